"""The report of a fit: one HTML page that holds everything, and its pictures as files.

`write_report` draws what the pictures need from the program (`pictures.gather`), asks each function in
`pictures.PICTURES` for its picture, runs the analyses that apply (`analyses.examine`), reads what calibration and
refinement have left in the folder (`trust.trust`), and sets tables and pictures into `report.html`: images inline, no
scripts, nothing loaded from elsewhere. A new picture is a new function in a list. Whatever is not there is left out.
"""

import io
import json
from pathlib import Path
from typing import Any

import jax
from jaxtyping import Array, Key
import xarray as xr

from sami_ppl._util.files import written_aside
from sami_ppl._util.history import read_history
from sami_ppl._util.progress import phase
from sami_ppl._util.versions import versions
from sami_ppl.nn.diffusers.autoencoder import AutoencoderKL
from sami_ppl.program.program import Program
from sami_ppl.runs.report import analyses, page, tables
from sami_ppl.runs.report.pictures import PICTURES, Distance, Material, Picture, gather
from sami_ppl.runs.report.trust import trust


def write_report(
    out: Path,
    program: Program,
    data: xr.Dataset,
    tree: xr.DataTree,
    metrics: dict[str, Any],
    *,
    key: Key[Array, ""],
    distance: Distance | None = None,
    autoencoder: AutoencoderKL | None = None,
) -> Path:
    """Write `out/report.html` and `out/figures/*.png`; returns the path of the page.

    `data`: observations x with known factors; where they have a split, the test part is shown. `tree`: the posterior as
    `sami_ppl.posterior` gives it. `metrics`: scores, all optional. `distance`: distance of each image from the set of
    true ones, where that is known; it is then written above the samples. `autoencoder`: of which the observations are
    latents; pictures are in pixels then, by its decoder. `out/log.jsonl`, `out/config.json`, `out/evidence.nc`,
    `out/calibration` and `out/refinement` are read if there. Raises ValueError for data without observations of the
    program's shape, and for an autoencoder of other latents.
    """
    out = Path(out)
    if "x" not in data or data["x"].shape[1:] != program.event_shape or not data["x"].shape[0]:
        found = dict(data["x"].sizes) if "x" in data else "no variable x"
        raise ValueError(
            f"data must hold observations x of shape (obs, {', '.join(map(str, program.event_shape))}), got {found}: "
            "give the data set that the program was fitted to"
        )
    config = json.loads((out / "config.json").read_text()) if (out / "config.json").exists() else None
    log = read_history(out / "log.jsonl") if (out / "log.jsonl").exists() else []
    with phase("report: codes and samples for its pictures"):
        material = gather(program, data, metrics, log, key=key, distance=distance, autoencoder=autoencoder)
    (out / "figures").mkdir(parents=True, exist_ok=True)
    found = analyses.examine(program, material, key=jax.random.fold_in(key, 1), evidence=out / "evidence.nc")
    with phase("report: drawing"):
        return _page(out, program, data, tree, metrics, config, log, material, found, autoencoder)


def _page(
    out: Path, program: Program, data: xr.Dataset, tree: xr.DataTree, metrics: dict[str, Any],
    config: dict[str, Any] | None, log: list[dict[str, Any]], material: Material, found: analyses.Findings,
    autoencoder: AutoencoderKL | None,
) -> Path:  # fmt: skip
    drawn = {part: [picture for make in makers if (picture := make(material))] for part, makers in PICTURES.items()}
    drawn["code"][1:1] = analyses.pictures(found)
    cards = {part: [_save(picture, out / "figures") for picture in pictures] for part, pictures in drawn.items()}
    held = analyses.axes_table(found)
    trust_tables, trust_figures = trust(out, metrics, tree)
    name, sentence = tables.identity(program, config, out)
    load = (
        "import sami_ppl, xarray\n"
        f"program = sami_ppl.load({(out / 'model').as_posix()!r})\n"
        f"tree = xarray.open_datatree({(out / 'posterior.nc').as_posix()!r})"
    )
    text = page.document(
        f"{name} · sami_ppl",
        page.header(name, sentence),
        page.section("What was fitted", tables=tables.fitted(program, data, tree)),
        tables.verdict(metrics),
        page.section("Measures", tables=tables.measures(metrics, latent=material.latent)),
        page.section("Samples", tables=[tables.pixels(metrics, autoencoder)], figures=cards["samples"]),
        page.section("What the code holds", tables=[tables.left_out(program), held], figures=cards["code"]),
        page.section("May it be believed?", tables=trust_tables, figures=trust_figures),
        page.section("How it went", tables=[tables.seconds(metrics, log)], figures=cards["course"]),
        page.section("Use it", rest=page.code(load)),
        page.details("Configuration", config),
        page.details("All measures", metrics),
        page.footer(" · ".join(f"{package} {version}" for package, version in versions().items())),
    )
    with written_aside(out / "report.html") as part:
        part.write_text(text, encoding="utf-8")
    return out / "report.html"


def _save(picture: Picture, folder: Path) -> str:
    """Write the picture's file and return its place on the page."""
    buffer = io.BytesIO()
    picture.figure.savefig(buffer, format="png", dpi=200)
    (folder / f"{picture.name}.png").write_bytes(buffer.getvalue())
    return page.figure(picture.title, picture.sentence, buffer.getvalue(), picture.figure.get_figwidth())
