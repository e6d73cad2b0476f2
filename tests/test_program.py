"""A program under NumPyro: traces, Predictive, SVI, the objectives, β, free bits, rotation of the code, messages."""

import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
from numpyro import distributions as dist
from numpyro import handlers
from numpyro.infer import SVI, Predictive, Trace_ELBO, TraceMeanField_ELBO, log_likelihood
import optax
import pytest
from scipy import stats

from sami_ppl.decoder import ScoreDecoder
from sami_ppl.encoder import RotatedEncoder
from sami_ppl.objective import ScoreELBO, site_kl
from sami_ppl.sampler import DDIM
from sami_ppl.schedule import VariancePreserving

N = 5
X = np.linspace(-1.5, 1.5, 4 * N, dtype=np.float32).reshape(N, 4)[:, [2, 0, 3, 1]]


def gaussian():
    """Two Gaussian sites, so that axes of different sites can be rotated into each other."""
    numpyro.sample("a", dist.Normal(0.0, 1.0))
    numpyro.sample("b", dist.Normal(0.0, 1.0).expand([2]).to_event(1))


def constrained():
    """No closed form for the KL of either site."""
    numpyro.sample("u", dist.Uniform(-1.0, 2.0))
    numpyro.sample("g", dist.Gamma(2.0, 1.0).expand([2]).to_event(1))


PRIORS = {"gaussian": gaussian, "constrained": constrained}


@pytest.fixture(scope="module")
def programs():
    """`programs(name)`: the tiny program on one of PRIORS, built once."""
    cache = {}

    def get(name, tiny):
        if name not in cache:
            cache[name] = tiny(PRIORS[name])
        return cache[name]

    return get


@pytest.fixture
def program(programs, tiny_program):
    return lambda name="gaussian": programs(name, tiny_program)


def traced(function, key, **kwargs):
    return handlers.trace(handlers.seed(function, jax.random.key(key))).get_trace(**kwargs)


# --- a NumPyro model and guide ----------------------------------------------------------------------------------------


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


def test_unobserved_model_draws_by_reverse_diffusion(program):
    """model(size=n): x is what the decoder samples for the z of the trace, with the key of the site."""
    p = program()
    trace = traced(p.model, 3, size=3)
    z = p.latents.to_code({k: trace[k]["value"] for k in ("a", "b")})
    expected = ScoreDecoder(p.denoiser, p.encoder, z, sampler=p.sampler).sample(trace["x"]["kwargs"]["rng_key"])
    assert trace["x"]["value"].shape == (3, 4)
    np.testing.assert_allclose(trace["x"]["value"], expected, rtol=1e-4, atol=1e-5)


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


# --- objectives -------------------------------------------------------------------------------------------------------

ELBOS = {
    "trace": lambda **kw: Trace_ELBO(**kw),
    "mean field": lambda **kw: TraceMeanField_ELBO(**kw),
}


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def losses(elbo, program_hashable, total, params, keys):
    p = program_hashable.value
    return jax.vmap(lambda key: elbo.loss(key, params, p.model, p.guide, X, total=total))(keys)


class Hashed:
    """A program as a static argument of jit, hashed by identity."""

    def __init__(self, value):
        self.value = value


@pytest.mark.parametrize("name", PRIORS)
def test_objectives_agree(name, program):
    """ScoreELBO = TraceMeanField_ELBO/n at the same key, and both = Trace_ELBO/n in expectation (5 sd, 6e-7)."""
    p = Hashed(program(name))
    keys, params = jax.random.split(jax.random.key(2), 400), p.value.params()
    ours, mean_field, trace = (
        np.asarray(losses(elbo, p, None, params, keys), float) / n
        for elbo, n in ((ScoreELBO(), 1), (TraceMeanField_ELBO(), N), (Trace_ELBO(), N))
    )
    np.testing.assert_allclose(ours, mean_field, rtol=1e-4)
    difference = ours - trace
    assert abs(difference.mean()) <= 5 * difference.std() / np.sqrt(len(keys)) + 1e-5
    assert ours.std() > 0  # negative control of the comparison: it is not of constants


def test_loss_per_observation_does_not_depend_on_the_total(program):
    """A batch that stands for 1,000 observations: NumPyro's loss is 1,000 times the loss per observation."""
    p = Hashed(program())
    keys, params = jax.random.split(jax.random.key(2), 3), p.value.params()
    whole = losses(TraceMeanField_ELBO(), p, 1000, params, keys)
    np.testing.assert_allclose(1000 * losses(ScoreELBO(), p, 1000, params, keys), whole, rtol=1e-4)


@pytest.mark.parametrize("name", PRIORS)
@pytest.mark.parametrize("elbo", [*ELBOS, "score"])
def test_beta_scales_the_divergence_and_nothing_else(elbo, name, program):
    """At one key, β = 4 gives 4 × the latent sites' losses and the same loss of x; β = 0 gives 0."""
    p = program(name)

    @jax.jit
    def parts(beta):
        arguments = (jax.random.key(3), p.params(), p.model, p.guide, X)
        if elbo == "score":
            return ScoreELBO().terms(*arguments, beta=beta)
        return ELBOS[elbo](sum_sites=False).loss(*arguments, beta=beta)

    zero, one, four = (parts(jnp.asarray(beta)) for beta in (0.0, 1.0, 4.0))
    for site in p.latents.sites:
        assert abs(one[site.name]).sum() > 1e-3
        np.testing.assert_allclose(four[site.name], 4 * one[site.name], rtol=1e-5)
        np.testing.assert_array_equal(zero[site.name], 0.0)
    np.testing.assert_allclose([zero["x"], four["x"]], one["x"], rtol=1e-6)


def test_beta_on_one_side_only_would_be_caught(program):
    """Negative control: β given to the model alone does not scale a KL without closed form."""
    p = program("constrained")

    @jax.jit
    def loss(beta):
        both = (lambda x: p.model(x, beta=beta), lambda x: p.guide(x))
        return TraceMeanField_ELBO(sum_sites=False).loss(jax.random.key(3), p.params(), *both, X)["u"]

    assert not np.isclose(loss(jnp.asarray(4.0)), 4 * loss(jnp.asarray(1.0)), rtol=1e-2)


def test_beta_schedule_compiles_once(program, counted):
    """β is a runtime value: five of them, 0 included, one trace of the update; parameters move, none is NaN."""
    p = program()
    model = counted(p.model)
    svi = SVI(lambda x, beta: model(x, beta=beta), lambda x, beta: p.guide(x, beta=beta), optax.adam(1e-2), ScoreELBO())
    state = svi.init(jax.random.key(0), X, jnp.asarray(1.0))
    update, after_init = jax.jit(svi.update), None
    for beta in (0.0, 0.25, 0.5, 1.0, 4.0):
        state, loss = update(state, X, jnp.asarray(beta))
        after_init = after_init or model.calls
        assert np.isfinite(loss)
    assert model.calls == after_init
    moved = jax.tree.map(lambda a, b: float(jnp.abs(a - b).max()), svi.get_params(state), p.params())
    assert max(jax.tree.leaves(moved)) > 1e-3


def largest(tree):
    return max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(tree))


@pytest.mark.parametrize("elbo", [ScoreELBO(), TraceMeanField_ELBO()], ids=["score", "mean field"])
def test_encoder_is_one_parameter_with_the_gradient_of_both_terms(elbo, program):
    """`encoder$params` appears once; its gradient is the sum of non-zero gradients of divergence (β) and bound."""
    p = program()

    @jax.jit
    def gradient(beta):
        def loss(params):
            return elbo.loss(jax.random.key(1), params, p.model, p.guide, X, beta=beta)

        return jax.grad(loss)(p.params())

    zero, one, two = (gradient(jnp.asarray(beta)) for beta in (0.0, 1.0, 2.0))
    divergence = jax.tree.map(jnp.subtract, two, one)
    assert largest(zero["encoder$params"]) > 1e-3  # through guidance and z
    assert largest(divergence["encoder$params"]) > 1e-3
    total = jax.tree.map(jnp.add, zero, divergence)
    np.testing.assert_allclose(largest(jax.tree.map(jnp.subtract, total, one)), 0, atol=1e-3 * largest(one))
    assert largest(divergence["denoiser$params"]) <= 1e-5 * largest(one)  # the KL is none of the denoiser's


def test_svi_finds_the_shared_encoder_once(program):
    """SVI's parameters are the program's: no second copy of the encoder under another name."""
    p = program()
    svi = SVI(p.model, p.guide, optax.sgd(0.1), Trace_ELBO())
    params = svi.get_params(svi.init(jax.random.key(0), X))
    assert set(params) == {"denoiser$params", "encoder$params"}
    assert eqx.tree_equal(params, p.params())


def test_free_bits_hold_each_axis_at_the_floor_without_gradient(program):
    """Below the floor an axis costs exactly the floor and has no gradient; above, nothing changes; β scales both."""
    p = program()

    @functools.partial(jax.jit, static_argnums=0)
    def divergence(floor, beta=1.0):
        def total(params):
            terms = ScoreELBO(floor).terms(jax.random.key(1), params, p.model, p.guide, X, beta=beta)
            latent = jnp.concatenate([terms[s.name] for s in p.latents.sites])
            return latent.sum(), latent

        return jax.grad(total, has_aux=True)(p.params())

    gradient, axes = divergence(0.0)
    assert axes.shape == (3,)
    middle = float(np.sort(axes)[:2].mean())
    np.testing.assert_allclose(divergence(middle)[1], np.maximum(axes, middle), rtol=1e-6)
    np.testing.assert_allclose(divergence(middle, 3.0)[1], 3 * np.maximum(axes, middle), rtol=1e-5)
    high, low = float(axes.max()) + 1, float(axes.min()) / 2
    held, at_floor = divergence(high)
    np.testing.assert_allclose(at_floor, high, rtol=1e-6)
    assert largest(held) == 0
    free, unchanged = divergence(low)
    np.testing.assert_allclose(unchanged, axes, rtol=1e-6)
    assert largest(jax.tree.map(jnp.subtract, free, gradient)) < 1e-6
    assert largest(gradient) > 1e-3
    with pytest.raises(ValueError, match="free_bits must be at least 0 nats, got -1"):
        ScoreELBO(-1)


# --- rotation of the code ---------------------------------------------------------------------------------------------

ROTATION = stats.special_ortho_group(3, seed=1).rvs().astype(np.float32)


@pytest.fixture
def rotated(program):
    p = program()
    return p, p.replace(encoder=RotatedEncoder(p.encoder, jnp.asarray(ROTATION)))


def test_rotation_leaves_the_bound_unchanged(rotated):
    """N(0, I) does not know its axes: the loss is the same in expectation, by the mean of 2,000 draws; 5 sd, 6e-7."""
    keys = jax.random.split(jax.random.key(4), 2000)
    straight, turned = (np.asarray(losses(ScoreELBO(), Hashed(p), None, p.params(), keys), float) for p in rotated)
    error = np.hypot(straight.std(), turned.std()) / np.sqrt(len(keys))
    assert abs(straight.mean() - turned.mean()) < 5 * error


def test_rotation_leaves_the_divergence_unchanged(rotated):
    """KL per observation summed over sites: that of the diagonal posterior is known; 2,000 draws, 5 sd (6e-7).

    Control: a shear in place of the rotation changes it.
    """
    p, q = rotated
    shear = p.replace(encoder=RotatedEncoder(p.encoder, jnp.eye(3).at[0, 1].set(1.0)))
    keys = jax.random.split(jax.random.key(4), 2000)

    def divergence(program):
        terms = jax.jit(
            jax.vmap(lambda key: ScoreELBO().terms(key, program.params(), program.model, program.guide, X))
        )(keys)
        total = sum(terms[s.name].sum(-1) for s in program.latents.sites)
        return np.asarray(total, float).mean(), 5 * total.std() / np.sqrt(len(keys)) + 1e-4

    exact, _ = divergence(p)
    turned, tolerance = divergence(q)
    assert abs(turned - exact) < tolerance
    assert abs(divergence(shear)[0] - exact) > 10 * tolerance


def test_rotated_code_gives_the_same_samples_and_the_same_error(rotated):
    """x given z' = Rz and a key is x given z and the key: guidance is that of the same density."""
    p, q = rotated
    z = jax.random.normal(jax.random.key(5), (N, 3))

    @functools.partial(jax.jit, static_argnums=0)
    def both(program, code):
        one = program.value
        decoder = ScoreDecoder(one.denoiser, one.encoder, code, sampler=one.sampler, key=jax.random.key(7))
        return decoder.sample(jax.random.key(6)), decoder.log_prob(X)

    turned_program = Hashed(q)
    straight, turned, wrong = both(Hashed(p), z), both(turned_program, z @ ROTATION.T), both(turned_program, z)
    np.testing.assert_allclose(turned[0], straight[0], rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(turned[1], straight[1], rtol=1e-3)
    assert not np.allclose(wrong[1], straight[1], rtol=1e-2)  # control: the code not rotated


def test_chain_of_conditionals_is_the_joint_gaussian(rotated):
    """The guide writes N(Rμ, R diag(s²) Rᵀ) site by site: its log density at its own draw is that of the joint."""
    p, q = rotated
    trace = traced(q.guide, 8, x=X)
    log_q = sum(trace[name]["fn"].log_prob(trace[name]["value"]) for name in ("a", "b"))
    loc, scale = jax.vmap(p.encoder.posterior)(X)
    z = q.latents.to_code({name: trace[name]["value"] for name in ("a", "b")})
    expected = [
        stats.multivariate_normal(ROTATION @ m, ROTATION @ np.diag(s**2) @ ROTATION.T).logpdf(z_i)
        for m, s, z_i in zip(np.asarray(loc, float), np.asarray(scale, float), z, strict=True)
    ]
    np.testing.assert_allclose(log_q, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", PRIORS)
def test_guide_draws_have_the_law_of_the_encoder(name, program):
    """Draws of the rotated guide, as codes: mean and covariance of R N(μ, s²); 4,000 draws, 5 sd per moment (6e-7)."""
    p = program(name)
    q, n = p.replace(encoder=RotatedEncoder(p.encoder, jnp.asarray(ROTATION))), 4000
    draws = Predictive(q.guide, params=q.params(), num_samples=n)(jax.random.key(9), X[:1])
    z = np.asarray(q.latents.to_code(draws))[:, 0]
    loc, scale = (np.asarray(v) for v in p.encoder.posterior(jnp.asarray(X[0])))
    unit = ((z - ROTATION @ loc) @ ROTATION) / scale
    np.testing.assert_allclose(unit.mean(0), 0, atol=5 / np.sqrt(n))
    np.testing.assert_allclose(np.cov(unit.T), np.eye(3), atol=5 * np.sqrt(2 / n))


def test_full_normal_divergence_in_closed_form():
    """KL(N(m, LLᵀ) ‖ N(μ, diag s²)) = E_q[log q − log p]: 20,000 draws, 5 sd; batched; zero where q = p."""
    factor = jnp.asarray([[[0.7, 0.0], [0.4, 0.5]], [[1.5, 0.0], [-0.3, 0.2]]])
    q = dist.MultivariateNormal(jnp.asarray([[0.2, -1.0], [0.0, 2.0]]), scale_tril=factor)
    p = dist.Normal(jnp.asarray([0.5, 0.0]), jnp.asarray([1.0, 2.0])).to_event(1)
    draws = q.sample(jax.random.key(0), (20_000,))
    ratio = np.asarray(q.log_prob(draws) - p.log_prob(draws))
    got = site_kl(q, p, draws[0])
    assert got.shape == (2, 1)
    np.testing.assert_array_less(abs(got[:, 0] - ratio.mean(0)), 5 * ratio.std(0) / np.sqrt(20_000))
    same = dist.MultivariateNormal(jnp.asarray([[0.5, 0.0]]), scale_tril=jnp.diag(jnp.asarray([1.0, 2.0]))[None])
    np.testing.assert_allclose(site_kl(same, p, draws[0, :1]), 0, atol=1e-6)


def test_diagonal_divergence_per_axis():
    """Per axis: ½((s² + (m − μ)²)/σ² − 1 − log s²/σ²) for Gaussians; log q − log p at the draw elsewhere."""
    m, s = jnp.asarray([[0.3, -1.0, 0.0]]), jnp.asarray([[0.5, 1.0, 2.0]])
    q, p = dist.Normal(m, s).to_event(1), dist.Normal(0.5, 1.5).expand([3]).to_event(1)
    expected = 0.5 * ((s**2 + (m - 0.5) ** 2) / 1.5**2 - 1 - np.log(s**2 / 1.5**2))
    np.testing.assert_allclose(site_kl(q, p, m), expected, rtol=1e-5, atol=1e-6)
    laplace = dist.Laplace(0, 1).expand([3]).to_event(1)
    value = m + 0.1
    difference = stats.norm.logpdf(value, m, s) - stats.laplace.logpdf(value)
    np.testing.assert_allclose(site_kl(q, laplace, value), difference, rtol=1e-5, atol=1e-6)


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
    with pytest.raises(TypeError, match=r"replace\(\) takes denoiser, .*; got decoder"):
        program().replace(decoder=None)


def test_marginal_model_trains_the_denoiser_alone(program):
    """First stage: x without latents; one parameter; the same loss under both ELBOs."""
    p = program()
    key = jax.random.key(1)
    arguments = (key, p.params(), p.marginal_model, p.no_guide, X)
    assert {s["name"] for s in traced(p.marginal_model, 0, x=X).values() if s["type"] == "param"} == {"denoiser$params"}
    np.testing.assert_allclose(ScoreELBO().loss(*arguments) * N, TraceMeanField_ELBO().loss(*arguments), rtol=1e-5)
