"""Codes against factors: cells counted by hand, and R² of Gaussian codes in closed form."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
from numpyro import distributions as dist
import pytest
import xarray as xr

from sami_ppl import analyses
from sami_ppl.decoders.exact import LinearGaussian
from sami_ppl.diffusion.schedule import VariancePreserving
from sami_ppl.program.program import Program

OBS = 4000
pytestmark = pytest.mark.slow


def prior():
    numpyro.sample("z", dist.Normal(0.0, 1.0).expand([3]).to_event(1))


def linear(spreads=(2.0, 1.0, 0.5)):
    weights = np.linalg.qr(np.random.default_rng(0).normal(size=(6, 3)))[0] * np.array(spreads)
    return LinearGaussian(jnp.asarray(weights, jnp.float32), 0.5, VariancePreserving(-8.0, 8.0))


def program_and_data(model, obs=OBS):
    """The factors are the latent axes, in another order and with other signs and units."""
    x, z = (np.asarray(a) for a in model.sample(jax.random.key(0), obs))
    factors = {"size": ("obs", 3 - 2 * z[:, 2]), "place": ("obs", z[:, 0]), "light": ("obs", 0.1 * z[:, 1])}
    return Program(prior, model.denoiser, model.encoder), xr.Dataset({"x": (("obs", "feature"), x), **factors})


def test_grid_is_the_mean_of_each_cell():
    program, data = program_and_data(linear(), 300)
    found = analyses.factor_grid(program, data, ["place", "light"], bins=6)
    assert found["mean"].dims == ("place", "light", "axis")
    means = program.encode(data["x"].values)[0]
    place, light = data["place"].values, data["light"].values
    for i in range(6):
        for j in range(6):
            inside = np.ones(300, bool)
            for value, centres, k in ((place, found["place"].values, i), (light, found["light"].values, j)):
                half = (centres[1] - centres[0]) / 2
                inside &= (value >= centres[k] - half - 1e-9) & (value <= centres[k] + half + 1e-9)
            assert found["count"].values[i, j] == inside.sum()
            if inside.any():
                np.testing.assert_allclose(found["mean"].values[i, j], means[inside].mean(0), atol=1e-5)
                np.testing.assert_allclose(found["spread"].values[i, j], means[inside].std(0), atol=1e-3)
            else:
                assert np.isnan(found["mean"].values[i, j]).all()
    assert int(found["count"].sum()) == 300
    assert (found["count"] == 0).any(), "an empty cell is part of this test"


def test_grid_of_few_values_and_of_one_factor():
    """Along its own factor an axis rises by its shrinkage 1 − Var(z | x); along another's it is flat (the control)."""
    program, data = program_and_data(linear())
    data["place"] = ("obs", np.round(data["place"].values.clip(-1.4, 1.4)))
    found = analyses.factor_grid(program, data, ["place"])
    assert found["place"].values.tolist() == [-1.0, 0.0, 1.0]
    slope = found["mean"].diff("place").values
    assert np.all(slope[:, 0] > 0.8)
    assert np.all(np.abs(slope[:, 1:]) < 0.15)
    assert len(analyses.plot_factor_grid(found).axes) == 3
    grid = analyses.factor_grid(program, data, ["place", "size"], bins=5)
    assert [panel.get_title() for panel in analyses.plot_factor_grid(grid).axes[:3]] == ["z[0]", "z[1]", "z[2]"]


@pytest.fixture(scope="module")
def associated():
    model = linear()
    program, data = program_and_data(model)
    found = analyses.association(program, data, key=jax.random.key(1), draws=8, resamples=100, level=0.999)
    shrinkage = 1 - np.diagonal(np.asarray(model.posterior(jnp.zeros(6), jnp.asarray(8.0))[1]))
    return found, shrinkage


def test_association_is_the_closed_form(associated):
    """R² of means is 1 − Var(z | x), of draws its square; the intervals (.999) hold them; other pairs have 0."""
    found, shrinkage = associated
    assert found["matched"].values.tolist() == ["z[2]", "z[0]", "z[1]"]
    np.testing.assert_array_equal(found["matched_share"], 1)
    for name, axis in (("place", 0), ("light", 1), ("size", 2)):
        own = found.sel(factor=name)
        low, high = own["r2_interval"].sel(source="observations").values[axis]
        assert low < shrinkage[axis] < high < low + 0.2
        drawn = own["r2_interval"].sel(source="draws").values[axis].mean()
        assert drawn == pytest.approx(shrinkage[axis] ** 2, abs=0.05)
        others = own["r2"].values[np.arange(3) != axis]
        assert np.all(np.abs(others) < 0.02)
        information = own["information"].values
        assert information.argmax() == axis


def test_intervals_of_information_take_its_bias_away(associated):
    """Unrelated pairs have information 0: the plug-in value lies above it, the interval reaches it."""
    found, _ = associated
    for name, axis in (("place", 1), ("light", 2), ("size", 0)):
        own = found.sel(factor=name, axis=f"z[{axis}]")
        low, high = own["information_interval"].sel(source="observations").values
        assert float(own["information"]) > 0.01
        assert low < 0.003
        assert high < float(own["information"])


def test_rotated_factors_match_nothing_well():
    """Negative control: a factor between two axes is told half by each, and which of them matches it is chance."""
    program, data = program_and_data(linear((3.0, 3.0, 3.0)))
    between = data.assign(place=data["place"] + 10 * data["light"])  # z₀ + z₁
    codes = program.encode(data["x"].values)[0]
    left = np.linalg.lstsq(codes, between["place"].values, rcond=None)[1][0] / OBS
    assert left < 0.1, "both axes together tell it"
    found = analyses.association(program, between, factors=["place"], key=jax.random.key(1), draws=2, resamples=40)
    np.testing.assert_allclose(found["r2"].values[:, 0], [0.48, 0.48, 0], atol=0.06)
    assert float(found["matched_share"][0]) < 0.99


def test_fewer_axes_than_factors_and_periods():
    """A factor that goes round counts as two; one of three factors is left without an axis."""
    program, data = program_and_data(linear(), 200)
    turn = xr.DataArray(np.linspace(0, 6, 200), dims="obs", attrs={"period": 2 * np.pi})
    data = data.assign(turn=turn)
    found = analyses.association(program, data, key=jax.random.key(1), draws=1, resamples=5)
    assert found["factor"].values.tolist() == ["size", "place", "light", "cos_turn", "sin_turn"]
    assert sorted(found["matched"].values.tolist()) == ["", "", "z[0]", "z[1]", "z[2]"]
    figure = analyses.plot_association(found)
    assert len(figure.axes[0].patches) == 3


def test_bad_input():
    program, data = program_and_data(linear(), 60)
    key = jax.random.key(0)
    with pytest.raises(ValueError, match="data holds no known factors"):
        analyses.association(program, data[["x"]], key=key)
    with pytest.raises(ValueError, match=r"data must be an xarray\.Dataset"):
        analyses.association(program, data["x"].values, key=key)
    with pytest.raises(ValueError, match="no factor 'hue'; its variables on obs are"):
        analyses.factor_grid(program, data, ["hue"])
    with pytest.raises(ValueError, match="factors must be a list"):
        analyses.factor_grid(program, data, "place")
    with pytest.raises(ValueError, match="at least 40 observations, got 1"):
        analyses.association(program, data.isel(obs=[0]), key=key)
    with pytest.raises(ValueError, match="at least 2 observations, got 1"):
        analyses.factor_grid(program, data.isel(obs=[0]), ["place"])
    flat = data.assign(place=("obs", np.zeros(60)))
    with pytest.raises(ValueError, match="factors place do not vary"):
        analyses.association(program, flat, key=key)
    with pytest.raises(ValueError, match="factor 'place' does not vary"):
        analyses.factor_grid(program, flat, ["place"])
    gap = data.assign(place=("obs", np.where(np.arange(60) == 3, np.nan, 1.0)))
    with pytest.raises(ValueError, match=r"factors place are NaN or infinite somewhere: drop these"):
        analyses.association(program, gap, key=key)
    empty = program_and_data(linear((0.0, 0.0, 0.0)), 60)[0]
    with pytest.raises(ValueError, match="all axes have collapsed"):
        analyses.association(empty, data, key=key)
    with pytest.raises(ValueError, match=r"x must have shape \(obs, 6\)"):
        analyses.factor_grid(program, data.isel(feature=slice(3)), ["place"])
