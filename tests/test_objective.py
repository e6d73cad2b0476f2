"""The objectives of a program under NumPyro: agreement, β, free bits, SVI."""

import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from numpyro.infer import SVI, Trace_ELBO, TraceMeanField_ELBO
import optax
import pytest
from two_priors import PRIORS, Hashed, N, X, losses

from sami_ppl.fitting.objective import ScoreELBO

ELBOS = {
    "trace": lambda **kw: Trace_ELBO(**kw),
    "mean field": lambda **kw: TraceMeanField_ELBO(**kw),
}


@pytest.mark.slow
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


@pytest.mark.slow
def test_loss_per_observation_does_not_depend_on_the_total(program):
    """A batch that stands for 1,000 observations: NumPyro's loss is 1,000 times the loss per observation."""
    p = Hashed(program())
    keys, params = jax.random.split(jax.random.key(2), 3), p.value.params()
    whole = losses(TraceMeanField_ELBO(), p, 1000, params, keys)
    np.testing.assert_allclose(1000 * losses(ScoreELBO(), p, 1000, params, keys), whole, rtol=1e-4)


@pytest.mark.slow
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


@pytest.mark.slow
def test_beta_on_one_side_only_would_be_caught(program):
    """Negative control: β given to the model alone does not scale a KL without closed form."""
    p = program("constrained")

    @jax.jit
    def loss(beta):
        both = (lambda x: p.model(x, beta=beta), lambda x: p.guide(x))
        return TraceMeanField_ELBO(sum_sites=False).loss(jax.random.key(3), p.params(), *both, X)["u"]

    assert not np.isclose(loss(jnp.asarray(4.0)), 4 * loss(jnp.asarray(1.0)), rtol=1e-2)


@pytest.mark.slow
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


@pytest.mark.slow
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


@pytest.mark.slow
def test_svi_finds_the_shared_encoder_once(program):
    """SVI's parameters are the program's: no second copy of the encoder under another name."""
    p = program()
    svi = SVI(p.model, p.guide, optax.sgd(0.1), Trace_ELBO())
    params = svi.get_params(svi.init(jax.random.key(0), X))
    assert set(params) == {"denoiser$params", "encoder$params"}
    assert eqx.tree_equal(params, p.params())


@pytest.mark.slow
def test_free_bits_hold_each_axis_at_the_floor_without_gradient(program):
    """Below the floor an axis costs exactly the floor and has no gradient; above, nothing changes; β scales both."""
    p = program()

    @functools.partial(jax.jit, static_argnums=0)
    def divergence(floor, beta=1.0, scale=1.0):
        def total(params):
            params = jax.tree.map(lambda leaf: scale * leaf, params)
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
    assert np.isnan(divergence(high, 1.0, np.nan)[1]).all(), "NaN is no number below the floor"
    free, unchanged = divergence(low)
    np.testing.assert_allclose(unchanged, axes, rtol=1e-6)
    assert largest(jax.tree.map(jnp.subtract, free, gradient)) < 1e-6
    assert largest(gradient) > 1e-3
    with pytest.raises(ValueError, match="free_bits must be at least 0 nats, got -1"):
        ScoreELBO(-1)
