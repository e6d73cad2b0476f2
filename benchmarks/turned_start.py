"""Which prior finds the axes where the start does not? `python benchmarks/turned_start.py --denoiser runs/disks/model`.

The encoder of the disks starts on principal components of blurred images, whose axes may by chance be the factors. Here
they are turned at random first, so that axes which are found are found by the prior. Six latents, β from .2 to .5; the
prior "soft_uniform" behind a learned rotation, and N(0, I). Scores of the start and of the fit, nothing done to either.
"""

import argparse
from dataclasses import replace
import json
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import numpy as np

from sami_ppl import Program, Stage, fit
from sami_ppl.data import train_test
from sami_ppl.data.disks import FACTORS
from sami_ppl.fitting.components import start_codes
from sami_ppl.fitting.start import fit_codes, transfer
from sami_ppl.metrics import disentanglement_report
from sami_ppl.saving import files as programs
from sami_ppl.saving.save import load_denoiser

LATENTS = 6
PRIORS: dict[str, dict[str, Any]] = {
    "soft_uniform": {"prior": "soft_uniform", "turn": True},
    "normal": {"prior": "normal", "turn": False},
}
FITTED, SCORED = 5000, 2500


def turned(codes: np.ndarray, components: int, seed: int) -> np.ndarray:
    """Codes with their leading components rotated at random (Haar)."""
    rotation = np.linalg.qr(np.random.default_rng(seed).standard_normal((components, components)))[0]
    return np.concatenate([codes[:, :components] @ rotation, codes[:, components:]], 1).astype(np.float32)


def scores(program: Program, train: Any, test: Any) -> dict[str, Any]:
    codes, factors = [], []
    for part, count in ((train, FITTED), (test, SCORED)):
        few = part.isel(obs=slice(count))
        codes.append(program.encode(few["x"].values)[0])
        factors.append(np.stack([few[name].values for name in FACTORS], -1))
    found = disentanglement_report(codes[0], factors[0], codes[1], factors[1], list(FACTORS), seed=0)
    correlation = {name: float(np.abs(found["correlation"][name]).max()) for name in FACTORS}
    return {"dci": found["dci"]["disentanglement"], "mig": found["mig"], "correlation": correlation}


def measure(folder: str, prior: str, seed: int, steps: int, warm_steps: int, progress: bool) -> dict[str, Any]:
    module = programs.load_file(programs.find("disks", "models"))
    data_key, build_key, warm_key, fit_key = jax.random.split(jax.random.key(seed), 4)
    config = programs.make_config(module.Config, {"latents": LATENTS, **PRIORS[prior]})
    data = module.load(config, key=data_key)
    train, test = train_test(data)
    x = train["x"].values
    program = load_denoiser(folder, module.build(config, data, key=build_key))
    denoiser: Any = program.denoiser
    encoder: Any = program.encoder
    trunk = transfer(denoiser.network, encoder.network)
    program = program.replace(encoder=eqx.tree_at(lambda e: e.network, encoder, trunk))
    codes, components, _ = start_codes(x, LATENTS)
    codes = turned(codes, components, seed)
    begun = fit_codes(program, x, codes, key=warm_key, steps=warm_steps, progress=progress)
    stage = Stage(
        steps=steps, batch=128, learning_rate=8e-4, warmup=300, clip=150.0,
        beta_start=0.2, beta=0.5, beta_steps=int(steps * 5 / 6),
    )  # fmt: skip
    fitted, _ = fit(begun, train, replace(stage, train=("encoder",)), key=fit_key, progress=progress)
    return {
        "denoiser": folder, "prior": prior, "seed": seed, "components": components, "steps": steps,
        "start": scores(begun, train, test), "fit": scores(fitted, train, test),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--denoiser", required=True, help="folder of a fitted program of disks, 16×16")
    parser.add_argument("--seed", type=int, default=0, help="of data, networks, the turn and the fit")
    parser.add_argument("--priors", nargs="+", choices=list(PRIORS), default=list(PRIORS))
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--warm-steps", type=int, default=500)
    parser.add_argument("--quiet", action="store_true")
    parser.add_argument(
        "--out", type=Path, default=Path("runs/turned_start.jsonl"), help="a line is added for each fit"
    )
    arguments = parser.parse_args()
    for prior in arguments.priors:
        found = measure(
            arguments.denoiser, prior, arguments.seed, arguments.steps, arguments.warm_steps, not arguments.quiet
        )
        line = json.dumps(found)
        print(line, flush=True)
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        with arguments.out.open("a") as file:
            file.write(line + "\n")


if __name__ == "__main__":
    main()
