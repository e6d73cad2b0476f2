"""Is the program right about the data? Held-out observations beside its draws, its samples of their codes, its prior.

Simulation-based calibration holds the posterior against images that the program draws itself: a program that is wrong
about the data passes. Of a program that is right, with a posterior that is right, three things can be exchanged:

- a held-out observation with a draw of the program, z ~ p(z), x ~ p(x | z);
- an observation x with samples of p(x | z) for *one* draw z from its posterior: (x, z) is then a draw of the joint law,
  and given z observation and samples are independent draws of p(x | z). So the rank of T(x, z) among the samples' is
  uniform for every function T (Johnson 2007, *Bayesian model assessment using pivotal quantities*; Gosselin 2011,
  *sampled posterior p-values*). With another z for every sample x would be used twice, and p-values crowd about ½;
- the codes z of all observations with draws of the prior.

Of entries that are hidden from the encoder nothing is used twice: there every sample has a z of its own, and hidden
entries can be exchanged with those of samples where entries are independent given the code.
"""

from collections.abc import Callable, Mapping
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key
import numpy as np
import xarray as xr

from sami_ppl._util.chunks import by_chunks, chunk_of
from sami_ppl._util.errors import UserError
from sami_ppl._util.keys import check_key
from sami_ppl._util.progress import progress_bar
from sami_ppl.calibration.checks import checks_table
from sami_ppl.calibration.ranks import LEVELS
from sami_ppl.diagnostics.gain import draw_codes
from sami_ppl.posteriors.generate import decode, prior_codes
from sami_ppl.posteriors.tree import obs_labels
from sami_ppl.priors.read import Given
from sami_ppl.program.program import Program

Statistic = Callable[[Float[np.ndarray, "n *event"]], Float[np.ndarray, " n"]]
"""One number of every observation; missing entries are NaN."""

OWN = ("distance", "log_q")
"""Statistics of observations and their codes, which every program has."""


def default_statistics(program: Program) -> dict[str, Statistic]:
    """Of the entries of an observation their mean, standard deviation, smallest and largest, and, where they lie beside
    each other, `roughness`: the root mean square difference of neighbours.
    """
    found: dict[str, Statistic] = {
        "mean": lambda x: np.nanmean(_flat(x), 1),
        "std": lambda x: np.nanstd(_flat(x), 1),
        "smallest": lambda x: np.nanmin(_flat(x), 1),
        "largest": lambda x: np.nanmax(_flat(x), 1),
    }
    axes = [
        axis
        for axis, (name, side) in enumerate(zip(program.event_dims, program.event_shape, strict=True), 1)
        if name not in ("channel", "feature") and side > 1
    ]
    if axes:

        def roughness(x: np.ndarray) -> np.ndarray:
            steps = np.concatenate([_flat(np.diff(x, axis=axis)) for axis in axes], 1)
            return np.sqrt(np.nanmean(steps**2, 1))

        found["roughness"] = roughness
    return found


def predictive_checks(
    program: Program,
    data: xr.Dataset | Float[Array | np.ndarray, "obs *event"],
    *,
    key: Key[Array, ""],
    statistics: Mapping[str, Statistic] | None = None,
    samples: int = 19,
    hidden: float = 0.25,
    resolution: float | None = None,
    false_alarm: float = 0.01,
    progress: bool = False,
) -> xr.DataTree:
    """Held-out observations against draws of the program, samples given their codes, and codes against the prior.

        checked = sp.predictive_checks(program, held_out, key=key)
        print(sp.calibration.describe_checks(checked))

    Args:
        program: the program.
        data: observations that no fit has seen, an array (obs, *event) or a Dataset, which holds the variables that
            the prior takes too; some tens or more.
        key: random key.
        statistics: functions of observations (n, *event), NaN where something is missing, to one number each (n,), by
            name. Default, those of `default_statistics`.
        samples: samples of the code of every observation, by the program's sampler: the greater part of the cost.
        hidden: share of the entries that are hidden from the encoder and predicted, where entries may be missing;
            other programs have no such check.
        resolution: in units of x; what differs by less is alike. Default, 1/255 of the range of the observations, as 8
            bits hold it: without, data of whole numbers differ from every sample.
        false_alarm: the probability that anything is flagged where program and posterior are right, at most: it is
            divided among all checks.
        progress: show a bar.

    Returns:
        A tree that ArviZ takes. `observed_data` (obs), `posterior_predictive` (chain, draw, obs), `prior_predictive`:
        the statistics of observations, of samples given their codes and of draws of the program; of the first two also
        `distance`, the root mean square distance from the mean of the other samples, and `log_q`, log q(z | x) in nats.
        `pit` (chain, draw), an observation a draw: their PIT values among the samples, as
        `az.plot_ecdf_pit(tree, group="pit")` takes them. `coverage` (obs, level): shares of the entries within central
        intervals of 50, 80 and 95 % of the samples, `entries`, and of `hidden` ones. `checks`: the table of
        `calibration.checks.checks_table`.

    Raises:
        ValueError: observations of another shape; UserError for fewer than 20 observations, 4 samples or statistics,
            a share or rate out of its range, and a statistic of another shape, or that is not finite.
    """
    check_key(key)
    x, given = program.observations(data)
    if len(x) < 20 or samples < 4:
        raise UserError(f"checks need at least 20 observations and 4 samples of each, got {len(x)} and {samples}")
    if not 0 < hidden < 1 or not 0 < false_alarm < 1:
        raise UserError(f"hidden and false_alarm must lie between 0 and 1, got {hidden} and {false_alarm}")
    chosen = default_statistics(program) if statistics is None else dict(statistics)
    if taken := {*chosen} & {*OWN}:
        raise UserError(f"statistics name {', '.join(sorted(taken))}, which every program has: choose other names")
    z_key, prior_key, draw_key, sample_key, hidden_key, tie_key = jax.random.split(key, 6)
    rng = np.random.default_rng(int(jax.random.randint(tie_key, (), 0, 2**31 - 1)))
    rounded = _rounding(x, resolution)
    x = rounded(x)
    observed = _evaluated(chosen, x, "the observations")

    z = draw_codes(program, x, z_key, given=given)
    prior_z = np.asarray(prior_codes(program, len(x), prior_key, given))
    drawn = rounded(decode(program, prior_z, jax.random.split(draw_key, len(x))))
    drawn = np.where(np.isnan(x), np.nan, drawn)
    of_draws = _evaluated(chosen, drawn, "draws of the program")

    own_code = lambda rows, _: np.repeat(z[rows], samples, axis=0)  # noqa: E731
    sets = _Sets(program, x, given, samples, rounded, rng)
    with progress_bar(len(x), "samples given codes", show=progress) as bar:
        found, inside = sets.compared(own_code, sample_key, ~np.isnan(x), chosen, z, bar)
    inside_hidden = None
    if program.missing == "entries":
        shown = _hide(x, hidden, rng)

        def fresh(rows: np.ndarray, key: Array) -> np.ndarray:
            own = {name: np.repeat(value[rows], samples, axis=0) for name, value in given.items()}
            return draw_codes(program, np.repeat(shown[rows], samples, axis=0), key, given=own)

        with progress_bar(len(x), "hidden entries", show=progress) as bar:
            _, inside_hidden = sets.compared(fresh, hidden_key, ~np.isnan(x) & np.isnan(shown), {}, None, bar)
    pit = {name: _pit(values, rng) for name, values in found.items()}
    units = str(data["x"].attrs.get("units", "of x")) if isinstance(data, xr.Dataset) else "of x"
    table = checks_table(
        observed, of_draws, found, pit, inside, inside_hidden, (z, prior_z), units=units, rng=rng,
        false_alarm=false_alarm,
    )  # fmt: skip
    table.attrs |= {
        "observations": len(x), "samples": samples, "sampler": type(program.sampler).__name__,
        "evaluations": program.sampler.evaluations,
    }  # fmt: skip
    return _tree(obs_labels(data, len(x)), of_draws, found, pit, inside, inside_hidden, table)


class _Sets:
    """An observation and samples of its code, one beside the other: whatever is computed of one is of all of them."""

    def __init__(
        self, program: Program, x: np.ndarray, given: Given, samples: int, rounded: Callable, rng: np.random.Generator
    ):
        self.program, self.x, self.given, self.samples = program, x, given, samples
        self.rounded, self.rng = rounded, rng

    def compared(
        self, codes: Callable, key: Array, entries: np.ndarray, statistics: Mapping[str, Statistic],
        z: np.ndarray | None, bar: Any,
    ) -> tuple[dict[str, np.ndarray], np.ndarray]:  # fmt: skip
        """Statistics (obs, 1 + samples), and the share of `entries` inside intervals of the others (obs, …, level).

        `codes` gives those of the samples of some observations; with `z`, what every program has is among them.
        """
        parts: list[dict[str, np.ndarray]] = []
        shares = []
        size = chunk_of(64, self.program.event_shape, passes=1 + self.samples)
        for i, start in enumerate(range(0, len(self.x), size)):
            rows = np.arange(start, min(start + size, len(self.x)))
            code_key, decode_key = jax.random.split(jax.random.fold_in(key, i))
            drawn_z = codes(rows, code_key)
            drawn = self.rounded(decode(self.program, drawn_z, jax.random.split(decode_key, len(drawn_z))))
            drawn = drawn.reshape(len(rows), self.samples, *self.program.event_shape)
            own = self.x[rows][:, None]
            sets = np.concatenate([own, np.where(np.isnan(own), np.nan, drawn)], axis=1)
            parts.append(self._statistics(sets, statistics, rows, z))
            shares += [_inside(one[:, seen], self.rng) for one, seen in zip(sets, entries[rows], strict=True)]
            bar.update(len(rows))
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}, np.stack(shares)

    def _statistics(
        self, sets: np.ndarray, statistics: Mapping[str, Statistic], rows: np.ndarray, z: np.ndarray | None
    ) -> dict[str, np.ndarray]:
        if z is None:
            return {}
        shape, flat = sets.shape[:2], sets.reshape(-1, *sets.shape[2:])
        found = _evaluated(statistics, flat, "samples given their codes")
        # From the mean of the others: that of all, with the own taken out.
        apart = (sets - sets.mean(1, keepdims=True)) * (shape[1] / self.samples)
        found["distance"] = np.sqrt(np.nanmean(_flat(apart.reshape(flat.shape)) ** 2, 1))
        repeated = np.repeat(rows, shape[1])
        own = {name: np.asarray(value)[repeated] for name, value in self.given.items()}
        chunk = chunk_of(256, self.program.event_shape)
        log_q = lambda *arrays: _log_q(self.program, *arrays)  # noqa: E731
        found["log_q"] = np.asarray(by_chunks(log_q, chunk, flat, z[repeated], own), float)
        return {name: values.reshape(shape) for name, values in found.items()}


@eqx.filter_jit
def _log_q(program: Program, x: Array, z: Array, given: Given) -> Array:
    return jnp.asarray(program.code_law(x, given).log_prob(z))


def _flat(x: np.ndarray) -> np.ndarray:
    return x.reshape(len(x), -1)


def _rounding(x: np.ndarray, resolution: float | None) -> Callable[[np.ndarray], np.ndarray]:
    """Onto multiples of the resolution, counted from the least of the observations."""
    low, high = float(np.nanmin(x)), float(np.nanmax(x))
    step = (high - low) / 255 if resolution is None else resolution
    if step < 0:
        raise UserError(f"resolution must be at least 0, got {resolution}: 0 takes values as they are")
    if step == 0:
        return lambda values: np.asarray(values, np.float32)
    return lambda values: (low + step * np.round((np.asarray(values, float) - low) / step)).astype(np.float32)


def _hide(x: np.ndarray, share: float, rng: np.random.Generator) -> np.ndarray:
    """Observations of which a share of what is seen, drawn at random, is NaN: at least one entry, never all."""
    shown = _flat(x).copy()
    for row in shown:
        seen = np.flatnonzero(~np.isnan(row))
        if len(seen) < 2:
            raise UserError("an observation has fewer than 2 entries that are seen: leave it out")
        count = min(max(1, round(share * len(seen))), len(seen) - 1)
        row[rng.choice(seen, count, replace=False)] = np.nan
    return shown.reshape(x.shape)


def _evaluated(statistics: Mapping[str, Statistic], x: np.ndarray, of: str) -> dict[str, np.ndarray]:
    found = {}
    for name, statistic in statistics.items():
        values = np.asarray(statistic(x), float)
        if values.shape != (len(x),):
            raise UserError(
                f"statistic {name!r} must give one number of each observation, shape ({len(x)},), got "
                f"{values.shape}: reduce all dims but the first"
            )
        if not np.isfinite(values).all():
            raise UserError(
                f"statistic {name!r} is not finite for {np.sum(~np.isfinite(values))} of {len(x)} of {of}: take the "
                "nan-functions of NumPy where something may be missing"
            )
        found[name] = values
    return found


def _inside(values: Float[np.ndarray, "members entries"], rng: np.random.Generator) -> np.ndarray:
    """The share of the entries of every member that lie inside central intervals of all members, (members, level)."""
    order = np.lexsort((rng.random(values.shape), values), axis=0)
    ranks = np.argsort(order, axis=0)
    pit = (ranks + rng.random(values.shape)) / len(values)
    return (np.abs(2 * pit - 1)[..., None] < np.asarray(LEVELS)).mean(1)


def _pit(values: Float[np.ndarray, "obs members"], rng: np.random.Generator) -> Float[np.ndarray, " obs"]:
    """(rank + U) / members of the first among all, those that are equal in random order."""
    own, others = values[:, :1], values[:, 1:]
    below, equal = (others < own).sum(1), (others == own).sum(1)
    return (below + (equal + 1) * rng.random(len(values))) / values.shape[1]


def _tree(
    labels: np.ndarray,
    of_draws: Mapping[str, np.ndarray],
    found: Mapping[str, np.ndarray],
    pit: Mapping[str, np.ndarray],
    inside: np.ndarray,
    inside_hidden: np.ndarray | None,
    table: xr.Dataset,
) -> xr.DataTree:
    import arviz as az

    names = {name: ["obs"] for name in found}
    groups = {
        "observed_data": {name: values[:, 0] for name, values in found.items()},
        "posterior_predictive": {name: values[:, 1:].T[None] for name, values in found.items()},
        "prior_predictive": {name: values[None, None] for name, values in of_draws.items()},
    }
    tree = az.from_dict(groups, dims=names, coords={"obs": labels})
    tree["pit"] = az.from_dict({"pit": {name: values[None] for name, values in pit.items()}})["pit"]
    shares = {"entries": inside} | ({} if inside_hidden is None else {"hidden": inside_hidden})
    tree["coverage"] = xr.DataTree(
        xr.Dataset(
            {name: (("obs", "level"), values[:, 0]) for name, values in shares.items()},
            coords={"obs": labels, "level": list(LEVELS)},
        )
    )
    tree["checks"] = xr.DataTree(table)
    return tree
