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
PAID = 0.5
"""Nats that guidance gains for each nat of KL, below which the code is said to cost more than it is worth."""
UNLIKE = 10.0
"""Fréchet distance of draws of the prior from data, over that of other data, from which they are said to be unlike."""


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
            "sp.recalibrate(program, key=key); where that was done, min_scale is to be lower from the beginning."
        )
    gain, cost = metrics.get("guidance_gain"), metrics.get("kl_total_nats", 0.0)
    if not collapsed and gain is not None and gain < PAID * cost:
        found.append(
            f"The code costs {cost:.1f} nats of KL and guidance gains {gain:.1f} by it: as a model of observations the "
            "program is better without. To try: a discount, a higher beta, fewer axes."
        )
    drawn = metrics.get("prior_draws")
    if drawn is not None and drawn["frechet"] > UNLIKE * max(drawn["frechet_data"], 0.0):
        found.append(
            "Draws of the prior do not look like the data: their Fréchet distance on random features is "
            f"{drawn['frechet']:.2g}, that of other data {drawn['frechet_data']:.2g}. To try: align, a prior that is "
            "learned, a higher beta."
        )
    if (told := metrics.get("calibration")) is not None and told["calibrated"] is False:
        found.append(_miscalibration(told))
    return found


def verdict(metrics: Mapping[str, Any]) -> str:
    """What a fit's figures say of it, in one sentence; what `fit_warnings` found is in `metrics["warnings"]`."""
    warned = metrics.get("warnings")
    if warned is None:
        return "Not checked."
    told = metrics.get("calibration") or {}
    if told.get("calibrated"):
        trust = (
            f"{told['simulations']} simulations cannot tell its posteriors from calibrated ones "
            f"(false alarms {100 * told['false_alarm']:g} %)"
        )
    else:
        trust = "its posteriors are not calibrated" if told.get("calibrated") is False else "calibration is not checked"
    if warned:
        return f"{len(warned)} warning{'s' * (len(warned) > 1)}; {trust}."
    return f"No warning: no sign of collapse was found, samples follow their codes; {trust}."


def _miscalibration(told: Mapping[str, Any]) -> str:
    """Which axes are off, and by how much."""
    off = [f"{axis} {said}" for axis, said in told["verdict"].items() if said != "calibrated"]
    shown = "; ".join(off[:SHOWN]) + ("; …" if len(off) > SHOWN else "")
    return (
        f"The posteriors are not calibrated, by {told['simulations']} simulations (false alarms "
        f"{100 * told['false_alarm']:g} %): {shown}. To fit a guide of its own to more samples: --set "
        "recalibrate=30000, or sp.recalibrate(program, key=key, simulations=30_000); more is told by sami calibrate."
    )


SHOWN = 4
"""Axes that a warning names."""
