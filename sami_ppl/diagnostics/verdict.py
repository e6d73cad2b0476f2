"""What the figures of a fitted program warn of, in words: each with what to do about it."""

from collections.abc import Mapping, Sequence
from typing import Any

from sami_ppl.diagnostics.collapse import ADVICE, collapse_warning

TOLD = 0.05
"""Nats of KL below which a site is told nothing."""
FLOOR = 0.1
"""Share of posterior widths at the encoder's least scale from which it is said."""
FOLLOWING = 0.8
"""Squared error of samples to their own image, over that to another's, from which they are said not to follow."""


def fit_warnings(metrics: Mapping[str, Any], sites: Mapping[str, Sequence[str]]) -> list[str]:
    """What a fit's figures warn of.

    `metrics`: figures as `evaluate` makes them. `sites`: the axes of each site of the prior, by name.
    """
    kl, found = metrics["kl_nats"], []
    collapsed = collapse_warning(list(kl.values()), metrics["z_gain"])
    if collapsed is not None:
        found.append(collapsed)
    elif silent := [name for name, axes in sites.items() if sum(kl[axis] for axis in axes) < TOLD]:
        found.append(
            f"Nothing is told of {', '.join(map(repr, silent))}: the KL of the site is below {TOLD} nats, and its "
            f"posterior is the prior. To try: {ADVICE}; or leave the site out."
        )
    samples = metrics["samples"]
    own, other, mean = (samples.get(f"mse_{kind}", 0.0) for kind in ("own", "other", "mean_image"))
    if not collapsed and own > FOLLOWING * other:
        found.append(
            f"Samples hardly follow their code: squared error {own:.3g} to the image that gave it, {other:.3g} to "
            f"another ({mean:.3g} of the mean image). To try: lower beta, a discount, more steps of the encoder."
        )
    elif not collapsed and own > mean:
        found.append(
            f"A sample is farther from the image that gave its code than the mean image is: squared error {own:.3g}, "
            f"{mean:.3g}. The code tells little, or the samples are noisy: compare means of several samples, fit the "
            "denoiser for longer."
        )
    if (share := metrics.get("at_floor")) is not None and share > FLOOR:
        found.append(
            f"{share:.0%} of the posterior's widths lie at the least that the encoder gives, min_scale: they are that "
            "setting, not the data's. To fit a guide of its own: --set recalibrate=10000, or "
            "sp.recalibrate(program, key=key)."
        )
    return found
