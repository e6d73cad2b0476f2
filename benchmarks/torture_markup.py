"""No code in data: pickles in files, paths that lead out of archives, labels that are HTML on a page.

A pickle that is read would make a file; a label that is not escaped would be an element of the report.
"""

from collections.abc import Callable
from functools import partial
from html.parser import HTMLParser
import json
import os
from pathlib import Path
import pickle
from typing import Any
import zipfile

import jax
import numpy as np
import xarray as xr

from benchmarks.torture_kills import command
from benchmarks.torture_trials import Refused, Sandbox, Tally, Wrong, contents
import sami_ppl as sp
from sami_ppl.data import check_data, load_data
from sami_ppl.fitting.checkpoint import Checkpoints
from sami_ppl.saving.files import find

SCRIPT = "<script>alert('sami')</script>"
LABELS = (
    SCRIPT,
    '"><img src=x onerror=alert(1)>',
    "javascript:alert(1)",
    "a</pre></table><b>",
    "$x_{$",
    "&lt;i&gt;",
    "\u202eb",
)
"""Of a site, its axes, variables, classes; the fifth is no formula that Matplotlib can set."""

NAMES = ("<script>alert('sami')", '"><img src=x onerror=alert(1)>', "<b>$x_{$")
"""The same, without the slash that no name may have."""


class Evil:
    """Makes a file where it is unpickled."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.mark),)


def stores(folder: Path, mark: Path) -> dict[str, Callable[[], Any]]:
    """Files with a pickle in them, and what reads them."""
    evil, found, x = pickle.dumps(Evil(mark)), {}, np.random.default_rng(0).normal(size=(6, 4)).astype("<f4") / 4
    objects = np.array([Evil(mark)] * 6, dtype=object)
    folder.mkdir()

    def archive(name: str, members: dict[str, bytes]) -> Path:
        with zipfile.ZipFile(folder / name, "w") as opened:
            for member, content in members.items():
                opened.writestr(member, content)
        return folder / name

    np.savez(folder / "objects.npz", x=x, name=objects)
    np.savez(folder / "plain.npz", x=x)
    plain = zipfile.ZipFile(folder / "plain.npz").read("x.npy")
    np.save(folder / "objects.npy", objects)
    for path in (
        folder / "objects.npz",
        archive("raw.npz", {"x.npy": evil}),
        archive("beside.npz", {"x.npy": plain, "name.npy": evil}),
        archive("out.npz", {"x.npy": plain, "../../out.npy": plain, "/tmp/sami-out.npy": plain}),
        (folder / "objects.npy").rename(folder / "renamed.npz"),
    ):
        found[path.name] = partial(_load, path)
    (folder / "pickle.npz").write_bytes(evil)
    (folder / "pickle.nc").write_bytes(evil)
    found |= {name: partial(_load, folder / name) for name in ("pickle.npz", "pickle.nc")}
    numbers = {"dtype": "<f4", "fill_value": 0, "filters": None, "compressor": None}
    codec = {"id": "pickle", "protocol": 5}
    for name, changes in {
        "filter.zarr": {"dtype": "|O", "fill_value": None, "filters": [codec]},
        "compressor.zarr": {"compressor": codec},
        "both.zarr": {"dtype": "|O", "fill_value": "", "filters": [{"id": "vlen-utf8"}], "compressor": codec},
    }.items():
        (store := folder / name).mkdir()
        (store / ".zgroup").write_text('{"zarr_format": 2}')
        for variable, meta, dims, content in (
            ("x", numbers, ("obs", "feature"), x.tobytes()),
            ("name", numbers | changes, ("obs",), evil),
        ):
            (store / variable).mkdir()
            shape = [6, 4][: len(dims)]
            meta = {"zarr_format": 2, "shape": shape, "chunks": shape, "order": "C", **meta}
            (store / variable / ".zarray").write_text(json.dumps(meta))
            (store / variable / ".zattrs").write_text(json.dumps({"_ARRAY_DIMENSIONS": dims}))
            (store / variable / ".".join("0" * len(dims))).write_bytes(content)
        found[name] = partial(_load, store)
    program = folder / "program"
    program.mkdir()
    np.savez(program / "arrays.npz", x=objects)
    (program / "program.json").write_bytes(evil)
    found["program.json"] = partial(sp.load, program)
    kept = Checkpoints(folder / "checkpoint", {"seed": 0})
    state = {"weights": jax.numpy.arange(6.0)}
    kept.save(1, state, 0.0)
    kept.close()
    for file in sorted((folder / "checkpoint").rglob("*")):
        if file.is_file():
            found[f"checkpoint, {file.relative_to(folder / 'checkpoint')}"] = partial(
                _checkpoint, folder, file.relative_to(folder / "checkpoint"), state, evil
            )
    return found


def _load(path: Path) -> None:
    check_data(load_data(path))


def _checkpoint(folder: Path, file: Path, state: Any, evil: bytes) -> None:
    target = folder / "checkpoint" / file
    before = target.read_bytes()
    target.write_bytes(evil)
    try:
        opened = Checkpoints(folder / "checkpoint", {"seed": 0}, resume=True)
        if (found := opened.restore(state)) is not None and not np.array_equal(found["weights"], state["weights"]):
            raise Wrong("another state")
    finally:
        target.write_bytes(before)


def pickles(seed: int, folder: Path) -> Tally:
    """Files with code in them: refused, or read without it."""
    tally, mark = Tally("code in files"), folder / "mark"
    (folder / "stores").mkdir()
    made = stores(folder / "stores" / "deep", mark)
    before = set(contents(folder))

    def trial(call: Callable[[], Any]) -> None:
        try:
            call()
        finally:
            if mark.exists():
                mark.rmdir()
                raise Wrong("it was run")
            if left := set(contents(folder)) - before:
                raise Wrong(f"written: {left}")

    for name, call in made.items():
        tally.take({"file": name}, partial(trial, call), ("npz", "nc", "zarr", "program", "checkpoint", "variable"))
    return tally


class Page(HTMLParser):
    """The elements of a page, their attributes, and its text."""

    def __init__(self, text: str):
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs

    def handle_data(self, data: str) -> None:
        self.text += data


def unsafe(page: str) -> str | None:
    """What of a page came from a label and is not text, or None."""
    found = Page(page)
    if bad := {"script", "iframe", "object", "embed", "link", "b"} & set(found.tags):
        return f"elements {bad}"
    for name, value in found.attributes:
        loaded = name in ("src", "href") and value is not None and not value.startswith(("data:image/png;base64,", "#"))
        if name.startswith("on") or loaded:
            return f"attribute {name}={value!r}"
    return None


PROGRAM = """
LABELS, NAMES = {labels!r}, {names!r}


def _labelled():
    infer = {{"event_dims": [NAMES[2]], "coords": {{NAMES[2]: list(LABELS)}}}}
    numpyro.sample(NAMES[0], dist.Normal(0, 1).expand([len(LABELS)]).to_event(1), infer=infer)


def build(config, data, *, key):
    return sp.autoencoder(_labelled, data, network="mlp", size={{"width": 8, "depth": 1}}, progress=False, key=key)
"""


def pages(seed: int, folder: Path) -> Tally:
    """A run whose every label is code: its report, and what notebooks show of its program and log."""
    tally, box, draws = Tally("code in labels"), Sandbox.make(folder), np.random.default_rng(seed)
    x = (draws.normal(size=(60, 2)) @ draws.normal(size=(2, 4)) / 2 + draws.normal(size=(60, 4)) / 9).astype(np.float32)
    code = find("linear_gaussian", "models").read_text()
    file, out = folder / "odd&<b>.py", folder / "out&<b>"
    file.write_text(
        code.replace('"""', f'"""{SCRIPT}: ', 1) + "\nimport numpyro\n" + PROGRAM.format(labels=LABELS, names=NAMES)
    )
    xr.Dataset(
        {
            "x": (("obs", "feature"), x, {"units": SCRIPT}),
            NAMES[0]: ("obs", x[:, 0].astype(float), {"units": SCRIPT}),
            NAMES[2]: ("obs", x[:, 1].astype(float), {"long_name": SCRIPT}),
            "class": ("obs", np.array([LABELS[i % 2] for i in range(60)])),
            NAMES[1]: ("obs", np.arange(60) % 3),
        },
        {"feature": list(LABELS[:4])},
        {SCRIPT: SCRIPT},
    ).to_netcdf(folder / "odd.nc", engine="h5netcdf")
    words = command(folder / "odd.nc", out)
    words[1] = str(file)
    words = [word for i, word in enumerate(words) if not {"features=4", "width=8", "depth=1"} & set(words[i : i + 2])]

    def run() -> None:
        process = box.start(*words)
        printed = "".join(process.communicate(timeout=1200))
        if process.returncode == 2 and "Traceback" not in printed:
            raise Refused(printed)
        if process.returncode:
            raise Wrong(printed[-1500:])
        page = (out / "report.html").read_text()
        if (bad := unsafe(page)) is not None or NAMES[0] not in Page(page).text:
            raise Wrong(bad or "the labels are not on the page")

    def notebook() -> None:
        program = sp.load(out / "model")
        for shown in (program, program.latents):
            if (bad := unsafe(shown._repr_html_())) is not None:
                raise Wrong(f"{type(shown).__name__}: {bad}")

    tally.take("a run and its report", run, (), limit=1200)
    if (out / "report.html").exists():
        tally.take("a program in a notebook", notebook, ())
    if (why := box.untouched()) is not None:
        tally.fail("home and working directory", why)
    return tally
