"""Posteriors that inform nothing, and what to do about them."""

from collections.abc import Sequence

ADVICE = (
    "lower beta, fit the denoiser longer, start the encoder warm, give spare latents, or set free_bits (for instance "
    "encoder.free_bits=0.5)"
)


class CollapseWarning(UserWarning):
    """The fitted posterior says nothing about the observations."""


def collapse_warning(kl: Sequence[float], gain: float) -> str | None:
    """What to tell the user about a posterior that informs nothing; None for one that does.

    `kl`: KL per axis in nats. `gain`: how much worse another observation's z predicts the noise than an observation's
    own, in nats. Both are asked for, since a KL above zero alone passes models whose samples ignore z.
    """
    if max(kl) < 0.05:
        return f"The posterior has collapsed: the KL is below .05 nats on every axis. To try: {ADVICE}."
    if gain < 0.05:
        return (
            "z informs nothing: the z of another observation predicts the noise as well as its own (difference "
            f"{gain:.2f} nats), though the KL is not zero. To try: {ADVICE}."
        )
    return None
