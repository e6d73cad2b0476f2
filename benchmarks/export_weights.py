"""Networks of a configuration as an .npz that PyTorch reads: `python -m benchmarks.export_weights --case NAME FILE`.

With `--golden`, the tiny pairs of the parity test instead, with inputs; weights are then integers in units of 1/64.
"""

import argparse
import json
import math
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import numpy as np

from benchmarks.cases import CASES, QUICK, STAGE, TINY, Case, program_of
from sami_ppl import DiagonalEncoder, PreconditionedDenoiser, VariancePreserving
from sami_ppl.nn import DiT, HalfUNet, ResidualMLP, UNet, ViT
from sami_ppl.program.program import NETWORKS

UNIT = 64


def arrays(module: eqx.Module, prefix: str) -> dict[str, np.ndarray]:
    """Every array leaf under its path, `encoder.network.down.entry.weight`."""
    leaves = jax.tree_util.tree_leaves_with_path(eqx.filter(module, eqx.is_inexact_array))
    return {
        f"{prefix}.{jax.tree_util.keystr(path, simple=True, separator='.')}": np.asarray(leaf) for path, leaf in leaves
    }


def size_of(network: Any) -> dict[str, Any]:
    """What PyTorch needs to build the same network."""
    size: dict[str, Any] = {"kind": type(network).__name__}
    if isinstance(network, ResidualMLP):
        width, depth = network.entry.out_features, len(network.blocks)
        return size | {"shape": network.in_shape, "out": network.out_shape, "width": width, "depth": depth}
    if isinstance(network, DiT | ViT):
        size |= {"width": network.entry.out_features, "depth": len(network.blocks), "patch": network.patch}
        size |= {"heads": network.blocks[0].heads}
        return size | ({"out": network.out_shape[0]} if isinstance(network, ViT) else {})
    if not isinstance(network, UNet | HalfUNet):
        raise TypeError(f"no export for {type(network).__name__}: add its sizes here")
    if any(len(level) != 1 for level in network.down.levels):
        raise ValueError("the PyTorch networks have one block per level, got more: build with blocks=1")
    size |= {"widths": [level[0].conv1.weight.shape[1] for level in network.down.levels], "patch": network.patch}
    return size | ({"out": network.out_shape[0]} if isinstance(network, HalfUNet) else {})


def config_of(denoiser: PreconditionedDenoiser, encoder: DiagonalEncoder) -> dict[str, Any]:
    """Arguments of PyTorch's `Denoiser` and `Encoder`."""
    if denoiser.predict != "data" or encoder.noise != "full":
        raise ValueError("the PyTorch side knows predict='data' and noise='full' only")
    shape = {"shape": denoiser.event_shape}
    statistics = {"mean": encoder.mean, "std": encoder.std}
    return {
        "denoiser": {"size": shape | size_of(denoiser.network), "mean": denoiser.mean, "std": denoiser.std},
        "encoder": {"size": shape | size_of(encoder.network), "features": encoder.loc.in_features,
                    "latents": encoder.latent_size, "min_scale": encoder.min_scale,
                    "log_snr_max": encoder.schedule.log_snr_max, **statistics},
    }  # fmt: skip


def as_text(config: dict[str, Any]) -> np.ndarray:
    return np.frombuffer(json.dumps(config).encode(), np.uint8)


def export_case(case: Case, file: Path) -> None:
    """Weights of a configuration of the benchmark, and what its training step needs."""
    program = program_of(case)
    denoiser, encoder = program.denoiser, program.encoder
    schedule = denoiser.schedule
    stage = {name: getattr(STAGE, name) for name in ("learning_rate", "clip", "ema", "beta")}
    stage |= {"log_snr_min": schedule.log_snr_min, "log_snr_max": schedule.log_snr_max}
    config = {"case": case.name, "batch": case.batch, "stage": stage, **config_of(denoiser, encoder)}
    weights = {k: v for name in NETWORKS for k, v in arrays(getattr(program, name), name).items()}
    np.savez(file, config=as_text(config), **weights)


def export_golden(file: Path) -> None:
    """The pairs of the parity test: U-Net and half U-Net; U-Net and perceptron; two perceptrons."""
    shape, schedule, count, latents = (2, 8, 8), VariancePreserving(-4.0, 4.0), 3, 2
    keys, rng, found = jax.random.split(jax.random.key(0), 5), np.random.default_rng(0), {}
    networks = {
        "unet": UNet(shape, widths=(10, 12), key=keys[0]),
        "half": HalfUNet(shape, (5,), widths=(10, 12), key=keys[1]),
        "mlp": ResidualMLP(shape, (5,), width=6, depth=1, key=keys[2]),
    }
    denoiser = PreconditionedDenoiser(networks["unet"], schedule, shape, mean=0.2, std=0.7)
    for kind in ("half", "mlp"):
        encoder = DiagonalEncoder(networks[kind], schedule, shape, latents, mean=0.2, std=0.7, key=keys[3])
        found[f"{kind}/config"] = as_text(config_of(denoiser, encoder))
        found |= {f"{kind}/{name}": _rounded(leaf, rng) for name, leaf in arrays(encoder, "encoder").items()}
    found |= {name: _rounded(leaf, rng) for name, leaf in arrays(denoiser, "denoiser").items()}
    inputs = {"x": (count, *shape), "eps": (count, *shape), "noise": (count, latents)}
    found |= {name: rng.normal(size=size).astype(np.float32) for name, size in inputs.items()}
    np.savez(file, log_snr=np.array([-2.0, 0.5, 3.0], np.float32), **found)


def _rounded(leaf: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Random weights of the usual size around the leaf's mean (1 for gains), in integers: exact, and small on disk."""
    scale = 0.2 if leaf.ndim == 1 else 0.6 / math.sqrt(min(leaf.shape[0], 128))
    return np.clip(np.rint(UNIT * (leaf.mean() + scale * rng.normal(size=leaf.shape))), -127, 127).astype(np.int8)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    parser.add_argument("--case", default=QUICK[0].name, choices=[c.name for c in (*CASES, *TINY)])
    parser.add_argument("--golden", action="store_true")
    arguments = parser.parse_args()
    if arguments.golden:
        export_golden(arguments.file)
    else:
        export_case({c.name: c for c in (*CASES, *TINY)}[arguments.case], arguments.file)


if __name__ == "__main__":
    main()
