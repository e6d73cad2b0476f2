"""The figures of a fitted program, on programs whose figures are known."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
from numpyro import distributions as dist
import pytest
from scipy import integrate, stats
import xarray as xr

from sami_ppl.analyses.evaluate import bound_figures, evaluate, marginal_kl, sample_figures
from sami_ppl.analyses.scores import probes
from sami_ppl.diagnostics import collapse_warning, noise_errors
from sami_ppl.diffusion.sampler import DPMSolver
from sami_ppl.diffusion.schedule import VariancePreserving
from sami_ppl.encoders.encoder import AbstractEncoder
from sami_ppl.encoders.law import DiagonalLaw
from sami_ppl.encoders.rotation import soft_uniform
from sami_ppl.fitting.gauge import align
from sami_ppl.program.program import Program

pytestmark = pytest.mark.slow

OBS = 400


def prior():
    numpyro.sample("z", dist.Normal(0.0, 1.0).expand([2]).to_event(1))


class Collapsed(AbstractEncoder):
    """The prior, whatever the observation."""

    base: AbstractEncoder

    def __init__(self, base):
        self.base = base

    schedule = property(lambda self: self.base.schedule)
    event_shape = property(lambda self: self.base.event_shape)
    latent_size = property(lambda self: self.base.latent_size)

    def parameters(self, x_noisy, log_snr):
        return jnp.zeros(2) + 0 * x_noisy.sum(), jnp.ones(2)

    def distribution(self, parameters):
        return DiagonalLaw(*parameters)


class Unused(Collapsed):
    """A guide that informs, and guidance that ignores z: KL without gain."""

    def parameters(self, x_noisy, log_snr):
        return self.base.parameters(x_noisy, log_snr)

    def log_prob(self, z, x_noisy, log_snr):
        return jnp.sum(-0.5 * z**2 - 0.5 * jnp.log(2 * jnp.pi)) + 0 * x_noisy.sum()


@pytest.fixture
def exact(oracle):
    return oracle(VariancePreserving(-8.0, 8.0))


@pytest.fixture
def program(exact):
    return Program(prior, exact.denoiser, exact.encoder, sampler=DPMSolver(24))


def draws(exact, obs=OBS, seed=0):
    """Codes and observations of the oracle."""
    rng = np.random.default_rng(seed)
    z = rng.normal(size=(obs, 2))
    return z, (z @ exact.weights.T + rng.normal(size=(obs, 6)) * exact.noise_variance**0.5).astype(np.float32)


def evidence(exact, x):
    """Mean −log p(x), exactly."""
    return -stats.multivariate_normal(np.zeros(6), exact.cov).logpdf(x).mean()


def analytic_kl(exact, x):
    """KL per axis of the exact posterior, averaged over x."""
    precision = 1 + (exact.weights**2).sum(0) / exact.noise_variance
    mean = x @ exact.weights / exact.noise_variance / precision
    return (0.5 * (mean**2 + 1 / precision - 1 + np.log(precision))).mean(0)


def test_bound_is_the_exact_evidence_of_the_oracle(exact, program):
    """Within four stated errors and the 2e-2 that the ends of the noise range cost; looser for a wrong denoiser."""
    _, x = draws(exact)
    found = bound_figures(program, x, key=jax.random.key(0), levels=32)
    bound, want = found["bound_nats"], evidence(exact, x)
    assert 0 < bound["se"] < 0.25
    assert abs(bound["mean"] - want) < 4 * bound["se"] + 0.02
    assert found["bits_per_dim"]["mean"] == pytest.approx(bound["mean"] / 6 / np.log(2))
    assert found["bits_per_dim"]["se"] == pytest.approx(bound["se"] / 6 / np.log(2))
    assert list(found["kl_nats"]) == ["z[0]", "z[1]"]
    assert list(found["kl_nats"].values()) == pytest.approx(analytic_kl(exact, x), rel=0.01)
    assert found["kl_total_nats"] == pytest.approx(sum(found["kl_nats"].values()))

    narrow = type(exact.denoiser)(jnp.zeros(6), jnp.asarray(0.3 * exact.cov, jnp.float32), exact.schedule)
    wrong = bound_figures(program.replace(denoiser=narrow), x, key=jax.random.key(0), levels=32)["bound_nats"]
    assert wrong["mean"] > want + 4 * wrong["se"] + 0.02


def test_marginal_kl_in_closed_form(exact, program):
    """Of a diagonal posterior, the terms of the bound; of a rotated one, less than the KL in the bound."""
    _, x = draws(exact)
    found = marginal_kl(program, x)
    assert list(found.values()) == pytest.approx(analytic_kl(exact, x), rel=0.01)
    rotated = align(program, x, seed=1).program
    angle = np.deg2rad(45.0)
    turn = jnp.asarray([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]], jnp.float32)
    rotated = rotated.replace(encoder=type(rotated.encoder)(program.encoder, turn))
    assert sum(marginal_kl(rotated, x).values()) < sum(found.values()) - 0.01
    full = bound_figures(rotated, x[:64], key=jax.random.key(0), levels=2)
    want = analytic_kl(exact, x[:64]).sum()
    assert full["kl_total_nats"] == pytest.approx(want, rel=0.01)
    assert list(full["kl_nats"].values()) == pytest.approx([want / 2] * 2, rel=0.01)


def test_marginal_kl_under_another_prior(exact, program):
    """Of a bounded prior with scales of its own, by scipy's integral; of a bounded support, none."""
    spread = jnp.array([0.8, 1.5])

    def bounded():
        numpyro.sample("z", soft_uniform(spread).to_event(1))

    program = program.replace(prior=bounded)
    _, x = draws(exact, 3)
    (site,), (loc, scale) = program.latents.sites, program.encode(x)
    found = marginal_kl(program, x)
    for j, axis in enumerate(site.axes):
        wanted = []
        for m, s in zip(loc[:, j] * site.scale[j] + site.shift[j], scale[:, j] * site.scale[j], strict=True):
            law = stats.norm(m, s)
            grid = np.linspace(m - 8 * s, m + 8 * s, 2001)
            log_p = np.asarray(soft_uniform(spread[j]).log_prob(jnp.asarray(grid)), float)
            wanted.append(integrate.simpson(law.pdf(grid) * (law.logpdf(grid) - log_p), x=grid))
        assert found[axis] == pytest.approx(np.mean(wanted), rel=0.01, abs=1e-3)
    assert found["z[0]"] != pytest.approx(found["z[1]"], rel=0.1), "or the axes could be mixed up"

    def box():
        numpyro.sample("z", dist.Uniform(-1, 1).expand([2]).to_event(1))

    assert marginal_kl(program.replace(prior=box), x) == {}


def test_sample_figures_of_the_oracle(exact, program):
    """Given z, x and its sample are independent N(Wz, .3 I): errors 2 · .3 to the own image, 2 tr Σ / 6 to another.

    400 × 6 squares: relative errors near .03 and .06; the solver adds 2 %.
    """
    z, x = draws(exact)
    found = sample_figures(
        program, x, key=jax.random.key(0), mean_image=np.zeros(6), distance=lambda images: images.std(-1),
        predict=lambda codes: codes, factors=z, names=["one", "two"],
    )  # fmt: skip
    apart = np.trace(exact.cov) / 6
    assert found["mse_own"] == pytest.approx(2 * exact.noise_variance, rel=0.15)
    assert found["mse_other"] == pytest.approx(2 * apart, rel=0.2)
    assert found["mse_two_images"] == pytest.approx(2 * apart, rel=0.2)
    assert found["mse_mean_image"] == pytest.approx(apart, rel=0.2)
    assert found["mse_own_median"] < found["mse_own"]
    # The posterior mean given a sample correlates with its code as √reliability: w² / (w² + s₀²).
    strength = (exact.weights**2).sum(0)
    reliability = strength / (strength + exact.noise_variance)
    assert list(found["reencoded_corr"].values()) == pytest.approx(np.sqrt(reliability), abs=0.07)
    # The true factors are one more noisy step away.
    assert list(found["reencoded_factor_corr"].values()) == pytest.approx(reliability**1.5, abs=0.12)
    assert (found["sampler"], found["evaluations"]) == ("DPMSolver", 24)
    assert found["rms_conditional"]["median"] < found["rms_conditional"]["p90"]
    assert found["rms_unconditional"]["median"] == pytest.approx(np.median(x.std(-1)), rel=0.15)


def labelled(separation, obs=600, seed=0):
    """Codes and pixels of three classes, and labels; with separation 0 they say nothing about the label."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(3, size=obs)
    codes = rng.normal(size=(obs, 2)) + separation * np.array([[0, 1], [1, -1], [-1, -1]])[labels]
    pixels = rng.normal(size=(obs, 1, 3, 3))
    half = obs // 2
    cut = lambda a: (a[:half], a[half:])  # noqa: E731
    return cut(codes), cut(pixels), cut(labels)


def test_probes_beat_chance_where_the_codes_separate_classes():
    found = probes(*labelled(3.0))
    assert set(found) == {"knn_sami", "linear_sami", "knn_pca", "linear_pca"}
    assert min(found["knn_sami"], found["linear_sami"]) > 0.95
    assert max(found["knn_pca"], found["linear_pca"]) < 0.5, "pixels are noise"


def test_probes_are_at_chance_where_codes_are_noise():
    """300 test labels: 1/3 ± five standard errors of .027."""
    assert all(abs(accuracy - 1 / 3) < 0.14 for accuracy in probes(*labelled(0.0)).values())


def collapse(program, x, key):
    kl = bound_figures(program, x, key=key, levels=2)["kl_nats"]
    return collapse_warning(list(kl.values()), float(jnp.sum(noise_errors(program, jnp.asarray(x), key).gain)))


@pytest.mark.parametrize(
    ("encoder", "message"),
    [(Collapsed, "has collapsed: the KL is below"), (Unused, "z informs nothing"), (lambda base: base, None)],
    ids=["collapsed", "unused", "oracle"],
)
def test_collapse_warnings(exact, program, encoder, message):
    _, x = draws(exact, 200)
    found = collapse(program.replace(encoder=encoder(exact.encoder)), x, jax.random.key(0))
    if message is None:
        assert found is None
    else:
        assert message in found
        assert "free_bits" in found


@pytest.mark.slow
@pytest.mark.parametrize("collapsed", [False, True])
def test_evaluate_gathers_the_figures(exact, program, collapsed):
    """The oracle recovers its factors; a collapsed program recovers none, and says so."""
    z, x = draws(exact, 900)
    data = xr.Dataset(
        {"x": (("obs", "feature"), x), "one": ("obs", z[:, 0]), "two": ("obs", z[:, 1]),
         "sign": ("obs", (z[:, 0] > 0).astype(int)), "same": ("obs", np.full(900, -1))},
        coords={"split": ("obs", np.where(np.arange(900) < 600, "train", "test"))},
    )  # fmt: skip
    if collapsed:
        program = program.replace(encoder=Collapsed(exact.encoder))
    found = evaluate(program, data, key=jax.random.key(0), samples=64)
    assert found["active_latents"] == (0 if collapsed else 2)
    if collapsed:
        assert len(found["warnings"]) == 1
        assert found["z_gain"] == pytest.approx(0, abs=1e-3)
        assert abs(found["guidance_gain"]) < 1e-3
        assert found["probes"]["sign"]["linear_sami"] < 0.65
        return
    assert found["warnings"] == []
    assert found["z_gain"] > found["guidance_gain"] > 0.5
    corr = np.abs(found["corr"]["values"])
    strength = (exact.weights**2).sum(0)
    assert np.diag(corr) == pytest.approx(np.sqrt(strength / (strength + exact.noise_variance)), abs=0.06)
    assert corr[[0, 1], [1, 0]].max() < 0.2
    assert found["linear_r2"]["one"] == pytest.approx(2.25 / 2.55, abs=0.06)
    assert set(found["rotated_control"]) == {"mig", "dci_disentanglement"}
    assert found["probes"]["sign"]["linear_sami"] > 0.8
    assert list(found["probes"]) == ["sign"], "of one value for all there is nothing to be told"
    assert "raw" not in found
    # The components of these data are the axes themselves: as good as the oracle, and no better.
    assert found["low_pass_pca"]["linear_r2"]["one"] == pytest.approx(2.25 / 2.55, abs=0.06)
    chosen = evaluate(program, data, key=jax.random.key(0), samples=8, factors=["two"])
    assert (list(chosen["linear_r2"]), "probes" in chosen) == (["two"], False)
    counts = {"train": 600, "test": 300, "bound": 300, "z_gain": 300, "noise_end_kl": 256, "samples": 64}
    assert found["observations"] == counts
    assert "skipped" not in found
    hurried = evaluate(program, data, key=jax.random.key(0), samples=64, seconds=0.0)
    assert hurried["observations"] == counts | {"bound": 256}, "the first chunk of each"
    assert hurried["bound_nats"]["se"] > found["bound_nats"]["se"]
    assert hurried["skipped"] == ["low_pass_pca", "probes of sign"]
    assert not hurried.keys() & {"low_pass_pca", "probes"}
    rng = np.random.default_rng(1)
    odd = data.assign(some=("obs", np.where(z[:, 0] > 2, np.nan, z[:, 0])), still=("obs", np.zeros(900)))
    odd["quarter"] = ("obs", rng.uniform(0, 90, 900), {"period": 360.0})
    with pytest.warns(UserWarning, match="left out of the true factors") as warned:
        kept = evaluate(program, odd, key=jax.random.key(0), samples=8)
    assert [str(w.message).split()[0] for w in warned] == ["some", "still"]
    assert list(kept["linear_r2"]) == ["one", "two", "cos_quarter", "sin_quarter"]
    assert kept["largest_jump"]["quarter"] == {}, "these angles do not go round"
    with pytest.raises(ValueError, match=r"no factor 'three'; .* on obs are \['one', 'two', 'sign', 'same'\]"):
        evaluate(program, data, key=jax.random.key(0), factors=["three"])
