"""A short calibration for every run: is there a sign that its posteriors cannot be believed?

A few hundred simulations tell a factor of 1.15 from 1; `sami calibrate` takes more of them, and looks at data too.
"""

from typing import Any

from jaxtyping import Array, Float, Key
import numpy as np

from sami_ppl.calibration.ranks import JOINT, calibration_table, simulated
from sami_ppl.posteriors.generate import sampled_values
from sami_ppl.program.program import Program

SIMULATIONS = 256
LEAST = 64
"""Simulations below which nothing is said."""


def quick_calibration(
    program: Program, *, key: Key[Array, ""], simulations: int = SIMULATIONS, seconds: float | None = None
) -> tuple[dict[str, Any], Float[np.ndarray, "n *event"]]:
    """What few simulations say of a program's calibration, as plain numbers, and the observations they made.

    `calibrated` is whether the ranks of all axes, and of the code as a whole, pass the test of uniformity with 1 % of
    false alarms in all; None where fewer than 64 simulations were made in the `seconds` that were given, or where they
    are not finite. `factor` by which each axis's posterior is too narrow, with standard errors, and `shift`, as
    `calibration_table` has them. Raises UserError for programs of sequences.
    """
    tree, x = simulated(program, key=key, simulations=simulations, draws=200, seconds=seconds, progress=False)
    figures: dict[str, Any] = {"simulations": len(x), "calibrated": None, "false_alarm": 0.01}
    means = tree["simulations"].to_dataset()["mean"].values
    finite = np.isfinite(means).all() and np.isfinite(sampled_values(program, x)).all()
    if len(x) >= LEAST and finite:
        table = calibration_table(tree, false_alarm=figures["false_alarm"])
        axes = table.drop_sel(axis=JOINT)
        names = [str(name) for name in axes["axis"].values]
        for name in ("factor", "factor_se", "shift"):
            figures[name] = dict(zip(names, axes[name].values.tolist(), strict=True))
        figures["verdict"] = {str(axis): str(table["verdict"].sel(axis=axis).item()) for axis in table["axis"].values}
        figures["calibrated"] = all(said == "calibrated" for said in figures["verdict"].values())
    return figures, x
