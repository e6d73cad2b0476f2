"""Sparse probes and kinds of axes, on codes whose answer is known."""

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


def prior():
    numpyro.sample("z", dist.Normal(0.0, 1.0).expand([4]).to_event(1))


def program_and_data(spreads, obs=1200):
    weights = np.linalg.qr(np.random.default_rng(0).normal(size=(8, 4)))[0] * np.array(spreads)
    model = LinearGaussian(jnp.asarray(weights, jnp.float32), 0.5, VariancePreserving(-8.0, 8.0))
    x, z = (np.asarray(a) for a in model.sample(jax.random.key(0), obs))
    data = xr.Dataset({"x": (("obs", "feature"), x)})
    data["one"] = ("obs", z[:, 1] > 0.3)
    data["two"] = ("obs", z[:, 0] - z[:, 2] > 0)
    data["all"] = ("obs", z[:, :3].sum(1) > 0)
    return Program(prior, model.denoiser, model.encoder), data


def test_hoyer_sparsity():
    assert analyses.hoyer_sparsity([0, 0, -3, 0]) == pytest.approx(1)
    assert analyses.hoyer_sparsity([2, -2, 2, 2]) == pytest.approx(0)
    assert analyses.hoyer_sparsity([1, 1, 0, 0]) == pytest.approx((2 - np.sqrt(2)) / (2 - 1))
    assert np.isnan(analyses.hoyer_sparsity([1.0]))
    assert np.isnan(analyses.hoyer_sparsity([0.0, 0.0]))


@pytest.mark.slow
def test_attributes_take_as_many_weights_as_they_have_axes():
    """One, two and three axes; the collapsed fourth is not probed; shuffled attributes are at chance (control)."""
    program, data = program_and_data([4.0, 4.0, 4.0, 0.0])
    found = analyses.attribute_sparsity(program, data, key=jax.random.key(1))
    assert found["attribute"].values.tolist() == ["one", "two", "all"]
    assert found["weights_needed"].values.tolist() == [1, 2, 3]
    assert np.all(found["auroc"] > 0.97)
    assert np.all(np.abs(found["chance"] - 0.5) < 0.08)
    np.testing.assert_array_equal(found["weight"].sel(axis="z[3]"), 0)
    assert found.attrs["axes_probed"] == 3
    hoyer = found["hoyer"].values
    assert hoyer[0] > 0.8
    assert hoyer[2] < 0.15
    assert hoyer[0] > hoyer[1] > hoyer[2]
    signs = np.sign(found["weight"].sel(attribute="two").values)
    assert signs[[0, 2]].tolist() == [1, -1]
    assert len(analyses.plot_attribute_sparsity(found).axes[0].get_yticklabels()) == 3


@pytest.mark.slow
def test_bad_attributes():
    program, data = program_and_data([4.0, 4.0, 4.0, 0.0], 60)
    key = jax.random.key(0)
    with pytest.raises(ValueError, match="data holds no attribute with two values"):
        analyses.attribute_sparsity(program, data[["x"]], key=key)
    with pytest.raises(ValueError, match="no factor 'smile'; its variables on obs are"):
        analyses.attribute_sparsity(program, data, ["smile"], key=key)
    with pytest.raises(ValueError, match="'third' must have exactly two values, got 3"):
        analyses.attribute_sparsity(program, data.assign(third=("obs", np.arange(60) % 3)), ["third"], key=key)
    with pytest.raises(ValueError, match="'rare' has one value only in a part"):
        analyses.attribute_sparsity(program, data.assign(rare=("obs", np.arange(60) == 0)), ["rare"], key=key)
    with pytest.raises(ValueError, match="at least 20 observations, got 1"):
        analyses.attribute_sparsity(program, data.isel(obs=[0]), ["one"], key=key)
    with pytest.raises(ValueError, match="test must be a share"):
        analyses.attribute_sparsity(program, data, key=key, test=1.0)
    empty, _ = program_and_data([0.0] * 4, 60)
    with pytest.raises(ValueError, match="all axes have collapsed"):
        analyses.attribute_sparsity(empty, data, key=key)


@pytest.mark.slow
def test_kinds_of_axes(tiny_program, fill):
    """Posterior variances v/(v + w²): small, half, the prior's own; a scale that changes with x is mixed."""
    program, data = program_and_data([4.0, 0.5, 0.0, 0.05])
    found = analyses.axis_activity(program, data["x"].values[:50])
    assert found["kind"].values.tolist() == ["active", "mixed", "passive", "passive"]
    v = 0.25 + np.exp(-8.0)
    np.testing.assert_allclose(found["mean"], v / (v + np.array([4.0, 0.5, 0.0, 0.05]) ** 2), rtol=1e-4)
    np.testing.assert_allclose(found["variance"], 0, atol=1e-8)
    labels = analyses.plot_axis_activity(found).axes[0].get_legend().get_texts()
    assert [label.get_text() for label in labels] == ["active: 1", "mixed: 1", "passive: 2"]

    tiny = tiny_program()
    x = 3 * np.asarray(jax.random.normal(jax.random.key(0), (200, 4)))
    other = analyses.axis_activity(tiny.replace(encoder=fill(tiny.encoder, 1.5)), x)
    scale = fill(tiny.encoder, 1.5)
    variance = np.asarray(jax.vmap(scale.posterior)(jnp.asarray(x))[1]) ** 2
    np.testing.assert_allclose(other["variance"], variance.var(0), rtol=1e-4)
    assert "mixed" in other["kind"].values
    with pytest.raises(ValueError, match="at least 2 observations, got 1"):
        analyses.axis_activity(program, data["x"].values[:1])
