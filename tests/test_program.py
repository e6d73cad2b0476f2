"""A program under NumPyro: traces, Predictive, messages."""

import copy

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
from numpyro import distributions as dist
from numpyro import handlers
from numpyro.infer import Predictive, TraceMeanField_ELBO, log_likelihood
import pytest
from scipy import stats
from two_priors import PRIORS, N, X, traced

from sami_ppl.decoders.decoder import ScoreDecoder
from sami_ppl.diffusion.sampler import DDIM
from sami_ppl.diffusion.schedule import VariancePreserving
from sami_ppl.fitting.objective import ScoreELBO


@pytest.mark.slow
@pytest.mark.parametrize("name", PRIORS)
def test_a_copy_has_the_structure_of_its_program(name, program):
    """So that trees of the two can be averaged, or told apart."""
    p = program(name)
    copied = copy.deepcopy(p)
    same = jax.tree.map(lambda a, b: a is not b and np.array_equal(a, b), *map(arrays_of, (p, copied)))
    assert all(jax.tree.leaves(same))


def arrays_of(program):
    return eqx.filter(program, eqx.is_array)


# --- a NumPyro model and guide ----------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("name", PRIORS)
def test_model_and_guide_trace(name, program):
    """Model: the prior's sites and x, batched; guide: the same latent sites, inside their supports; two parameters."""
    p = program(name)
    model, guide = traced(p.model, 0, x=X), traced(p.guide, 1, x=X)
    latent = [site.name for site in p.latents.sites]
    sample_sites = lambda t: [k for k, s in t.items() if s["type"] == "sample"]  # noqa: E731
    assert [s for s in sample_sites(model) if s != "x"] == latent == sample_sites(guide)
    assert model["x"]["is_observed"]
    np.testing.assert_array_equal(model["x"]["value"], X)
    for site in p.latents.sites:
        for trace in (model, guide):
            assert trace[site.name]["value"].shape == (N, *site.event_shape)
        assert model[site.name]["fn"].support(guide[site.name]["value"]).all()
    params = lambda t: {k for k, s in t.items() if s["type"] == "param"}  # noqa: E731
    assert params(model) == {"denoiser$params", "encoder$params"}
    assert params(guide) == {"encoder$params"}


@pytest.mark.slow
def test_unobserved_model_draws_by_reverse_diffusion(program):
    """model(size=n): x is what the decoder samples for the z of the trace, with the key of the site."""
    p = program()
    trace = traced(p.model, 3, size=3)
    z = p.latents.to_code({k: trace[k]["value"] for k in ("a", "b")})
    expected = ScoreDecoder(p.denoiser, p.encoder, z, sampler=p.sampler).sample(trace["x"]["kwargs"]["rng_key"])
    assert trace["x"]["value"].shape == (3, 4)
    np.testing.assert_allclose(trace["x"]["value"], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_render_model(program):
    """NumPyro's own drawing of the program: every site in the plate `obs`."""
    pytest.importorskip("graphviz")
    source = numpyro.render_model(program().model, model_kwargs={"x": X}).source
    for word in ("a", "b", "x", "obs"):
        assert word in source


def test_predictive_gives_new_observations_not_the_data(program):
    """Posterior by the guide, then the model at these sites without x: draws of x, not the x that was observed."""
    p = program()
    params = p.params()
    draws = Predictive(p.guide, params=params, num_samples=3)(jax.random.key(0), X)
    assert {k: v.shape for k, v in draws.items()} == {"a": (3, N), "b": (3, N, 2)}
    new = Predictive(p.model, draws, params=params)(jax.random.key(1), None, size=N)["x"]
    assert new.shape == (3, N, 4)
    assert not np.isclose(new, X[None]).all(-1).any()
    assert not np.allclose(new[0], new[1])
    same = Predictive(p.model, draws, params=params)(jax.random.key(1), X)
    assert "x" not in same or np.array_equal(same["x"][0], X)  # what happens with the data left in


@pytest.mark.slow
def test_log_likelihood_is_the_bound_with_the_fitted_parameters(program):
    """numpyro.log_likelihood under fitted params = minus the fitted program's bound on a fixed noise set, by hand."""
    p = program()
    fitted = {k: jax.tree.map(lambda a: a + 0.05, v) for k, v in p.params().items()}
    draws = Predictive(p.guide, params=fitted, num_samples=2)(jax.random.key(0), X)
    got = log_likelihood(handlers.substitute(p.model, data=fitted), draws, X)["x"]
    assert got.shape == (2, N)

    def by_hand(program, z):
        schedule = program.denoiser.schedule
        level_key, noise_key = jax.random.split(jax.random.key(0))
        levels = schedule.stratified(level_key, N)[0]
        eps = jax.random.normal(jax.random.split(noise_key, 1)[0], X.shape)
        total = []
        for x, code, level, e in zip(X, z, levels, eps, strict=True):
            alpha, sigma = schedule.alpha(level), schedule.sigma(level)
            noisy = alpha * x + sigma * e
            g = jax.grad(program.encoder.log_prob, argnums=1)(code, noisy, level)
            error = e - program.denoiser(noisy, level) + sigma * g
            s2 = jax.nn.sigmoid(4.0)
            start = 0.5 * np.sum((1 - s2) * x**2 + s2 - np.log(s2) - 1)
            total.append(start + 4 * np.sum(error**2) + 2 * (np.log(2 * np.pi * np.e) - 4))
        return -np.array(total)

    new = p.with_params(fitted)
    z = p.latents.to_code(draws)[0]
    np.testing.assert_allclose(got[0], by_hand(new, z), rtol=2e-4)
    assert not np.allclose(got[0], by_hand(p, z), rtol=1e-2)  # control: the parameters before the fit


def test_decoder_log_prob_is_the_exact_density_on_the_oracle(oracle):
    """Mean over 40,000 (λ, ε) of ScoreDecoder.log_prob = log p(x | z) of the linear-Gaussian model; 5 sd, 6e-7."""
    exact, z, n = oracle(VariancePreserving(-10.0, 10.0)), jnp.asarray([0.5, -1.0]), 40_000
    x = jnp.linspace(-1.0, 1.0, 6)
    decoder = ScoreDecoder(
        exact.denoiser, exact.encoder, jnp.broadcast_to(z, (n, 2)), sampler=DDIM(), key=jax.random.key(1)
    )
    values = np.asarray(jax.jit(lambda: decoder.log_prob(jnp.broadcast_to(x, (n, 6))))(), float)
    truth = stats.multivariate_normal(exact.weights @ z, exact.noise_variance * np.eye(6)).logpdf(x)
    tolerance = 5 * values.std() / np.sqrt(n)
    assert tolerance < 1
    assert abs(values.mean() - truth) < tolerance + 2e-3  # excess of the finite range
    other = stats.multivariate_normal(exact.weights @ -z, exact.noise_variance * np.eye(6)).logpdf(x)
    assert abs(values.mean() - other) > tolerance  # control: the density at another z


# --- messages ---------------------------------------------------------------------------------------------------------


def seeded(function, *args, **kwargs):
    return handlers.seed(function, jax.random.key(0))(*args, **kwargs)


ERRORS = {
    "one observation": (lambda p: seeded(p.model, X[0]), r"shape \(obs, 4\), got \(4,\); add the leading dim"),
    "other width": (lambda p: seeded(p.guide, X[:, :3]), r"x must have shape \(obs, 4\), got \(5, 3\)"),
    "too many dims": (lambda p: seeded(p.model, X[:, None]), r"got \(5, 1, 4\)"),
    "size against x": (lambda p: seeded(p.model, X, size=3), "size is 3 but x holds 5 observations"),
    "guide without x": (lambda p: seeded(p.guide), r"guide is amortised.*guide\(x\)"),
    "encoder width": (
        lambda p: p.replace(prior=lambda: numpyro.sample("a", dist.Normal(0, 1))),
        r"latent_size is 3 but the prior has 1 .*\(a\).*read_prior\(prior\)\.size",
    ),
    "dims clash": (lambda p: p.replace(event_dims=("b_axis",)), r"event_dims \['b_axis'\] are names of other dims"),
    "reserved dim": (lambda p: p.replace(event_dims=("obs",)), r"event_dims \['obs'\]"),
    "number of dims": (lambda p: p.replace(event_dims=("row", "column")), "event_dims must name each of the 1 dims"),
    "missing site": (
        lambda p: ScoreELBO().loss(jax.random.key(0), p.params(), p.model, lambda x: None, X),
        r"same latent sites, got \['a', 'b'\] in the model and \[\] in the guide",
    ),
    "extra site": (
        lambda p: ScoreELBO().loss(jax.random.key(0), p.params(), p.marginal_model, p.guide, X),
        r"got \[\] in the model and \['a', 'b'\] in the guide",
    ),
}


@pytest.mark.parametrize("name", ERRORS)
def test_messages(name, program):
    """Every misuse names the argument or site, what was expected, and what came."""
    call, message = ERRORS[name]
    with pytest.raises(ValueError, match=f"(?s){message}"):
        call(program())


def test_replace_refuses_what_is_no_part(program):
    """A misspelt part is an error that lists the parts."""
    with pytest.raises(TypeError, match=r"replace\(\) does not take decoder: it takes denoiser, encoder, "):
        program().replace(decoder=None)


def test_marginal_model_trains_the_denoiser_alone(program):
    """First stage: x without latents; one parameter; the same loss under both ELBOs."""
    p = program()
    key = jax.random.key(1)
    arguments = (key, p.params(), p.marginal_model, p.no_guide, X)
    assert {s["name"] for s in traced(p.marginal_model, 0, x=X).values() if s["type"] == "param"} == {"denoiser$params"}
    np.testing.assert_allclose(ScoreELBO().loss(*arguments) * N, TraceMeanField_ELBO().loss(*arguments), rtol=1e-5)
