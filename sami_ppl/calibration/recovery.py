"""True factors, where they are known: how well the posterior tells them, and what its width means in their units."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Key
import numpy as np
import xarray as xr

from sami_ppl._util.keys import check_key
from sami_ppl.calibration.ranks import LEVELS
from sami_ppl.data import real_factors, unrolled, unrolled_names
from sami_ppl.diagnostics.gain import draw_code
from sami_ppl.metrics.correlation import correlation
from sami_ppl.program.program import Program


def factor_recovery(
    program: Program,
    train: xr.Dataset,
    test: xr.Dataset,
    *,
    key: Key[Array, ""],
    draws: int = 64,
) -> xr.Dataset:
    """How well posteriors tell the true factors, the real-valued variables on `obs`; periodic ones as cosine and sine.

    A smooth map from codes to factors (kernel ridge regression) is fitted to one draw from the posterior of each
    `train` observation and applied to `draws` draws for each of `test`. Variables on `factor`: `error`, the root mean
    square, `r2` and `correlation` of the mean of these predictions; `width`, the root mean square of their standard
    deviation; `coverage` (level, factor) of the true factor by their central intervals; on (obs, factor) `truth`,
    `predicted` and `sd`.

    Coverage here is what a reader of the factors gets who takes posterior draws for the only uncertainty. It holds the
    posterior *and* the map against the truth: where it is below nominal, either may be at fault, and only
    simulation-based calibration is about the posterior alone.

    A warning names variables that are left out, since they are not finite or constant. Raises ValueError where none is
    left.
    """
    check_key(key)
    from sklearn.kernel_ridge import KernelRidge

    names = real_factors(test, train)
    if not names:
        raise ValueError("data have no real-valued variables on obs, so that there are no true factors to recover")
    columns = [column for name in names for column in unrolled_names(test[name])]
    known, truth = (
        np.stack([unrolled(part, names)[column].values for column in columns], -1) for part in (train, test)
    )
    x_train, x_test = (jnp.asarray(part["x"].values, jnp.float32) for part in (train, test))
    draw = eqx.filter_jit(draw_code)
    train_key, *keys = jax.random.split(key, draws + 1)
    centre, scale = known.mean(0), known.std(0) + 1e-12
    ridge: Any = KernelRidge(kernel="rbf").set_params(alpha=0.01)
    ridge.fit(draw(program, x_train, train_key), (known - centre) / scale)
    spread = np.stack([ridge.predict(draw(program, x_test, k)) * scale + centre for k in keys])
    predicted, sd = spread.mean(0), spread.std(0, ddof=1)
    edges = 0.5 + 0.5 * np.outer([-1, 1], LEVELS)
    low, high = np.quantile(spread, edges, axis=0)
    error = predicted - truth
    variables = {
        "r2": ("factor", 1 - (error**2).mean(0) / truth.var(0)),
        "correlation": ("factor", np.diag(correlation(predicted, truth))),
        "error": ("factor", np.sqrt((error**2).mean(0))),
        "width": ("factor", np.sqrt((sd**2).mean(0))),
        "coverage": (("level", "factor"), ((low <= truth) & (truth <= high)).mean(1)),
        "truth": (("obs", "factor"), truth),
        "predicted": (("obs", "factor"), predicted),
        "sd": (("obs", "factor"), sd),
    }
    coords = {"factor": columns, "level": list(LEVELS)}
    return xr.Dataset(variables, coords=coords, attrs={"regressor": "kernel ridge", "draws": draws})
