"""Discrete sites of a prior: their code, their values, and labels that are known for some observations.

The code of a site with K values is one-hot, K coordinates of z: log q(kind | x_λ, λ) is then a function of the code as
every other log density, and its gradient in x_λ, a classifier's, guides. Objectives sum over the values (enumeration),
so that nothing discrete is ever differentiated.
"""

import math
from typing import Any

import jax
from jax.core import Tracer
import jax.numpy as jnp
from jaxtyping import Array
import numpy as np
from numpyro import distributions as dist
from numpyro.distributions import constraints
from numpyro.distributions.transforms import ParameterFreeTransform
from numpyro.primitives import Messenger

from sami_ppl.priors.latents import Latents

MOST = 64
"""Combinations of values that an objective sums over at most: each costs a pass through the encoder."""


class OneHotTransform(ParameterFreeTransform):
    """Code (K,) → the value of its largest coordinate, 0 … K − 1; back, a one-hot vector."""

    def __init__(self, size: int):
        self.size = size

    @property
    def domain(self) -> constraints.Constraint:
        """Vectors."""
        return constraints.real_vector

    @property
    def codomain(self) -> constraints.Constraint:
        """0 … K − 1."""
        return constraints.integer_interval(0, self.size - 1)

    def __call__(self, x: Array) -> Array:
        return jnp.argmax(x, axis=-1)

    def _inverse(self, y: Array) -> Array:
        return jax.nn.one_hot(y, self.size)

    def log_abs_det_jacobian(self, x: Array, y: Array, intermediates: None = None) -> Array:
        return jnp.zeros(jnp.shape(y))

    def forward_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        return shape[:-1]

    def inverse_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        return (*shape, self.size)


def categories(name: str, fn: Any, kind: str) -> int:
    """The number of values of a discrete prior site; 0 for a continuous one.

    Raises ValueError unless these are 0 … K − 1, at most `MOST` of them, of a single variable.
    """
    if not fn.support.is_discrete:
        return 0
    if fn.event_shape:
        raise ValueError(
            f"prior site {name!r} ({kind}) holds several discrete variables or a one-hot vector, event shape "
            f"{tuple(fn.event_shape)}: write a dist.Categorical site for each variable"
        )
    if not fn.has_enumerate_support:
        raise ValueError(
            f"prior site {name!r} ({kind}) is discrete without a finite list of values to sum over: use "
            "dist.Categorical over those that matter, or a continuous site"
        )
    values = np.asarray(fn.enumerate_support(expand=False)).reshape(-1)
    if not np.array_equal(values, np.arange(len(values))):
        raise ValueError(
            f"prior site {name!r} ({kind}) has the values {values[0]} … {values[-1]}: number them from 0, as "
            "dist.Categorical does, and compute with them afterwards"
        )
    return len(values)


def check_combinations(sizes: dict[str, int]) -> None:
    """Raise ValueError where discrete sites have more combinations of values than are summed over."""
    if (count := math.prod(sizes.values())) > MOST:
        told = ", ".join(f"{name} ({size})" for name, size in sizes.items())
        raise ValueError(
            f"the discrete prior sites {told} have {count} combinations of values, more than the {MOST} that are "
            "summed over: marginalise one by dist.MixtureSameFamily, or relax it by sami_ppl.RelaxedOneHotCategorical"
        )


def labels(trace: dict[str, Any], latents: Latents) -> dict[str, np.ndarray]:
    """Known values (obs,) of partly observed sites in a prior's trace, −1 where there is none."""
    known = {site.name: trace[site.name].get("known") for site in latents.discrete}
    return {name: np.asarray(values) for name, values in known.items() if values is not None}


def _check_known(name: str, known: Array, fn: Any) -> None:
    if isinstance(known, Tracer) or not (count := categories(name, fn, type(fn).__name__)):
        return
    if wrong := sorted(set(np.asarray(known)[~np.isin(known, np.arange(-1, count))].tolist())):
        raise ValueError(
            f"known values of prior site {name!r} must be 0 … {count - 1}, the others masked out, got {wrong[0]}: "
            "number labels from 0, −1 where there is none, and write obs_mask=label >= 0"
        )


class partly_observed(Messenger):
    """Makes one site of NumPyro's three for `sample(name, fn, obs=labels, obs_mask=known)`, latent for everyone.

    NumPyro splits it into `name_observed`, `name_unobserved` and their merger `name`. Here the site `name` keeps its
    own values, and its `known` holds the labels, −1 where there is none: guide and code then have one site, and
    it is the objective that gives all weight to the label where it is known. ValueError for labels that the site has
    not, but while they are traced.
    """

    def __init__(self):
        self._labels: Any = None
        self._value: Any = None
        super().__init__()

    def process_message(self, msg: dict[str, Any]) -> None:
        """NumPyro's hook: take the observed part aside, rename the latent one, replace the merger."""
        mask = msg["fn"]._mask if isinstance(msg.get("fn"), dist.MaskedDistribution) else None
        if mask is not None and msg["is_observed"] and msg["name"].endswith("_observed"):
            name = msg["name"].removesuffix("_observed")
            known = jnp.where(mask, msg["value"], -1)
            _check_known(name, known, msg["fn"].base_dist)
            self._labels = (name, known, msg["fn"].base_dist)
            msg["stop"] = True
        elif self._labels is not None and msg["name"] == f"{self._labels[0]}_unobserved":
            name, known, msg["fn"] = self._labels
            msg["name"], msg["known"] = name, known  # not in infer, which replay takes from the guide
        elif self._labels is not None and msg["type"] == "deterministic" and msg["name"] == self._labels[0]:
            msg["value"], msg["stop"], self._labels = self._value, True, None

    def postprocess_message(self, msg: dict[str, Any]) -> None:
        """NumPyro's hook: remember the value of the latent part; under `handlers.do`, the one that is set."""
        # `do` sends the site through twice, as itself and then, under another name, with the value set.
        if self._labels is not None and msg["type"] == "sample" and "known" in msg:
            self._value = msg["value"]
