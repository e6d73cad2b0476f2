"""The table of docs/decoders.md: three likelihoods on handwritten digits, and the codes that come with them.

python -m benchmarks.decoders [--steps 1500]
"""

import argparse
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from numpyro import distributions as dist

import sami_ppl as sp
from sami_ppl.analyses.evaluate import probes
from sami_ppl.data import digits, split, train_test
from sami_ppl.diagnostics import noise_errors

FITS: Any = (("guided", 0.2), ("conditioned", 0.1), ("conditioned", 0.02), ("gaussian", 1.0))


def plan(decoder: str, beta: float, steps: int) -> sp.AbstractPlan:
    """Two stages of guided decoders, both networks at once of others."""
    every: Any = {"steps": steps, "batch": 128, "validate_every": 200}
    if decoder != "guided":
        return sp.Joint(sp.Stage(**every, learning_rate=1e-3, clip=150.0, beta=beta))
    encoder = sp.Stage(train=("encoder",), **every, learning_rate=8e-4, warmup=200, beta=beta, clip=150.0)
    return sp.TwoStage(sp.Stage(target="marginal", **every, learning_rate=2e-3), encoder, warm_steps=300)


def main(steps: int) -> None:
    """Fit and print, a row for each decoder."""
    data_key, build_key, fit_key, key = jax.random.split(jax.random.key(0), 4)
    data = split(digits(), test=0.2, key=data_key)
    train, test = train_test(data)
    pixels, labels = (train.x.values, test.x.values), (train.digit.values, test.digit.values)
    prior = sp.factors(z=dist.Normal(0, 1).expand([8]))
    for decoder, beta in FITS:
        program = sp.autoencoder(
            prior, data, decoder=decoder, network="mlp", size={"width": 128, "depth": 3}, key=build_key, progress=False
        )
        fitted = plan(decoder, beta, steps)
        program, _ = sp.fit(program, train, fitted, held_out=test, key=fit_key, progress=False)
        bound = sp.evidence_bound(program, test, key=key)
        errors: Any = eqx.filter_jit(noise_errors)(program, jnp.asarray(pixels[1]), key)
        saved = np.nan if errors.unguided is None else float(np.sum(errors.unguided - errors.own))
        accuracy = probes((program.encode(pixels[0])[0], program.encode(pixels[1])[0]), pixels, labels)
        used = int((bound["kl_axis"].mean("obs") > 0.3).sum())
        nats = {"bound": bound["bound"].mean(), "KL": bound["kl"].sum("site").mean(), "saved": saved}
        figures = [f"{name} {float(value):.1f}" for name, value in nats.items()] + [f"axes {used}"]
        figures += [f"{name} {value:.2f}" for name, value in accuracy.items()]
        print(f"{decoder}, beta {beta:g}: {', '.join(figures)}", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=1500)
    main(parser.parse_args().steps)
