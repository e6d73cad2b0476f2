"""Representations out of a diffusion model that exists: an encoder fitted to it, beside no fit and a whole one.

    python -m benchmarks.extraction /usr/share/datasets/fashion-mnist tests/data/diffusers/clothes

The rows of docs/diffusers.md: an encoder fitted to the denoiser of a folder of diffusers, principal components of its
bottom map at some noise levels, two stages with a U-Net of our own, principal components of pixels. Columns: accuracy
of five nearest neighbours and of a linear probe on codes of as many numbers, held out; the bound on −log p(x) in nats;
seconds of the fit. The training images are also those of the probes.
"""

import argparse
from pathlib import Path
import time

import jax
import numpy as np
from numpyro import distributions as dist
from sklearn.decomposition import PCA
import xarray as xr

import sami_ppl as sp
from sami_ppl import analyses
from sami_ppl.analyses.evaluate import probes
from sami_ppl.data import load_data, train_test

RANGE = (-6.0, 6.0)
"""Log-SNR, of both denoisers, so that their bounds compare."""


def padded(data: xr.Dataset, sides: tuple[int, ...]) -> xr.Dataset:
    """Images with a black margin that brings them to the size of the network."""
    margins = [((s - n) // 2, (s - n + 1) // 2) for s, n in zip(sides, data.x.shape[2:], strict=True)]
    x = np.pad(data.x.values, [(0, 0), (0, 0), *margins], constant_values=-1)
    return data.drop_vars("x").assign(x=(("obs", "channel", "row", "column"), x))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="images with a label, as load_data takes them")
    parser.add_argument("checkpoint", type=Path, help="a folder of save_pretrained")
    parser.add_argument("--images", type=int, default=5000, help="for training")
    parser.add_argument("--test", type=int, default=1000)
    parser.add_argument("--latents", type=int, default=16)
    parser.add_argument("--steps", type=int, default=1000, help="of each stage")
    parser.add_argument("--warm-steps", type=int, default=300)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--levels", type=float, nargs="*", default=[-2.0, 0.0, 2.0, 4.0], help="log-SNR of bottom maps")
    parser.add_argument("--bound", type=int, default=256, help="test images of the bound")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rows", nargs="*", default=["pixels", "bottom", "encoder", "two stages"])
    options = parser.parse_args()
    keys = jax.random.split(jax.random.key(options.seed), 6)
    foreign = sp.diffusion.from_diffusers(options.checkpoint, log_snr_min=RANGE[0], log_snr_max=RANGE[1])
    parts = zip(train_test(load_data(options.data)), (options.images, options.test), strict=True)
    train, test = (padded(part.isel(obs=slice(n)), foreign.event_shape[1:]) for part, n in parts)
    x, labels = ([part[name].values for part in (train, test)] for name in ("x", "label"))

    def row(name: str, codes: list[np.ndarray], bound: str = "", seconds: float = 0.0) -> None:
        found = probes(tuple(codes), tuple(x), tuple(labels))
        print(
            f"| {name} | {found['knn_sami']:.3f} | {found['linear_sami']:.3f} | {bound} | {seconds:.0f} |", flush=True
        )

    def bottom(name: str, denoiser: sp.diffusion.AbstractDenoiser) -> None:
        for level in options.levels:
            began = time.perf_counter()
            found = analyses.bottleneck_components(denoiser, x[0], options.latents, log_snr=level, key=keys[0])
            codes = [found.encode(part, key=key) for part, key in zip(x, keys[1:3], strict=True)]
            row(f"{name}, λ = {level:g}", codes, seconds=time.perf_counter() - began)

    def fitted(name: str, program: sp.Program, plan: sp.AbstractPlan) -> sp.Program:
        began = time.perf_counter()
        program, _ = sp.fit(program, train, plan, held_out=test, key=keys[4], progress=False)
        seconds = time.perf_counter() - began
        bound = sp.evidence_bound(program, test.isel(obs=slice(options.bound)), key=keys[5])["bound"].values
        error = bound.std(ddof=1) / np.sqrt(len(bound))
        row(name, [program.encode(part)[0] for part in x], f"{bound.mean():.0f} ± {error:.0f}", seconds)
        return program

    print(f"{options.images} images, {options.latents} numbers, {options.steps} steps, seed {options.seed}")
    print("| code | kNN(5) | linear probe | bound | seconds |\n|---|---|---|---|---|")
    if "pixels" in options.rows:
        flat = [part.reshape(len(part), -1) for part in x]
        components = PCA(options.latents, random_state=0).fit(flat[0])
        row("principal components of pixels", [components.transform(part) for part in flat])
    if "bottom" in options.rows:
        bottom("its bottom map", foreign)
    prior = sp.factors(z=dist.Normal(0, 1).expand([options.latents]))
    stage = sp.Sized(steps=options.steps, batch=options.batch)
    if "encoder" in options.rows:
        program = sp.autoencoder(prior, train, network=foreign, key=keys[3], progress=False)
        fitted("encoder fitted to it", program, sp.EncoderOnly(stage, warm_steps=options.warm_steps))
    if "two stages" in options.rows:
        schedule = sp.VariancePreserving(*RANGE)
        program = sp.autoencoder(prior, train, network="unet", schedule=schedule, key=keys[3], progress=False)
        program = fitted(
            "two stages, a U-Net of our own", program, sp.TwoStage(stage, stage, warm_steps=options.warm_steps)
        )
        bottom("the bottom map of that U-Net", program.denoiser)


if __name__ == "__main__":
    main()
