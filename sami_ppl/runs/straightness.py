"""Videos through finished runs: what `sami straightness` prints and writes."""

from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np
import pandas as pd
import xarray as xr

from sami_ppl._util.errors import UserError, mistakes
from sami_ppl._util.progress import phase, telling
from sami_ppl.analyses.trajectories import plot_straightness, straightness_table
from sami_ppl.analyses.trajectories import straightness as measure
from sami_ppl.data import cut_clips, cut_patches, luminance, scale_bytes, train_test
from sami_ppl.data.readers.images import Decoding
from sami_ppl.data.readers.video import read_video
from sami_ppl.program.program import Program
from sami_ppl.runs.reading import read_as
from sami_ppl.runs.run import check_at_least, open_run
from sami_ppl.runs.settings import seed_key


def straightness_runs(
    folders: Sequence[Path],
    videos: Sequence[Path],
    *,
    patches: int = 0,
    frames: int = 12,
    step: int = 1,
    change: float = 0.0,
    resamples: int = 2000,
    seed: int = 0,
    out: Path | None = None,
    progress: bool = False,
) -> str:
    """How straight videos run in the codes of finished runs; returns the table as text.

    Codes are those of single frames, components those of the first run's training part. With `patches`, so many are cut
    out of each video, of the size that the programs take and in which a pixel changes by `change` of 255 at least; else
    whole frames, resized as the first run's own images were, are cut into clips that do not overlap. Colour is made
    gray for programs of one channel. With `out`, writes `straightness.nc`, each clip with its video,
    `straightness.json`, the table, and `straightness.png`. `progress`: say on stderr what is done.

    Raises UserError for a folder that is named twice or holds no finished run, runs of latents, or with codes of
    several sizes, videos that are not there, cannot be decoded, are too short or of another size, and where no patch
    changes as much.
    """
    check_at_least(3, frames=frames)
    check_at_least(1, step=step, resamples=resamples)
    check_at_least(0, patches=patches)
    names = [str(folder).rstrip("/") for folder in folders]
    if not names or not videos:
        raise UserError("give the folder of a finished run, and a video, video=FILE")
    if len(set(names)) < len(names):
        raise UserError(f"a folder is named twice: {', '.join(names)}")
    side = read_as(Path(names[0])).get("resize") if not patches else None
    clip_key, key, table_key = jax.random.split(seed_key(seed), 3)
    with telling(progress), mistakes(ValueError):
        with phase("opening the runs"):
            programs, stills = _opened(names)
        shape = next(iter(programs.values())).event_shape
        cut = []
        for i, video in enumerate(videos):
            with phase(f"reading {video}"):
                x = _frames(Path(video), side)
            own_key = jax.random.fold_in(clip_key, i)
            with mistakes(ValueError, prefix=f"{video}: "):
                cut.append(_cut(x, shape, patches, frames, step, change, own_key))
        clips = np.concatenate(cut)
        with phase(f"codes of {len(clips):,} clips of {frames} frames"):
            found = measure(programs, clips, stills=stills, key=key)
    of = np.repeat([str(video) for video in videos], [len(one) for one in cut])
    found = found.assign_coords(video=("clip", of)).assign_attrs(step=step, change=change)
    table = straightness_table(found, resamples=resamples, key=table_key)
    if out is not None:
        _write(found, table, Path(out))
    return _text(found, table)


def _opened(names: list[str]) -> tuple[dict[str, Program], np.ndarray]:
    """Programs of single frames, and the observations that the first was fitted to."""
    programs, stills = {}, None
    for name in names:
        run = open_run(Path(name))
        if run.autoencoder is not None:
            raise UserError(f"{name} is of latents, beside which frames of a video say nothing: give runs of images")
        program, single = run.program.single(run.data)
        programs[name] = program
        if stills is None:
            part = train_test(single)[0] if "split" in single.coords else single
            stills = program.observed(part)
        elif program.event_shape != stills.shape[1:]:
            raise UserError(
                f"{name} takes observations of shape {program.event_shape}, {names[0]} of {stills.shape[1:]}: give "
                "runs that take the same"
            )
    assert stills is not None
    return programs, stills


def _frames(video: Path, side: int | None) -> np.ndarray:
    """Frames of a video in uint8, a quarter of the memory that all of them take in float32."""
    if not video.is_file():
        raise UserError(f"there is no video {video}")
    return read_video(video, Decoding(side)).x.values


def _cut(
    x: np.ndarray, shape: tuple[int, ...], patches: int, frames: int, step: int, change: float, key: jax.Array
) -> np.ndarray:
    """Clips (clip, frame, *event) in [−1, 1]."""
    if len(shape) != 3 or shape[0] not in (1, x.shape[1]):
        raise ValueError(f"frames of {x.shape[1]} channels, but the program takes observations of shape {shape}")
    if patches:
        clips = cut_patches(x, (shape[1], shape[2]), patches, length=frames, step=step, change=change, key=key)
    elif x.shape[2:] != shape[1:]:
        rows, columns = (" × ".join(map(str, sides)) for sides in (x.shape[2:], shape[1:]))
        raise ValueError(
            f"frames are of {rows} pixels, the program takes {columns}: cut patches, patches=50, or give a run whose "
            f"images were resized, resize={shape[1]}"
        )
    else:
        clips = cut_clips(x, frames, step=step)
    clips = scale_bytes(clips, 255)
    return luminance(clips) if shape[0] == 1 else clips


def _write(found: xr.Dataset, table: pd.DataFrame, out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    found.to_netcdf(out / "straightness.nc", engine="h5netcdf")
    (out / "straightness.json").write_text(table.to_json(orient="index", indent=1) or "")
    plot_straightness(found).savefig(out / "straightness.png", dpi=150)


def _text(found: xr.Dataset, table: pd.DataFrame) -> str:
    count, frames, step = found.sizes["clip"], found.attrs["frames"], found.attrs["step"]
    videos = len(np.unique(found.video))
    width = max(map(len, table.index))
    lines = [
        f"curvature in degrees (0 straight, 90 a random walk, 120 independent points), and the mean cosine: {count} "
        f"clips of {videos} video{'s' * (videos != 1)}, {frames} frames, each {step} after the last, codes of "
        f"{found.attrs['dimensions of the code']} numbers; whitened: where all directions of the code vary alike; 95 % "
        "intervals over videos and clips",
        f"  {'':<{width}}  {'curvature':>22}  {'straighter than pixels':>24}  {'whitened':>22}  {'cosine':>22}  "
        f"{'in random order':>15}",
    ]
    for name, row in table.iterrows():
        degrees, gain, even = (_interval(row, column, 1) for column in ("curvature", "straightening", "whitened"))
        cosine = _interval(row, "cosine", 3)
        lines.append(
            f"  {name!s:<{width}}  {degrees:>22}  {gain:>24}  {even:>22}  {cosine:>22}  {row['shuffled']:>15.1f}"
        )
    return "\n".join(lines)


def _interval(row: pd.Series, name: str, digits: int) -> str:
    if np.isnan(row[name]):
        return "–"
    mean, low, high = (f"{row[part]:.{digits}f}".replace("-", "−") for part in (name, f"{name}_low", f"{name}_high"))
    return f"{mean} ({low} to {high})"
