"""What a checkpoint is of: the settings of a stage, the program, and the data. A fit goes on from no other."""

from dataclasses import asdict, replace
import hashlib
from typing import Any

import equinox as eqx
import jax
import numpy as np

from sami_ppl.distributions.supports import described
from sami_ppl.fitting.stage import Stage
from sami_ppl.priors.read import Given
from sami_ppl.program.program import Program


def signature(
    program: Program, stage: Stage, data: dict[str, Any], held_out: tuple[Any, Given], **settings: Any
) -> dict[str, Any]:
    """What a run must have in common with the one that it continues; plain values, for `Checkpoints`.

    `data`: by what the data are known again. `held_out`: x and the variables that the prior takes, on the host.
    """
    sites = (*program.latents.sites, *program.latents.global_sites)
    weights = {network: sum(leaf.size for leaf in jax.tree.leaves(p)) for network, p in program.params().items()}
    # Functions by their names: where they lie in memory is another thing in every process.
    named = lambda f: f if isinstance(f, int | float) else getattr(f, "__qualname__", type(f).__qualname__)  # noqa: E731
    penalties = {name: named(f) for name, f in stage.penalties.items()}
    return asdict(replace(stage, penalties={})) | settings | weights | {
        "penalties": penalties,
        "schedule": eqx.tree_pformat(program.denoiser.schedule, short_arrays=False),
        "sites": {site.name: [site.law, described(site.transform)] for site in sites},
        "data": data, "held_out": digests(*held_out),
    }  # fmt: skip


def digests(x: Any, given: Given) -> dict[str, str]:
    """The first 16 digits of the SHA-256 of every array."""
    arrays = {"x": x, **given}
    return {name: hashlib.sha256(np.ascontiguousarray(array)).hexdigest()[:16] for name, array in arrays.items()}
