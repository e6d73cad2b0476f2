"""Transformers: their parts against independent ones, sides that patches do not divide, two derivatives, programs."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from numpyro import distributions as dist
import pytest
from scipy.special import softmax

import sami_ppl as sp
from sami_ppl.fitting import sizes
from sami_ppl.nn import AscendingDiT, DiT, HalfUNet, UNet, ViT
from sami_ppl.nn.masked import unmasked
from sami_ppl.nn.transformer import TransformerBlock, sines
from sami_ppl.program.build import unet_size
from sami_ppl.program.transformers import transformers

KEY = jax.random.key(0)
SCHEDULE = sp.VariancePreserving(-4.0, 4.0)
SMALL = {"width": 8, "depth": 1, "heads": 2, "patch": 4}
SHAPES = [(1, 8, 8), (2, 9, 14), (3, 5, 4), (1, 3, 2)]
LEVEL = jnp.asarray(0.3)
PRIOR = sp.factors(place=dist.Uniform(-1, 1).expand([2]), light=dist.Normal(0, 1))


def values(*shape, seed=1):
    return jax.random.normal(jax.random.key(seed), shape)


# --- parts ------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_attention_is_attention(fill, x64):
    """Head by head in NumPy; a token that moves moves what all the others are given."""
    block, h = fill(TransformerBlock(6, 3, None, key=KEY)), np.asarray(values(5, 6))
    every = h @ np.asarray(block.attend.weight).T + np.asarray(block.attend.bias)
    queries, keys, outs = (every[:, i * 6 : (i + 1) * 6].reshape(5, 3, 2) for i in range(3))
    heads = [softmax(queries[:, k] @ keys[:, k].T / np.sqrt(2), axis=1) @ outs[:, k] for k in range(3)]
    expected = np.concatenate(heads, 1) @ np.asarray(block.out.weight).T + np.asarray(block.out.bias)
    found = block.attention(jnp.asarray(h))
    np.testing.assert_allclose(found, expected, rtol=1e-10)
    assert np.abs(block.attention(jnp.asarray(h).at[0].add(1.0)) - found).min(1).max() > 1e-4


@pytest.mark.slow
def test_blocks_start_as_the_identity_and_images_at_zero():
    h, embedding = values(4, 8), values(128)
    for size in (128, None):
        np.testing.assert_array_equal(TransformerBlock(8, 2, size, key=KEY)(h, embedding if size else None), h)
    assert not np.asarray(DiT((2, 9, 6), **SMALL, key=KEY)(values(2, 9, 6), LEVEL)).any()
    assert not np.asarray(AscendingDiT(3, (2, 9, 6), **SMALL, key=KEY)(values(3))).any()


@pytest.mark.parametrize("places", [(7, 7), (16, 2), (1, 1)])
def test_positions_tell_all_places_apart(places):
    found = np.asarray(sines(places, 8))
    assert found.shape == (places[0] * places[1], 8)
    distances = np.linalg.norm(found[:, None] - found[None], axis=-1)
    assert (distances + 9 * np.eye(len(found))).min() > 0.02


@pytest.mark.slow
def test_sides_that_patches_do_not_divide_have_a_margin_inside(fill):
    """The same as an image with zeros around, cut; both networks."""
    x = values(2, 9, 6)
    padded = jnp.pad(x, [(0, 0), (1, 2), (1, 1)])
    small, large = (fill(DiT(shape, **SMALL, key=KEY)) for shape in (x.shape, padded.shape))
    np.testing.assert_allclose(small(x, LEVEL), large(padded, LEVEL)[:, 1:10, 1:7], rtol=1e-5, atol=1e-6)
    assert np.abs(large(padded, LEVEL)[:, 0]).max() > 1e-3, "control: the margin is not zero by itself"
    small, large = (fill(ViT(shape, (3,), **SMALL, key=KEY)) for shape in (x.shape, padded.shape))
    np.testing.assert_allclose(small(x, LEVEL), large(padded, LEVEL), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes_of_any_sides(shape):
    x, z, level = (jax.ShapeDtypeStruct(s, jnp.float32) for s in (shape, (3,), ()))
    assert jax.eval_shape(DiT(shape, **SMALL, key=KEY), x, level).shape == shape
    assert jax.eval_shape(DiT(shape, **SMALL, condition=3, key=KEY), x, level, z).shape == shape
    assert jax.eval_shape(DiT(shape, **SMALL, out_channels=4, key=KEY), x, level).shape == (4, *shape[1:])
    assert jax.eval_shape(ViT(shape, (5,), **SMALL, key=KEY), x, level).shape == (5,)
    assert jax.eval_shape(ViT(shape, (5,), **SMALL, noise=False, key=KEY), x, None).shape == (5,)
    assert jax.eval_shape(AscendingDiT(3, shape, **SMALL, key=KEY), z, None).shape == shape


@pytest.mark.parametrize(
    ("shape", "size", "message"),
    [
        ((1, 8, 8), {"width": 8, "heads": 3}, "width 8 must be a multiple of heads 3.*write width=144, heads=3"),
        ((1, 8, 8), {"patch": 0}, "patch 0 positive"),
        ((1, 8, 8), {"width": 145}, "width 145 must be a multiple of heads 3"),
        ((5,), {}, r"takes images \(channels, rows, columns\), got an observation of \(5,\)"),
    ],
)
def test_sizes_that_do_not_go_are_refused(shape, size, message):
    for build in (DiT, lambda *a, **k: ViT(a[0], (5,), **k), lambda *a, **k: AscendingDiT(3, *a, **k)):
        with pytest.raises(ValueError, match=message):
            build(shape, **size, key=KEY)


def test_an_encoder_that_sees_the_noise_level_asks_for_it():
    with pytest.raises(ValueError, match="give log_snr"):
        ViT((1, 4, 4), (3,), **SMALL, key=KEY)(values(1, 4, 4), None)


# --- guidance ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_guidance_through_attention_is_differentiated_twice(fill, x64):
    """d/dw of a function of ∇ₓ log q(z | x_λ, λ), and its second derivative in x, against central differences."""
    network = fill(ViT((1, 4, 6), (5,), width=4, depth=2, heads=2, patch=2, key=KEY))
    encoder = fill(sp.DiagonalEncoder(network, SCHEDULE, (1, 4, 6), 2, key=KEY))
    params, static = eqx.partition(encoder, eqx.is_inexact_array)
    flat, unravel = jax.flatten_util.ravel_pytree(params)
    x, z, target = values(1, 4, 6), values(2, seed=2), values(1, 4, 6, seed=3)

    def error(flat, x):
        own = eqx.combine(unravel(flat), static)
        return jnp.sum((jax.grad(own.log_prob, 1)(z, x, LEVEL) - target) ** 2)

    gradients = jax.jit(jax.grad(error, (0, 1)))(flat, x)
    for argument, (gradient, at) in enumerate(zip(gradients, (flat, x), strict=True)):
        assert np.isfinite(gradient).all()
        along = jax.random.normal(jax.random.key(4), at.shape)
        along = along / jnp.linalg.norm(along)
        ends = [[flat, x], [flat, x]]
        for end, step in zip(ends, (1e-5, -1e-5), strict=True):
            end[argument] = at + step * along
        slope = (error(*ends[0]) - error(*ends[1])) / 2e-5
        np.testing.assert_allclose(jnp.vdot(gradient, along), slope, rtol=1e-6)
        assert abs(slope) > 1e-3


# --- programs ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", [16, 28, 48, 64, 96, 128])
def test_a_step_costs_about_what_one_of_the_u_net_does(side):
    """By the operations of a pass as XLA counts them, without compiling: plain denoising, and a guided step."""
    shape, settings = (3, side, side), {"features": 64, "decoder": "guided", "code": 3, "sees": True}
    transformer = eqx.filter_eval_shape(lambda: transformers(shape, shape, {}, keys=(KEY, KEY), **settings)[0])
    size = unet_size(shape)
    convolutional = eqx.filter_eval_shape(
        lambda: (UNet(shape, **size, key=KEY), HalfUNet(shape, (64,), **size, key=KEY))
    )

    def operations(network):
        params, static = eqx.partition(network, lambda leaf: isinstance(leaf, jax.ShapeDtypeStruct))
        once = jax.jit(lambda params, x: eqx.combine(params, static)(x, LEVEL))
        return once.lower(params, jax.ShapeDtypeStruct(shape, jnp.float32)).cost_analysis()["flops"]

    (denoiser, encoder), (other, half) = (map(operations, pair) for pair in (transformer, convolutional))
    assert 0.5 < denoiser / other < 2
    assert 0.5 < (denoiser + 9 * encoder) / (other + 9 * half) < 2.5


@pytest.mark.slow
@pytest.mark.parametrize("decoder", ["guided", "conditioned", "gaussian"])
def test_one_word_makes_the_program(decoder, capsys):
    x = np.array(values(6, 9, 14, seed=5))
    x[:, 2, 3:5] = np.nan  # missing, which networks are told
    size = {"depth": 1, "width": 8}
    program = sp.autoencoder(PRIOR, x, network="dit", decoder=decoder, size=size, key=KEY)
    assert "networks: transformer, width 8, depth 1, patch 2; " in capsys.readouterr().out
    assert isinstance(unmasked(program.denoiser.network), AscendingDiT if decoder == "gaussian" else DiT)
    assert isinstance(unmasked(program.encoder.network), ViT)
    if decoder == "guided":
        assert program.denoiser.predict == "noise"
    level = jnp.zeros(())
    assert jax.eval_shape(program.encoder, jnp.zeros((1, 9, 14)), level)[0].shape == (3,)


def test_a_transformer_is_trained_as_a_u_net_is():
    """Batches, steps and rates of large networks."""
    x = np.asarray(values(600, 12, 12, seed=5))
    settings = {"progress": False, "key": KEY}
    dit = sp.autoencoder(PRIOR, x, network="dit", size={"width": 8, "depth": 1}, **settings)
    unet = sp.autoencoder(PRIOR, x, network="unet", size={"widths": (4, 4), "patch": 2}, **settings)
    other = sp.autoencoder(PRIOR, x, network="mlp", size={"width": 8, "depth": 1}, **settings)
    for stage in (sizes.denoiser_stage, sizes.encoder_stage, sizes.joint_stage, sizes.gaussian_stage):
        extent = sizes.Extent(600, 1.0)
        assert stage(dit, extent) == stage(unet, extent) != stage(other, extent)


@pytest.mark.parametrize(
    ("data", "size", "message"),
    [
        (values(6, 5), {}, r"network='dit' takes images .* shape \(5,\): write network='mlp'"),
        (values(6, 8, 8), {"widths": (4, 8)}, "size holds widths, a transformer takes width, depth, heads and patch"),
    ],
)
def test_what_a_transformer_does_not_take_is_refused(data, size, message):
    with pytest.raises(ValueError, match=message):
        sp.autoencoder(PRIOR, np.asarray(data), network="dit", size=size, progress=False, key=KEY)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::sami_ppl.diagnostics.CollapseWarning")
def test_a_transformer_is_fitted_saved_and_loaded(tmp_path):
    """A stage of the denoiser lowers the bound; the loaded program is the saved one and encodes as it does."""
    x = np.tanh(np.asarray(values(64, 1, 1, 1) + 0.1 * values(64, 1, 7, 6, seed=7)))
    program = sp.autoencoder(PRIOR, x, network="dit", size=SMALL, sampler=sp.DDIM(3), progress=False, key=KEY)
    stage = sp.Stage(steps=40, batch=32, learning_rate=1e-2, warmup=5, ema=0.9, target="marginal", validate_every=10)
    fitted, history = sp.fit(program, x, stage, key=KEY, progress=False)
    losses = [record["bound"] for record in history.records if "bound" in record]
    assert losses[-1] < losses[0]
    sp.save(fitted, tmp_path / "model")
    loaded = sp.load(tmp_path / "model", program)
    assert eqx.tree_equal(loaded.denoiser, fitted.denoiser)
    np.testing.assert_array_equal(loaded.encode(x[:2])[0], fitted.encode(x[:2])[0])
