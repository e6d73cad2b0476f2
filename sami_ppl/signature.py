"""What a checkpoint is of: the settings of a stage, the program, and the data. A fit goes on from no other."""

from dataclasses import asdict
from functools import partial
import hashlib
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
from numpyro import distributions as dist
from numpyro import handlers

from sami_ppl.prior import Given, sample_prior
from sami_ppl.program import Program
from sami_ppl.stage import Stage


def signature(
    program: Program, stage: Stage, data: tuple[Any, Given], held_out: tuple[Any, Given], **settings: Any
) -> dict[str, Any]:
    """What a run must have in common with the one that it continues; plain values, for `Checkpoints`.

    `data` and `held_out`: x and the variables that the prior takes, on the host.
    """
    weights = {network: sum(leaf.size for leaf in jax.tree.leaves(p)) for network, p in program.params().items()}
    return asdict(stage) | settings | weights | {
        "denoiser_loss": program.denoiser_loss,
        "schedule": eqx.tree_pformat(program.denoiser.schedule, short_arrays=False),
        "sites": laws(program), "data": digests(*data), "held_out": digests(*held_out),
    }  # fmt: skip


def digests(x: Any, given: Given) -> dict[str, str]:
    """The first 16 digits of the SHA-256 of every array."""
    arrays = {"x": x, **given}
    return {name: hashlib.sha256(np.ascontiguousarray(array)).hexdigest()[:16] for name, array in arrays.items()}


def laws(program: Program) -> dict[str, str]:
    """The sites of the prior as it begins: law, transform, and a draw with its log density, which tell parameters."""
    run = handlers.seed(partial(sample_prior, program.prior), jax.random.key(0))
    trace = handlers.trace(run).get_trace(numpyro.plate("obs", 1), program.given.rows(jnp.arange(1)))
    described = {}
    for site in (*program.latents.sites, *program.latents.shared):
        law, value = trace[site.name]["fn"], trace[site.name]["value"]
        # Four digits are the same wherever they are computed.
        draw = f"log density {float(jnp.sum(law.log_prob(value))):.4g} at {float(jnp.sum(value)):.4g}"
        while isinstance(law, dist.Independent | dist.ExpandedDistribution | dist.MaskedDistribution):
            law = law.base_dist
        described[site.name] = f"{type(law).__name__}, {type(site.transform).__name__}, {draw}"
    return described
