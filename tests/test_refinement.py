"""Refined posteriors against the exact one of a linear-Gaussian program, started from guides right and wrong.

A refined mean is right within .1 posterior standard deviations and a refined standard deviation within 10 %: noise of
400 independent draws is .05 and 3.5 %, and there are 1,600 or more.
"""

import json
import sys

from directions_oracle import oracle as directions
from discrete_priors import X, dataset, joint, kinds_program, labelled
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
from numpyro import distributions as dist
import pytest
from scipy import stats
import xarray as xr

from sami_ppl import refinement
from sami_ppl.calibration import pictures
from sami_ppl.decoders.bound import bound
from sami_ppl.decoders.exact import ExactEncoder, LinearGaussian
from sami_ppl.diffusion.schedule import NoiseProposal, VariancePreserving
from sami_ppl.encoders.encoder import encoder_for
from sami_ppl.encoders.families import Full, Mixture
from sami_ppl.program.program import Program
from sami_ppl.refinement.target import (
    _noise,
    _target,
    code_at,
    log_density,
    log_joint,
    log_likelihood,
    log_prior,
    targets,
)
from sami_ppl.runs import cli
from sami_ppl.runs.refine import describe, refine_run
from sami_ppl.saving.files import UserError

WEIGHTS = np.linalg.qr(np.random.default_rng(0).normal(size=(6, 2)))[0] @ np.array([[1.5, 0.5], [0.0, 0.8]])
METHODS = {"nuts": {"draws": 400, "warmup": 150}, "svi": {"draws": 2000, "steps": 300}}


class Wrong(ExactEncoder):
    """The exact noisy posterior, but for the clean end: the guide is twice too narrow, and a half of its sd off."""

    def parameters(self, x_noisy, log_snr):
        mean, cov = super().parameters(x_noisy, log_snr)
        clean = log_snr >= self.schedule.log_snr_max
        return mean + jnp.where(clean, 0.25, 0.0) * jnp.sqrt(jnp.diag(cov)), jnp.where(clean, 0.25, 1.0) * cov


def prior():
    numpyro.sample("z", dist.Normal(0.0, 1.0).expand([2]).to_event(1), infer={"event_dims": ["factor"]})


@pytest.fixture(scope="module")
def model():
    return LinearGaussian(jnp.asarray(WEIGHTS, jnp.float32), 0.5, VariancePreserving(-10.0, 9.0))


@pytest.fixture(scope="module")
def kinds_oracle():
    return kinds_program()


@pytest.fixture(scope="module")
def x(model):
    return np.asarray(model.sample(jax.random.key(0), 2)[0])


def exact_moments(model, x):
    """Mean and covariance of p(z | x), written down anew."""
    cov = np.linalg.inv(np.eye(2) + WEIGHTS.T @ WEIGHTS / 0.25)
    return x @ WEIGHTS @ cov / 0.25, cov


def distance(tree, model, x):
    """Largest error of the means in exact standard deviations, and of the standard deviations, relative."""
    codes = tree["unconstrained_posterior"]["code"].values
    mean, cov = exact_moments(model, x)
    sd = np.sqrt(np.diag(cov))
    return np.abs((codes.mean((0, 1)) - mean) / sd).max(), np.abs(codes.std((0, 1)) / sd - 1).max()


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_refinement_of_a_wrong_guide_is_the_exact_posterior(method, model, x):
    """The control is the guide itself, which fails by .25 of its sd and half the width; agreement tells by how much."""
    program = Program(prior, model.denoiser, Wrong(model))
    refine = getattr(refinement, method)
    tree = refine(program, x, key=jax.random.key(1), levels=128, **METHODS[method])
    shift, ratio = distance(tree, model, x)
    assert shift < 0.1
    assert ratio < 0.1
    cov = exact_moments(model, x)[1]
    codes = tree["unconstrained_posterior"]["code"].values[:, :, 0].reshape(-1, 2)
    assert np.corrcoef(codes.T)[0, 1] == pytest.approx(cov[0, 1] / np.sqrt(cov[0, 0] * cov[1, 1]), abs=0.1)

    guide = tree["amortised"]["z"].values
    assert np.abs(guide.std((0, 1)) / np.sqrt(np.diag(cov)) - 1).min() > 0.4
    found = tree["agreement"]
    assert found["sd_ratio"].values == pytest.approx(2.0, rel=0.1)
    assert found["mean_shift"].values == pytest.approx(-0.5, abs=0.2)
    # KL(q ‖ p) of the guide: its factor ½ costs D (log 2 − 3/8) nats, its shift δ = .25 sd's (marginal) some more.
    delta = 0.25 * np.sqrt(np.diag(cov))
    kl = 2 * (np.log(2) - 3 / 8) + 0.5 * delta @ np.linalg.solve(cov, delta)
    assert np.all(np.abs(found["gain"].values - kl) < 4 * found["gain_se"].values + 0.05)
    assert np.all(found["gain"].values > 0.3)
    assert tree["posterior"]["z"].dims == ("chain", "draw", "obs", "factor")
    assert tree["posterior"]["z"].values == pytest.approx(tree["unconstrained_posterior"]["code"].values, abs=1e-5)
    if method == "nuts":
        stats = tree["sample_stats"]
        assert stats["diverging"].dims == ("chain", "draw", "obs")
        assert not stats["diverging"].values.any()
        assert "divergences 0 of 3200" in describe(tree, method)


@pytest.mark.slow
def test_refinement_leaves_the_exact_guide(model, x):
    """No shift, no other width, and nothing gained."""
    program = Program(prior, model.denoiser, model.encoder)
    tree = refinement.svi(program, x[:1], key=jax.random.key(1), levels=128, **METHODS["svi"])
    assert np.abs(tree["agreement"]["mean_shift"].values).max() < 0.1
    assert np.abs(tree["agreement"]["sd_ratio"].values - 1).max() < 0.1
    assert np.abs(tree["agreement"]["gain"].values).max() < 0.05


@pytest.mark.slow
def test_likelihood_is_the_bound_in_closed_form(model, x):
    """Differences between codes, from which ε has gone: only the integral over λ is left, by 256 levels."""
    program = Program(prior, model.denoiser, model.encoder)
    (target,) = targets(program, x[:1], jax.random.key(0), 256)
    codes = np.random.default_rng(0).normal(size=(8, 2)).astype(np.float32)
    found = np.array([log_likelihood(program, target.table, jnp.asarray(z)) for z in codes])
    known = np.array(
        [-float(model.bound(jnp.asarray(x[0]), jnp.asarray(z), 1e-6 * jnp.eye(2))[0].total) for z in codes]
    )
    assert found - found[0] == pytest.approx(known - known[0], rel=0.03, abs=0.05)
    # The value itself has the noise of ε: that of half a χ²₆ over 256 levels and few of them weighty.
    assert found[0] == pytest.approx(known[0], abs=6.0)


def positive_prior():
    rate = numpyro.sample("rate", dist.Gamma(3.0, 2.0))
    numpyro.sample("place", dist.Uniform(-1.0, 3.0).expand([2]).to_event(1))
    numpyro.sample("size", dist.LogNormal(0.0, rate))


@pytest.mark.slow
def test_prior_of_codes_has_the_jacobian(tiny_program):
    """Of constrained and dependent sites, against scipy's densities and log |dx/dz| by differences."""
    program = tiny_program(positive_prior)
    z = jnp.asarray([0.3, -0.4, 0.8, 0.5])
    values = program.latents.from_code(z)
    rate, place, size = float(values["rate"]), np.asarray(values["place"]), float(values["size"])
    density = stats.gamma.logpdf(rate, 3.0, scale=0.5) + stats.uniform.logpdf(place, -1.0, 4.0).sum()
    density += stats.lognorm.logpdf(size, rate)
    flat = lambda z: jnp.concatenate([jnp.ravel(v) for v in program.latents.from_code(z).values()])  # noqa: E731
    jacobian = np.linalg.slogdet(np.asarray(jax.jacfwd(flat)(z)))[1]
    assert float(log_prior(program, z)) == pytest.approx(density + jacobian, abs=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("family", [Full, Mixture], ids=lambda f: f.__name__)
def test_likelihood_is_the_mean_bound_of_every_family(tiny_program, mlp, fill, family):
    """From a table of derivatives, against the bound through both networks on the same noise."""
    program = tiny_program()
    schedule = program.denoiser.schedule
    encoder = encoder_for(program.prior, mlp(4, 8, key=jax.random.key(1)), schedule, (4,), families={"z": family},
                          key=jax.random.key(2))  # fmt: skip
    program = program.replace(encoder=fill(encoder))
    x, z, key = jnp.asarray([0.4, -1.0, 0.2, 0.9]), jnp.asarray([0.7, -0.2]), jax.random.key(0)
    levels = NoiseProposal(schedule, jnp.asarray([1.0, 3.0, 2.0])).at((jnp.arange(6) + 0.5) / 6)
    log_snr, eps = _noise(levels, x, key)
    assert np.array_equal(eps[:6], -eps[6:])
    each = jax.vmap(lambda *row: bound(program.denoiser, program.encoder, x, z, *row).total)
    known = each(log_snr, jnp.tile(levels.weight, 2), eps).mean()
    target = _target(program, program, levels, x, key, {}, {}, jnp.zeros((1, 2)))
    found = log_likelihood(program, target.table, z)
    assert float(found) == pytest.approx(-float(known), rel=1e-4)


@pytest.mark.slow
def test_what_cannot_be_refined_is_said(model, x):
    program, key = Program(prior, model.denoiser, model.encoder), jax.random.key(0)
    for method, count in (
        ("nuts", "draws"),
        ("nuts", "warmup"),
        ("nuts", "chains"),
        ("svi", "draws"),
        ("svi", "steps"),
    ):
        with pytest.raises(ValueError, match=f"{count} must be at least 1, got 0"):
            getattr(refinement, method)(program, x, key=key, **{count: 0})
    for method, few in (("svi", {"draws": 2}), ("nuts", {"draws": 1, "chains": 2})):
        with pytest.raises(ValueError, match=r"draws, of all chains together, must be more than the 2 axes .*, got 2"):
            getattr(refinement, method)(program, x, key=key, **few)
    with pytest.raises(ValueError, match="levels must be at least 2, got 1"):
        refinement.svi(program, x, key=key, levels=1)
    with pytest.raises(ValueError, match=r"x must have shape \(obs, 6\), got \(2, 5\)"):
        refinement.nuts(program, x[:, :5], key=key)
    with pytest.raises(ValueError, match="holds no observations"):
        refinement.nuts(program, x[:0], key=key)


def test_picture_of_agreement():
    rng = np.random.default_rng(0)
    figure = pictures.agreement(rng.normal(size=(4, 8)), np.ones((4, 8)), [f"z[{j}]" for j in range(8)], list("abcd"))
    assert [panel.get_title() for panel in figure.axes] == [f"z[{j}]" for j in range(6)]
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == list("abcd")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Cyclopts application invoked without tokens")
def test_command_writes_what_it_says(exact_run, monkeypatch, capsys, tmp_path):
    """Positions are of the test part; the exact networks leave nothing to refine."""
    monkeypatch.setattr(sys, "argv", ["sami", "refine", str(exact_run), "--obs", "2,0", "--with", "svi", "--quiet"])
    cli.main()
    text = capsys.readouterr().out
    assert "svi beside the amortised posterior, 64 noise levels" in text
    folder = exact_run / "refinement"
    assert {file.name for file in folder.iterdir()} == {"svi.nc", "svi.json", "svi.png"}
    assert json.loads((folder / "svi.json").read_text())["obs"] == [2, 0]
    with xr.open_datatree(folder / "svi.nc", engine="h5netcdf") as tree:
        assert list(tree["posterior"]["obs"].values) == [2, 0]
        assert np.abs(tree["agreement"]["mean_shift"].values).max() < 0.3
    for arguments, message in (
        ({"obs": "a,b"}, "separated by commas"),
        ({"obs": "0,80"}, "there are 80 observations, 0 to 79, but no 80"),
        ({"obs": "1,1"}, "named twice"),
        ({"method": "hmc"}, "refinement is by nuts or svi"),
        ({"draws": 1}, "draws=1: must be at least 2"),
    ):
        with pytest.raises(UserError, match=message):
            refine_run(exact_run, **arguments)
    with pytest.raises(UserError, match="is no finished run"):
        refine_run(tmp_path)


@pytest.mark.slow
def test_the_fitted_prior_is_the_one_that_counts(tiny_program):
    """log p(z) at learned parameters."""

    def learned():
        numpyro.sample("z", dist.Normal(numpyro.param("centre", jnp.zeros(2)), 1.0).to_event(1))

    program = tiny_program(prior=learned).replace(prior_params={"centre": jnp.array([2.0, -1.0])})
    z = jnp.array([0.3, 0.4])
    np.testing.assert_allclose(
        log_prior(program, z), dist.Normal(jnp.array([2.0, -1.0]), 1.0).log_prob(z).sum(), rtol=1e-5
    )


# --- directions, discrete sites ---------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(("dim", "method"), [(2, "nuts"), (3, "svi")])
def test_directions_are_refined_to_the_exact_posterior(dim, method):
    """Von Mises on the circle, von Mises–Fisher on the sphere, from a guide of half the concentration."""
    program, truth = directions(dim)
    x = truth.sample(1)
    settings = {"nuts": {"draws": 400, "warmup": 150}, "svi": {"draws": 2000, "steps": 300}}[method]
    tree = getattr(refinement, method)(program, x, key=jax.random.key(1), levels=128, **settings)
    codes = tree["unconstrained_posterior"]["code"].values[:, :, 0].reshape(-1, dim)
    np.testing.assert_allclose(np.linalg.norm(codes, axis=1), 1, atol=1e-4)
    k = truth.concentration(x)[0]
    length = np.linalg.norm(k)
    exact, wide = (truth.resultant(size) * k / length for size in (length, length / 2))
    # The sd of an angle is near 1/√‖k‖; .1 of it moves the mean vector by that, .1 of its square shortens it.
    assert np.linalg.norm(codes.mean(0) - exact) < 0.15 / length**0.5
    amortised = tree["amortised"]["place"].values
    assert amortised.shape == tree["posterior"]["place"].shape
    gap = 1 - truth.resultant(length)
    assert 1 - np.linalg.norm(codes.mean(0)) == pytest.approx(gap, rel=0.25)
    assert 1 - np.linalg.norm(wide) > 1.5 * gap, "the control"
    assert tree["agreement"]["gain"].values[0] > 0


@pytest.mark.slow
@pytest.mark.parametrize("dim", [2, 3])
def test_lengths_of_directions_integrate_out(dim):
    """∫ density of v over all of space = ∫ p(u, x) over directions, by sums over grids; lengths are 1 in the mean."""
    program, truth = directions(dim)
    (target,) = targets(program, truth.sample(1), jax.random.key(0), 8)
    step = 0.07
    grid = np.stack(np.meshgrid(*[np.arange(-1.75, 1.76, step)] * dim, indexing="ij"), -1).reshape(-1, dim)
    grid = grid[np.abs(np.linalg.norm(grid, axis=1) - 1) < 0.75].astype(np.float32)  # three standard deviations
    whole = jax.jit(jax.vmap(lambda v: log_density(program, target, v)))(jnp.asarray(grid))
    rng = np.random.default_rng(0)
    if dim == 2:
        angle = np.linspace(-np.pi, np.pi, 400, endpoint=False)
        u, area = np.stack([np.cos(angle), np.sin(angle)], 1), 2 * np.pi
    else:
        u, area = rng.normal(size=(40_000, 3)), 4 * np.pi
        u /= np.linalg.norm(u, axis=1, keepdims=True)
    joint = jax.jit(jax.vmap(lambda z: log_joint(program, target, z)))(jnp.asarray(u, jnp.float32))
    found = float(jax.nn.logsumexp(whole)) + dim * np.log(step)
    assert found == pytest.approx(float(jax.nn.logsumexp(joint)) + np.log(area / len(u)), abs=0.05)
    mean = np.linalg.norm(grid, axis=1) @ np.asarray(jax.nn.softmax(whole))
    assert mean == pytest.approx(1, abs=0.02), "1.06 without the volume of the lengths"


@pytest.mark.slow
def test_discrete_sites_are_summed_over(build):
    """The density of the others is a sum over kinds, drawn by the shares of its terms; known ones are held."""
    program = build(joint)
    (target,) = targets(program, X[:1], jax.random.key(0), 4)
    assert target.kinds.shape == (3, 6)
    point = jnp.array([0.3, -0.4, 0.8])
    codes = jnp.concatenate([jnp.eye(3), jnp.tile(point, (3, 1))], 1)
    terms = np.asarray(jax.jit(jax.vmap(lambda z: log_joint(program, target, z)))(codes), float)
    whole = jax.jit(lambda point: log_density(program, target, point))(point)
    assert float(whole) == pytest.approx(np.logaddexp.reduce(terms), abs=1e-4)
    keys = jax.random.split(jax.random.key(1), 4000)
    drawn = np.asarray(jax.jit(jax.vmap(lambda key: code_at(program, target, point, key)))(keys))
    np.testing.assert_allclose(drawn[:, 3:], np.broadcast_to(point, (4000, 3)), rtol=1e-6)
    share = np.exp(terms - np.logaddexp.reduce(terms))
    assert np.all(np.abs(drawn[:, :3].mean(0) - share) < 4 * np.sqrt(share * (1 - share) / 4000) + 1e-3)
    told = build(labelled, {"label": np.array([-1])})
    found = targets(told, dataset(), jax.random.key(0), 2)
    assert [len(target.kinds) for target in found] == [3, 1, 1, 3, 1]
    assert found[1].kinds[0, :3].tolist() == [0, 0, 1]


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_refinement_with_kinds_is_the_exact_mixture(kinds_oracle, method):
    """Mean and spread of z, and the probabilities of the kinds, against the mixture posterior in closed form."""
    program, _, exact = kinds_oracle
    x = np.array([[0.4, 0.2]], np.float32)
    tree = getattr(refinement, method)(program, x, key=jax.random.key(1), levels=128, **METHODS[method])
    clean = exact.schedule.alpha(jnp.asarray(6.0)) * x[0]
    mean, cov = exact.posterior(clean, jnp.asarray(6.0))
    probs = np.exp(exact.parameters(clean, jnp.asarray(6.0))[0])
    z, kind = (tree["posterior"][name].values.ravel() for name in ("z", "kind"))
    sd = float(np.sqrt(cov[0, 0]))
    assert abs(z.mean() - float(mean[0])) < 0.15 * sd
    assert z.std() == pytest.approx(sd, rel=0.15)
    np.testing.assert_allclose(np.bincount(kind.astype(int), minlength=3) / len(kind), probs, atol=0.07)
    assert tree["agreement"]["axis"].values.tolist() == ["z[0]"]
    assert abs(float(tree["agreement"]["gain"].values[0])) < 0.2, "the guide is the posterior, nearly Gaussian in z"


MEANS = np.array([[1.0, -0.5], [-2.0, 1.0]])


def by_class(kind):
    numpyro.sample("z", dist.Normal(jnp.asarray(MEANS)[kind], 0.6).to_event(1), infer={"event_dims": ["factor"]})


def hierarchical(obs):
    scale = numpyro.sample("scale", dist.LogNormal(0.0, 1.0).expand([2]).to_event(1))
    with obs:
        numpyro.sample("z", dist.Normal(0, scale).to_event(1), infer={"event_dims": ["factor"]})


def narrowly_known():
    numpyro.sample("scale", dist.LogNormal(jnp.log(jnp.array([0.3, 0.6])), 1e-4).to_event(1))


def moments_under(program, model, x, mean, sd):
    """Mean and covariance of the code given x where its site is N(mean, diag(sd²)), written down anew.

    The code is the site centred and scaled by the prior, and x = W code + noise.
    """
    (site,) = program.latents.sites
    mean, sd = (mean - np.asarray(site.shift)) / np.asarray(site.scale), sd / np.asarray(site.scale)
    noise = float(model.noise_std) ** 2
    cov = np.linalg.inv(WEIGHTS.T @ WEIGHTS / noise + np.diag(1 / np.square(sd)))
    return cov @ (WEIGHTS.T @ np.asarray(x) / noise + mean / np.square(sd)), cov


def agrees(tree, mean, cov):
    codes, sd = tree["unconstrained_posterior"]["code"].values[:, :, 0], np.sqrt(cov.diagonal())
    assert (np.abs(codes.mean((0, 1)) - mean) / sd).max() < 0.1
    assert codes.std((0, 1)) / sd == pytest.approx(np.ones(2), rel=0.1)


@pytest.mark.slow
@pytest.mark.parametrize("kind", [0, 1])
@pytest.mark.parametrize("method", METHODS)
def test_the_class_of_an_observation_counts(model, x, kind, method):
    """Under p(z | u) the likelihood stays and the posterior moves; the guide, which does not see u, is far from it."""
    program = Program(by_class, model.denoiser, model.encoder, given={"kind": np.arange(2)})
    data = xr.Dataset({"x": (("obs", "feature"), x[:1]), "kind": ("obs", np.array([kind]))})
    tree = getattr(refinement, method)(program, data, key=jax.random.key(1), levels=128, **METHODS[method])
    agrees(tree, *moments_under(program, model, x[0], MEANS[kind], np.full(2, 0.6)))
    with pytest.raises(AssertionError):
        agrees(tree, *moments_under(program, model, x[0], MEANS[1 - kind], np.full(2, 0.6)))


@pytest.mark.slow
def test_every_observation_has_its_own_variables(model):
    program = Program(by_class, model.denoiser, model.encoder, given={"kind": np.arange(2)})
    kinds = np.array([1, 0, 1])
    data = xr.Dataset({"x": (("obs", "feature"), np.zeros((3, 6), np.float32)), "kind": ("obs", kinds)})
    found = targets(program, data, jax.random.key(0), 2)
    assert [int(target.given["kind"]) for target in found] == kinds.tolist()
    for target, kind in zip(found, kinds, strict=True):
        z = jnp.zeros(2)
        assert log_prior(program, z, target.given) == log_prior(program, z, {"kind": jnp.asarray(kind)})
    assert log_prior(program, z, {"kind": jnp.asarray(0)}) != log_prior(program, z, {"kind": jnp.asarray(1)})


@pytest.mark.slow
def test_global_sites_are_as_their_guide_has_them(model, x):
    """Where it knows them, the posterior is that under these scales."""
    program = Program(hierarchical, model.denoiser, model.encoder, global_guide=narrowly_known)
    tree = refinement.svi(program, x[:1], key=jax.random.key(1), levels=128, **METHODS["svi"])
    agrees(tree, *moments_under(program, model, x[0], 0.0, np.array([0.3, 0.6])))
    with pytest.raises(AssertionError):
        agrees(tree, *moments_under(program, model, x[0], 0.0, np.ones(2)))


def vaguely_known():
    numpyro.sample("scale", dist.LogNormal(jnp.log(jnp.array([0.3, 0.6])), 0.5).to_event(1))


@pytest.mark.slow
def test_draws_of_global_sites_follow_their_guide_and_all_count(model, x):
    """Mean and standard deviation of 64 draws within four standard errors."""
    program = Program(hierarchical, model.denoiser, model.encoder, global_guide=vaguely_known)
    (target,) = targets(program, x[:1], jax.random.key(0), 2)
    logs = np.log(np.asarray(target.global_values["scale"]))
    assert logs.shape == (64, 2)
    assert logs.mean(0) == pytest.approx(np.log([0.3, 0.6]), abs=4 * 0.5 / 64**0.5)
    assert logs.std(0, ddof=1) == pytest.approx(0.5, abs=4 * 0.5 / 128**0.5)
    z = jnp.array([0.5, -0.5])
    own = log_joint(program, target, z) - log_likelihood(program, target.table, z)
    assert float(own) == pytest.approx(float(log_prior(program, z, {}, target.global_values)), abs=1e-3)
    first = {name: value[:1] for name, value in target.global_values.items()}
    assert abs(float(own) - float(log_prior(program, z, {}, first))) > 0.01, "the control"


def test_the_prior_is_averaged_over_global_sites(tiny_program):
    """Densities at two scales, averaged as densities."""
    program = tiny_program(prior=hierarchical)
    z, scale = jnp.array([0.3, -0.4]), jnp.array([[0.5, 1.0], [2.0, 0.7]])
    (site,) = program.latents.sites
    value = np.asarray(program.latents.from_code(z)["z"])
    each = stats.norm(0, np.asarray(scale)).pdf(value).prod(1)
    jacobian = np.log(np.broadcast_to(np.asarray(site.scale), 2)).sum()
    found = log_prior(program, z, global_values={"scale": scale})
    assert float(found) == pytest.approx(np.log(each.mean()) + jacobian, abs=1e-4)
