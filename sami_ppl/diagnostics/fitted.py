"""Programs whose networks are still as they were made."""

import warnings

import equinox as eqx
import jax
import numpy as np

from sami_ppl.nn import AbstractResidual
from sami_ppl.program.program import Program


class NotFittedWarning(UserWarning):
    """A network has never been trained: what is computed with it says nothing about the data."""


def not_fitted(program: Program) -> list[str]:
    """Which of `"denoiser"` and `"encoder"` have never been trained.

    Blocks that are `AbstractResidual`, as those of `sami_ppl.nn` are, start as the identity, and one step of any
    optimiser takes them away from it; pretrained weights are seen for what they are, wherever they come from. Networks
    without such blocks are taken for fitted, since nothing is known of how they start.
    """
    return [part for part in ("denoiser", "encoder") if _at_the_start(getattr(program, part))]


def warn_if_not_fitted(program: Program, *, stacklevel: int = 3) -> None:
    """Warn, as the caller of the caller, of networks that have never been trained."""
    if parts := not_fitted(program):
        warnings.warn(
            f"The {' and the '.join(parts)} of this program have never been fitted, and what follows says nothing "
            "about the data: program, history = sp.fit(program, data, sp.Stage(steps=3000), key=key) fits both, "
            'sp.Stage(steps=3000, train=("encoder",)) one of them.',
            NotFittedWarning,
            stacklevel=stacklevel,
        )


def _at_the_start(part: eqx.Module) -> bool:
    nodes = jax.tree.leaves(part, is_leaf=lambda node: isinstance(node, AbstractResidual))
    last = [node.last for node in nodes if isinstance(node, AbstractResidual)]
    arrays = jax.tree.leaves(eqx.filter(last, eqx.is_inexact_array))
    return bool(arrays) and not any(np.any(np.asarray(array)) for array in arrays)
