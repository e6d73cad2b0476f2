"""Simulation-based calibration (Talts et al. 2018), and what the ranks say in words.

Draw z* from the prior and x from the program given z*: then z* is a draw from the model's own posterior of x. Where the
amortised posterior is that posterior, z* is exchangeable with S draws z of it, so that for every function f

    PIT = (#{f(z) < f(z*)} + U) / (S + 1),      U ~ Uniform(0, 1),

is exactly uniform, whatever S and whatever the family. Here f is each axis of the code in turn, and log q(z | x), whose
PIT says whether regions of highest density hold z* as often as they say (`joint`).

It is the fitted model, its sampler included, that the posterior is held against; real data play no part in it.
"""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key
import numpy as np
import xarray as xr

from sami_ppl._util.chunks import chunk_of, padded_chunks
from sami_ppl._util.errors import UserError
from sami_ppl._util.keys import check_key
from sami_ppl._util.progress import progress_bar
from sami_ppl.diagnostics.fitted import warn_if_not_fitted
from sami_ppl.diffusion.sampler import AbstractSampler
from sami_ppl.priors.sites import Process
from sami_ppl.program.program import Program

LEVELS = (0.5, 0.8, 0.95)
"""Contents of the intervals and regions whose coverage is told."""

JOINT = "joint"


def simulation_based_calibration(
    program: Program,
    *,
    key: Key[Array, ""],
    simulations: int = 512,
    draws: int = 200,
    sampler: AbstractSampler | None = None,
    chunk: int | None = None,
    progress: bool | None = None,
) -> xr.DataTree:
    """Ranks of simulated codes among `draws` draws from their amortised posteriors.

    Groups: `prior_sbc`, PIT values as `az.plot_ecdf_pit` takes them, `code` (chain = 1, draw = simulation, axis) and
    `joint` (chain, draw), that of log q; `simulations`, the codes `z` and the posteriors' `mean` and `sd`, each
    (simulation, axis). `sampler` replaces the program's own: the posterior is calibrated for one sampler's images.
    `chunk`: simulations at a time, default 64, fewer of large observations. `progress`: show a bar.

    Raises ValueError for fewer than 2 simulations or draws, UserError for programs of sequences.
    """
    check_key(key)
    warn_if_not_fitted(program)
    return simulated(
        program, key=key, simulations=simulations, draws=draws, sampler=sampler, chunk=chunk, progress=progress
    )[0]


def simulated(
    program: Program,
    *,
    key: Key[Array, ""],
    simulations: int,
    draws: int,
    sampler: AbstractSampler | None = None,
    chunk: int | None = None,
    seconds: float | None = None,
    progress: bool | None = None,
) -> tuple[xr.DataTree, Float[np.ndarray, "simulations *event"]]:
    """The tree of `simulation_based_calibration`, and the observations that it is of.

    `seconds`: after so many no further chunk of simulations is begun. Raises as that does.
    """
    check_key(key)
    import arviz as az

    chunk = chunk_of(64, program.event_shape) if chunk is None else chunk
    for name, value in (("simulations", simulations), ("draws", draws), ("chunk", chunk)):
        least = 1 if name == "chunk" else 2
        if value < least:
            raise ValueError(f"{name} must be at least {least}, got {value}")
    if any(isinstance(site, Process) for site in program.latents.sites):
        raise UserError("program is one of sequences, whose ranks are not known yet: calibrate frames_of(program)")
    sampler = program.sampler if sampler is None else sampler
    prior_key, image_key, rank_key = jax.random.split(key, 3)
    truth = program.prior_codes(prior_key, simulations)
    keys = jax.random.split(image_key, simulations)
    parts, images = [], []
    with progress_bar(simulations, "simulations", show=progress, unit="image") as bar:
        for i, (rows, count) in enumerate(padded_chunks(simulations, chunk, seconds=seconds)):
            x, *found = _ranks(program, sampler, truth[rows], keys[rows], jax.random.fold_in(rank_key, i), draws)
            images.append(np.asarray(x)[:count])
            parts.append(tuple(np.asarray(value, float)[:count] for value in found))
            bar.update(count)
    code, joint, mean, sd = (np.concatenate(part) for part in zip(*parts, strict=True))
    axes = list(program.latents.axes)
    tree = az.from_dict(
        {"prior_sbc": {"code": code[None], JOINT: joint[None]}}, dims={"code": ["axis"]}, coords={"axis": axes}
    )
    each = ("simulation", "axis")
    variables = {"z": (each, np.asarray(truth, float)[: len(mean)]), "mean": (each, mean), "sd": (each, sd)}
    tree["simulations"] = xr.DataTree(xr.Dataset(variables, coords={"axis": axes}))
    tree.attrs |= {"draws": draws, "sampler": type(sampler).__name__, "evaluations": sampler.evaluations}
    return tree, np.concatenate(images)


@eqx.filter_jit
def _ranks(
    program: Program, sampler: AbstractSampler, truth: Array, image_keys: Array, key: Array, draws: int
) -> tuple[Array, Array, Array, Array, Array]:
    """Samples, PIT of every axis (obs, D) and of log q (obs,), means and standard deviations (obs, D) of the draws."""
    encoder = program.encoder

    def one(truth: Array, image_key: Array, key: Array) -> tuple[Array, Array, Array, Array, Array]:
        draw_key, tie_key = jax.random.split(key)
        x = sampler.sample(program.decoder(truth), image_key)
        q = encoder.law(x)
        z = jax.vmap(q.sample)(jax.random.split(draw_key, draws))
        drawn, true = (jnp.concatenate([c, jnp.asarray(q.log_prob(c))[:, None]], axis=1) for c in (z, truth[None]))
        # Draws that equal the truth, as those of discrete sites do, are ordered at random.
        below, equal = (drawn < true).sum(0), (drawn == true).sum(0)
        pit = (below + (equal + 1) * jax.random.uniform(tie_key, below.shape)) / (draws + 1)
        return x, pit[:-1], pit[-1], z.mean(0), z.std(0, ddof=1)

    return jax.vmap(one)(truth, image_keys, jax.random.split(key, len(truth)))


def calibration_table(tree: xr.DataTree, *, false_alarm: float = 0.01) -> xr.Dataset:
    """What the PIT values of `simulation_based_calibration` say, for every axis and for the code as a whole (`joint`).

    Variables on `axis`: `p_value` of ArviZ's test of uniformity (POT-C, the one `az.plot_ecdf_pit` shows); `factor` by
    which the posterior's standard deviation is too small and `shift`, how far it lies above the truth in its own
    standard deviations, from mean and standard deviation of Φ⁻¹(PIT), with standard errors `factor_se`, `shift_se`. A
    rank beyond all draws has no distance, so that large factors are lower ends (1.43 is 1.38 with 200 draws). Further
    `coverage` (axis, level) of central intervals, of regions of highest density for `joint`, with the standard error
    `coverage_se` (level,) that it has where it is nominal; `contraction`, 1 − posterior / prior variance, and
    `z_score`, the root mean square of (posterior mean − truth) / posterior standard deviation (Betancourt 2018,
    *Calibrating Model-Based Inferences and Decisions*), 1 up to noise where the posterior is calibrated, and without an
    upper end; `verdict`.

    `false_alarm`: the probability that any verdict but "calibrated" is passed on a calibrated posterior, at most: it is
    divided among the axes and the whole (Bonferroni). Raises ValueError unless it lies between 0 and 1, and for a tree
    without the groups of `simulation_based_calibration`.
    """
    from arviz_stats.base import array_stats  # pyright: ignore[reportPrivateImportUsage]
    from scipy.stats import norm

    if not 0 < false_alarm < 1:
        raise ValueError(f"false_alarm must lie between 0 and 1, got {false_alarm}")
    for group in ("prior_sbc", "simulations"):
        if group not in tree.children:
            raise ValueError(
                f"tree has no group {group!r}, it has {', '.join(tree.children) or 'none'}: write "
                "tree = simulation_based_calibration(program, key=...)"
            )
    ranks, simulated = tree["prior_sbc"].to_dataset().isel(chain=0), tree["simulations"].to_dataset()
    axes = list(ranks["axis"].values)
    code, joint = ranks["code"].transpose("draw", "axis").values, ranks[JOINT].values
    pit = np.concatenate([code, joint[:, None]], axis=1)
    count, draws = len(pit), tree.attrs["draws"]
    p_value = np.asarray(array_stats.uniformity_test(pit, axis=0)[0], float)
    probit = norm.ppf(np.clip(code, 1e-9, 1 - 1e-9))
    factor, shift = probit.std(0, ddof=1), -probit.mean(0)
    fourth = ((probit - probit.mean(0)) ** 4).mean(0)
    factor_se, shift_se = np.sqrt((fourth - factor**4) / (4 * count)) / factor, factor / np.sqrt(count)
    inside = np.concatenate([np.abs(2 * code - 1), 1 - joint[:, None]], axis=1)
    levels = np.asarray(LEVELS)
    coverage = (inside[:, :, None] < levels).mean(0)
    outermost = ((code * (draws + 1) < 1) | (code * (draws + 1) > draws)).mean(0)
    prior, posterior = simulated["z"].var("simulation", ddof=1), (simulated["sd"] ** 2).mean("simulation")
    z_score: Any = np.sqrt((((simulated["mean"] - simulated["z"]) / simulated["sd"]) ** 2).mean("simulation"))
    rejected = p_value < false_alarm / len(p_value)
    verdicts = [
        _verdict((width, width_se), (off, off_se), saturated=share > 0.1) if one else "calibrated"
        for one, width, width_se, off, off_se, share in zip(
            rejected[:-1], factor, factor_se, shift, shift_se, outermost, strict=True
        )
    ]
    off = coverage[-1] - levels
    size = "small" if off[np.argmax(np.abs(off))] < 0 else "large"
    verdicts.append(f"regions too {size}" if rejected[-1] else "calibrated")
    with_nan = lambda values: ("axis", np.append(values, np.nan))  # noqa: E731
    variables = {
        "p_value": ("axis", p_value),
        "factor": with_nan(factor), "factor_se": with_nan(factor_se),
        "shift": with_nan(shift), "shift_se": with_nan(shift_se),
        "coverage": (("axis", "level"), coverage),
        "coverage_se": ("level", np.sqrt(levels * (1 - levels) / count)),
        "contraction": with_nan((1 - posterior / prior).values),
        "z_score": with_nan(z_score.values),
        "verdict": ("axis", np.array(verdicts)),
    }  # fmt: skip
    attrs = {**tree.attrs, "simulations": count, "false_alarm": false_alarm}
    return xr.Dataset(variables, coords={"axis": [*axes, JOINT], "level": levels}, attrs=attrs)


def _verdict(factor: tuple[float, float], shift: tuple[float, float], *, saturated: bool) -> str:
    """Words for an axis whose PIT values are not uniform: what stands out by more than three standard errors."""
    said = []
    if abs(factor[0] - 1) > 3 * factor[1]:
        # The outermost ranks hold what lies beyond the draws, however far.
        more = " or more" if saturated and factor[0] > 1 else ""
        narrow = "narrow" if factor[0] > 1 else "wide"
        said.append(f"too {narrow} by a factor of about {max(factor[0], 1 / factor[0]):.2f}{more}")
    if abs(shift[0]) > 3 * shift[1]:
        said.append(f"shifted by {_signed(shift[0])} posterior standard deviations")
    return ", ".join(said) or "centre and width are right, the shape is not"


def _signed(value: float) -> str:
    return f"{value:+.2f}".replace("-", "−")


def describe(table: xr.Dataset) -> str:
    """The table of `calibration_table` as text, a line for each axis."""
    levels = ", ".join(f"{level:.0%}" for level in table["level"].values)
    width = max(len(str(axis)) for axis in table["axis"].values)
    told = table.attrs
    lines = [
        f"simulation-based calibration: {told['simulations']} simulations ({told['sampler']}, {told['evaluations']} "
        f"evaluations), {told['draws']} draws each; false alarms {100 * told['false_alarm']:g}% over all lines",
        f"  {'':<{width}}  {'coverage of ' + levels:<26}{'p-value':>9}{'factor':>8}{'shift':>8}  verdict",
    ]
    for name in table["axis"].values:
        row: Any = table.sel(axis=name)
        covered = ", ".join(f"{float(value):.0%}" for value in row["coverage"].values)
        moments = f"{float(row['factor']):>8.2f}{_signed(float(row['shift'])):>8}" if name != JOINT else f"{'':16}"
        p_value = f"{float(row['p_value']):.1g}" if row["p_value"] > 1e-15 else "<1e-15"
        lines.append(f"  {name:<{width}}  {covered:<26}{p_value:>9}{moments}  {row['verdict'].item()}")
    errors = ", ".join(f"{float(value):.1%}" for value in table["coverage_se"].values)
    lines.append(f"  standard errors: coverage {errors}; factor ±{float(table['factor_se'].mean()):.2f}, "
                 f"shift ±{float(table['shift_se'].mean()):.2f}")  # fmt: skip
    return "\n".join(lines)
