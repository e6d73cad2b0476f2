"""True factors, where they are known: how well the posterior tells them, and what its width means in their units."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Key
import numpy as np
from sklearn.ensemble import RandomForestRegressor
import xarray as xr

from sami_ppl.calibration.ranks import LEVELS
from sami_ppl.data import unrolled, unrolled_names
from sami_ppl.diagnostics.gain import draw_code
from sami_ppl.program import Program


def factor_recovery(
    program: Program,
    train: xr.Dataset,
    test: xr.Dataset,
    *,
    key: Key[Array, ""],
    draws: int = 64,
) -> xr.Dataset:
    """How well posteriors tell the true factors, the real-valued variables on `obs`; periodic ones as cosine and sine.

    A random forest (100 trees) from posterior means to factors is fitted on `train` and read on `test`. Variables on
    `factor`: `r2`, `correlation` and `error`, the root mean square, of its predictions; `width`, the root mean square
    over observations of the standard deviation of its predictions over `draws` draws of the posterior; `coverage`
    (factor, level) of the true factor by the central intervals of these; on (obs, factor) `truth`, `predicted`, `sd`.

    Coverage here is what a reader of the factors gets who takes posterior draws for the only uncertainty. It holds the
    posterior *and* the regression against the truth: below nominal with `width` below `error`, either may be at fault,
    and only simulation-based calibration is about the posterior alone.

    Raises ValueError where the data have no such variables.
    """
    names = [
        str(name) for name, v in test.data_vars.items() if name != "x" and v.dims == ("obs",) and v.dtype.kind == "f"
    ]
    if not names:
        raise ValueError("data have no real-valued variables on obs, so that there are no true factors to recover")
    columns = [column for name in names for column in unrolled_names(test[name])]
    known, truth = (
        np.stack([unrolled(part, names)[column].values for column in columns], -1) for part in (train, test)
    )
    x_train, x_test = (np.asarray(part["x"].values, np.float32) for part in (train, test))
    forest = RandomForestRegressor(100, random_state=0, n_jobs=-1)
    # scikit-learn takes and gives a single target as a vector.
    forest.fit(program.encode(x_train)[0], known[:, 0] if len(columns) == 1 else known)
    predict = lambda codes: forest.predict(codes).reshape(len(codes), -1)  # noqa: E731
    predicted = predict(program.encode(x_test)[0])
    draw = jax.jit(jax.vmap(lambda key: draw_code(program, jnp.asarray(x_test), key)))
    codes = np.asarray(draw(jax.random.split(key, draws)))
    spread = predict(codes.reshape(-1, codes.shape[-1])).reshape(draws, *truth.shape)
    edges = 0.5 + 0.5 * np.outer([-1, 1], LEVELS)
    low, high = np.quantile(spread, edges, axis=0)
    error = predicted - truth
    variables = {
        "r2": ("factor", 1 - (error**2).mean(0) / truth.var(0)),
        "correlation": ("factor", [np.corrcoef(predicted[:, j], truth[:, j])[0, 1] for j in range(len(columns))]),
        "error": ("factor", np.sqrt((error**2).mean(0))),
        "width": ("factor", np.sqrt(spread.var(0, ddof=1).mean(0))),
        "coverage": (("level", "factor"), ((low <= truth) & (truth <= high)).mean(1)),
        "truth": (("obs", "factor"), truth),
        "predicted": (("obs", "factor"), predicted),
        "sd": (("obs", "factor"), spread.std(0, ddof=1)),
    }
    coords = {"factor": columns, "level": list(LEVELS)}
    return xr.Dataset(variables, coords=coords, attrs={"regressor": "random forest of 100 trees", "draws": draws})
