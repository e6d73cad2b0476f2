"""The relaxed categorical: its density against integrals, its draws, its site, and how biased its gradients are."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
from numpyro.distributions.transforms import biject_to
import pytest
from scipy.special import logsumexp

from sami_ppl import families
from sami_ppl.decoders.guidance import guidance
from sami_ppl.diffusion.schedule import VariancePreserving
from sami_ppl.distributions.relaxed import LogRatios, LogRatioTransform, RelaxedOneHotCategorical
from sami_ppl.encoders.encoder import encoder_for
from sami_ppl.fitting.objective import ScoreELBO
from sami_ppl.priors.read import read_prior

LOGITS = jnp.array([0.4, -0.3, 1.0])


def relaxed():
    numpyro.sample("kind", RelaxedOneHotCategorical(0.5, LOGITS), infer={"event_dims": ["value"]})


def grid(temperature, half=60.0, points=801):
    """Log ratios on a square that holds all the mass, and the area of a cell."""
    side = np.linspace(-half, half, points, dtype=np.float32) / temperature / 4
    u = np.stack(np.meshgrid(side, side, indexing="ij"), -1).reshape(-1, 2)
    return jnp.asarray(u), float(side[1] - side[0]) ** 2


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.0])
def test_density_integrates_to_one_and_has_the_probabilities_as_its_regions(temperature):
    """P(x_i is largest) = π_i at every temperature (Maddison et al. 2017, prop. 1 b): integrals of the density."""
    u, cell = grid(temperature)
    mass = np.exp(np.asarray(LogRatios(temperature, LOGITS).log_prob(u), float)) * cell
    assert mass.sum() == pytest.approx(1, abs=2e-3)
    largest = np.argmax(np.concatenate([u, np.zeros((len(u), 1))], 1), 1)
    found = [mass[largest == i].sum() for i in range(3)]
    np.testing.assert_allclose(found, jax.nn.softmax(LOGITS), atol=0.01)


@pytest.mark.parametrize("temperature", [0.3, 1.0])
def test_density_on_the_simplex_is_the_papers(temperature):
    """Eq. 10 of Maddison et al. 2017 in double precision on the host; a temperature off by a tenth is not it."""
    law = RelaxedOneHotCategorical(temperature, LOGITS)
    x = law.sample(jax.random.key(0), (200,))
    logs, logits = np.log(np.asarray(x, float)), np.asarray(LOGITS, float)

    def paper(t):
        each = logits - t * logs
        return np.log(2) + 2 * np.log(t) + (each - logs).sum(1) - 3 * logsumexp(each, axis=1)

    np.testing.assert_allclose(law.log_prob(x), paper(temperature), rtol=2e-4, atol=2e-3)
    assert np.abs(np.asarray(law.log_prob(x)) - paper(1.1 * temperature)).max() > 0.05


@pytest.mark.slow
def test_moments_of_draws_are_those_of_the_density():
    """Mean and variance of the log ratios: differences of Gumbels are logistic, π²/3 over T²."""
    u = LogRatios(0.5, LOGITS).sample(jax.random.key(1), (40_000,))
    np.testing.assert_allclose(u.mean(0), (LOGITS[:2] - LOGITS[2]) / 0.5, atol=0.1)
    np.testing.assert_allclose(u.var(0), np.pi**2 / 3 / 0.25, rtol=0.04)
    x = RelaxedOneHotCategorical(0.05, LOGITS).sample(jax.random.key(2), (2000,))
    assert jnp.isfinite(RelaxedOneHotCategorical(0.05, LOGITS).log_prob(x)).all(), "draws at the corners have a density"


def test_transform_is_a_bijection_with_its_volume():
    transform = biject_to(RelaxedOneHotCategorical.support)
    assert isinstance(transform, LogRatioTransform)
    u = jnp.array([0.3, -1.2])
    x = transform(u)
    np.testing.assert_allclose(transform.inv(x), u, rtol=1e-5)
    jacobian = jax.jacfwd(lambda u: transform(u)[:2])(u)
    np.testing.assert_allclose(transform.log_abs_det_jacobian(u, x), jnp.linalg.slogdet(jacobian)[1], rtol=1e-5)


@pytest.mark.slow
def test_site_and_family(mlp):
    """K − 1 coordinates, the prior's temperature; moments stated are those drawn; guidance is the slope of log q."""
    latents = read_prior(relaxed)
    (site,) = latents.sites
    assert (site.size, site.event_shape, site.temperature, site.dims) == (2, (3,), 0.5, ("value",))
    schedule = VariancePreserving(-4.0, 4.0)
    encoder = encoder_for(relaxed, mlp(4, 6, key=jax.random.key(0)), schedule, (4,), key=jax.random.key(1))
    assert isinstance(encoder.families[0], families.RelaxedCategorical)
    assert encoder.families[0].temperature == 0.5
    x, level = jnp.arange(4.0), jnp.asarray(1.0)
    parameters = encoder.parameters(x, level)
    draws = encoder.distribution(parameters).sample(jax.random.key(2), (20_000,))
    loc, scale = encoder(x, level)
    np.testing.assert_allclose(draws.mean(0), loc, atol=0.05)
    np.testing.assert_allclose(draws.std(0), scale, rtol=0.03)
    z, step = jnp.array([0.4, -0.7]), 1e-2
    slope = [(encoder.log_prob(z, x + step * e, level) - encoder.log_prob(z, x - step * e, level)) / (2 * step)
             for e in jnp.eye(4)]  # fmt: skip
    np.testing.assert_allclose(guidance(encoder, z, x, level), jnp.stack(slope), atol=2e-3)


@pytest.mark.slow
def test_kl_is_by_monte_carlo_and_right(tiny_program, mlp):
    """The KL at draws, averaged, is the integral of q log q/p over log ratios."""
    schedule = VariancePreserving(-4.0, 4.0)
    encoder = encoder_for(relaxed, mlp(4, 6, key=jax.random.key(0)), schedule, (4,), key=jax.random.key(1))
    program = tiny_program(relaxed_free).replace(prior=relaxed, encoder=encoder)
    x = jnp.repeat(jnp.linspace(-2, 1, 4)[None], 4000, 0)
    kl = float(ScoreELBO().terms(jax.random.key(3), program.params(), program.model, program.guide, x)["kind"][0])
    parameters = encoder.parameters(*encoder.clean(x[0]))["kind"]
    u, cell = grid(0.5, half=40.0)
    log_q, log_p = (np.asarray(LogRatios(0.5, logits).log_prob(u), float) for logits in (parameters, LOGITS))
    assert kl == pytest.approx((np.exp(log_q) * (log_q - log_p)).sum() * cell, rel=0.1)


def relaxed_free():
    numpyro.sample("a", numpyro.distributions.Normal(0.0, 1.0).expand([2]).to_event(1))


@pytest.mark.slow
def test_bias_of_its_gradient_falls_with_the_temperature():
    """∇ E f(one-hot) by enumeration against ∇ E f(relaxed) at falling temperatures; enumeration has none."""
    values = jnp.array([[1.0, -0.5], [0.2, 2.0], [-1.5, 0.3]])

    def f(x):
        return jnp.sum(jnp.tanh(x @ values) ** 2, -1)

    exact = jax.grad(lambda logits: jax.nn.softmax(logits) @ f(jnp.eye(3)))(LOGITS)

    def bias(temperature):
        def mean(logits):
            return f(RelaxedOneHotCategorical(temperature, logits).sample(jax.random.key(0), (200_000,))).mean()

        return float(jnp.linalg.norm(jax.grad(mean)(LOGITS) - exact))

    found = [bias(t) for t in (1.0, 0.5, 0.2, 0.1)]
    assert found == sorted(found, reverse=True)
    assert found[-1] < 0.3 * found[0]


ERRORS = {
    "temperature": (lambda: RelaxedOneHotCategorical(0.0, LOGITS), "temperature must be a positive number.*got 0.0"),
    "traced temperature": (lambda: RelaxedOneHotCategorical(jnp.ones(()), LOGITS), "temperature must be a positive"),
    "one category": (lambda: RelaxedOneHotCategorical(0.5, jnp.zeros(1)), r"at least two categories, got \(1,\)"),
    "family of another site": (
        lambda: encoder_for(relaxed_free, lambda x, lam: x, VariancePreserving(), (4,),
                            families={"a": families.RelaxedCategorical}, key=jax.random.key(0)),
        "'a' is not relaxed"),
}  # fmt: skip


@pytest.mark.parametrize("name", ERRORS)
def test_bad_input(name):
    call, message = ERRORS[name]
    with pytest.raises(ValueError, match=message):
        call()
