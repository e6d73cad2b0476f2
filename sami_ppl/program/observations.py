"""What a program takes for observations: arrays and Datasets in its own layout, with the variables of its prior."""

import abc
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float
import numpy as np
import numpyro
from numpyro import handlers
import xarray as xr

from sami_ppl.data.checks import Missing, as_array, as_floats, check_variable, prior_variables
from sami_ppl.data.layout import arranged
from sami_ppl.data.pixels import warn_of_scale
from sami_ppl.diffusion.denoiser import AbstractDenoiser
from sami_ppl.priors.discrete import labels
from sami_ppl.priors.latents import Latents
from sami_ppl.priors.lookups import check_lookups
from sami_ppl.priors.read import Given, GivenValues


class WithObservations(eqx.Module):
    """The part of a program that takes data."""

    denoiser: eqx.AbstractVar[AbstractDenoiser]
    latents: eqx.AbstractVar[Latents]
    given: eqx.AbstractVar[GivenValues]
    event_dims: eqx.AbstractVar[tuple[str, ...]]
    event_shape: eqx.AbstractVar[tuple[int, ...]]
    of_sequences: eqx.AbstractVar[bool]

    @abc.abstractmethod
    def sample_prior(self, plate: Any, size: int, given: Given | None = None) -> None:
        """Sample all sites of the prior for the `size` observations of a plate."""

    @property
    def missing(self) -> Missing:
        """What may be missing in observations, NaN."""
        if self.of_sequences:
            return "frames"
        return "nothing" if self.denoiser.seen is None else "entries"

    def check_observations(self, x: Array | np.ndarray) -> None:
        """Raise ValueError unless x has shape (obs, *event)."""
        if jnp.ndim(x) != 1 + len(self.event_shape) or jnp.shape(x)[1:] != self.event_shape:
            raise ValueError(
                f"x must have shape (obs, {', '.join(map(str, self.event_shape))}), got {jnp.shape(x)}"
                + ("; add the leading dim: x[None]" if jnp.shape(x) == self.event_shape else "")
            )

    def laid_out(self, data: xr.Dataset) -> xr.Dataset:
        """The data with x in the program's layout, where it is another order of its dims or lacks a channel."""
        raw = data["x"]
        x = arranged(raw, raw.dims[1:], self.event_shape, self.event_dims)
        return data if x is raw else data.assign(x=(("obs", *self.event_dims), np.asarray(x), raw.attrs))

    def observed(
        self, data: xr.Dataset | Array | np.ndarray, *, at_least: int = 1, why: str = ""
    ) -> Float[np.ndarray, "obs *event"]:
        """Observations x as floats, of an array or of a Dataset with the variable x, in the program's layout: dims are
        matched by name, in arrays channels that are last come to the front and grey images get theirs.

        Raises ValueError for another shape, for no observations, and for fewer than `at_least`, saying `why`; TypeError
        and ValueError for values that `data.checks.as_floats` refuses. Warns of values on another scale than the
        denoiser was built for.
        """
        if isinstance(data, xr.Dataset):
            check_variable(data, "x")
        x: Any = as_array(data["x"].values if isinstance(data, xr.Dataset) else data)
        dims = data["x"].dims[1:] if isinstance(data, xr.Dataset) else None
        x = arranged(x, dims, self.event_shape, self.event_dims)
        self.check_observations(x)
        if len(x) == 0:
            raise ValueError("data holds no observations: give an array of shape (obs, *event)")
        if len(x) < at_least:
            raise ValueError(f"{why or 'x'} needs at least {at_least} observations, got {len(x)}: give more of them")
        x = as_floats(x, missing=self.missing)
        warn_of_scale(x, self.denoiser.statistics)
        return x

    def observations(self, data: xr.Dataset | Array | np.ndarray) -> tuple[Float[np.ndarray, "obs *event"], Given]:
        """Observations x and the variables that the prior takes, of an array of x or a Dataset with all of them.

        Raises what `observed` raises, and ValueError for a variable that is missing or that `data.checks.as_numbers`
        refuses.
        """
        x = self.observed(data)
        return x, self.variables(data, len(x))

    def variables(self, data: xr.Dataset | Array | np.ndarray, size: int) -> Given:
        """The variables that the prior takes, of `size` observations. Raises as `observations` does, and for labels
        outside the table that the prior looks up by them.
        """
        numbers = {n: v for n, v in self.given.rows(slice(None)).items() if n not in self.latents.tables}
        given = prior_variables(data, self.latents.arguments, numbers)
        check_lookups(given, self.latents.tables)
        self.known_values(given, size)
        return given

    def known_values(self, given: Given, size: int) -> dict[str, np.ndarray]:
        """Of partly observed discrete sites: the value, −1 where unknown, (obs,). Raises ValueError for values that a
        site has not.
        """
        if not self.latents.discrete or not self.latents.arguments:
            return {}
        run = handlers.seed(self.sample_prior, jax.random.key(0))
        return labels(handlers.trace(run).get_trace(numpyro.plate("obs", size), size, given), self.latents)
