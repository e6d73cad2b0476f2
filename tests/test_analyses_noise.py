"""Noisy posteriors and denoising errors against closed forms of the linear-Gaussian model."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
from numpyro import distributions as dist
import pytest
import xarray as xr

from sami_ppl import analyses, plots
from sami_ppl.decoders.exact import LinearGaussian
from sami_ppl.diffusion.schedule import VarianceExploding, VariancePreserving
from sami_ppl.program.program import Program

OBS, LEVELS = 4096, 7
pytestmark = pytest.mark.slow


def prior():
    numpyro.sample("z", dist.Normal(0.0, 1.0).expand([2]).to_event(1))


def make(schedule, *, slant=0.0, cls=LinearGaussian):
    """The weaker axis comes first; `slant` mixes the columns."""
    orthonormal = np.linalg.qr(np.random.default_rng(0).normal(size=(6, 2)))[0]
    weights = orthonormal @ np.diag([0.7, 3.0]) @ np.array([[1.0, slant], [0.0, 1.0]])
    return cls(jnp.asarray(weights, jnp.float32), 0.5, schedule)


SCHEDULE = VariancePreserving(-8.0, 12.0)
both = pytest.mark.parametrize("schedule", [SCHEDULE, VarianceExploding(-8.0, 12.0)], ids=["vp", "ve"])


def program_of(model, encoder=None):
    return Program(prior, model.denoiser, model.encoder if encoder is None else encoder)


def exact_variance(model, log_snr):
    """Var(z_j | x_λ), by conditioning the joint Gaussian in numpy."""
    w = np.asarray(model.weights, float)
    noise = 0.25 + np.exp(-log_snr)
    gain = np.linalg.solve(w @ w.T + noise * np.eye(len(w)), w)
    return np.diag(np.eye(2) - w.T @ gain)


@both
@pytest.mark.parametrize("slant", [0.0, 0.8], ids=["aligned", "mixed"])
def test_posterior_by_noise_is_the_closed_form(schedule, slant):
    """Variances within 1e-3; variances over 4,096 observations within 5 of their standard errors √(2/n)."""
    model = make(schedule, slant=slant)
    x, _ = model.sample(jax.random.key(0), OBS)
    found = analyses.posterior_by_noise(program_of(model), x, key=jax.random.key(1), levels=LEVELS, chunk=1000)
    exact = np.stack([exact_variance(model, level) for level in found["log_snr"].values])
    by_axis = found.sel(axis=["z[0]", "z[1]"])
    np.testing.assert_allclose(by_axis["posterior_variance"], exact, rtol=1e-3)
    np.testing.assert_allclose(by_axis["mean_variance"], 1 - exact, rtol=5 * np.sqrt(2 / OBS))
    np.testing.assert_allclose(
        by_axis["explained"], by_axis["mean_variance"] / (by_axis["mean_variance"] + exact), rtol=2e-3
    )
    # Of a Gaussian with total variance 1 and share e: e (1 − e) √(2/n).
    np.testing.assert_allclose(by_axis["explained_se"], exact * (1 - exact) * np.sqrt(2 / OBS), rtol=0.15)
    assert found["log_snr"].values[[0, -1]].tolist() == [-8.0, 12.0]


def test_axes_come_in_the_order_in_which_they_survive_noise():
    model = make(SCHEDULE)
    x, _ = model.sample(jax.random.key(0), 512)
    found = analyses.posterior_by_noise(program_of(model), x, key=jax.random.key(1), levels=3)
    assert found["axis"].values.tolist() == ["z[1]", "z[0]"]
    assert found["rank"].values.tolist() == [1, 2]
    assert found.sel(axis="z[0]")["rank"] == 2


class Shrunken(LinearGaussian):
    """Half the mean of the true posterior."""

    def posterior(self, x_noisy, log_snr):
        mean, cov = super().posterior(x_noisy, log_snr)
        return 0.5 * mean, cov


def test_wrong_posteriors_do_not_sum_to_the_prior():
    """Negative control: the two variances sum to 1 for the true posterior, to far less for a shrunken one."""
    for cls, true in ((LinearGaussian, True), (Shrunken, False)):
        model = make(SCHEDULE, cls=cls)
        x, _ = model.sample(jax.random.key(0), OBS)
        found = analyses.posterior_by_noise(program_of(model), x, key=jax.random.key(1), levels=3)
        total = (found["mean_variance"] + found["posterior_variance"]).isel(log_snr=-1)
        assert np.allclose(total, 1, atol=5 * np.sqrt(2 / OBS)) == true


def test_last_chunk_counts_once():
    """Seven observations in chunks of three: at the clean end the variance is that of the encoder's own means."""
    model = make(SCHEDULE)
    program = program_of(model)
    x, _ = model.sample(jax.random.key(0), 7)
    found = analyses.posterior_by_noise(program, x, key=jax.random.key(1), levels=3, chunk=3)
    means = program.encode(x)[0].var(0, ddof=1)
    np.testing.assert_allclose(found["mean_variance"].isel(log_snr=-1).sel(axis=["z[0]", "z[1]"]), means, rtol=0.03)


def exact_errors(model, log_snr):
    """E‖x − E[x | x_λ]‖² and E‖x − E[x | x_λ, z]‖²: traces of conditional covariances."""
    w = np.asarray(model.weights, float)
    free, noise = np.linalg.eigvalsh(w @ w.T) + 0.25, np.exp(-log_snr)
    return (free * noise / (free + noise)).sum(), 6 * 0.25 * noise / (0.25 + noise)


@both
@pytest.mark.parametrize("slant", [0.0, 0.8], ids=["aligned", "mixed"])
def test_variance_reduction_is_the_closed_form(schedule, slant):
    """Errors within 5 standard errors (ratio of a χ²: √(2/n) at most), reduction within 5 of its own."""
    model = make(schedule, slant=slant)
    x, _ = model.sample(jax.random.key(0), OBS)
    found = analyses.variance_reduction(program_of(model), x, key=jax.random.key(1), levels=LEVELS, chunk=1500)
    free, given = np.array([exact_errors(model, level) for level in found["log_snr"].values]).T
    np.testing.assert_allclose(found["error"], free, rtol=5 * np.sqrt(2 / OBS))
    np.testing.assert_allclose(found["error_given_z"], given, rtol=5 * np.sqrt(2 / OBS))
    assert np.all(np.abs(found["reduction"] - (1 - given / free)) < 5 * found["reduction_se"] + 1e-4)
    assert np.all(found["error_given_other"] > found["error_given_z"])


def test_variance_reduction_of_wrong_and_of_empty_codes():
    """Negative controls: a shrunken posterior misses the closed form; a code of nothing reduces nothing."""
    model = make(SCHEDULE, cls=Shrunken)
    x, _ = model.sample(jax.random.key(0), OBS)
    found = analyses.variance_reduction(program_of(model), x, key=jax.random.key(1), levels=LEVELS)
    free, given = np.array([exact_errors(model, level) for level in found["log_snr"].values]).T
    assert np.any(np.abs(found["reduction"] - (1 - given / free)) > 20 * found["reduction_se"])

    empty = LinearGaussian(jnp.zeros((6, 2)), 0.5, SCHEDULE)
    found = analyses.variance_reduction(program_of(model, empty.encoder), x[:64], key=jax.random.key(1), levels=3)
    np.testing.assert_allclose(found["reduction"], 0, atol=1e-6)
    np.testing.assert_allclose(found["error_given_other"], found["error_given_z"], rtol=1e-6)


@pytest.mark.parametrize("analysis", [analyses.posterior_by_noise, analyses.variance_reduction])
def test_bad_input(analysis):
    model = make(SCHEDULE)
    program, key = program_of(model), jax.random.key(0)
    x, _ = model.sample(key, 4)
    with pytest.raises(ValueError, match="at least 2 observations, got 1"):
        analysis(program, x[:1], key=key)
    with pytest.raises(ValueError, match=r"x must have shape \(obs, 6\), got \(4, 5\)"):
        analysis(program, x[:, :5], key=key)
    with pytest.raises(ValueError, match=r"add the leading dim: x\[None\]"):
        analysis(program, x[0], key=key)
    with pytest.raises(ValueError, match="data has no variable 'x' on obs"):
        analysis(program, xr.Dataset({"y": (("obs", "feature"), np.asarray(x))}), key=key)
    with pytest.raises(ValueError, match="levels must be at least 2"):
        analysis(program, x, key=key, levels=1)


def test_plots():
    """Figures of their own, with the lines that the Datasets hold."""
    model = make(SCHEDULE)
    program, key = program_of(model), jax.random.key(0)
    x, _ = model.sample(key, 32)
    by_noise = analyses.plot_posterior_by_noise(analyses.posterior_by_noise(program, x, key=key, levels=3))
    assert [text.get_text() for text in by_noise.axes[0].get_legend().get_texts()] == ["z[1], rank 1", "z[0], rank 2"]
    found = analyses.variance_reduction(program, x, key=key, levels=3)
    share = analyses.plot_variance_reduction(found).axes[1].get_lines()[0]
    np.testing.assert_array_equal(share.get_ydata(), found["reduction"])


def test_many_axes_are_all_drawn():
    """Seven by name, the others grey; none is left out."""
    axes, levels = [f"z[{j}]" for j in range(9)], np.array([-1.0, 0.0, 1.0])
    values = (("log_snr", "axis"), np.arange(27.0).reshape(3, 9))
    found = xr.Dataset(
        {"mean_variance": values, "posterior_variance": values},
        coords={"log_snr": levels, "axis": axes, "rank": ("axis", np.arange(1, 10))},
    )
    own = {"axis_energy": values, "axis_information": values}
    total = {name: ("log_snr", np.arange(3.0)) for name in ("energy", "gain", "information")}
    spectrum = xr.Dataset(own | total, coords={"log_snr": levels, "axis": axes})
    whole, each, sums = plots.spectrum(spectrum).axes
    assert len(whole.get_lines()) == 2
    assert len(sums.get_lines()) == 9
    for panel in (analyses.plot_posterior_by_noise(found).axes[0], each):
        assert len(panel.get_lines()) == 9
        named = [text.get_text() for text in panel.get_legend().get_texts()]
        assert len(named) == 8
        assert named[-1] == "others"
