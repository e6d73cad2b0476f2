"""Saves and loads a program: a JSON description and an `.npz` of arrays. Nothing is pickled.

    folder/program.json    format, versions, configuration, latent sites, list of arrays, checksum
    folder/arrays.npz      every array of the program under its path, for instance `.encoder.loc.weight`
    folder/program.py      the program file that built it, where it came from one

A prior is code, so it is not stored: it comes from `program.py`, which `load` runs, or from a program of the same
structure that the caller gives.
"""

from functools import partial
import hashlib
import json
from pathlib import Path
import shutil
from typing import Any, cast

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from sami_ppl.encoder import RotatedEncoder
from sami_ppl.framewise import FramewiseDenoiser
from sami_ppl.over_time import frames_of
from sami_ppl.program import Program
from sami_ppl.programs import build_program
from sami_ppl.versions import versions

FORMAT = "sami_ppl program"
FORMAT_VERSION = 1


class LoadError(RuntimeError):
    """A saved program is missing, damaged, foreign, or does not fit."""


def save(program: Program, folder: str | Path) -> Path:
    """Write a program to a new folder, all of it or nothing; returns the folder.

    Where the program came from a file (`program.origin`), the file and its configuration are stored too, and `load`
    needs nothing else. An existing saved program in the folder is replaced; any other folder that is not empty raises
    FileExistsError.
    """
    folder = Path(folder)
    if folder.exists() and any(folder.iterdir()) and not (folder / "program.json").exists():
        raise FileExistsError(f"{folder} exists and holds something else than a saved program: give a new folder")
    part = folder.with_name(folder.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    arrays = _arrays(program)
    np.savez(part / "arrays.npz", allow_pickle=False, **arrays)
    if program.origin is not None:
        # The text that built it: the file may have been edited while the fit went on.
        (part / "program.py").write_text(program.origin.source)
    description = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "versions": versions(),
        "config": None if program.origin is None else json.loads(program.origin.config),
        "aligned": isinstance(program.encoder, RotatedEncoder),
        "event_shape": list(program.event_shape),
        "latents": {site.name: list(site.event_shape) for site in program.latents.sites},
        "arrays": {name: [list(a.shape), str(a.dtype)] for name, a in arrays.items()},
        "sha256": _checksum(part / "arrays.npz"),
    }
    (part / "program.json").write_text(json.dumps(description, indent=1))
    old = folder.with_name(folder.name + ".old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.rename(old)
    part.rename(folder)
    shutil.rmtree(old, ignore_errors=True)
    return folder


def load(folder: str | Path, program: Program | None = None) -> Program:
    """Read a saved program.

    Without `program`, the saved `program.py` is run to build the structure (trust it as you would any Python file);
    with a `program` of the same structure, only its arrays are replaced. Raises LoadError, saying what is wrong.
    """
    folder = Path(folder)
    description = _read_description(folder)
    archive = _checked_archive(folder)
    if program is None:
        if not (folder / "program.py").exists():
            raise LoadError(
                f"{folder} was saved from Python and holds no program file: build the same program and call "
                f"load({str(folder)!r}, program)"
            )
        build = partial(build_program, folder / "program.py", config=description["config"])
        try:
            program = cast(Program, eqx.filter_eval_shape(build, key=jax.random.key(0)))
        except jax.errors.JAXTypeError:  # a program that looks at its arrays while it is built
            program = build(key=jax.random.key(0))
    if description["aligned"] and not isinstance(program.encoder, RotatedEncoder):
        size = program.latents.size
        program = program.replace(
            encoder=RotatedEncoder(program.encoder, cast(Any, jax.ShapeDtypeStruct((size, size), jnp.float32)))
        )
    latents = {site.name: list(site.event_shape) for site in program.latents.sites}
    if latents != description["latents"]:
        raise LoadError(
            f"{folder} holds a program with the latent sites {description['latents']}, this one has {latents}"
        )
    with np.load(archive, allow_pickle=False) as saved:
        return _with_arrays(program, dict(saved), folder)


def load_denoiser(folder: str | Path, program: Program) -> Program:
    """The program with the denoiser of a saved one, whatever that one's prior and encoder. Raises LoadError.

    A program of sequences takes that of single frames.
    """
    folder = Path(folder)
    single = list(program.event_shape[1:]) == _read_description(folder).get("event_shape")
    if isinstance(program.denoiser, FramewiseDenoiser) and single:
        frame = load_denoiser(folder, frames_of(program)).denoiser
        return program.replace(denoiser=FramewiseDenoiser(frame, program.denoiser.frames))
    _read_description(folder)
    archive = _checked_archive(folder)
    with np.load(archive, allow_pickle=False) as saved:
        found = {name: array for name, array in saved.items() if name.startswith(".denoiser.")}
    own = {name: array for name, array in _arrays(program).items() if not name.startswith(".denoiser.")}
    return _with_arrays(program, found | own, folder)


def _checked_archive(folder: Path) -> Path:
    archive = folder / "arrays.npz"
    if not archive.exists() or _checksum(archive) != _read_description(folder)["sha256"]:
        raise LoadError(f"{archive} is missing, truncated or changed since it was saved: copy the folder again")
    return archive


def _paths(program: Program) -> tuple[list[tuple[str, Any]], Any]:
    dynamic, static = eqx.partition(
        program, lambda leaf: isinstance(leaf, jax.Array | np.ndarray | jax.ShapeDtypeStruct)
    )
    leaves, structure = jax.tree_util.tree_flatten_with_path(dynamic)
    return [(jax.tree_util.keystr(path), leaf) for path, leaf in leaves], (structure, static)


def _arrays(program: Program) -> dict[str, np.ndarray]:
    return {name: np.asarray(leaf) for name, leaf in _paths(program)[0]}


def _with_arrays(program: Program, arrays: dict[str, np.ndarray], folder: Path) -> Program:
    named, (structure, static) = _paths(program)
    expected = {name: tuple(leaf.shape) for name, leaf in named}
    found = {name: a.shape for name, a in arrays.items()}
    if expected != found:
        wrong = [n for n in {**expected, **found} if expected.get(n) != found.get(n)]
        lines = [f"  {n}: saved {found.get(n, 'not at all')}, expected {expected.get(n, 'none')}" for n in wrong[:5]]
        more = f"\n  … and {len(wrong) - 5} more" if len(wrong) > 5 else ""
        raise LoadError(f"the arrays in {folder} do not fit the program:\n" + "\n".join(lines) + more)
    leaves = [jnp.asarray(arrays[name], leaf.dtype) for name, leaf in named]
    return eqx.combine(jax.tree_util.tree_unflatten(structure, leaves), static)


def _read_description(folder: Path) -> dict[str, Any]:
    file = folder / "program.json"
    if not file.exists():
        raise LoadError(f"{folder} holds no saved program (no program.json): give the folder that save() wrote")
    try:
        description = json.loads(file.read_text())
    except ValueError as error:
        raise LoadError(f"{file} is damaged ({error}): copy the folder again") from error
    if not isinstance(description, dict) or description.get("format") != FORMAT:
        found = description.get("format") if isinstance(description, dict) else type(description).__name__
        raise LoadError(f"{file} is no sami_ppl program (format {found!r})")
    if description.get("format_version", 0) > FORMAT_VERSION:
        written = description.get("versions", {}).get("sami_ppl", "")
        raise LoadError(f"{file} was written by sami_ppl {written} in a newer format: update sami_ppl")
    if missing := {"format_version", "config", "aligned", "latents", "sha256"} - description.keys():
        raise LoadError(f"{file} is damaged (no {', '.join(sorted(missing))}): copy the folder again")
    return description


def _checksum(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()
