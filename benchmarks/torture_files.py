"""Damaged files: what users may hand over is flipped, cut, doubled and deleted, byte by byte, and then read.

The right result of a damaged file is what was written, where the damage did not matter or cannot be seen, as in an
archive without checksums; all else must be refused with the name of the file.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
import resource
import shutil
from typing import Any

import jax
import numpy as np
from PIL import Image
import xarray as xr

from benchmarks.torture_trials import Tally, Wrong
import sami_ppl as sp
from sami_ppl.data import check_data, load_data
from sami_ppl.fitting.checkpoint import Checkpoints
from sami_ppl.saving.files import build_program, find, load_file

MOST_MEMORY = 24 << 30
"""Address space of a trial: a file whose header asks for more must be refused, and not read."""
IMAGES = {
    ".png": {}, ".jpg": {"quality": 90}, ".bmp": {}, ".gif": {}, ".tif": {"compression": "tiff_lzw"}, ".tiff": {},
    ".webp": {}, ".ppm": {},
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """A file or folder, and what reads it; `names`: words of which an error must have one."""

    kind: str
    source: Path
    read: Callable[[Path], Any]
    names: tuple[str, ...]
    share: float = 1.0


def damage(rng: np.random.Generator, content: bytes) -> bytes:
    """Bytes with one to three faults."""
    found = bytearray(content)
    for _ in range(int(rng.integers(1, 4))):
        size = max(len(found), 1)
        # Headers are short, and most of what can go wrong is in them.
        at, length = int(rng.integers(min(size, 256) if rng.random() < 0.5 else size)), int(rng.integers(1, 64))
        match int(rng.integers(7)):
            case 0 if found:
                found[at] = int(rng.integers(256))
            case 1 if found:
                found[at] ^= 1 << int(rng.integers(8))
            case 2:
                del found[at:]
            case 3:
                del found[at : at + length]
            case 4:
                found[at:at] = found[at : at + length]
            case 5:
                found[at : at + length] = bytes(length)
            case _:
                found[at:at] = rng.bytes(length)
    return bytes(found)


def damage_path(rng: np.random.Generator, path: Path) -> str:
    """One fault in a file, or in a file of a folder; says which."""
    files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
    file = files[int(rng.integers(len(files)))]
    how = rng.choice(["bytes", "bytes", "bytes", "empty", "deleted", "folder", "other"])
    if how == "bytes":
        file.write_bytes(damage(rng, file.read_bytes()))
    elif how == "empty":
        file.write_bytes(b"")
    elif how == "deleted":
        file.unlink()
    elif how == "folder":
        file.unlink()
        file.mkdir()
    else:
        shutil.copyfile(files[int(rng.integers(len(files)))], part := file.with_name("other-part"))
        part.replace(file)
    return f"{file.name}: {how}"


def damaged_files(count: int, seed: int, folder: Path) -> list[Tally]:
    """So many damaged files of all kinds."""
    tallies, made = [], cases(folder / "sources")
    whole = sum(case.share for case in made)
    with _less_memory():
        for number, case in enumerate(made):
            tally = Tally(f"damaged: {case.kind}")
            case.read(case.source)  # undamaged
            for trial in range(max(2, round(count * case.share / whole))):
                rng = np.random.default_rng([seed, number, trial])
                place = folder / "damaged" / case.source.name
                shutil.rmtree(place.parent, ignore_errors=True)
                place.parent.mkdir()
                (shutil.copytree if case.source.is_dir() else shutil.copyfile)(case.source, place)
                how = damage_path(rng, place)
                # HDF5 is code in C, which damage can keep busy for ever.
                take = tally.take_apart if case.kind.endswith(".nc") else tally.take
                take({"seed": [seed, number, trial], "how": how}, partial(case.read, place), case.names)
            tallies.append(tally)
    return tallies


@contextmanager
def _less_memory() -> Iterator[None]:
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (MOST_MEMORY, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def cases(folder: Path) -> list[Case]:
    """Undamaged files of every kind that is read, and what reads them."""
    folder.mkdir(parents=True)
    draws = np.random.default_rng(0)
    x = np.tanh(draws.normal(size=(12, 4))).astype(np.float32)
    data = xr.Dataset(
        {"x": (("obs", "feature"), x), "size": ("obs", x[:, 0].astype(float)), "name": ("obs", list("abcdefghijkl"))},
        {"feature": list("wxyz")}, {"note": "a, b"},
    )  # fmt: skip
    np.savez(folder / "plain.npz", x=x, size=x[:, 0])
    np.savez_compressed(folder / "packed.npz", x=x, size=x[:, 0])
    data.to_netcdf(folder / "new.nc", engine="h5netcdf")
    data.to_netcdf(folder / "packed.nc", engine="h5netcdf", encoding={"x": {"zlib": True, "fletcher32": True}})
    data[["x", "size"]].to_netcdf(folder / "old.nc", engine="scipy")
    data.to_zarr(folder / "store.zarr", consolidated=False)
    read = partial(_data, x)
    found = [
        Case(name, folder / name, read, (name.partition(".")[0], "x ", "variable"))
        for name in ("plain.npz", "packed.npz", "new.nc", "packed.nc", "old.nc", "store.zarr")
    ]
    for suffix, options in IMAGES.items():
        (images := folder / f"images{suffix}").mkdir()
        for i in range(2):
            picture = Image.fromarray(draws.integers(0, 255, (12, 12, 3), dtype=np.uint8))
            picture.save(images / f"picture{i}{suffix}", **options)
        found.append(Case(f"images, {suffix}", images, _images, ("picture", "folder", "x has"), 0.3))
    found += [_program_case(folder), _checkpoint_case(folder), _code_case(folder)]
    return found


def _data(x: np.ndarray, path: Path) -> None:
    found = check_data(load_data(path))
    if not np.isfinite(found.x.values).all() or found.x.dims[0] != "obs" or found.x.dtype != np.float32:
        raise Wrong(f"x of {found.x.dtype} on {found.x.dims}")
    if path.suffix == ".npz" and not np.array_equal(found.x.values, x):
        raise Wrong("an archive with checksums gives other numbers")


def _images(path: Path) -> None:
    found = check_data(load_data(path))
    if abs(found.x.values).max() > 1 or found.x.dims != ("obs", "channel", "row", "column"):
        raise Wrong(f"x from {found.x.values.min()} to {found.x.values.max()} on {found.x.dims}")


def _program_case(folder: Path) -> Case:
    file, key = find("linear_gaussian", "models"), jax.random.key(0)
    module = load_file(file)
    config = module.Config(observations=20, features=4, width=4, depth=1)
    program = build_program(file, config, module.load(config, key=key), key=key)
    sp.save(program, folder / "program")
    wanted = [np.asarray(leaf) for leaf in jax.tree.leaves(program.params())]

    def read(path: Path) -> None:
        found = [np.asarray(leaf) for leaf in jax.tree.leaves(sp.load(path).params())]
        if len(found) != len(wanted) or not all(map(np.array_equal, found, wanted)):
            raise Wrong("another program was loaded")

    return Case("saved program", folder / "program", read, ("program", "arrays"), 0.1)


def _checkpoint_case(folder: Path) -> Case:
    state = {"weights": jax.numpy.arange(6.0).reshape(2, 3), "step": jax.numpy.asarray(3)}
    kept = Checkpoints(folder / "checkpoint", {"seed": 0})
    kept.save(3, state, 1.0)
    kept.save(4, state, 2.0)
    kept.close()

    def read(path: Path) -> None:
        opened = Checkpoints(path, {"seed": 0}, resume=True)
        try:
            found = opened.restore(state)
        finally:
            opened.close()
        if found is not None and not all(map(np.array_equal, jax.tree.leaves(found), jax.tree.leaves(state))):
            raise Wrong("another state was restored")

    return Case("checkpoint", folder / "checkpoint", read, ("checkpoint",), 0.1)


def _code_case(folder: Path) -> Case:
    source = folder / "code.py"
    source.write_bytes(find("linear_gaussian", "models").read_bytes())

    def read(path: Path) -> None:
        if not hasattr(load_file(path), "Config"):
            raise Wrong("no Config")

    return Case("program file", source, read, ("code.py",), 0.3)


def repeat(seed: list[int], folder: Path) -> tuple[Case, Path]:
    """The damaged file of a failure, and what reads it."""
    case = cases(folder / "sources")[seed[1]]
    place = folder / "damaged" / case.source.name
    place.parent.mkdir()
    (shutil.copytree if case.source.is_dir() else shutil.copyfile)(case.source, place)
    damage_path(np.random.default_rng(seed), place)
    return case, place
