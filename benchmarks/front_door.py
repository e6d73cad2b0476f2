"""The front door against the long form: `python -m benchmarks.front_door`.

The README's example, which guesses networks, statistics, batches and steps, beside the same fit put together by hand as
docs/pieces.md does: a prior function, two networks, two stages and the warm start between them, in three calls. Sizes,
stages and random keys are those that the front door takes, so that the two differ by rounding, or one of them does what
it does not say. Compared on disks, on scikit-learn's digits and on vectors by the bound on −log p(x) of the same
held-out observations at the same noise levels, in nats per observation: less is better. The standard error of a
difference is that of the differences of single observations; the control is the long form from other weights.
"""

import argparse
from collections.abc import Callable
from dataclasses import replace
import json
import math
from pathlib import Path
import time
from typing import Any, NamedTuple

import jax
import numpy as np
import numpyro
import numpyro.distributions as dist
import xarray as xr

import sami_ppl as sp
from sami_ppl._util.tables import table
from sami_ppl.data import digits, disks, split, train_test
from sami_ppl.evidence.elbo import mean_and_error
from sami_ppl.fitting.sizes import Extent, denoiser_stage, encoder_stage
from sami_ppl.fitting.start import told
from sami_ppl.nn import ResidualMLP
from sami_ppl.priors.read import Prior


class Case(NamedTuple):
    """Data of a number of observations, the factors to find, by the front door and by hand, and their code's size."""

    load: Callable[[int, jax.Array], xr.Dataset]
    factors: Prior
    prior: Prior
    latents: int


def place_and_light() -> None:
    """The prior of disks, by hand."""
    numpyro.sample("place", dist.Uniform(-1, 1).expand([2]).to_event(1), infer={"event_dims": ["coordinate"]})
    numpyro.sample("light", dist.Normal(0, 1))


def normal(latents: int) -> Prior:
    """The prior of digits and vectors, by hand."""

    def prior() -> None:
        numpyro.sample("z", dist.Normal(0, 1).expand([latents]).to_event(1))

    return prior


def vectors(count: int, key: jax.Array) -> xr.Dataset:
    """Two tanh layers of three Normal factors, twelve features, with noise of a tenth of their deviation."""
    rng = np.random.default_rng(int(jax.random.randint(key, (), 0, 2**31 - 1)))
    h = rng.standard_normal((count, 3))
    for size in (12, 12):
        h = np.tanh(h @ rng.standard_normal((h.shape[1], size)) * math.sqrt(1.5 / h.shape[1]))
    x = h + 0.1 * h.std() * rng.standard_normal(h.shape)
    return xr.Dataset({"x": (("obs", "feature"), x.astype(np.float32))})


CASES = {
    "disks": Case(
        lambda count, key: disks(key, count),
        sp.factors(place=dist.Uniform(-1, 1).expand([2]), light=dist.Normal(0, 1)), place_and_light, 3,
    ),
    "digits": Case(
        lambda count, key: digits().isel(obs=slice(count)),
        sp.factors(z=dist.Normal(0, 1).expand([8])), normal(8), 8,
    ),
    "vectors": Case(vectors, sp.factors(z=dist.Normal(0, 1).expand([3])), normal(3), 3),
}  # fmt: skip


def by_front_door(case: Case, train: xr.Dataset, steps: int | None, keys: jax.Array, progress: bool) -> sp.Program:
    """The README's example; `steps` of every stage, None as many as it takes by itself."""
    program = sp.autoencoder(case.factors, train, key=keys[0], progress=progress)
    plan = sp.TwoStage()
    if steps is not None:
        stage = sp.Stage(steps=steps, batch=64, beta=0.2, clip=150.0)
        plan = sp.TwoStage(stage, stage, warm_steps=steps)
    return sp.fit(program, train, plan, key=keys[1], progress=progress)[0]


def by_hand(case: Case, train: xr.Dataset, steps: int | None, keys: jax.Array, progress: bool) -> sp.Program:
    """The example of docs/pieces.md."""
    weights, stages = jax.random.split(keys[0], 3), jax.random.split(keys[1], 3)
    x = train["x"].values
    shape, schedule = x.shape[1:], sp.VariancePreserving()
    stats: dict[str, Any] = {"mean": float(x.mean(dtype=np.float64)), "std": float(x.std(dtype=np.float64))}
    size: dict[str, Any] = {"width": 512 if math.prod(shape) >= 64 else 256, "depth": 3}
    program = sp.Program(
        case.prior,
        sp.PreconditionedDenoiser(ResidualMLP(shape, shape, **size, key=weights[0]), schedule, shape, **stats),
        sp.DiagonalEncoder(
            ResidualMLP(shape, (64,), **size, key=weights[1]), schedule, shape, case.latents, **stats, key=weights[2]
        ),
    )
    cut = max(1, len(x) // 10)  # held out for validation
    part, held_out = train.isel(obs=slice(-cut)), train.isel(obs=slice(-cut, None))
    extent = Extent(len(x) - cut, told(program, part))
    first, second = denoiser_stage(program, extent), encoder_stage(program, extent)
    if steps is not None:
        first = second = sp.Stage(steps=steps, batch=64, beta=0.2, clip=150.0)
    first, second = replace(first, target="marginal"), replace(second, train=("encoder",))
    common: dict[str, Any] = {"held_out": held_out, "progress": progress}
    program, _ = sp.fit(program, part, first, key=stages[0], **common)
    program = sp.warm_start(program, part, key=stages[1], steps=steps or 500, batch=second.batch, progress=progress)
    return sp.fit(program, part, second, key=stages[2], **common)[0]


FORMS = {"front door": by_front_door, "by hand": by_hand}


def measure(
    name: str, count: int, steps: int | None, seed: int, *, scored: int, levels: int, progress: bool
) -> dict[str, Any]:
    """Both forms on one data set: bounds on −log p(x) of `scored` held-out observations, their difference, seconds."""
    case = CASES[name]
    data_key, split_key, score_key, *keys = jax.random.split(jax.random.key(seed), 5)
    train, test = train_test(split(case.load(count, data_key), key=split_key))
    found: dict[str, Any] = {"data": name, "seed": seed, "train": train.sizes["obs"]}
    bounds = {}
    for form, make in FORMS.items():
        began = time.perf_counter()
        program = make(case, train, steps, jax.numpy.stack(keys), progress)
        seconds = time.perf_counter() - began
        bound = sp.evidence_bound(program, test.isel(obs=slice(scored)), key=score_key, levels=levels)
        bounds[form] = bound["bound"].values
        found[form] = {
            "bound": mean_and_error(bounds[form]), "kl": float(bound["kl"].sum("site").mean()), "seconds": seconds,
        }  # fmt: skip
    found["scored"] = len(bounds["by hand"])
    other = by_hand(case, train, steps, jax.random.split(jax.numpy.stack(keys)[0], 2), progress)
    bound = sp.evidence_bound(other, test.isel(obs=slice(scored)), key=score_key, levels=levels)
    found["control"] = mean_and_error(bound["bound"].values - bounds["by hand"])
    found["difference"] = mean_and_error(bounds["front door"] - bounds["by hand"])
    return found


def printed(rows: list[dict[str, Any]]) -> str:
    """One line for every data set and seed."""
    heads = ["data", "seed", "train", "held out"]
    heads += [f"{form}: {what}" for form in FORMS for what in ("nats", "KL", "seconds")]
    lines = [[*heads, "front door − by hand", "other weights − by hand"]]
    for row in rows:
        line = [row["data"], str(row["seed"]), f"{row['train']:,}", f"{row['scored']:,}"]
        for form in FORMS:
            line += [_error(row[form]["bound"]), f"{row[form]['kl']:.2f}", f"{row[form]['seconds']:.0f}"]
        lines.append([*line, _error(row["difference"]), _error(row["control"])])
    return table(lines)


def _error(value: dict[str, float]) -> str:
    return f"{value['mean']:.2f} ± {value['se']:.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--observations", type=int, default=25_000, help="four fifths of them for training")
    parser.add_argument("--levels", type=int, default=16, help="noise levels for the bound of one observation")
    parser.add_argument("--scored", type=int, default=1000, help="held-out observations, at most")
    parser.add_argument("--quick", action="store_true", help="300 observations, 20 steps: whether it runs")
    parser.add_argument("--out", type=Path, help="JSON file for the figures")
    parser.add_argument("--progress", action="store_true", help="show what is guessed and the bars")
    arguments = parser.parse_args()
    count, steps = (300, 20) if arguments.quick else (arguments.observations, None)
    rows: list[dict[str, Any]] = []
    for name in arguments.data:
        for seed in arguments.seeds:
            rows.append(
                measure(
                    name, count, steps, seed, scored=arguments.scored, levels=arguments.levels,
                    progress=arguments.progress,
                )
            )  # fmt: skip
            print(printed(rows[-1:]), flush=True)
            if arguments.out is not None:
                arguments.out.write_text(json.dumps(rows, indent=1))
    if len(rows) > 1:
        print(printed(rows))


if __name__ == "__main__":
    main()
