"""Families of posteriors: densities against independent implementations, draws and their derivatives, supports."""

from functools import partial

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
from numpyro import distributions as dist
from numpyro import handlers
import pytest
from scipy.integrate import quad

from sami_ppl import families
from sami_ppl.decoders.guidance import guidance
from sami_ppl.diagnostics import noise_end_kl
from sami_ppl.diagnostics.gain import draw_code
from sami_ppl.diffusion.schedule import VariancePreserving
from sami_ppl.encoders.affine import AffineEncoder
from sami_ppl.encoders.encoder import DiagonalEncoder, FamilyEncoder, encoder_for
from sami_ppl.encoders.families import DiagonalMixture, ProjectedNormals
from sami_ppl.fitting.objective import ScoreELBO
from sami_ppl.priors.read import read_prior
from sami_ppl.priors.sites import Direction

pytestmark = pytest.mark.slow

SCHEDULE = VariancePreserving(-4.0, 4.0)
KEY = jax.random.key(0)
LOG_WEIGHTS = jnp.log(jnp.array([0.2, 0.5, 0.3]))
LOC = jnp.array([[-1.0, 0.5], [0.3, -0.8], [2.0, 1.0]])
SCALE = jnp.array([[0.5, 0.9], [1.2, 0.4], [0.6, 0.7]])


def mixture_prior():
    each = dist.Normal(jnp.array([[-2.0, 0.0], [2.0, 0.0], [0.0, 2.0]]), 0.5).to_event(1)
    numpyro.sample("z", dist.MixtureSameFamily(dist.Categorical(jnp.ones(3) / 3), each))


def angle_prior():
    numpyro.sample("angle", dist.VonMises(0.0, 1e-3))
    numpyro.sample("size", dist.Normal(0, 1))


def torus_prior():
    numpyro.sample("angles", dist.VonMises(0.0, 1e-3).expand([2]).to_event(1))


def sphere_prior():
    numpyro.sample("axis", dist.ProjectedNormal(jnp.zeros(3)))


def correlated_prior():
    numpyro.sample("z", dist.Normal(0, 1).expand([3]).to_event(1))
    numpyro.sample("share", dist.Beta(2.0, 3.0))


PRIORS = {
    "mixture": (mixture_prior, {}),
    "mixture of eight": (mixture_prior, {"z": partial(families.Mixture, components=8)}),
    "angle": (angle_prior, {}),
    "torus": (torus_prior, {}),
    "sphere": (sphere_prior, {}),
    "full": (correlated_prior, {"z": families.Full}),
    "low rank": (correlated_prior, {"z": partial(families.LowRank, rank=1), "share": families.Mixture}),
}


@pytest.fixture
def build(tiny_program, mlp, fill):
    """`build(name)`: a program on one of PRIORS, its encoder's weights all random."""

    def make(name):
        prior, chosen = PRIORS[name]
        encoder = encoder_for(prior, mlp(4, 6, key=KEY), SCHEDULE, (4,), families=chosen, key=jax.random.key(1))
        assert isinstance(encoder, FamilyEncoder)
        base = tiny_program()
        return type(base)(prior, base.denoiser, fill(encoder), sampler=base.sampler)

    return make


# Mixtures


def test_mixture_density_is_numpyros():
    each = dist.Normal(LOC, SCALE).to_event(1)
    theirs = dist.MixtureSameFamily(dist.Categorical(logits=LOG_WEIGHTS), each)
    z = jax.random.normal(KEY, (50, 2)) * 2
    np.testing.assert_allclose(DiagonalMixture(LOG_WEIGHTS, LOC, SCALE).log_prob(z), theirs.log_prob(z), rtol=2e-5)


def moments_of_draws(log_weights, loc, scale, key, count=400_000):
    z = DiagonalMixture(jax.nn.log_softmax(log_weights), loc, scale).sample(key, (count,))
    return jnp.stack([z[:, 0], z[:, 0] ** 2, z[:, 0] * z[:, 1], jnp.sin(z[:, 1])], 1)


def moments_in_closed_form(log_weights, loc, scale):
    weights = jax.nn.softmax(log_weights)
    first, second = loc[:, 0], loc[:, 0] ** 2 + scale[:, 0] ** 2
    sine = jnp.sin(loc[:, 1]) * jnp.exp(-0.5 * scale[:, 1] ** 2)
    return weights @ jnp.stack([first, second, loc[:, 0] * loc[:, 1], sine], 1)


def test_mixture_draws_and_their_derivatives_have_the_right_means():
    """E f(z) and its gradient in weights, means and scales, for four f: within 5 standard errors, and to .02."""
    parameters = (LOG_WEIGHTS, LOC, SCALE)
    exact = moments_in_closed_form(*parameters)
    draws = moments_of_draws(*parameters, KEY)
    error = draws.std(0) / len(draws) ** 0.5
    assert np.all(np.abs(draws.mean(0) - exact) < 5 * error)
    found = jax.jacobian(lambda *p: moments_of_draws(*p, KEY).mean(0), argnums=(0, 1, 2))(*parameters)
    wanted = jax.jacobian(moments_in_closed_form, argnums=(0, 1, 2))(*parameters)
    for got, want in zip(found, wanted, strict=True):
        np.testing.assert_allclose(got, want, atol=0.02)


def test_numpyros_mixture_would_have_no_derivative_in_the_weights():
    """Negative control: the draw of a component, differentiated as it stands, misses the weights' gradient."""

    def mean(log_weights):
        which = jax.random.categorical(KEY, log_weights, shape=(20_000,))
        return jnp.mean(LOC[which, 0] + SCALE[which, 0] * jax.random.normal(jax.random.key(1), (20_000,)))

    exact = jax.grad(lambda w: moments_in_closed_form(w, LOC, SCALE)[0])(LOG_WEIGHTS)
    assert np.all(jax.grad(mean)(LOG_WEIGHTS) == 0)
    assert np.abs(exact).max() > 0.1


# Directions


@pytest.mark.parametrize("dim", [2, 3])
def test_direction_density_is_numpyros_where_that_is_exact(dim):
    concentration = 1.5 * jax.random.normal(KEY, (40, 1, dim))
    unit = dist.ProjectedNormal(jnp.zeros(dim)).sample(jax.random.key(1), (40,))
    theirs = dist.ProjectedNormal(concentration[:, 0]).log_prob(unit)
    np.testing.assert_allclose(ProjectedNormals(concentration).log_prob(unit), theirs, atol=2e-3)


@pytest.mark.parametrize("dim", [2, 3])
@pytest.mark.parametrize("along", [-30.0, -12.0, -5.5, -4.9, -1.0, 0.0, 4.0])
def test_direction_density_by_quadrature(dim, along):
    """Log of the radial integral, far on the other side too, where the plain formula has no digit left."""
    peak = max(along, 0.0)
    value = quad(lambda r: r ** (dim - 1) * np.exp(-0.5 * (r - along) ** 2 + 0.5 * min(along, 0) ** 2), 0, peak + 40,
                 points=[peak, peak + 1], epsabs=0, epsrel=1e-10, limit=200)[0]  # fmt: skip
    expected = np.log(value) - 0.5 * min(along, 0) ** 2 - 0.5 * np.log(2 * np.pi) - 0.5 * (dim - 1) * np.log(2 * np.pi)
    length = jnp.asarray(abs(along))
    found = families.projected_normal_log_prob(jnp.asarray(along), length, dim)
    assert float(found) == pytest.approx(expected, abs=1e-3 + 2e-6 * along**2)
    slope = jax.grad(lambda t: families.projected_normal_log_prob(t, length, dim))(jnp.asarray(along))
    assert np.isfinite(slope)


@pytest.mark.parametrize("dim", [2, 3])
def test_moments_of_directions(dim):
    """Mean and spread of the unit vector against 200,000 draws, within 5 standard errors."""
    concentration = jnp.array([[0.4, 1.1, -0.3][:dim], [6.0, -3.0, 1.0][:dim]])
    q = ProjectedNormals(concentration)
    draws = np.asarray(q.sample(KEY, (200_000,)))
    mean, spread = np.asarray(q.mean), np.sqrt(np.asarray(q.variance))
    assert np.all(np.abs(draws.mean(0) - mean) < 5 * draws.std(0) / 200_000**0.5 + 1e-5)
    np.testing.assert_allclose(spread, draws.std(0), rtol=0.02)


# Families in a program


@pytest.mark.parametrize("name", PRIORS)
def test_guide_has_the_law_of_the_code(name, build):
    """At every site: the guide's log density of its draw is that of the code, less the volume of the code's units."""
    program = build(name)
    x = jax.random.normal(jax.random.key(3), (5, 4))
    trace = handlers.trace(handlers.seed(program.guide, KEY)).get_trace(x)
    values = {site.name: trace[site.name]["value"] for site in program.latents.sites}
    z = program.latents.to_code(values)
    q = program.code_law(x)
    for site in program.latents.sites:
        own = q.of_site(site, {}).log_prob(z[:, site.code])
        if not isinstance(site, Direction):
            unconstrained = site.transform.inv(values[site.name])
            volume = site.transform.log_abs_det_jacobian(unconstrained, values[site.name])
            own = own - np.sum(np.log(site.scale)) - np.asarray(volume).reshape(5, -1).sum(-1)
        np.testing.assert_allclose(trace[site.name]["fn"].log_prob(values[site.name]), own, rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(program.latents.to_code(program.latents.from_code(z)), z, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", PRIORS)
def test_draws_of_the_code_have_the_stated_moments(name, build):
    """Mean and standard deviation that the encoder states, against 20,000 draws of the code; a shift of .1 is seen."""
    program = build(name)
    x = jnp.repeat(jax.random.normal(jax.random.key(3), (1, 4)), 20_000, 0)
    z = np.asarray(draw_code(program, x, KEY))
    loc, scale = program.encoder.posterior(x[0])
    error = z.std(0) / 20_000**0.5
    assert np.all(np.abs(z.mean(0) - loc) < 5 * error)
    np.testing.assert_allclose(scale, z.std(0), rtol=0.05)
    assert np.any(np.abs(z.mean(0) + 0.1 - loc) > 5 * error)


@pytest.mark.parametrize("name", PRIORS)
def test_guidance_and_loss_are_differentiable(name, build):
    """Guidance by central differences, and a finite, non-zero gradient of the loss for every head."""
    program = build(name)
    x = jax.random.normal(jax.random.key(3), (5, 4))
    z, level = draw_code(program, x, KEY)[0], jnp.asarray(0.3)
    g = guidance(program.encoder, z, x[0], level)
    step = 1e-2
    ends = [
        jax.vmap(lambda d, s=s: program.encoder.log_prob(z, x[0] + s * step * d, level))(jnp.eye(4)) for s in (1, -1)
    ]
    np.testing.assert_allclose(g, (ends[0] - ends[1]) / (2 * step), rtol=0.02, atol=0.02)

    params = program.params()
    loss = lambda params: ScoreELBO().loss(KEY, params, program.model, program.guide, x)  # noqa: E731
    gradient = jax.grad(loss)(params)["encoder$params"].families
    leaves = jax.tree.leaves(eqx.filter(gradient, eqx.is_inexact_array))
    assert all(np.all(np.isfinite(leaf)) for leaf in leaves)
    assert all(np.any(leaf != 0) for leaf in leaves)


def test_default_families_suit_the_prior(mlp):
    kinds = lambda prior: [type(f) for f in encoder_for(prior, mlp(4, 6, key=KEY), SCHEDULE, (4,), key=KEY).families]  # noqa: E731
    assert kinds(mixture_prior) == [families.Mixture]
    assert kinds(angle_prior) == [families.Directions, families.Diagonal]
    assert isinstance(encoder_for(correlated_prior, mlp(4, 6, key=KEY), SCHEDULE, (4,), key=KEY), DiagonalEncoder)
    components = encoder_for(mixture_prior, mlp(4, 6, key=KEY), SCHEDULE, (4,), key=KEY).families[0].components
    assert components == 3, "as many as the prior has"


@pytest.mark.parametrize(
    ("prior", "chosen", "message"),
    [
        (angle_prior, {"angel": families.Full}, "families names angel, but the prior's sites are angle, size"),
        (angle_prior, {"angle": families.Full}, "'angle' lives on a circle, where a Gaussian would tear"),
        (angle_prior, {"size": families.Directions}, "'size' has no directions: Directions is for dist.VonMises"),
        (correlated_prior, {"z": partial(families.LowRank, rank=0)}, "rank must be positive, got 0"),
    ],
)
def test_wrong_families_name_the_remedy(prior, chosen, message, mlp):
    with pytest.raises(ValueError, match=message):
        encoder_for(prior, mlp(4, 6, key=KEY), SCHEDULE, (4,), families=chosen, key=KEY)


def test_a_gaussian_encoder_on_a_circle_is_refused(tiny_program, mlp):
    base = tiny_program()
    encoder = DiagonalEncoder(mlp(4, 6, key=KEY), SCHEDULE, (4,), read_prior(angle_prior).size, key=KEY)
    with pytest.raises(ValueError, match=r"prior site 'angle' lives on a circle.*encoder_for"):
        type(base)(angle_prior, base.denoiser, encoder)


# What is left at the noisy end


class _Constant(eqx.Module):
    """A network that sees nothing: one feature, 1."""

    def __call__(self, x, log_snr):
        return jnp.ones(1)


def _set(family, **arrays):
    """A family whose heads give these values whatever the features."""
    for name, value in arrays.items():
        head = getattr(family, name)
        blank = eqx.tree_at(lambda h: (h.weight, h.bias), head, (jnp.zeros_like(head.weight), jnp.ravel(value)))
        family = eqx.tree_at(lambda f, name=name: getattr(f, name), family, blank)
    return family


def test_noise_end_tells_a_family_that_suits_from_one_that_does_not(tiny_program):
    """Prior: three modes. Its own mixture as q leaves 0 nats; the best Gaussian leaves what quadrature says."""
    latents = read_prior(mixture_prior)
    site = latents.sites[0]
    base = tiny_program()
    means = (np.array([[-2.0, 0.0], [2.0, 0.0], [0.0, 2.0]]) - site.shift) / site.scale
    low, high = np.log(0.03), np.log(2.0)
    raw = lambda s: np.log((np.log(s) - low) / (high - np.log(s))) - np.log(-low / high)  # noqa: E731
    spread = np.full((3, 2), 0.5) / site.scale

    def program(family, chosen):
        encoder = FamilyEncoder(_Constant(), SCHEDULE, (4,), latents, families={"z": chosen}, key=KEY)
        encoder = eqx.tree_at(lambda e: e.families, encoder, (family(encoder.families[0]),))
        return type(base)(mixture_prior, base.denoiser, encoder, sampler=base.sampler)

    x = np.zeros((256, 4), np.float32)
    own = program(lambda f: _set(f, weights=jnp.zeros(3), loc=means, scale=raw(spread)), families.Mixture)
    assert abs(noise_end_kl(own, x, key=KEY)["z"]) < 1e-3
    centre = means.mean(0)
    deviation = np.sqrt((spread**2 + (means - centre) ** 2).mean(0))
    gauss = program(lambda f: _set(f, loc=centre, scale=raw(deviation)), families.Diagonal)
    normal = np.random.default_rng(0).normal(size=(400_000, 2)) * deviation + centre
    log_q = -0.5 * (((normal - centre) / deviation) ** 2 + np.log(2 * np.pi * deviation**2)).sum(1)
    each = -0.5 * (((normal[:, None] - means) / spread) ** 2 + np.log(2 * np.pi * spread**2)).sum(2)
    expected = np.mean(log_q - np.log(np.exp(each).mean(1)))
    found = noise_end_kl(gauss, x, key=KEY)["z"]
    assert expected > 0.3
    assert found == pytest.approx(expected, abs=0.1 * expected)


@pytest.mark.parametrize("rotated", [False, True])
def test_draws_of_a_gaussian_code_have_its_mean_and_covariance(rotated, tiny_program, fill):
    """A diagonal encoder, and one in rotated axes: 40,000 draws; 5 standard errors of means, 5 % of the covariance."""
    program = tiny_program()
    encoder = fill(program.encoder)
    if rotated:
        encoder = AffineEncoder(encoder, jnp.array([[0.8, -0.6], [0.6, 0.8]]))
    program = program.replace(encoder=encoder)
    x = jax.random.normal(jax.random.key(3), (1, 4))
    z = np.asarray(draw_code(program, jnp.repeat(x, 40_000, 0), KEY))
    q = program.code_law(x)
    loc, factor = np.asarray(q.mean[0]), np.asarray(q.root[0])
    assert np.all(np.abs(z.mean(0) - loc) < 5 * z.std(0) / 40_000**0.5)
    covariance = factor @ factor.T
    np.testing.assert_allclose(np.cov(z.T), covariance, atol=0.05 * np.diag(covariance).max())
    assert np.abs(np.diag(factor) - 1).max() > 0.4, "else a variance for a standard deviation would not show"


def test_a_least_scale_of_its_own_is_kept(mlp):
    """Of a family that was given one, also behind a discrete site; others take the encoder's."""
    given = {"z": partial(families.Full, min_scale=0.2)}
    encoder = encoder_for(correlated_prior, mlp(4, 6, key=KEY), SCHEDULE, (4,), families=given, min_scale=0.1, key=KEY)
    assert encoder.families[0].diagonal.min_scale == 0.2
    other = {"z": families.Full}
    encoder = encoder_for(correlated_prior, mlp(4, 6, key=KEY), SCHEDULE, (4,), families=other, min_scale=0.1, key=KEY)
    assert encoder.families[0].diagonal.min_scale == 0.1
    assert families.with_min_scale(lambda features, site, *, key: key, 0.1)(1, None, key=3) == 3
