"""Samplers of a fitted disks program against each other and against images it has not seen, as a Markdown table.

    python benchmarks/samplers.py --program runs/disks_0/model            # the denoiser alone
    python benchmarks/samplers.py --program runs/disks_0/model --codes    # given codes of held-out images

Sliced Wasserstein distance: the root mean, over random unit directions, of the squared distance between the sorted
projections, which in one dimension is exactly W₂ of two sets of equal size. Directions, sizes, keys and codes are the
same for all samplers. Each figure is a mean over `--sets` independent sets, with its standard error; the last columns
take all sets together, where less of the distance is due to their finite size. The first two rows are that noise: two
independent sets of images, and two of the reference.
"""

import argparse
from collections.abc import Callable
import json
from pathlib import Path
import sys
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import sami_ppl as sp
from sami_ppl.data import disks
from sami_ppl.diagnostics.gain import draw_code
from sami_ppl.diffusion.sampler import AbstractSampler

SAMPLERS = {
    "DDIM": sp.DDIM,
    "DPMSolver": sp.DPMSolver,
    "Heun": lambda n: sp.Heun(n - (n + 1) % 2),
    "FromPureNoise(DPMSolver)": lambda n: sp.FromPureNoise(sp.DPMSolver(n - 2)),
    "Ancestral": sp.Ancestral,
    "StochasticDPMSolver": sp.StochasticDPMSolver,
    "FromPureNoise(StochasticDPMSolver)": lambda n: sp.FromPureNoise(sp.StochasticDPMSolver(n - 2)),
}


class Images(NamedTuple):
    """Of `sets` times n images each: those that give the codes, and those that samples are compared with."""

    seen: np.ndarray
    unseen: np.ndarray


def sliced_wasserstein(a: np.ndarray, b: np.ndarray, directions: np.ndarray) -> float:
    """Between two sets of as many images; directions (p, L) of unit length."""
    a, b = (np.sort(x.reshape(len(x), -1).astype(np.float32) @ directions, 0) for x in (a, b))
    return float(np.sqrt(np.mean((a - b) ** 2)))


def held_out(program: sp.Program, sets: int, size: int, seed: int) -> Images:
    """Fresh draws: no seed of a fit leads to them."""
    config = json.loads(program.origin.config)
    keys = jax.random.split(jax.random.fold_in(jax.random.key(seed), 2**31 - 1), 2 * sets)
    drawn = [disks(k, size, resolution=config["resolution"], radius=config["radius"])["x"].values for k in keys]
    return Images(np.stack(drawn[:sets]), np.stack(drawn[sets:]))


def drawer(program: sp.Program, images: Images, codes: bool, seed: int) -> Callable[[AbstractSampler], np.ndarray]:
    """`draw(sampler)`: samples of the shape of `images.seen`, given the code of each or from the denoiser alone."""
    code_key, key = jax.random.split(jax.random.key(seed))
    seen = images.seen.reshape(-1, *program.event_shape)
    z = jax.jit(lambda x: draw_code(program, x, code_key))(jnp.asarray(seen)) if codes else None

    def draw(sampler: AbstractSampler) -> np.ndarray:
        if z is None:
            samples = sp.generate(program, key=key, size=len(seen), guided=False, sampler=sampler)
        else:
            samples = sp.decode(program, z, jax.random.split(key, len(seen)), sampler=sampler)
        return samples.reshape(images.seen.shape)

    return draw


def spread(values: list[float]) -> str:
    return f"{np.mean(values):.4f} ± {np.std(values, ddof=1) / np.sqrt(len(values)):.4f}"


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--program", type=Path, required=True, help="folder of a saved disks program")
    parser.add_argument("--codes", action="store_true", help="sample given posterior codes of held-out images")
    parser.add_argument("--samples", type=int, default=2000, help="of each set")
    parser.add_argument("--sets", type=int, default=4)
    parser.add_argument("--evaluations", type=int, nargs="+", default=[10, 20, 50])
    parser.add_argument("--reference", type=int, default=500, help="evaluations of the ancestral sampler")
    parser.add_argument("--directions", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args(arguments)

    program = sp.load(asked.program)
    images = held_out(program, asked.sets, asked.samples, asked.seed)
    draw = drawer(program, images, asked.codes, asked.seed)
    directions = np.random.default_rng(asked.seed).normal(size=(images.seen[0, 0].size, asked.directions))
    directions = (directions / np.linalg.norm(directions, axis=0)).astype(np.float32)

    def each(a: np.ndarray, b: np.ndarray) -> list[float]:
        return [sliced_wasserstein(x, y, directions) for x, y in zip(a, b, strict=True)]

    def together(a: np.ndarray) -> float:
        return sliced_wasserstein(np.concatenate(a), np.concatenate(images.unseen), directions)

    reference = draw(sp.Ancestral(asked.reference))
    # The reference of another set, so that it is independent of the samples even though keys and codes are shared.
    other, base, base_together = np.roll(reference, 1, axis=0), each(reference, images.unseen), together(reference)

    def row(name: str, evaluations: str, samples: np.ndarray) -> None:
        to_images = each(samples, images.unseen)
        cells = [name, evaluations, spread(each(samples, other)), spread(to_images)]
        cells += [spread([a / b for a, b in zip(to_images, base, strict=True)])]
        cells += [f"{together(samples):.4f}", f"{together(samples) / base_together:.3f}"]
        if asked.codes:
            error = ((samples - images.seen) ** 2).mean(axis=(2, 3, 4))
            cells += [f"{error.mean():.4f}", f"{100 * (error > 0.05).mean():.1f} %"]
        print("| " + " | ".join(cells) + " |", flush=True)

    header = ["sampler", "evaluations", f"to {asked.reference} ancestral", "to held-out images", "ratio"]
    header += ["all sets: to held-out images", "ratio"]
    header += ["squared error to the own image", "above .05"] if asked.codes else []
    print("| " + " | ".join(header) + " |\n|" + "---|" * len(header), flush=True)
    row("held-out images", "–", images.seen)
    row("Ancestral", str(asked.reference), reference)
    for evaluations in asked.evaluations:
        for name, build in SAMPLERS.items():
            sampler = build(evaluations)
            row(name, str(sampler.evaluations), draw(sampler))


if __name__ == "__main__":
    main(sys.argv[1:])
