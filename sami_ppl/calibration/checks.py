"""What predictive checks found, in a table and in words."""

from collections.abc import Mapping
from typing import Any

from jaxtyping import Float
import numpy as np
import xarray as xr

from sami_ppl.calibration.ranks import LEVELS
from sami_ppl.metrics.samples import mmd_test

RIGHT = "as it should be"


def checks_table(
    observed: Mapping[str, Float[np.ndarray, " obs"]],
    of_draws: Mapping[str, Float[np.ndarray, " obs"]],
    of_samples: Mapping[str, Float[np.ndarray, "obs members"]],
    pit: Mapping[str, Float[np.ndarray, " obs"]],
    inside: Float[np.ndarray, "obs members level"],
    inside_hidden: Float[np.ndarray, "obs members level"] | None,
    codes: tuple[Float[np.ndarray, "obs D"], Float[np.ndarray, "obs D"]],
    *,
    units: str,
    rng: np.random.Generator,
    false_alarm: float,
) -> xr.Dataset:
    """A row on `check` for every statistic of draws and of samples, for intervals of entries, and for the codes.

    Variables: `observed` and `drawn`, the mean of the statistic over observations, and over what the program draws in
    their place, in `units`; of intervals the share of entries inside and the content; of codes their root mean square.
    `p_value`: of draws and codes by `mmd_test`; of samples by ArviZ's test of the uniformity of PIT values
    (POT-C); of intervals by which member of every set is called the observation, all being alike. `verdict` in words.
    A check is flagged where its p-value is below `false_alarm` over the number of checks.

    The first of `members` is the observation. `codes`: of observations, and of the prior.
    """
    from arviz_stats.base import array_stats  # pyright: ignore[reportPrivateImportUsage]
    from scipy.stats import norm

    covered = {"entries": inside} | ({} if inside_hidden is None else {"hidden entries": inside_hidden})
    total = len(observed) + len(pit) + len(LEVELS) * len(covered) + 1
    least = false_alarm / total
    permutations = int(5 / least)
    seed = int(rng.integers(2**31 - 1))
    rows: list[tuple[str, float, float, str, float, str]] = []
    for name, own in observed.items():
        drawn = of_draws[name]
        p = mmd_test(own[:, None], drawn[:, None], permutations=permutations, seed=seed)
        spread = max(float(drawn.std()), 1e-12)
        told = _words(
            name, "draws of the program", float(own.mean() - drawn.mean()) / spread, float(own.std()) / spread
        )
        rows.append((f"draws: {name}", own.mean(), drawn.mean(), units, p, told if p < least else RIGHT))
    for name, values in pit.items():
        p = float(array_stats.uniformity_test(values[:, None], axis=0)[0][0])
        probit = norm.ppf(np.clip(values, 1e-6, 1 - 1e-6))
        told = _words(name, "samples of their code", float(probit.mean()), float(probit.std()))
        means = of_samples[name][:, 0].mean(), of_samples[name][:, 1:].mean()
        own_units = "nats" if name == "log_q" else units
        rows.append((f"samples: {name}", *means, own_units, p, told if p < least else RIGHT))
    for of, shares in covered.items():
        for i, level in enumerate(LEVELS):
            one = shares[:, :, i]
            p, said = _of_roles(one, permutations, rng), float(one[:, 0].mean())
            told = f"intervals too {'narrow' if said < one.mean() else 'wide'}"
            rows.append((f"{of}: {level:.0%}", said, level, "1", p, told if p < least else RIGHT))
    own, prior = (np.asarray(z, float) for z in codes)
    p = mmd_test(own, prior, permutations=permutations, seed=seed)
    told = "codes of observations are not spread as the prior"
    sizes = float(np.sqrt((own**2).mean())), float(np.sqrt((prior**2).mean()))
    rows.append(("codes", sizes[0], sizes[1], "prior spreads", p, told if p < least else RIGHT))
    names, *columns = (list(column) for column in zip(*rows, strict=True))
    variables = {
        name: ("check", np.asarray(column))
        for name, column in zip(("observed", "drawn", "units", "p_value", "verdict"), columns, strict=True)
    }
    return xr.Dataset(variables, coords={"check": names}, attrs={"false_alarm": false_alarm})


def _words(name: str, others: str, shift: float, ratio: float) -> str:
    """What a statistic says where it is flagged; shift and ratio in standard deviations of the others."""
    if name == "log_q" and shift > 0:
        return "samples do not follow their code as observations do"
    if name == "log_q":
        return "observations are unlike samples of their code"
    if name == "distance":
        return f"samples of a code vary too {'little, or lie elsewhere' if shift > 0 else 'much'}"
    if abs(shift) > 0.2 or 0.9 < ratio < 1.1:
        return f"{'higher' if shift > 0 else 'lower'} than of {others}, by {abs(shift):.2g} of their standard deviation"
    return f"spread by {ratio:.2g} times what {others} say"


def _of_roles(shares: Float[np.ndarray, "obs members"], permutations: int, rng: np.random.Generator) -> float:
    """p-value, two-sided, of the mean share of the first members, were any other member of each set in its place."""
    apart = shares - shares.mean()
    found, as_far = abs(apart[:, 0].mean()), 1
    every = np.arange(len(apart))[:, None]
    for start in range(0, permutations, 1000):
        roles = rng.integers(apart.shape[1], size=(len(apart), min(1000, permutations - start)))
        as_far += int((np.abs(apart[every, roles].mean(0)) >= found - 1e-12).sum())
    return as_far / (permutations + 1)


def describe_checks(tree: xr.DataTree) -> str:
    """The table of `predictive_checks` as text, a line for each check."""
    table = tree["checks"].to_dataset()
    told, width = table.attrs, max(len(str(name)) for name in table["check"].values)
    lines = [
        f"predictive checks: {told['observations']} held-out observations, {told['samples']} samples of the code of "
        f"each ({told['sampler']}, {told['evaluations']} evaluations); false alarms {100 * told['false_alarm']:g}% "
        "over all lines",
        f"  {'':<{width}}{'observed':>11}{'drawn':>11}  {'units':<14}{'p-value':>9}  verdict",
    ]
    for name in table["check"].values:
        row: Any = table.sel(check=name)
        numbers = "".join(f"{float(row[of]):>11.4g}" for of in ("observed", "drawn")).replace("-", "−")
        p_value = f"{float(row['p_value']):.1g}"
        units, verdict = (str(row[of].item()) for of in ("units", "verdict"))
        lines.append(f"  {name:<{width}}{numbers}  {units:<14}{p_value:>9}  {verdict}")
    return "\n".join(lines)


def flagged(tree: xr.DataTree) -> dict[str, str]:
    """The verdicts of checks that are not as they should be, by name."""
    table = tree["checks"].to_dataset()
    pairs = zip(table["check"].values, table["verdict"].values, strict=True)
    return {str(name): str(said) for name, said in pairs if said != RIGHT}
