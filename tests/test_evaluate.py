"""Networks as a step evaluates them: computed again for their gradient, and in bfloat16."""

from dataclasses import replace

from conftest import fill
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scripted_fits import ALONE, KEY, STAGE

from sami_ppl import DiagonalEncoder, PreconditionedDenoiser, Stage, fit
from sami_ppl.decoders.exact import LinearGaussian
from sami_ppl.decoders.guidance import guidance
from sami_ppl.decoders.training import Objective
from sami_ppl.diffusion.schedule import VariancePreserving
from sami_ppl.nn import DiT, NoiseEmbedding, ResidualMLP, UNet
from sami_ppl.nn.evaluate import evaluated, in_bfloat16, rematerialised

X = np.random.default_rng(0).normal(size=(50, 4)).astype(np.float32)


def pair(network, trunk, shape):
    """A denoiser and an encoder with weights that are not zero."""
    schedule = VariancePreserving(-4.0, 4.0)
    denoiser = PreconditionedDenoiser(network, schedule, shape)
    return fill(denoiser, 0.05), fill(DiagonalEncoder(trunk, schedule, shape, 2, key=KEY), 0.05)


def perceptrons(**size):
    shapes = ((4,), (4,)), ((4,), (8,))
    return pair(*(ResidualMLP(*shape, **size, key=KEY) for shape in shapes), (4,))


@pytest.fixture(scope="module")
def small():
    return perceptrons(width=16, depth=2)


def bounds(networks, objective, x):
    """A function of the weights: the mean bound of x, at fixed codes, noise and noise levels."""
    params, static = eqx.partition(networks, eqx.is_inexact_array)
    keys, levels = jax.random.split(KEY), networks[0].schedule.stratified(KEY, len(x))
    z, eps = jax.random.normal(keys[0], (len(x), 2)), jax.random.normal(keys[1], x.shape)

    def loss(params):
        denoiser, encoder = eqx.combine(params, static)
        return jnp.mean(objective.bounds(denoiser, encoder, x, z, levels, eps))

    return loss, params


def checkpoints(function, *inputs):
    """How many pieces of a function are computed again."""
    return str(jax.make_jaxpr(function)(*inputs)).count("prevent_cse=")


def apart(found, expected):
    pairs = list(zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True))
    return max(float(jnp.abs(a - b).max()) for a, b in pairs) / max(float(jnp.abs(b).max()) for _, b in pairs)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["guided", "own"])
def test_gradients_of_blocks_that_are_computed_again_are_the_same(kind, small):
    """Guidance is differentiated twice; to 1e-5 in float32. Every block is one, and they are in the program traced."""
    x = jax.random.normal(KEY, (3, 4))
    again, params = bounds(small, Objective(kind, remat=True), x)
    plain, _ = bounds(small, Objective(kind), x)
    (loss, gradient), (expected, held) = (jax.jit(jax.value_and_grad(f))(params) for f in (again, plain))
    assert float(loss) == pytest.approx(float(expected), rel=1e-6)
    assert apart(gradient, held) < 1e-5
    blocks = [checkpoints(f, params) for f in (again, plain)]
    assert blocks[0] >= 4
    assert blocks[1] == 0


@pytest.mark.slow
def test_they_hold_less():
    """Of six blocks, 512 observations: a step holds less than three quarters (.71)."""
    networks, x = perceptrons(width=64, depth=6), jnp.zeros((512, 4))

    def held(remat):
        loss, params = bounds(networks, Objective(remat=remat), x)
        return jax.jit(jax.grad(loss)).lower(params).compile().memory_analysis().temp_size_in_bytes

    assert held(True) < 0.75 * held(False)


def test_a_network_without_blocks_is_one(mlp):
    network = mlp(4, 4, key=KEY)
    again = rematerialised(network)
    np.testing.assert_array_equal(again(X[0], jnp.zeros(())), network(X[0], jnp.zeros(())))
    assert checkpoints(lambda x: again(x, jnp.zeros(())), X[0]) == 1


@pytest.mark.slow
def test_blocks_of_our_networks_are_known():
    """Of a transformer its blocks and the exit, of a U-Net of two levels the five on its way."""
    networks = DiT((1, 4, 4), width=8, depth=3, heads=1, patch=2, key=KEY), UNet((1, 4, 4), widths=(4, 8), key=KEY)
    for network, blocks in zip(networks, (4, 5), strict=True):
        again = rematerialised(network)
        assert checkpoints(lambda x, again=again: again(x, jnp.zeros(())), jnp.zeros((1, 4, 4))) == blocks


# bfloat16


TOLERANCE = 0.01
"""Of the loss in bfloat16, relative to that in float32."""


@pytest.mark.slow
def test_the_loss_in_bfloat16_is_that_in_float32_to_a_hundredth(small):
    """Its gradient points the same way, in float32. Controls: terms added up in bfloat16, and levels rounded to it."""
    x = jax.random.normal(KEY, (512, 4))
    rounded, params = bounds(small, Objective(compute="bfloat16"), x)
    exact, _ = bounds(small, Objective(), x)
    (loss, gradient), (expected, whole) = (jax.jit(jax.value_and_grad(f))(params) for f in (rounded, exact))
    assert loss.dtype == jnp.float32
    assert {leaf.dtype for leaf in jax.tree.leaves(gradient)} == {jnp.dtype("float32")}
    assert float(loss) == pytest.approx(float(expected), rel=TOLERANCE)
    assert float(loss) != float(expected)
    flat, other = (jnp.concatenate([leaf.ravel() for leaf in jax.tree.leaves(tree)]) for tree in (gradient, whole))
    assert float(flat @ other / jnp.linalg.norm(flat) / jnp.linalg.norm(other)) > 0.99

    terms = jnp.full(512, expected / 512, jnp.bfloat16)
    summed = jax.lax.fori_loop(0, 512, lambda i, total: total + terms[i], jnp.zeros((), jnp.bfloat16))
    assert abs(float(summed) - float(expected)) > TOLERANCE * float(expected), "control"


@pytest.mark.slow
def test_guidance_in_bfloat16_is_a_gradient_in_float32(small):
    """To a twentieth of its length, at every noise level; of an encoder that is given the image in bfloat16 it is not
    of the image's type: the control.
    """
    _, encoder = small
    rounded = evaluated(encoder, remat=False, compute="bfloat16")
    z, x = jnp.asarray([0.3, -1.0]), jnp.asarray(X[0])
    levels = jnp.linspace(-4.0, 4.0, 9)
    found, expected = (
        jax.jit(jax.vmap(lambda level, encoder=encoder: guidance(encoder, z, x, level)))(levels)
        for encoder in (rounded, encoder)
    )
    assert found.dtype == jnp.float32
    error = jnp.linalg.norm(found - expected, axis=1) / jnp.linalg.norm(expected, axis=1)
    assert 1e-5 < float(error.max()) < 0.05
    assert guidance(encoder, z, x.astype(jnp.bfloat16), levels[0]).dtype == jnp.bfloat16, "control"


def test_noise_levels_stay_in_float32(small, monkeypatch):
    """Of levels that bfloat16 does not tell apart the embedding is that in float32, rounded."""
    network = small[0].network
    right, seen = NoiseEmbedding.__call__, []
    spy = lambda self, level: (seen.append(level.dtype), right(self, level))[1]  # noqa: E731
    monkeypatch.setattr(NoiseEmbedding, "__call__", spy)
    x, low, high = jnp.asarray(X[0]), jnp.asarray(3.001), jnp.asarray(3.004)
    assert low.astype(jnp.bfloat16) == high.astype(jnp.bfloat16)
    assert jax.eval_shape(in_bfloat16(network), x, low).dtype == jnp.float32
    assert seen == [jnp.float32]
    products = str(jax.make_jaxpr(in_bfloat16(network))(x, low))
    assert products.count("bf16[16] = dot_general") >= 5, "the blocks"
    embedded = [network.embedding(level) for level in (low, high)]
    assert float(jnp.abs(embedded[0] - embedded[1]).max()) > 0


@pytest.mark.slow
def test_masters_and_validation_stay_in_float32(tiny_program):
    """Weights come back in float32, and move; what is validated is that of float32, to the digit."""
    stage = replace(STAGE, steps=2, validate_every=2, learning_rate=1e-9)
    found = [
        fit(tiny_program(), X, one, key=KEY, progress=False)
        for one in (stage, replace(stage, compute="bfloat16", remat=True))
    ]
    (_, history), (program, rounded) = found
    assert {leaf.dtype for leaf in jax.tree.leaves(program.params())} == {jnp.dtype("float32")}
    (record,), (other,) = history.records, rounded.records
    assert other["bound"] == pytest.approx(record["bound"], rel=1e-6)
    assert other["train_loss"] != record["train_loss"]
    assert other["train_loss"] == pytest.approx(record["train_loss"], rel=TOLERANCE)


def test_what_has_no_network_is_refused(tiny_program):
    law = LinearGaussian(jnp.eye(4, 2), 0.5, tiny_program().denoiser.schedule)
    program = tiny_program().replace(denoiser=law.denoiser)
    with pytest.raises(ValueError, match=r"the denoiser of this program \(ExactDenoiser\) have none"):
        replace(ALONE, remat=True).check(program, 50)
    replace(STAGE, remat=True).check(program, 50)
    with pytest.raises(ValueError, match="compute must be one of"):
        Stage(compute="float16")
