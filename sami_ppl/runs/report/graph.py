"""The graph of a program, as an SVG on the page: sites, plates and networks by what NumPyro says depends on what."""

from collections.abc import Callable, Sequence
from html import escape
import math
from typing import Any, NamedTuple
import warnings

import numpyro
from numpyro import handlers
from numpyro.infer.inspect import get_model_relations

from sami_ppl.priors.read import Given
from sami_ppl.priors.sites import Direction
from sami_ppl.program.program import Program

ROW, GAP, PAD, LETTER = 78, 18, 16, 7.4


class Node(NamedTuple):
    """A site or a parameter: its name, what it is, its row, whether it is in the plate, and what it depends on."""

    name: str
    kind: str
    row: int
    in_plate: bool
    parents: tuple[str, ...]

    @property
    def is_site(self) -> bool:
        """Sites are ellipses, parameters boxes."""
        return self.kind != "parameter"

    @property
    def half(self) -> tuple[float, float]:
        """Half width and half height in pixels."""
        letters = max(len(self.name), 0.82 * len(self.kind) if self.is_site else 0)
        return max(30.0, 0.5 * LETTER * letters + 14), 25.0 if self.is_site else 13.0


def read_graph(program: Program) -> list[Node]:
    """Nodes from the top to the bottom: those that depend on nothing close to the first that depends on them."""
    given = program.given.rows(slice(1))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="init_to_median.. skipping")  # on a sphere that is what is wanted
        found = get_model_relations(_started(program, given), model_kwargs={"size": 1, "given": given})
    parents = {
        site: tuple(p.removesuffix("$params") for p in (*found["sample_param"][site], *above))
        for site, above in found["sample_sample"].items()
    }
    parents |= {name: () for above in list(parents.values()) for name in above if name not in parents}
    rows: dict[str, int] = {}

    def row(name: str) -> int:
        if name not in rows:
            rows[name] = max((row(parent) + 1 for parent in parents[name]), default=0)
        return rows[name]

    for name in parents:
        row(name)
    kinds = found["sample_dist"]
    for name, above in parents.items():
        if not above:
            first = min((n for n, p in parents.items() if name in p), key=rows.__getitem__, default=name)
            # One network above the observation, one beside it: a narrow column, for narrow screens.
            beside = first == "x" and name not in kinds and [p for p in parents["x"] if p not in kinds].index(name) % 2
            rows[name] = max(0, rows[first] - (not beside))
    inside = {site for sites in found["plate_sample"].values() for site in sites}
    nodes = [Node(n, kinds.get(n, "parameter"), rows[n], n in inside, above) for n, above in parents.items()]
    return sorted(nodes, key=lambda node: node.row)


def _started(program: Program, given: Given) -> Callable[..., Any]:
    """The model with a value for every site on a sphere: NumPyro looks for one by a bijection, and there is none."""
    names = [site.name for site in program.latents.sites if isinstance(site, Direction) and site.manifold == "sphere"]
    if not names:
        return program.model
    drawn = handlers.trace(handlers.seed(program.sample_prior, 0)).get_trace(numpyro.plate("obs", 1), 1, given)
    return handlers.substitute(program.model, data={name: drawn[name]["value"] for name in names})


def draw_graph(program: Program, nodes: Sequence[Node]) -> str:
    """The graph as an SVG that takes its colours from the page; it scrolls by itself where it is too wide."""
    columns = [[n for n in nodes if n.in_plate == inside] for inside in (False, True)]
    widths = [max((_width(_row(column, r)) for r in range(_rows(nodes))), default=0.0) for column in columns]
    starts = [PAD, PAD + (widths[0] + 2 * GAP if columns[0] else 0.0) + PAD]
    places: dict[str, tuple[float, float]] = {}
    for column, width, start in zip(columns, widths, starts, strict=True):
        for r in range(_rows(nodes)):
            row = _row(column, r)
            left = start + (width - _width(row)) / 2
            for node in row:
                places[node.name] = (left + node.half[0], PAD + 30 + r * ROW)
                left += 2 * node.half[0] + GAP
    by_name = {node.name: node for node in nodes}
    arrows = [_arrow(by_name[p], places[p], node, places[node.name]) for node in nodes for p in node.parents]
    drawn = [_plate(columns[1], places, starts[1], widths[1]), *arrows, *(_node(n, *places[n.name]) for n in nodes)]
    width, height = starts[1] + widths[1] + 2 * PAD, 2 * PAD + 44 + (_rows(nodes) - 1) * ROW + 34
    return (
        f"<figure class=graph><div class=scroll tabindex=0><svg width='{width:.0f}' height='{height:.0f}' "
        f"viewBox='0 0 {width:.0f} {height:.0f}' role=img aria-label='The program as a graph'>"
        "<defs><marker id=tip viewBox='0 0 8 8' refX=7 refY=4 markerWidth=7 markerHeight=7 orient=auto>"
        f"<path d='M0,0 L8,4 L0,8 z'/></marker></defs>{''.join(drawn)}</svg></div>"
        f"<figcaption><p>{escape(_caption(program))}</p></figcaption></figure>"
    )


def _caption(program: Program) -> str:
    own = ", ".join(site.name for site in program.latents.sites)
    words = f"The program as NumPyro has it. Guide: q({own} | x) is the encoder at the clean end."
    if program.latents.global_sites:
        words += f" Shared by all observations: {', '.join(site.name for site in program.latents.global_sites)}."
    if program.latents.arguments:
        words += f" The prior is given {', '.join(program.latents.arguments)} of each observation."
    return words


def _rows(nodes: Sequence[Node]) -> int:
    return 1 + max(node.row for node in nodes)


def _row(nodes: Sequence[Node], row: int) -> list[Node]:
    return [node for node in nodes if node.row == row]


def _width(row: Sequence[Node]) -> float:
    return sum(2 * node.half[0] for node in row) + GAP * max(0, len(row) - 1)


def _node(node: Node, x: float, y: float) -> str:
    (across, down), name = node.half, escape(node.name)
    if not node.is_site:
        box = f"<rect x='{x - across:.1f}' y='{y - down:.1f}' width='{2 * across:.1f}' height='{2 * down:.1f}' rx=4 />"
        return f"<g>{box}<text x='{x:.1f}' y='{y + 4.5:.1f}'>{name}</text></g>"
    shape = f"<ellipse cx='{x:.1f}' cy='{y:.1f}' rx='{across:.1f}' ry='{down:.1f}'/>"
    words = f"<text x='{x:.1f}' y='{y - 1:.1f}'>{name}</text><text class=kind x='{x:.1f}' y='{y + 13:.1f}'>"
    observed = " class=observed" if node.name == "x" else ""
    return f"<g{observed}>{shape}{words}{escape(node.kind)}</text></g>"


def _plate(members: Sequence[Node], places: dict[str, Any], left: float, width: float) -> str:
    top, bottom = (f(places[node.name][1] for node in members) for f in (min, max))
    box = (
        f"<rect class=plate x='{left - PAD:.1f}' y='{top - 34:.1f}' width='{width + 2 * PAD:.1f}' "
        f"height='{bottom - top + 84:.1f}' rx=8 />"
    )
    return f"{box}<text class=label x='{left + width + PAD - 8:.1f}' y='{bottom + 43:.1f}'>obs</text>"


def _arrow(above: Node, start: tuple[float, float], below: Node, end: tuple[float, float]) -> str:
    dx, dy = end[0] - start[0], end[1] - start[1]
    (x1, y1), (x2, y2) = (_edge(above, start, dx, dy), _edge(below, end, -dx, -dy))
    return f"<path class=arrow d='M{x1:.1f},{y1:.1f} L{x2:.1f},{y2:.1f}' marker-end='url(#tip)'/>"


def _edge(node: Node, at: tuple[float, float], dx: float, dy: float) -> tuple[float, float]:
    """Where a line from the centre of a node leaves it."""
    across, down = node.half
    if node.is_site:
        share = 1 / math.hypot(dx / across, dy / down)
    else:
        share = min(across / abs(dx) if dx else math.inf, down / abs(dy) if dy else math.inf)
    return at[0] + share * dx, at[1] + share * dy
