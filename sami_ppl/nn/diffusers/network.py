"""What the networks of diffusers have in common here: settings, weights by name, and a half that gives features."""

import abc
from collections.abc import Mapping
from typing import Any, ClassVar, Self

import equinox as eqx
import jax
from jaxtyping import Array, Float
import numpy as np

from sami_ppl.nn.diffusers.weights import with_copies, with_weights


class AbstractHalf(eqx.Module):
    """The half of a network that an encoder begins with: an image at a time step → a map of features."""

    settings: eqx.AbstractVar[Any]

    @abc.abstractmethod
    def features(self, x: Float[Array, "c h w"], timestep: Float[Array, ""]) -> Float[Array, "*places features"]:
        """The map in which this half ends, channels last."""


class AbstractNetwork(AbstractHalf):
    """A network of diffusers, from an image (channels, h, w) and a time step to an image of the same shape.

    `kinds`: the classes of diffusers that it is; `Settings` and `Half`: those of its settings and of its half.
    """

    kinds: ClassVar[tuple[str, ...]]
    Settings: ClassVar[Any]
    Half: ClassVar[Any]

    @abc.abstractmethod
    def __call__(self, x: Float[Array, "c h w"], timestep: Float[Array, ""]) -> Float[Array, "c h w"]:
        """What it was trained to predict."""

    @staticmethod
    @abc.abstractmethod
    def as_here(settings: Any, weights: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Weights of any version of diffusers with the names, and where they are no kernels the shapes, of this one.

        Raises ValueError for what has no place here.
        """

    @classmethod
    def empty(cls, settings: Any) -> Self:
        """A network with places for its weights, `jax.ShapeDtypeStruct`s."""
        return eqx.filter_eval_shape(cls, settings, key=jax.random.key(0))

    @classmethod
    def of(cls, settings: Any, weights: Mapping[str, np.ndarray]) -> Self:
        """The network with the weights of a checkpoint. Raises what `as_here` and `with_weights` raise."""
        return with_weights(cls.empty(settings), cls.as_here(settings, weights))

    @property
    def half(self) -> AbstractHalf:
        """The half that gives features, with copies of its weights."""
        return with_copies(eqx.filter_eval_shape(self.Half, self.settings, key=jax.random.key(0)), self)
