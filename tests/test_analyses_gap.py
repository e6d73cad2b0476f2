"""The amortisation gap: none for the exact posterior, the KL from it for one spoiled on purpose."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
from numpyro import distributions as dist
import pytest
import xarray as xr

import sami_ppl as sp
from sami_ppl.analyses import amortisation_gap, plot_amortisation_gap
from sami_ppl.decoders.exact import ExactEncoder

pytestmark = pytest.mark.slow  # all stand on a fitted program


WIDTH, SHIFT = 0.6, 0.8
KL = 2 * 0.5 * (WIDTH**2 - 1 - np.log(WIDTH**2)) + 0.5 * SHIFT**2


class Spoiled(ExactEncoder):
    """As guide .6 as wide as the posterior, and .8 of its standard deviations beside it on one axis."""

    def parameters(self, x_noisy, log_snr):
        mean, cov = super().parameters(x_noisy, log_snr)
        clean = log_snr >= self.schedule.log_snr_max
        moved = mean + jnp.linalg.cholesky(cov) @ jnp.array([SHIFT, 0.0])
        return jnp.where(clean, moved, mean), cov * jnp.where(clean, WIDTH**2, 1.0)


def prior():
    numpyro.sample("z", dist.Normal(0.0, 1.0).expand([2]).to_event(1))


@pytest.fixture(scope="module")
def gaps():
    columns = np.linalg.qr(np.random.default_rng(0).normal(size=(6, 2)))[0] * [2.0, 1.0]
    truth = sp.LinearGaussian(jnp.asarray(columns, jnp.float32), 0.5, sp.VariancePreserving(-10.0, 9.0))
    program = sp.Program(prior, truth.denoiser, truth.encoder)
    x = np.asarray(truth.sample(jax.random.key(0), 3)[0])
    data = xr.Dataset({"x": (("obs", "feature"), x)}, coords={"obs": ["a", "b", "c"]})
    encoders = {"exact": truth.encoder, "spoiled": Spoiled(truth)}
    return {
        name: amortisation_gap(program.replace(encoder=encoder), data, key=jax.random.key(1), steps=150, levels=96)
        for name, encoder in encoders.items()
    }, np.asarray(jax.vmap(truth.log_prob)(jnp.asarray(x)))


@pytest.mark.slow
def test_the_gap_is_the_kl_from_the_posterior(gaps):
    """Four standard errors, and .03 nats for the refined Gaussian, which follows its own noise set and draws."""
    found, _ = gaps
    for name, want in (("exact", 0.0), ("spoiled", KL)):
        allowed = 4 * found[name]["gap_se"].values + 0.03
        assert (np.abs(found[name]["gap"].values - want) < allowed).all(), name
    assert (found["spoiled"]["gap"] > 5 * found["spoiled"]["gap_se"] + 0.03).all(), "the control is seen"


def test_bounds_and_labels(gaps):
    """Refined bounds of both are the same; the noise set that all share moves them by a nat or so from the evidence."""
    found, evidence = gaps
    for gap in found.values():
        np.testing.assert_allclose(gap["amortised"] - gap["refined"], gap["gap"], atol=1e-3)
        assert gap["obs"].values.tolist() == ["a", "b", "c"]
        assert gap["gap"].attrs["units"] == "nats"
        np.testing.assert_allclose(gap["refined"], -evidence, atol=3)
    np.testing.assert_allclose(found["exact"]["refined"], found["spoiled"]["refined"], atol=0.8)
    assert np.ptp(evidence) > 3, "evidences differ by more than the noise"


def test_the_picture_shows_the_largest_on_top(gaps):
    found, _ = gaps
    panel = plot_amortisation_gap(found["spoiled"]).axes[0]
    order = [label.get_text() for label in panel.get_yticklabels()]
    gap = found["spoiled"]["gap"].sel(obs=order).values
    assert (np.diff(gap) <= 0).all()
    assert panel.get_ylim() == (2.5, -0.5)
