"""Correlation with factors after matching, the rank condition of theorem 1 of Khemakhem et al. 2020, clusters."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
from numpyro import distributions as dist
import pytest
import xarray as xr

from sami_ppl.diagnostics import clusters
from sami_ppl.metrics import check_variability, mean_correlation
from sami_ppl.saving import files as programs

RNG = np.random.default_rng(0)


def test_order_sign_and_scale_do_not_count():
    """1 for factors in another order, of other signs and scales; the control is their rotation by 45°."""
    z = RNG.normal(size=(2000, 3))
    assert mean_correlation(z[:, [2, 0, 1]] * [3.0, -1.0, 0.1] + 1, z) == pytest.approx(1.0)
    c = np.cos(np.pi / 4)
    rotated = z.copy()
    rotated[:, :2] = z[:, :2] @ np.array([[c, c], [-c, c]])
    assert mean_correlation(rotated, z) == pytest.approx((2 * c + 1) / 3, abs=0.03)


def test_every_factor_needs_an_axis_of_its_own():
    """One axis cannot serve two factors, the greedy choice is not the best, and a missing axis counts 0."""
    z = RNG.normal(size=(50_000, 2))
    both = z.sum(1) / np.sqrt(2)
    assert mean_correlation(np.stack([both, z[:, 0]], 1), z) == pytest.approx((1 + np.sqrt(0.5)) / 2, abs=0.02)
    assert mean_correlation(z[:, :1], z) == pytest.approx(0.5, abs=1e-6)


def test_rank_condition():
    """2D + 1 values of u in general position suffice; fewer, or scales that do not change, do not."""
    loc, scale = RNG.uniform(-2, 2, (5, 2)), RNG.uniform(0.2, 1, (5, 2))
    check_variability(loc, scale)
    with pytest.raises(ValueError, match=r"4 values of u .* in 3 directions, identifiability needs 4: give at least 5"):
        check_variability(loc[:4], scale[:4])
    with pytest.raises(ValueError, match="in 2 directions"):
        check_variability(loc, np.ones((5, 2)))
    with pytest.raises(ValueError, match="in 0 directions"):
        check_variability(loc[:1], scale[:1])


# --- clusters ---------------------------------------------------------------------------------------------------------

CENTRES = jnp.array([[-4.0, 0.0], [4.0, 0.0], [0.0, 4.0]])


def mixture():
    each = dist.Normal(CENTRES, 1.0).to_event(1)
    numpyro.sample("z", dist.MixtureSameFamily(dist.Categorical(jnp.ones(3) / 3), each))


@pytest.mark.slow
def test_clusters_are_the_nearest_components(tiny_program):
    """Of components of one width and weight; with a variable that decides the component, it does."""
    x = np.random.default_rng(0).normal(scale=3.0, size=(50, 4)).astype(np.float32)
    program = tiny_program(prior=mixture)
    values = program.latents.from_code(program.encode(x)[0])["z"]
    nearest = np.argmin(((values[:, None] - CENTRES) ** 2).sum(-1), axis=1)
    np.testing.assert_array_equal(clusters(program, x)["z"], nearest)
    assert len(np.unique(nearest)) > 1

    def told(label):
        logits = 100.0 * jax.nn.one_hot(label, 3) * (label >= 0)[:, None]
        numpyro.sample(
            "z", dist.MixtureSameFamily(dist.Categorical(logits=logits), dist.Normal(CENTRES, 1).to_event(1))
        )

    label = np.where(np.arange(50) % 2, np.arange(50) % 3, -1)
    program = program.replace(prior=told, given={"label": np.array([-1])})
    found = clusters(program, xr.Dataset({"x": (("obs", "feature"), x), "label": ("obs", label)}))["z"]
    np.testing.assert_array_equal(found[label >= 0], label[label >= 0])
    values = program.latents.from_code(program.encode(x)[0])["z"]
    nearest = np.argmin(((values[:, None] - CENTRES) ** 2).sum(-1), axis=1)
    np.testing.assert_array_equal(found[label < 0], nearest[label < 0])


def test_clusters_need_a_mixture(tiny_program):
    with pytest.raises(ValueError, match=r"no site of the prior is a mixture or discrete .z.*MixtureSameFamily"):
        clusters(tiny_program(), np.zeros((3, 4), np.float32))


@pytest.mark.slow
def test_classes_of_the_mixing_program_follow_the_data():
    """A class beyond the prior's last one would be taken for that one."""
    module = programs.load_file(programs.find("mixing", "models"))
    data = xr.Dataset({"x": (("obs", "feature"), np.eye(3, 5)), "u": ("obs", [0, 11, 4])})
    small = module.Config(width=8, depth=1)
    program = module.build(small, data, key=jax.random.key(0))
    assert program.event_shape == (5,)
    assert program.prior_params["loc"].shape == (12, 2)
    without = module.build(replace(small, prior="normal"), data.drop_vars("u"), key=jax.random.key(0))
    assert without.latents.arguments == ()
    few = module.build(small, data.assign(u=("obs", [0, 1, 4])), key=jax.random.key(0))
    assert few.prior_params["loc"].shape == (9, 2)
    with pytest.raises(ValueError, match="u counts classes from 0, got -1"):
        module.build(small, data.assign(u=("obs", [0, -1, 4])), key=jax.random.key(0))
