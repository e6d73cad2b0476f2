"""Flows: densities and inverses, gradients that reach the condition, learned priors, a family for the guide."""

from dataclasses import replace
from functools import partial

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
from numpyro import distributions as dist
from numpyro.contrib.module import eqx_module
import optax
import pytest

from sami_ppl import families, fit
from sami_ppl.decoders.guidance import guidance
from sami_ppl.diagnostics import noise_end_kl
from sami_ppl.diffusion.schedule import VariancePreserving
from sami_ppl.distributions.flows import FlowDistribution, coupling_flow, flow_distribution
from sami_ppl.encoders.encoder import FamilyEncoder, encoder_for
from sami_ppl.fitting.objective import ScoreELBO
from sami_ppl.fitting.stage import Stage
from sami_ppl.fitting.step import Fit
from sami_ppl.priors.read import read_prior
from sami_ppl.saving.save import load, save

flowjax = pytest.importorskip("flowjax.distributions", reason="needs the extra flows")

KEY = jax.random.key(0)
SCHEDULE = VariancePreserving(-4.0, 4.0)
FLOW = coupling_flow(2, layers=3, width=8, key=KEY)


def flow_prior():
    numpyro.sample("z", flow_distribution(eqx_module("flow", FLOW)))


def banana_prior():
    """z₂ bends with z₁: no Gaussian comes near, one coupling layer is exact."""
    numpyro.sample("z", Banana())


class Banana(dist.Distribution):
    support = dist.constraints.real_vector

    def __init__(self):
        super().__init__((), (2,), validate_args=False)

    def sample(self, key, sample_shape=()):
        noise = jax.random.normal(key, (*sample_shape, 2))
        return jnp.stack([noise[..., 0], noise[..., 0] ** 2 - 1 + 0.4 * noise[..., 1]], -1)

    def log_prob(self, value):
        one, other = value[..., 0], value[..., 1]
        norm = jax.scipy.stats.norm.logpdf
        return norm(one) + norm(other, one**2 - 1, 0.4)


@pytest.fixture
def bent(fill):
    """A conditional flow with random weights, and a condition for it."""
    return fill(coupling_flow(2, condition=3, layers=3, width=8, key=KEY), 0.3), jnp.array([0.5, -1.0, 0.2])


# --- densities --------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_density_integrates_to_one(bent):
    """Over a grid of step .05 on [−12, 12]², to 1e-4; the control leaves the Jacobian out."""
    flow, condition = bent
    at = jnp.arange(-12, 12, 0.05)
    grid = jnp.stack(jnp.meshgrid(at, at), -1).reshape(-1, 2)
    log_prob = jax.jit(FlowDistribution(flow, condition).log_prob)(grid)
    assert np.exp(log_prob).sum() * 0.05**2 == pytest.approx(1, abs=1e-4)
    base = jnp.vectorize(flow.bijection.inverse, signature="(d),(c)->(d)")(grid, condition)
    without = jax.scipy.stats.norm.logpdf(base).sum(-1)
    assert abs(np.exp(without).sum() * 0.05**2 - 1) > 0.05


def test_inverse_undoes_the_flow_and_its_log_determinant(bent):
    flow, condition = bent
    u = 2 * jax.random.normal(KEY, (50, 2))
    there = jax.vmap(lambda u: flow.bijection.transform_and_log_det(u, condition))
    back = jax.vmap(lambda z: flow.bijection.inverse_and_log_det(z, condition))
    z, forward = there(u)
    again, backward = back(z)
    np.testing.assert_allclose(again, u, atol=2e-5)
    np.testing.assert_allclose(forward, -backward, atol=2e-5)
    jacobian = jax.vmap(jax.jacfwd(lambda u: flow.bijection.transform(u, condition)))(u)
    np.testing.assert_allclose(forward, np.linalg.slogdet(jacobian)[1], atol=2e-5)
    assert np.abs(forward).max() > 0.2, "else a determinant left out would not show"


@pytest.mark.slow
@pytest.mark.parametrize("size", [3, 6])
def test_every_coordinate_depends_on_every_other(size, fill):
    """Layers with rolls between them couple all pairs and are undone; before training the flow is the identity."""
    flow = coupling_flow(size, layers=6, width=4, key=KEY)
    u = jax.random.normal(KEY, (size,))
    np.testing.assert_allclose(flow.log_prob(u), jax.scipy.stats.norm.logpdf(u).sum(), rtol=1e-5)
    moved = fill(flow)
    jacobian = jax.jacfwd(moved.bijection.transform)(u)
    assert np.all(np.abs(jacobian) > 1e-6)
    np.testing.assert_allclose(moved.bijection.inverse(moved.bijection.transform(u)), u, atol=1e-4)


def test_draws_follow_the_density(bent):
    """E over 40,000 draws of log q of another Gaussian: −cross-entropies by quadrature, 5 standard errors."""
    flow, condition = bent
    law = FlowDistribution(flow, condition)
    z = law.sample(jax.random.key(1), (40_000,))
    at = jnp.arange(-12, 12, 0.05)
    grid = jnp.stack(jnp.meshgrid(at, at), -1).reshape(-1, 2)
    weight = np.exp(law.log_prob(grid)) * 0.05**2
    for statistic in (lambda z: z[:, 0], lambda z: jnp.sin(z[:, 0] * z[:, 1]), lambda z: z[:, 1] ** 2):
        found, wanted = np.asarray(statistic(z)), np.sum(weight * statistic(grid))
        assert abs(found.mean() - wanted) < 5 * found.std() / 200


@pytest.mark.slow
def test_gradients_reach_the_condition(bent):
    """By central differences, of densities and of draws; flowjax's own bridge stops them: the negative control."""
    flow, condition = bent
    z, step = jnp.array([0.3, -0.7]), 1e-2

    def density(condition):
        return FlowDistribution(flow, condition).log_prob(z)

    def draw(condition):
        return FlowDistribution(flow, condition).sample(KEY).sum()

    for function in (density, draw):
        ends = [jax.vmap(function)(condition + s * step * jnp.eye(3)) for s in (1, -1)]
        found = jax.grad(function)(condition)
        np.testing.assert_allclose(found, (ends[0] - ends[1]) / (2 * step), atol=5e-3)
        assert np.abs(found).max() > 0.02
    from flowjax.experimental.numpyro import distribution_to_numpyro

    theirs = jax.grad(lambda condition: distribution_to_numpyro(flow, condition).log_prob(z))
    assert np.all(theirs(condition) == 0)


@pytest.mark.slow
def test_a_flow_is_a_tree_of_arrays(bent):
    """So that transformations take the distribution itself, and give it back."""
    law = FlowDistribution(*bent)
    z = jnp.ones((3, 2))
    through = jax.jit(lambda law: (law, law.log_prob(z)))(law)
    np.testing.assert_allclose(through[1], law.log_prob(z), rtol=1e-5)
    np.testing.assert_allclose(through[0].log_prob(z), law.log_prob(z), rtol=1e-5)


# --- priors -----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_flow_prior_is_saved_with_its_program(tiny_program, tmp_path, fill):
    program = tiny_program(prior=flow_prior)
    params = fill(program.prior_params)
    assert set(params) == {"flow$params"}
    save(program.replace(prior_params=params), tmp_path / "program")
    again = load(tmp_path / "program", program)
    assert eqx.tree_equal(again.prior_params, params)
    np.testing.assert_allclose(again.prior_codes(KEY, 5), program.replace(prior_params=params).prior_codes(KEY, 5))


@pytest.mark.slow
def test_any_flow_of_flowjax_is_a_prior(tiny_program):
    """Here a Gaussian with learned location and scale."""
    gaussian = flowjax.Normal(jnp.array([1.0, -2.0]), 3.0)
    prior = lambda: numpyro.sample("z", flow_distribution(eqx_module("flow", gaussian)))  # noqa: E731
    latents = read_prior(prior)
    np.testing.assert_allclose(latents.sites[0].shift, [1, -2], atol=0.25)
    np.testing.assert_allclose(latents.sites[0].scale, 3, rtol=0.1)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: flow_distribution(dist.Normal(0, 1)), TypeError, "must be a flowjax distribution, got Normal: write"),
        (lambda: flow_distribution(flowjax.Normal(0.0)), ValueError, r"over vectors.*got shape \(\)"),
        (
            lambda: flow_distribution(coupling_flow(2, condition=3, layers=1, key=KEY)),
            ValueError,
            r"without a condition; .*cond_shape \(3,\)",
        ),
        (lambda: coupling_flow(1, key=KEY), ValueError, "two coordinates or more, got 1"),
        (lambda: coupling_flow(2, layers=0, key=KEY), ValueError, "layers must be positive, got 0"),
    ],
)
def test_what_is_no_flow_is_refused(call, error, message):
    with pytest.raises(error, match=message):
        call()


@pytest.mark.slow
def test_a_prior_fitted_afterwards_is_the_aggregate_posterior(tiny_program):
    """Posteriors all N(m, s²) alike: the optimal Normal prior is theirs. Networks stay, the denoiser is not called."""

    def learned():
        loc, log_scale = (numpyro.param(name, jnp.zeros(2)) for name in ("loc", "log_scale"))
        numpyro.sample("z", dist.Normal(loc, jnp.exp(log_scale)).to_event(1))

    program = tiny_program(prior=learned)
    x = np.random.default_rng(0).normal(1.0, 1.0, size=(64, 4)).astype(np.float32)
    silent = program.replace(denoiser=jax.tree.map(lambda a: a * jnp.nan, program.denoiser))
    recipe = Fit(silent, Stage(train=("prior",)), steps=1).recipe
    loss = ScoreELBO().loss(KEY, silent.params(), *recipe.sides(silent), x)
    assert np.isfinite(loss), "a denoiser that gives NaN has no part in it"
    stage = Stage(steps=400, batch=57, warmup=1, learning_rate=0.05, validate_every=400, beta=1.0, ema=0.0)
    fitted, _ = fit(program, x, replace(stage, train=("prior",)), key=KEY, progress=False)
    assert eqx.tree_equal(fitted.encoder, program.encoder)
    assert eqx.tree_equal(fitted.denoiser, program.denoiser)
    loc, scale = program.encode(x[:57])
    np.testing.assert_allclose(fitted.prior_params["loc"], loc.mean(0), atol=0.02)
    wanted = np.sqrt((scale**2).mean(0) + loc.var(0))
    np.testing.assert_allclose(np.exp(fitted.prior_params["log_scale"]), wanted, rtol=0.02)


def test_a_prior_without_parameters_cannot_be_fitted(tiny_program):
    with pytest.raises(ValueError, match=r"train=\('prior',\) needs target='joint' and a prior with parameters"):
        Fit(tiny_program(), Stage(train=("prior",)), steps=1)
    with pytest.raises(ValueError, match=r"target='marginal' fits the denoiser alone, got train=\('prior',\)"):
        Stage(target="marginal", train=("prior",))


@pytest.mark.slow
def test_a_flow_fitted_afterwards_is_no_worse_than_the_normal_prior(tiny_program, fill):
    """E KL(q ‖ p) of posteriors that lie on a bent curve: below that of N(0, I), from which it starts."""
    program = tiny_program()
    program = program.replace(encoder=fill(program.encoder, 0.8))
    x = np.random.default_rng(0).normal(size=(512, 4)).astype(np.float32)
    bent = program.replace(prior=flow_prior)
    # Read from the same codes: shift 0 and scale 1 but for what 4,096 draws leave.
    stage = Stage(steps=400, batch=256, warmup=10, learning_rate=0.01, validate_every=400, beta=1.0)
    fitted, _ = fit(bent, x, replace(stage, train=("prior",)), key=KEY, progress=False)
    kl = {}
    for name, one in {"start": bent, "flow": fitted}.items():
        sides = Fit(one, Stage(train=("prior",)), steps=1).recipe.sides(one)
        kl[name] = np.mean([ScoreELBO().loss(k, one.params(), *sides, x) for k in jax.random.split(KEY, 8)])
    loc, scale = program.encode(x)
    normal = 0.5 * np.mean(np.sum(loc**2 + scale**2 - 1 - 2 * np.log(scale), 1))
    assert kl["start"] == pytest.approx(normal, rel=0.05)
    assert kl["flow"] < normal - 0.1


# --- the family -------------------------------------------------------------------------------------------------------


@pytest.fixture
def encoder(mlp, fill):
    small = partial(families.Flow, layers=2, width=6, context=3)
    encoder = encoder_for(banana_prior, mlp(4, 6, key=KEY), SCHEDULE, (4,), families={"z": small}, key=KEY)
    return fill(encoder, 0.3)


@pytest.mark.slow
def test_guidance_of_a_flow_and_its_gradient_in_the_weights(encoder):
    """∇_x log q, and the derivative of its square along random weights, by central differences."""
    x, z, level = jnp.array([0.3, -1.0, 0.5, 0.1]), jnp.array([0.4, -0.6]), jnp.asarray(0.3)
    step = 1e-2
    ends = [jax.vmap(lambda d, s=s: encoder.log_prob(z, x + s * step * d, level))(jnp.eye(4)) for s in (1, -1)]
    np.testing.assert_allclose(guidance(encoder, z, x, level), (ends[0] - ends[1]) / (2 * step), rtol=0.02, atol=0.01)

    params, static = eqx.partition(encoder, eqx.is_inexact_array)
    direction = jax.tree.map(lambda a: jax.random.normal(KEY, a.shape), params)

    def energy(t):
        moved = jax.tree.map(lambda a, d: a + t * d, params, direction)
        return jnp.sum(guidance(eqx.combine(moved, static), z, x, level) ** 2)

    slope = jax.jit(jax.grad(energy))(0.0)
    np.testing.assert_allclose(slope, (energy(1e-3) - energy(-1e-3)) / 2e-3, rtol=0.02)


@pytest.mark.slow
def test_gradients_reach_the_network_through_the_context_alone(encoder):
    """What freezes it in flowjax's bridge: location and scale cut off, the network still has a gradient."""
    x = jnp.array([0.3, -1.0, 0.5, 0.1])

    def loss(encoder):
        loc, scale, context = encoder.parameters(x, jnp.asarray(0.3))["z"]
        law = encoder.distribution({"z": (*jax.lax.stop_gradient((loc, scale)), context)})
        return law.log_prob(jnp.array([0.4, -0.6])) + jnp.sum(law.sample(KEY))

    gradient = eqx.filter_grad(loss)(encoder)
    for leaf in jax.tree.leaves(eqx.filter(gradient.network, eqx.is_inexact_array)):
        assert np.any(leaf != 0)


@pytest.mark.slow
def test_moments_are_those_of_draws(encoder):
    """Means to .03 of a standard deviation, standard deviations to 5 %, over 40,000 draws of three observations."""
    x = jax.random.normal(KEY, (3, 4))
    parameters = jax.vmap(lambda x: encoder.parameters(x, jnp.asarray(0.3)))(x)
    q = encoder.distribution(parameters)
    z = encoder.families[0].distribution(parameters["z"]).sample(KEY, (40_000,))
    assert z.shape == (40_000, 3, 2)
    loc, scale = np.asarray(q.mean), np.sqrt(np.asarray(q.variance))
    np.testing.assert_allclose((z.mean(0) - loc) / z.std(0), 0, atol=0.03)
    np.testing.assert_allclose(z.std(0), scale, rtol=0.05)


class _Constant(eqx.Module):
    """A network that sees nothing: one feature, 1."""

    def __call__(self, x, log_snr):
        return jnp.ones(1)


@pytest.mark.slow
def test_a_flow_becomes_a_prior_that_no_gaussian_can(tiny_program):
    """Fitted to draws of the prior by maximum likelihood, E KL(q ‖ p) at the noisy end; the control is `Full`."""
    base = tiny_program()
    latents = read_prior(banana_prior)
    values = Banana().sample(KEY, (20_000,))
    codes = latents.to_code({"z": values})
    found = {}
    for name, family in {"flow": families.Flow, "full": families.Full}.items():
        encoder = FamilyEncoder(_Constant(), SCHEDULE, (4,), latents, families={"z": family}, key=KEY)
        encoder = fit_to_draws(encoder, codes)
        program = type(base)(banana_prior, base.denoiser, encoder, sampler=base.sampler)
        found[name] = noise_end_kl(program, np.zeros((256, 4), np.float32), key=KEY)["z"]
    assert found["flow"] < 0.05
    assert found["full"] > 0.5


def fit_to_draws(encoder, codes, steps=600):
    params, static = eqx.partition(encoder, eqx.is_inexact_array)
    optimiser = optax.adam(optax.cosine_decay_schedule(0.02, steps))

    def loss(params, z):
        model = eqx.combine(params, static)
        law = model.distribution(model.parameters(jnp.zeros(4), jnp.asarray(-4.0)))
        return -jnp.mean(law.log_prob(z))

    @jax.jit
    def update(carry, key):
        params, state = carry
        gradient = jax.grad(loss)(params, jax.random.choice(key, codes, (512,)))
        change, state = optimiser.update(gradient, state)
        return (optax.apply_updates(params, change), state), None

    (params, _), _ = jax.lax.scan(update, (params, optimiser.init(params)), jax.random.split(KEY, steps))
    return eqx.combine(params, static)


@pytest.mark.slow
def test_one_coordinate_is_refused(mlp):
    def prior():
        numpyro.sample("share", dist.Beta(2.0, 3.0))

    with pytest.raises(ValueError, match=r"'share' has one coordinate.*families\.Mixture"):
        encoder_for(prior, mlp(4, 6, key=KEY), SCHEDULE, (4,), families={"share": families.Flow}, key=KEY)
