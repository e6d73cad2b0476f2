"""The observations of a run: read or made by the program file, in two parts; of latent diffusion, made latents.

Any program is one of latents where a run is given an autoencoder: what the program, the inference and the analyses see
are latents, and nothing in them knows of it. They stay in the folder of the run, so that it is opened again without
the images and without the autoencoder, whose decoder only the pictures of a report need.
"""

from contextlib import suppress
import json
from pathlib import Path
from types import ModuleType
from typing import Any
import warnings

import jax
import xarray as xr

from sami_ppl._util.errors import UserError, mistakes
from sami_ppl._util.files import written_aside
from sami_ppl._util.progress import phase, say
from sami_ppl.data import check_data, load_data, open_stream, split
from sami_ppl.data.layout import layout_of
from sami_ppl.data.stream import Stream, StreamError
from sami_ppl.diffusion.latents import autoencoder_from_diffusers, to_latents
from sami_ppl.nn.diffusers.autoencoder import AutoencoderKL

LATENTS = "latents.nc"
"""In the folder of a run with an autoencoder: its observations."""


def read_data(path: Path, *, autoencoder: str | None = None, **reading: Any) -> xr.Dataset:
    """The user's data, of latent diffusion as latents; `reading`: what `load_data` is told beside their path.

    Raises UserError where there are none, or they cannot be read or made latents.
    """
    with mistakes(ValueError, TypeError, OSError):
        data = check_data(load_data(path, **reading))
    return data if autoencoder is None else as_latents(data, autoencoder)


def read_as(out: Path) -> dict[str, Any]:
    """How other observations are read for a run: resized and made latents as its own were."""
    with suppress(OSError, ValueError):  # what else is wrong with the folder, `open_run` says
        description = json.loads((Path(out) / "config.json").read_text())
        found = {**description.get("reading", {}), "autoencoder": description.get("autoencoder")}
        return {name: found[name] for name in ("resize", "autoencoder") if found.get(name) is not None}
    return {}


def run_data(
    module: ModuleType,
    config: Any,
    source: Path | None,
    reading: dict[str, Any],
    *,
    autoencoder: str | None = None,
    kept: Path | None = None,
    key: jax.Array,
) -> xr.Dataset | Stream:
    """The observations of a run, in two parts.

    `kept`: the folder of the run, where it has been there before: latents that it made are not made again.
    """
    if kept is not None and autoencoder is not None and (kept / LATENTS).is_file():
        with phase(f"reading {kept / LATENTS}"):
            return read_data(kept / LATENTS)
    with phase("making the data" if source is None else f"reading {source}"):
        data = _loaded(module, config, source, reading, key=key)
    return data if autoencoder is None else as_latents(data, autoencoder)


def _loaded(
    module: ModuleType, config: Any, source: Path | None, reading: dict[str, Any], *, key: jax.Array
) -> xr.Dataset | Stream:
    if source is None:
        return check_data(module.load(config, key=key))
    if reading.get("stream"):
        with mistakes(ValueError, TypeError, OSError, StreamError):
            stream = check_data(open_stream(source, **{name: v for name, v in reading.items() if name != "stream"}))
        return stream if stream.is_split else split(stream, key=key)
    data = read_data(source, **reading)
    return data if "split" in data.coords else split(data, key=key)


def named_autoencoder(folder: str | Path) -> str:
    """An autoencoder as a run remembers it: its folder wherever the next command is called, or a repository's name."""
    path = Path(folder).expanduser()
    return str(path.resolve()) if path.is_dir() else str(folder)


def as_latents(data: Any, folder: str) -> Any:
    """A Dataset of images as one of latents, said in a line; a Dataset or Stream of as many channels is of latents.

    Raises UserError for a folder without an autoencoder, images that it does not take, and streams of images.
    """
    with mistakes(ValueError, TypeError, OSError, prefix=f"autoencoder={folder}: "):
        autoencoder = autoencoder_from_diffusers(folder)
        settings = autoencoder.settings
        shape = data.event_shape if isinstance(data, Stream) else layout_of(data).event_shape
        if len(shape) == 3 and shape[0] == settings.latent_channels != settings.in_channels:
            say(f"data of shape {shape} are taken for latents of {folder}; pictures of the report are of pixels")
            return data
        if isinstance(data, Stream):
            raise UserError(
                f"stream=True reads what is stored, and latents of images {shape} are made in memory: leave stream= "
                "out, or store latents, sp.diffusion.to_latents(autoencoder, part) of one part after another"
            )
        sides = tuple(side // settings.unit for side in shape[1:])
        with phase(
            f"making images {shape} latents {(settings.latent_channels, *sides)}, by {folder}; what is fitted and "
            "measured is of latents, pictures of the report are of pixels"
        ):
            return to_latents(autoencoder, data)


def keep_latents(data: xr.Dataset | Stream, out: Path) -> None:
    """Write the latents of a run into its folder; what is streamed is stored already."""
    if not isinstance(data, Stream) and not (out / LATENTS).exists():
        with written_aside(out / LATENTS) as part:
            data.to_netcdf(part, engine="h5netcdf")


def decoding_autoencoder(folder: str | None, event_shape: tuple[int, ...]) -> AutoencoderKL | None:
    """The autoencoder of a run, for pixels; None, with a warning, where it is not what or where it was."""
    if folder is None:
        return None
    try:
        autoencoder = autoencoder_from_diffusers(folder)
        if (channels := autoencoder.settings.latent_channels) != event_shape[0]:
            raise ValueError(
                f"{folder} is another: latents have {channels} channels, those of the run {event_shape[0]}"
            )
        return autoencoder
    except (OSError, ValueError) as error:
        warnings.warn(
            f"pictures of the report are left out, the autoencoder that makes pixels of latents being lost: {error}. "
            "Put it back, or write where it is now into config.json, and write the report again",
            stacklevel=3,
        )
        return None
