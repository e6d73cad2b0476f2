"""Which variables of a data set are known factors."""

import numpy as np
import pytest
import xarray as xr

from sami_ppl.data import factor_names, read_factors, real_factors

N = 6
DATA = xr.Dataset(
    {
        "x": (("obs", "feature"), np.zeros((N, 3), np.float32)),
        "size": ("obs", np.linspace(0, 1, N)),
        "turn": ("obs", np.linspace(0, 6, N), {"period": 2 * np.pi}),
        "digit": ("obs", np.arange(N)),
        "bright": ("obs", np.arange(N) > 2),
        "hue": ("obs", np.array(["red", "blue"] * 3)),
        "file": ("obs", np.array([f"{i}.png" for i in range(N)])),
        "track": (("obs", "time"), np.zeros((N, 2))),
        "taken": ("obs", np.arange(N).astype("datetime64[D]").astype("datetime64[ns]")),
    },
    coords={"split": ("obs", ["train"] * 4 + ["test"] * 2)},
)


@pytest.mark.parametrize(
    ("kind", "expected"),
    [("real", ["size", "turn"]), ("class", ["digit"]), ("binary", ["bright", "hue"])],
)
def test_kinds(kind, expected):
    assert factor_names(DATA, kind) == expected
    assert factor_names(DATA, kind, [expected[-1]]) == [expected[-1]]
    assert factor_names(DATA, kind, ["file"]) == []
    with pytest.raises(ValueError, match=r"no factor 'colour', 'x'; its variables on obs are \['size', "):
        factor_names(DATA, kind, ["colour", "x"])
    with pytest.raises(ValueError, match="with the observations x"):
        factor_names(DATA.drop_vars("x"), kind)


def test_what_goes_round_counts_as_two():
    values, names = read_factors(DATA)
    assert names == ["size", "cos_turn", "sin_turn"]
    np.testing.assert_allclose(values[:, 1] ** 2 + values[:, 2] ** 2, 1)
    values, names = read_factors(DATA, ["digit"])  # named, whatever its type
    np.testing.assert_array_equal(values[:, 0], np.arange(N))


def test_factors_that_tell_nothing_are_left_out_by_name():
    data = DATA.assign(size=("obs", np.where(np.arange(N) == 1, np.nan, 1)), same=("obs", np.ones(N)))
    with pytest.warns(UserWarning, match="left out of the true factors") as found:
        assert real_factors(data) == ["turn"]
    assert [str(warning.message).split()[0] for warning in found] == ["size", "same"]
