"""The pieces of a page: tables, figures, folded text, the style sheet. All text is escaped."""

import base64
from collections.abc import Iterable, Mapping, Sequence
from html import escape
import json
import math
from pathlib import Path
from typing import Any

import jax
import numpy as np
from PIL import Image


def text(value: Any) -> str:
    """A cell: three significant digits, mean ± standard error, a dash for what is missing."""
    if isinstance(value, Mapping) and "mean" in value:
        return f"{text(value['mean'])} ± {text(value.get('se'))}"
    if value is None or (isinstance(value, float | np.floating) and not math.isfinite(value)):
        return "–"
    if isinstance(value, float | np.floating | jax.Array):
        number = float(value)
        return (f"{number:,.1f}" if abs(number) >= 100 else f"{number:.3g}").replace("-", "−")
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def table(head: Sequence[str], rows: Iterable[Sequence[Any]], caption: str, *, shade: int | None = None) -> str:
    """A table in a box that scrolls by itself. From column `shade` on, numbers are shaded by their size, up to 1."""
    rows = [tuple(row) for row in rows]
    numbers = [any(isinstance(cell, int | float | np.number) for cell in column) for column in zip(*rows, strict=True)]
    names = zip(head, numbers, strict=True) if head else ()
    lines = ["".join(f"<th scope=col{' class=n' * number}>{escape(str(name))}</th>" for name, number in names)]
    for first, *cells in rows:
        line = f"<th scope=row>{escape(str(first))}</th>"
        for j, cell in enumerate(cells, 1):
            number = isinstance(cell, int | float | np.number)
            shaded = shade is not None and j >= shade and number and math.isfinite(cell)
            tint = f" style='--tint:{60 * min(1.0, abs(cell)):.0f}%'" if shaded else ""
            line += (
                f"<td{' class=n' if numbers[j] or isinstance(cell, Mapping) else ''}{tint}>{escape(text(cell))}</td>"
            )
        lines.append(line)
    body = "".join(f"<tr>{line}</tr>" for line in lines if line)
    return f"<div class=scroll tabindex=0><table><caption>{escape(caption)}</caption>{body}</table></div>"


def figure(title: str, sentence: str, png: bytes, inches: float) -> str:
    """A picture of a natural width with heading and sentence; one too wide for the screen scrolls by itself."""
    words = f"<figcaption><h3>{escape(title)}</h3><p>{escape(sentence)}</p></figcaption>"
    return f"<figure>{words}{image(title, png, inches)}</figure>"


def figure_file(title: str, sentence: str, file: Path, *, dpi: int) -> str:
    """`figure` of a picture that lies in a file, drawn with so many dots per inch."""
    with Image.open(file) as picture:
        return figure(title, sentence, file.read_bytes(), picture.width / dpi)


def image(title: str, png: bytes, inches: float) -> str:
    """A picture alone, on paper of its own; `title` is its text for those who do not see it."""
    source = f"data:image/png;base64,{base64.b64encode(png).decode()}"
    style = f"--inches:{inches:.2f}"
    return f"<div class='scroll paper' tabindex=0><img src='{source}' alt='{escape(title)}' style='{style}'></div>"


def header(title: str, sentence: str) -> str:
    """The head of the page."""
    return f"<header><h1>{escape(title)}</h1><p>{escape(sentence)}</p></header>"


def footer(content: str) -> str:
    """The foot of the page."""
    return f"<footer>{escape(content)}</footer>"


def code(content: str) -> str:
    """Text to copy."""
    return f"<pre class=scroll tabindex=0>{escape(content)}</pre>"


def note(content: str, command: str) -> str:
    """A sentence with a command to copy below it."""
    return f"<div class=note><p>{escape(content)}</p>{code(command)}</div>"


def verdict(title: str, sentence: str, items: Iterable[str] = (), *, good: bool | None = None) -> str:
    """A box with a verdict: good, bad or neither."""
    kind = {True: " good", False: " bad", None: ""}[good]
    lines = "".join(f"<li>{escape(item)}</li>" for item in items)
    body = f"<p><strong>{escape(title)}</strong> {escape(sentence)}</p>" + (f"<ul>{lines}</ul>" if lines else "")
    return f"<section class='verdict{kind}'>{body}</section>"


def details(title: str, value: Any) -> str:
    """A value as JSON, folded; nothing for an empty one."""
    if not value:
        return ""
    content = json.dumps(value, indent=1, default=str, ensure_ascii=False)
    return f"<details><summary>{escape(title)}</summary>{code(content)}</details>"


def section(title: str, *, tables: Iterable[str] = (), figures: Iterable[str] = (), rest: str = "") -> str:
    """A heading, tables side by side, figures in a grid, and the rest; nothing where there is none of them."""
    boxes = (("tables", "\n".join(filter(None, tables))), ("figures", "\n".join(filter(None, figures))))
    inside = "".join(f"<div class={box}>{content}</div>" for box, content in boxes if content) + rest
    return f"<section><h2>{escape(title)}</h2>{inside}</section>" if inside else ""


def document(title: str, *parts: str) -> str:
    """The whole page."""
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark"><title>{escape(title)}</title>
<style>{STYLE}</style></head>
<body><main>
{"\n".join(filter(None, parts))}
</main></body></html>
"""


STYLE = """
:root { --ink: #1f2328; --soft: #5b636b; --page: #fbfbfa; --card: #ffffff; --line: #dcdfe3; --accent: #0072b2;
  --bad: #c04a00; --good: #00785a; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e4e6e8; --soft: #a2a9b1; --page: #16181b; --card: #1e2125; --line: #383d43; --accent: #56b4e9;
    --bad: #ff8f4d; --good: #3cc49c; }
  .paper { filter: brightness(.93); }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink); font: 16px/1.5 system-ui, sans-serif;
  overflow-wrap: anywhere; }
main { max-width: 74rem; margin: auto; padding: 1.5rem 1rem 3rem; }
h1 { font-size: 1.9rem; line-height: 1.2; margin: 0 0 .3rem; }
h2 { font-size: 1.25rem; margin: 2.4rem 0 .8rem; padding-top: .8rem; border-top: 1px solid var(--line); }
h3 { font-size: 1rem; margin: 0; }
p { margin: 0; max-width: 46rem; }
header p, figcaption p, footer { color: var(--soft); }
footer { margin-top: 2rem; font-size: .8rem; }
.scroll { overflow-x: auto; max-width: 100%; }
.tables { display: flex; flex-wrap: wrap; gap: 1.4rem 2.6rem; align-items: flex-start; }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; overflow-wrap: normal; }
caption { text-align: left; color: var(--soft); padding-bottom: .35rem; max-width: min(24rem, 90vw); }
th, td { padding: .28rem 1.1rem .28rem 0; text-align: left; font-weight: 400; border-top: 1px solid var(--line);
  vertical-align: top; }
th[scope=col] { color: var(--soft); font-size: .82rem; border-top: 0; vertical-align: bottom; }
th[scope=row] { font-weight: 500; }
td.n, th[scope=col].n { text-align: right; white-space: nowrap; padding: .28rem .6rem; }
td[style] { background: color-mix(in srgb, var(--accent) var(--tint), transparent); }
.verdict { margin-top: 1.6rem; padding: .8rem 1rem; background: var(--card); border: 1px solid var(--line);
  border-left: .35rem solid var(--soft); border-radius: .3rem; }
.verdict.bad { border-left-color: var(--bad); } .verdict.bad strong { color: var(--bad); }
.verdict.good { border-left-color: var(--good); } .verdict.good strong { color: var(--good); }
.verdict ul { margin: .2rem 0 0; padding-left: 1.2rem; }
.tables + .figures { margin-top: 1.6rem; }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 30rem), 1fr)); gap: 1.6rem;
  align-items: start; }
figure { margin: 0; padding: 1rem; background: var(--card); border: 1px solid var(--line); border-radius: .4rem; }
figcaption p { font-size: .9rem; margin: .2rem 0 .8rem; }
.paper { background: #fff; border-radius: .25rem; padding: .4rem; }
.paper img { display: block; width: 100%; max-width: calc(var(--inches) * 118px);
  min-width: calc(var(--inches) * 70px); height: auto; margin: auto; }
pre { margin: 0; padding: .8rem 1rem; background: var(--card); border: 1px solid var(--line); border-radius: .3rem;
  font: .85rem/1.5 ui-monospace, monospace; overflow-wrap: normal; }
.tables > * { max-width: 100%; min-width: 0; }
.graph { padding: 0; border: 0; background: none; } .graph p { color: var(--soft); max-width: 24rem; }
.graph svg { display: block; font: 13px system-ui, sans-serif; text-anchor: middle; }
.graph text { fill: var(--ink); } .graph .kind, .graph .label { fill: var(--soft); font-size: 11px; }
.graph .label { text-anchor: end; } .graph marker path { fill: var(--soft); }
.graph rect, .graph ellipse { fill: var(--card); stroke: var(--ink); } .graph .observed ellipse { fill: var(--line); }
.graph .plate { fill: none; stroke: var(--soft); } .graph .arrow { stroke: var(--soft); fill: none; }
.note { flex-basis: 100%; } .note pre { margin-top: .4rem; } .tables .verdict { flex-basis: 100%; margin: 0; }
details { margin-top: 1rem; } summary { cursor: pointer; } details pre { margin-top: .5rem; }
@media (max-width: 34rem) {
  main { padding: 1rem .8rem 2rem; } figure { padding: .8rem .6rem; } .paper { padding: 0; }
  figcaption { padding: 0 .2rem; } h2 { margin-top: 1.8rem; }
}
@page { margin: 1.5cm; }
@media print {
  body { background: #fff; font-size: 10pt; } main { padding: 0; max-width: none; }
  h2 { margin-top: 1.4rem; } .figures { display: block; } figure { margin-bottom: 1rem; padding: .6rem .8rem; }
  .paper img { width: auto; min-width: 0; max-width: min(100%, calc(var(--inches) * 84px)); max-height: 9.5cm; }
  figure, table, .verdict, pre { break-inside: avoid; } h2, caption { break-after: avoid; }
  .scroll { overflow: visible; } pre { white-space: pre-wrap; }
}
"""
