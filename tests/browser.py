"""Looks at a page in headless Chromium, as a person would at several widths, in the light and in the dark."""

from html import escape
import json
import re
import shutil
import subprocess

import pytest

WRAPPER = """<!doctype html><meta charset=utf-8><body><pre id=found></pre><script>
const found = []
function note(frame) {{
  const page = frame.contentDocument, wide = page.documentElement.clientWidth, style = frame.contentWindow
    .getComputedStyle(page.body)
  const scrolls = '.scroll svg, .scroll table, .scroll img, pre'
  const out = [...page.body.querySelectorAll('*')].filter(e => !e.closest(scrolls)
    && e.getBoundingClientRect().right > wide + 1 && e.getBoundingClientRect().height)
  found.push({{width: frame.width, scheme: frame.style.colorScheme, room: page.documentElement.scrollWidth - wide,
    beyond: out.map(e => e.tagName + ' ' + e.className), paper: style.backgroundColor, ink: style.color,
    images: [...page.images].map(i => [i.alt, i.complete ? i.naturalWidth : 0])}})
  document.getElementById('found').textContent = JSON.stringify(found)
}}
</script>{frames}"""


def look(text, folder, *, widths=(375, 1280), schemes=("light", "dark")):
    """Each view of a page: what sticks out on the right, its images and their natural widths, paper and ink.

    The page must stand alone, without scripts. Skips the test where there is no Chromium.
    """
    browser = next(filter(shutil.which, ("chromium", "chromium-browser", "google-chrome")), None)
    if browser is None:
        pytest.skip("no browser: apt-get install chromium")
    frames = "".join(
        f"<iframe width={width} height=800 style='color-scheme: {scheme}' onload='note(this)' srcdoc='{escape(text)}'>"
        "</iframe>"
        for width in widths
        for scheme in schemes
    )
    file = folder / "wrapper.html"
    file.write_text(WRAPPER.format(frames=frames), encoding="utf-8")
    command = [browser, "--headless=new", "--no-sandbox", "--disable-gpu", f"--user-data-dir={folder / 'browser'}",
               "--virtual-time-budget=20000", "--dump-dom", file.as_uri()]  # fmt: skip
    dom = subprocess.run(command, capture_output=True, text=True, timeout=120).stdout
    (found,) = re.findall(r'<pre id="found">(.*?)</pre>', dom, flags=re.DOTALL)
    views = json.loads(found.replace("&amp;", "&").replace("&lt;", "<").replace("&gt;", ">"))
    assert len(views) == len(widths) * len(schemes)
    return views


def complaints(views):
    """What is wrong with the views, in words; empty for a good page."""
    said = []
    for view in views:
        where = f"{view['width']} px, {view['scheme']}"
        said += [f"{where}: {one} sticks out" for one in view["beyond"]]
        said += [f"{where}: wider than the screen by {view['room']} px"] * (view["room"] > 0)
        said += [f"{where}: image {alt!r} has not loaded" for alt, width in view["images"] if not width]
        paper, ink = (_lightness(view[name]) for name in ("paper", "ink"))
        if abs(paper - ink) < 0.5 or (paper > ink) != (view["scheme"] == "light"):
            said.append(f"{where}: ink {view['ink']} on paper {view['paper']}")
    return said


def _lightness(colour):
    red, green, blue = (int(part) / 255 for part in re.findall(r"\d+", colour)[:3])
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue
