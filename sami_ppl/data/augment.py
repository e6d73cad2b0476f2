"""Symmetries of images that the user names: a small data set is seen moved and mirrored, by denoiser and encoder alike.

A symmetry is knowledge of the data: shifted clothes are clothes, a mirrored digit is none. It is applied to each batch
of a stage, anew in every step; validation sees observations as they are.
"""

from dataclasses import dataclass
from typing import Literal, get_args

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

Flip = Literal["none", "horizontal", "vertical", "both"]


@dataclass(frozen=True)
class Augmentation:
    """Random shifts of up to `shift` pixels along rows and columns, and mirrorings, each with probability one half.

    What is shifted in repeats the image's edge. Call it with a key and images (obs, channel, row, column). Raises
    ValueError for a shift that is no whole number of at least 0, and for another flip.
    """

    shift: int = 0
    flip: Flip = "none"

    def __post_init__(self) -> None:
        if isinstance(self.shift, bool) or not isinstance(self.shift, int) or self.shift < 0:
            raise ValueError(f"shift must be a whole number of pixels of at least 0, got {self.shift!r}")
        if self.flip not in get_args(Flip):
            raise ValueError(f"flip must be one of {', '.join(get_args(Flip))}, got {self.flip!r}")

    def check(self, event_shape: tuple[int, ...], event_dims: tuple[str, ...]) -> None:
        """Raise ValueError unless observations are single images that are larger than the shift."""
        if len(event_shape) != 3 or tuple(event_dims[1:]) != ("row", "column"):
            dims = ", ".join(event_dims) or "no dims"
            raise ValueError(
                f"augment is for single images (channel, row, column), observations are {event_shape} ({dims}): leave "
                "it out"
            )
        if self.shift >= min(event_shape[1:]):
            raise ValueError(f"shift must be below the image's sides, {event_shape[1:]}, got {self.shift}")

    def __call__(
        self, key: Key[Array, ""], x: Float[Array, "obs channel row column"]
    ) -> Float[Array, "obs channel row column"]:
        """The images, each moved and mirrored by itself."""
        shift_key, *flip_keys = jax.random.split(key, 3)
        if self.shift:
            s = self.shift
            wide = jnp.pad(x, ((0, 0), (0, 0), (s, s), (s, s)), mode="edge")
            starts = jax.random.randint(shift_key, (len(x), 2), 0, 2 * s + 1)
            cut = lambda image, at: jax.lax.dynamic_slice(image, (0, at[0], at[1]), x.shape[1:])  # noqa: E731
            x = jax.vmap(cut)(wide, starts)
        for axis, name, flip_key in zip((2, 3), ("vertical", "horizontal"), flip_keys, strict=True):
            if self.flip in (name, "both"):
                turned = jax.random.bernoulli(flip_key, shape=(len(x), 1, 1, 1))
                x = jnp.where(turned, jnp.flip(x, axis), x)
        return x


def augmented(*, shift: int = 0, flip: Flip = "none") -> Augmentation:
    """Symmetries of the data, for the stages of a fit.

        seen = sp.Sized(augment=sp.data.augmented(shift=2, flip="horizontal"))
        sp.fit(program, data, sp.TwoStage(denoiser=seen, encoder=seen), key=key)

    Args:
        shift: pixels by which images may be moved along rows and columns.
        flip: "horizontal", left and right exchanged, "vertical", top and bottom, "both" or "none".

    Raises:
        ValueError: a shift that is no whole number of at least 0, another flip.
    """
    return Augmentation(shift, flip)
