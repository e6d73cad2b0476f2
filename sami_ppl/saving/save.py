"""Saves and loads a program: a JSON description and an `.npz` of arrays. Nothing is pickled.

    folder/program.json    format, versions, configuration, all that is no array in plain values, list of arrays,
                           checksum
    folder/arrays.npz      every array of the program under its path, for instance `.encoder.loc.weight`
    folder/program.py      the program file that built it, where it came from one

A prior is code, so it is not stored: it comes from `program.py`, which `load` runs, or from a program of the same
structure that the caller gives. What is built is compared with what was saved.
"""

from collections.abc import Mapping
import dataclasses
from functools import partial
import hashlib
from importlib import metadata
import json
from pathlib import Path
from typing import Any, cast

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Key
import numpy as np

from sami_ppl._util.files import written_aside
from sami_ppl._util.versions import versions
from sami_ppl.diffusion.diffusers import DiffusersDenoiser, from_diffusers, is_diffusers
from sami_ppl.distributions.supports import described
from sami_ppl.encoders.affine import AffineEncoder
from sami_ppl.encoders.encoder import AbstractEncoder
from sami_ppl.encoders.own_guide import OwnGuideEncoder
from sami_ppl.encoders.tails import TailedEncoder
from sami_ppl.program.exchange import with_denoiser
from sami_ppl.program.program import NETWORKS, Program
from sami_ppl.program.sequences import frames_of, with_frames
from sami_ppl.saving.files import build_program, slip
from sami_ppl.saving.outline import outlined

FORMAT = "sami_ppl program"
FORMAT_VERSION = 2
NEEDED = {"format_version", "config", "aligned", "event_shape", "latents", "program", "sha256"}
# `load` runs program.py, of which Python keeps the bytecode.
OWN_FILES = {"program.json", "arrays.npz", "program.py", "__pycache__"}
# Settings that come back with the arrays: units of the networks.
RESTORED = ("mean", "std", "predict")


class LoadError(RuntimeError):
    """A saved program is missing, damaged, foreign, or does not fit."""


def save(program: Program, folder: str | Path) -> Path:
    """Write a program to a new folder, all of it or nothing; returns the folder.

    Where the program came from a file (`program.origin`), the file and its configuration are stored too, and `load`
    needs nothing else, unless a prior, a sampler or a network of another kind was put in since. An existing saved
    program in the folder is replaced; a folder that holds anything else raises FileExistsError.
    """
    folder = Path(folder)
    found = {path.name for path in folder.iterdir()} if folder.exists() else set()
    if foreign := sorted(found - OWN_FILES if "program.json" in found else found):
        raise FileExistsError(
            f"{folder} exists and holds something else than a saved program ({', '.join(foreign[:3])}): give a new "
            "folder, save(program, folder)"
        )
    with written_aside(folder) as new:
        new.mkdir()
        _write(program, new)
    return folder


def load(folder: str | Path, program: Program | None = None) -> Program:
    """Read a saved program.

    Without `program`, the saved `program.py` is run to build the structure (trust it as you would any Python file);
    with a `program` of the same structure, its arrays are replaced, and with them the mean and standard deviation that
    the networks take the data to have and what the denoiser predicts. Raises LoadError, saying what is wrong: also
    where the program differs from the saved one in anything else, such as its prior's laws, the ends of its schedule
    or its sampler.
    """
    folder = Path(folder)
    description = _read_description(folder)
    archive = _checked_archive(folder)
    again = f"build the program as it was saved and call load({str(folder)!r}, program)"
    if program is None:
        if not (folder / "program.py").exists():
            raise LoadError(f"{folder} was saved from Python and holds no program file: {again}")
        program = _built(folder, description)
        if (denoiser := _of_diffusers(folder)) is not None:
            changed = eqx.filter_eval_shape(with_denoiser, program, denoiser, key=jax.random.key(0))
            program = cast(Program, changed)
    program = _wrapped(program, description)
    latents = {site.name: list(site.event_shape) for site in program.latents.sites}
    if latents != description["latents"]:
        raise LoadError(
            f"{folder} holds a program with the latent sites {description['latents']}, this one has {latents}"
        )
    with np.load(archive, allow_pickle=False) as saved:
        program = _with_arrays(program, dict(saved), folder)
    return _as_saved(program, description["program"], folder, again)


def load_denoiser(folder: str | Path, program: Program, *, key: Key[Array, ""] | None = None) -> Program:
    """The program with the denoiser of a saved one, whatever that one's prior and encoder, or with one of diffusers.

    With the weights come the mean and standard deviation of the data that they were fitted to, and what they predict;
    those of the program's encoder stay. A program of sequences takes the denoiser of single frames. Raises LoadError,
    also for a denoiser of another kind or with another schedule.

    A folder that diffusers' `save_pretrained` wrote, a repository in its cache, and a program saved with such a
    denoiser bring their own schedule, and an encoder that begins with its features (`program.exchange.with_denoiser`);
    `key` is of its new layers. Raises what `from_diffusers` and `with_denoiser` raise.
    """
    if (denoiser := _of_diffusers(folder)) is not None:
        return with_denoiser(program, denoiser, key=jax.random.key(0) if key is None else key)
    folder = Path(folder)
    single, _ = program.single()
    if single is not program and list(single.event_shape) == _read_description(folder)["event_shape"]:
        return with_frames(program, load_denoiser(folder, single))
    return _with_networks(program, folder, ("denoiser",))


def load_networks(folder: str | Path, program: Program) -> Program:
    """The program with denoiser and encoder of a saved one, whatever that one's prior.

    With the weights come the mean and standard deviation that the networks take the data to have, and what the denoiser
    predicts. Raises LoadError, also for networks of another kind or with another schedule.
    """
    folder = Path(folder)
    return _with_networks(_wrapped(program, _read_description(folder)), folder, NETWORKS)


def _of_diffusers(folder: str | Path) -> DiffusersDenoiser | None:
    """The denoiser of a folder of diffusers, or of a program that was saved with one; None for any other folder."""
    if is_diffusers(folder):
        return from_diffusers(folder)
    settings = _read_description(Path(folder)).get("diffusers")
    if settings is None:
        return None
    empty = DiffusersDenoiser.from_settings(settings)
    with np.load(_checked_archive(Path(folder)), allow_pickle=False) as saved:
        leaves, structure = jax.tree_util.tree_flatten_with_path(empty)
        prefix = ".denoiser.frame" if any(name.startswith(".denoiser.frame.") for name in saved) else ".denoiser"
        named = [(f"{prefix}{jax.tree_util.keystr(path)}", leaf) for path, leaf in leaves]
        return jax.tree.unflatten(structure, [jnp.asarray(saved[n]) if _is_array(v) else v for n, v in named])


def _write(program: Program, folder: Path) -> None:
    arrays = _arrays(program)
    denoiser = program.single()[0].denoiser
    np.savez(folder / "arrays.npz", allow_pickle=False, **arrays)
    if program.origin is not None:
        # The text that built it: the file may have been edited while the fit went on.
        (folder / "program.py").write_text(program.origin.source)
    description = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "versions": versions(),
        "config": None if program.origin is None else json.loads(program.origin.config),
        "data": None if program.origin is None else json.loads(program.origin.data),
        "aligned": isinstance(_guiding(program), AffineEncoder),
        "own_guide": isinstance(own := program.encoder.single, OwnGuideEncoder),
        "tails": isinstance(own, OwnGuideEncoder) and isinstance(own.own, TailedEncoder),
        "diffusers": denoiser.settings if isinstance(denoiser, DiffusersDenoiser) else None,
        "event_shape": list(program.event_shape),
        "latents": {site.name: list(site.event_shape) for site in program.latents.sites},
        "program": _description(program),
        "arrays": {name: [list(a.shape), str(a.dtype)] for name, a in arrays.items()},
        "sha256": _checksum(folder / "arrays.npz"),
    }
    (folder / "program.json").write_text(json.dumps(description, indent=1))


def _built(folder: Path, description: dict[str, Any]) -> Program:
    """What program.py builds, its arrays without values where it can do so."""
    data = outlined(description["data"])
    build = partial(build_program, folder / "program.py", config=description["config"], data=data)
    try:
        return cast(Program, eqx.filter_eval_shape(build, key=jax.random.key(0)))
    except jax.errors.JAXTypeError:  # a program that looks at its arrays while it is built
        return build(key=jax.random.key(0))
    except Exception as error:
        if (mistake := slip(error)) is None:
            raise
        raise LoadError(f"{folder} holds a program file that is damaged, or fails: {mistake}") from error


def _guiding(program: Program) -> AbstractEncoder:
    """The encoder of a single observation that guides."""
    encoder = program.encoder.single
    return encoder.base if isinstance(encoder, OwnGuideEncoder) else encoder


def _wrapped(program: Program, description: dict[str, Any]) -> Program:
    """The program with places for the axes of one whose gauge was fixed, for a guide of its own and its tails."""
    if program.of_sequences:
        return with_frames(program, _wrapped(frames_of(program), description))
    encoder = _guiding(program)
    if description["aligned"] and not isinstance(encoder, AffineEncoder):
        size = program.latents.size
        places: Any = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((size, size), (size,))]
        encoder = AffineEncoder(encoder, *places)
    if not description.get("own_guide", False):
        return program.replace(encoder=encoder)
    own = TailedEncoder(encoder) if description.get("tails", False) else encoder
    return program.replace(encoder=OwnGuideEncoder(encoder, own))


def _with_networks(program: Program, folder: Path, names: tuple[str, ...]) -> Program:
    description, archive = _read_description(folder), _checked_archive(folder)
    prefixes = tuple(f".{name}." for name in names)
    with np.load(archive, allow_pickle=False) as saved:
        found = {name: array for name, array in saved.items() if name.startswith(prefixes)}
    own = {name: leaf for name, leaf in _paths(program)[0] if not name.startswith(prefixes)}
    program = _with_arrays(program, found | own, folder)
    again = "build the program with the settings of the saved one"
    return _as_saved(program, {name: description["program"][name] for name in names}, folder, again)


def _description(program: Program) -> dict[str, Any]:
    """What is no array of a program, in plain values as JSON gives them."""
    names = ("denoiser", "encoder", "sampler", "event_dims", "global_guide")
    given = zip(program.given.names, program.given.arrays, strict=True)
    sites = (*program.latents.sites, *program.latents.global_sites)
    found = {
        "sites": {
            site.name: {"law": site.law, "transform": described(site.transform), "event_shape": site.event_shape}
            for site in sites
        },
        "given": {name: [array.shape, float(array.mean()), float(array.std())] for name, array in given},
        **{name: _plain(getattr(program, name)) for name in names},
    }
    return json.loads(json.dumps(found))


def _plain(value: Any) -> Any:
    """Modules by their fields without arrays, functions and classes by their names."""
    if isinstance(value, np.generic):
        return value.item()
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, eqx.Module):
        fields = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
        return {"kind": _name(type(value))} | {name: _plain(v) for name, v in fields.items() if not _is_array(v)}
    if isinstance(value, Mapping):
        return {str(name): _plain(v) for name, v in value.items()}
    if isinstance(value, tuple | list):
        return [_plain(v) for v in value]
    if isinstance(value, partial):
        return {"kind": "partial", "of": _plain(value.func), "args": _plain(value.args), **_plain(value.keywords)}
    return _name(value if hasattr(value, "__qualname__") else type(value))


def _name(thing: Any) -> str:
    """The qualified name below the function, if any, in which it was made: which one that is does not matter."""
    return thing.__qualname__.rpartition("<locals>.")[-1]


def _as_saved(program: Program, saved: dict[str, Any], folder: Path, again: str) -> Program:
    """The program with RESTORED as they were saved. Raises LoadError for anything else that is not as it was saved."""
    program = _restored(program, saved)
    found = _description(program)
    if different := _first_difference(saved, {name: found.get(name) for name in saved}):
        path, was, built = different
        raise LoadError(f"{folder} was saved with {path} = {was!r}, this program has {built!r}: {again}")
    return program


def _restored(module: Any, saved: dict[str, Any]) -> Any:
    new = object.__new__(type(module))  # as Equinox copies modules: they cannot be built again from their fields
    for field in dataclasses.fields(module):
        value, was = getattr(module, field.name), saved.get(field.name)
        if isinstance(value, eqx.Module) and isinstance(was, dict):
            value = _restored(value, was)
        elif field.name in RESTORED and isinstance(was, int | float | str):
            value = was
        object.__setattr__(new, field.name, value)
    return new


def _first_difference(saved: Any, built: Any, path: str = "") -> tuple[str, Any, Any] | None:
    """Where two descriptions differ first, and what each has there."""
    if isinstance(saved, dict) and isinstance(built, dict):
        # A field that only one of two of a kind has is of another version of the library.
        names = [name for name in {**saved, **built} if "kind" not in saved or (name in saved and name in built)]
        pairs = [(f"{path}.{name}" if path else name, saved.get(name), built.get(name)) for name in names]
    elif isinstance(saved, list) and isinstance(built, list) and len(saved) == len(built):
        pairs = [(f"{path}[{i}]", *pair) for i, pair in enumerate(zip(saved, built, strict=True))]
    elif isinstance(saved, int | float) and isinstance(built, int | float):
        # Parameters of laws may be computed, on another machine then.
        return None if np.isclose(saved, built, rtol=1e-4, atol=1e-6, equal_nan=True) else (path, saved, built)
    else:
        return None if saved == built else (path, saved, built)
    return next((found for pair in pairs if (found := _first_difference(*pair[1:], pair[0]))), None)


def _checked_archive(folder: Path) -> Path:
    archive = folder / "arrays.npz"
    if not archive.is_file() or _checksum(archive) != _read_description(folder)["sha256"]:
        raise LoadError(f"{archive} is missing, truncated or changed since it was saved: copy the folder again")
    return archive


def _is_array(leaf: Any) -> bool:
    return isinstance(leaf, jax.Array | np.ndarray | jax.ShapeDtypeStruct)


def _paths(program: Program) -> tuple[list[tuple[str, Any]], Any]:
    dynamic, static = eqx.partition(program, _is_array)
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
    if not file.is_file():
        raise LoadError(f"{folder} holds no saved program (no program.json): give the folder that save() wrote")
    try:
        description = json.loads(file.read_text())
    except ValueError as error:
        raise LoadError(f"{file} is damaged ({error}): copy the folder again") from error
    if not isinstance(description, dict) or description.get("format") != FORMAT:
        found = description.get("format") if isinstance(description, dict) else type(description).__name__
        raise LoadError(f"{file} is no sami_ppl program (format {found!r})")
    if (version := description.get("format_version", FORMAT_VERSION)) != FORMAT_VERSION:
        writer = description.get("versions", {}).get("sami_ppl", "of another version")
        raise LoadError(
            f"{file} is of format {version}, written by sami_ppl {writer}; this one, {metadata.version('sami_ppl')}, "
            f"reads format {FORMAT_VERSION}: "
            + ("update it" if version > FORMAT_VERSION else "fit the program again, or load it by what wrote it")
        )
    if missing := NEEDED - description.keys():
        raise LoadError(f"{file} is damaged (no {', '.join(sorted(missing))}): copy the folder again")
    return description


def _checksum(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()
