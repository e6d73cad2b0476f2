"""Networks: shapes, what depends on λ and what does not, and their parts against independent implementations."""

import equinox as eqx
from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
from numpyro import distributions as dist
from numpyro.infer import SVI
import optax
import pytest

import sami_ppl as sp
from sami_ppl.diffusion.denoiser import GaussianDenoiser, PreconditionedDenoiser
from sami_ppl.diffusion.sampler import DDIM
from sami_ppl.diffusion.schedule import VarianceExploding, VariancePreserving
from sami_ppl.encoders.encoder import DiagonalEncoder
from sami_ppl.fitting.objective import ScoreELBO
from sami_ppl.nn import AscendingUNet, DiT, HalfUNet, NoiseEmbedding, ResidualMLP, UNet, ViT
from sami_ppl.nn.convolution import Conv, GroupNorm, outside_loops, pool, upsample
from sami_ppl.nn.embed import from_patches, to_patches
from sami_ppl.nn.flax import FlaxNetwork
from sami_ppl.program.program import Program

KEY = jax.random.key(0)
SCHEDULE = VariancePreserving(-4.0, 4.0)
IMAGES = [(channels, size, size) for channels in (1, 3) for size in (8, 16, 28)]
PATCHES = [2, 4]
LOW, HIGH = jnp.asarray(-2.0), jnp.asarray(3.0)


def values(shape):
    return jax.random.normal(jax.random.key(1), shape)


def shape_of(function, *args):
    return jax.tree.map(lambda a: a.shape, jax.eval_shape(function, *args))


# --- shapes, at every size; nothing is computed -----------------------------------------------------------------------

DENOISERS = {
    "mlp": lambda shape, patch, key: ResidualMLP(shape, shape, width=8, depth=1, key=key),
    "unet": lambda shape, patch, key: UNet(
        shape, widths=(4,) if shape[1] // patch % 2 else (4, 8), patch=patch, key=key
    ),
    "dit": lambda shape, patch, key: DiT(shape, width=8, depth=1, heads=2, patch=patch, key=key),
}
ENCODERS = {
    "mlp": lambda shape, patch, noise, key: ResidualMLP(shape, (5,), width=8, depth=1, noise=noise, key=key),
    "half unet": lambda shape, patch, noise, key: HalfUNet(
        shape, (5,), widths=(4,) if shape[1] // patch % 2 else (4, 8), patch=patch, noise=noise, key=key
    ),
    "vit": lambda shape, patch, noise, key: ViT(
        shape, (5,), width=8, depth=1, heads=2, patch=patch, noise=noise, key=key
    ),
}


@pytest.mark.parametrize("shape", [(3,), (7,), *IMAGES], ids=str)
@pytest.mark.parametrize("patch", PATCHES)
def test_output_shapes(shape, patch):
    """Denoiser networks: the shape of the observation; encoder networks: a vector, with and without λ."""
    x, level = jax.ShapeDtypeStruct(shape, jnp.float32), jax.ShapeDtypeStruct((), jnp.float32)
    for name, make in DENOISERS.items():
        if len(shape) == 3 or name == "mlp":
            assert shape_of(lambda x, t, make=make: make(shape, patch, KEY)(x, t), x, level) == shape, name
    for name, make in ENCODERS.items():
        if len(shape) == 3 or name == "mlp":
            assert shape_of(lambda x, t, make=make: make(shape, patch, True, KEY)(x, t), x, level) == (5,), name
            assert shape_of(lambda x, make=make: make(shape, patch, False, KEY)(x, None), x) == (5,), name


SIDES = [(2, 9), (1, 9, 14), (3, 7, 5, 6)]
"""A signal, an image and a volume whose sides do not halve."""


@pytest.mark.parametrize("shape", [(2, 16), *SIDES, (1, 4, 3, 8)], ids=str)
def test_networks_of_any_number_of_sides(shape):
    """In and out have the same shape; nothing is computed."""
    x, level, sizes = jax.ShapeDtypeStruct(shape, jnp.float32), jnp.zeros(()), {"widths": (4, 8), "patch": 2}
    assert shape_of(lambda x: UNet(shape, **sizes, key=KEY)(x, level), x) == shape
    assert shape_of(lambda x: UNet(shape, **sizes, out_channels=5, key=KEY)(x, level), x) == (5, *shape[1:])
    assert shape_of(lambda x: HalfUNet(shape, (5,), **sizes, key=KEY)(x, level), x) == (5,)
    assert shape_of(lambda: AscendingUNet(3, shape, **sizes, key=KEY)(jnp.zeros(3))) == shape


@pytest.mark.slow
@pytest.mark.parametrize("shape", SIDES, ids=str)
def test_sides_that_do_not_halve_are_padded_and_cut(shape, fill):
    """The same numbers as the observation with zeros around it, cut by hand; weights are those of any other sides."""
    sizes = {"widths": (4, 8), "patch": 2}
    long = tuple(-(-side // 4) * 4 for side in shape[1:])
    around = [((b - a) // 2, b - a - (b - a) // 2) for a, b in zip(shape[1:], long, strict=True)]
    inside = (slice(None), *(slice(first, first + a) for (first, _), a in zip(around, shape[1:], strict=True)))
    network, other = fill(UNet(shape, **sizes, key=KEY)), fill(UNet((shape[0], *long), **sizes, key=KEY))
    assert eqx.tree_equal(network, other)
    x = values(shape)
    padded = jnp.pad(x, ((0, 0), *around))
    found, whole = jax.jit(lambda x, y: (network(x, LOW), network(y, LOW)))(x, padded)
    np.testing.assert_allclose(found, whole[inside], atol=1e-6)
    assert np.abs(np.asarray(whole)).sum() > np.abs(np.asarray(found)).sum(), "control: something was cut"
    half = fill(HalfUNet(shape, (5,), **sizes, key=KEY))
    np.testing.assert_array_equal(*jax.jit(lambda x, y: (half(x, LOW), half(y, LOW)))(x, padded))


@pytest.mark.parametrize("build", [UNet, lambda *a, **k: HalfUNet(a[0], (5,), **k)], ids=["unet", "half"])
@pytest.mark.parametrize("shape", [(5,), (1, 2, 3, 4, 5), (1, 0, 4)], ids=str)
def test_observations_without_sides_are_refused(build, shape):
    with pytest.raises(ValueError, match=r"takes signals \(channels, length\), images .* got an observation of"):
        build(shape, key=KEY)


# --- dependence on λ --------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("name", DENOISERS)
def test_denoiser_networks_see_the_noise_level(name, fill):
    """With weights away from their zero initialisation, the output depends on λ and on every part of the input."""
    shape = (1, 8, 8)
    network, x = fill(DENOISERS[name](shape, 2, KEY)), values(shape)
    low, high, moved = jax.jit(lambda x, y: (network(x, LOW), network(x, HIGH), network(y, LOW)))(
        x, x.at[0, 7, 7].add(1.0)
    )
    assert not np.allclose(low, high, rtol=1e-3)
    assert not np.allclose(low, moved, rtol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("noise", ["full", "variance", "blind"])
@pytest.mark.parametrize("name", ENCODERS)
def test_encoder_depends_on_the_noise_level_as_told(name, noise, fill):
    """full: location and scale; variance: location is exactly the same at all λ, scale is not; blind: neither is."""
    shape = (1, 8, 8)
    network = ENCODERS[name](shape, 2, noise == "full", KEY)
    encoder = fill(DiagonalEncoder(network, SCHEDULE, shape, 3, noise=noise, key=KEY))
    (loc, scale), (loc2, scale2) = jax.jit(lambda x: (encoder(x, LOW), encoder(x, HIGH)))(values(shape))
    assert loc.shape == scale.shape == (3,)
    assert (scale > 0).all()
    assert np.array_equal(loc, loc2) == (noise != "full")
    assert np.array_equal(scale, scale2) == (noise == "blind")
    # guidance of a noise-blind encoder at one x_λ and z is the same at all λ; that of "variance" is not
    z = jnp.ones(3)
    low, high = jax.jit(lambda x: tuple(jax.grad(encoder.log_prob, 1)(z, x, level) for level in (LOW, HIGH)))(
        values(shape)
    )
    assert np.array_equal(low, high) == (noise == "blind")


def test_noise_embedding_tells_levels_apart():
    """Fixed frequencies: any two of 41 levels on [−10, 10] differ in features, and single precision is enough."""
    embedding = NoiseEmbedding(16, key=KEY)
    features = np.asarray(jax.vmap(embedding)(jnp.linspace(-10.0, 10.0, 41)))
    distances = np.linalg.norm(features[:, None] - features[None], axis=-1)
    assert distances[~np.eye(41, dtype=bool)].min() > 1e-3


@pytest.mark.parametrize("kind", [VariancePreserving, VarianceExploding], ids=["vp", "ve"])
@pytest.mark.parametrize("predict", ["data", "noise"])
def test_preconditioning_against_the_exact_denoiser(kind, predict, x64):
    """White Gaussian data N(m, s²): the network that is optimal gives the exact ε̂.

    It is E[x | x_λ] in units of the data for "data", F(u) = α s u/√v; zero for "noise". Inputs have unit variance.
    """
    schedule, m, s = kind(-4.0, 4.0), 1.5, 0.4
    exact = GaussianDenoiser(jnp.full(3, m), s**2 * jnp.eye(3), schedule)

    def network(u, level):
        alpha, sigma = schedule.alpha(level), schedule.sigma(level)
        return alpha * s / jnp.sqrt((alpha * s) ** 2 + sigma**2) * u if predict == "data" else 0 * u

    denoiser = PreconditionedDenoiser(network, schedule, (3,), mean=m, std=s, predict=predict)
    eps, unit = jax.random.normal(jax.random.key(2), (2, 3))
    for level in (LOW, jnp.asarray(0.0), HIGH):
        x_noisy = schedule.add_noise(m + s * unit, level, eps)
        np.testing.assert_allclose(denoiser(x_noisy, level), exact(x_noisy, level), rtol=1e-10)
        alpha, sigma = schedule.alpha(level), schedule.sigma(level)
        np.testing.assert_allclose(exact(x_noisy, level), sigma * (x_noisy - alpha * m) / (alpha**2 * s**2 + sigma**2))
    other = PreconditionedDenoiser(lambda u, level: 0.3 + u, schedule, (3,), mean=m, std=s, predict=predict)
    assert not np.allclose(other(x_noisy, HIGH), exact(x_noisy, HIGH), rtol=1e-2)  # control: another network


@pytest.mark.parametrize(("option", "message"), [({"std": 0.0}, "std must be positive"), ({"predict": "x"}, "predict")])
def test_preconditioning_refuses_wrong_options(option, message):
    """Both are named."""
    with pytest.raises(ValueError, match=message):
        PreconditionedDenoiser(lambda u, level: u, SCHEDULE, (3,), **option)


OTHERS = {
    "too short": (
        lambda x, log_snr: x[:2],
        r"denoiser network .* shape \(4,\) .* shape \(2,\): write sp.nn.ResidualMLP",
    ),
    "a vector more": (lambda x, log_snr: x[None], r"of the same shape, got one of shape \(1, 4\)"),
    "of other inputs": (
        lambda x, log_snr: jnp.ones((3, 4)) @ x + x,
        r"denoiser network failed on .* shape \(4,\), \(\): add",
    ),
    "of one argument": (lambda x: x, r"failed on .*: .*positional argument.*\nIt is called as network\(x, log_snr\)"),
    "a pair": (lambda x, log_snr: (x, x), "must put out one array for .*, got tuple: take it out"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_networks_of_another_shape_are_refused_where_they_are_handed_over(name, mlp):
    """By the denoiser, and by the front door, before anything is compiled."""
    network, message = OTHERS[name]
    with pytest.raises(ValueError, match=message):
        PreconditionedDenoiser(network, SCHEDULE, (4,))
    prior = sp.factors(z=dist.Normal(0, 1).expand([2]))
    with pytest.raises(ValueError, match=message):
        sp.autoencoder(prior, values((6, 4)), network=(network, mlp(4, 3, key=KEY)), key=KEY, progress=False)
    if name != "too short":  # a vector of features may be short
        with pytest.raises(ValueError, match=r"(?s)encoder network .*(end it with a reshape|failed on|one array)"):
            sp.autoencoder(prior, values((6, 4)), network=(mlp(4, 4, key=KEY), network), key=KEY, progress=False)


# --- parts ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("c_in", "c_out", "sides"), [(1, 4, (5, 5)), (3, 2, (8, 6)), (2, 3, (7,)), (2, 3, (4, 3, 5))])
def test_convolution_is_a_convolution(c_in, c_out, sides, fill):
    """Conv = jax.lax.conv_general_dilated with SAME padding and the weight as (*places, in) × out."""
    dims = len(sides)
    layer, h = fill(Conv(c_in, c_out, dims, key=KEY)), values((*sides, c_in))
    kernel = jnp.moveaxis(layer.weight.reshape(*(3,) * dims, c_in, c_out), (-1, -2), (0, 1))

    def convolved(kernel):
        out = jax.lax.conv_general_dilated(jnp.moveaxis(h, -1, 0)[None], kernel, (1,) * dims, "SAME")[0]
        return jnp.moveaxis(out, 0, -1) + layer.bias

    np.testing.assert_allclose(layer(h), convolved(kernel), rtol=1e-5, atol=1e-5)
    assert not np.allclose(layer(h), convolved(kernel[:, :, ::-1]), rtol=1e-2)  # control


@pytest.mark.parametrize("sides", [(6,), (4, 6), (2, 4, 6)], ids=str)
def test_pooling_is_the_mean_and_upsampling_its_inverse(sides):
    """Of what is the same at both places of every pair."""
    h = values((*sides, 3))
    np.testing.assert_allclose(pool(upsample(h)), h, rtol=1e-6)
    first = h[tuple(slice(0, 2) for _ in sides)]
    np.testing.assert_allclose(pool(h)[(0,) * len(sides)], first.reshape(-1, 3).mean(0), rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("sides", [(6,), (6, 5), (3, 4, 3)], ids=str)
def test_convolutions_outside_loops_and_inside_are_one_function(sides):
    """Value, gradients and the gradient of a gradient, as training has it; forward differentiation too."""
    layer, h = Conv(3, 4, len(sides), key=KEY), values((*sides, 3))

    def slope(layer, h):
        return jnp.sum(jax.grad(lambda h: jnp.sum(jnp.tanh(layer(h))))(h) ** 3)

    def all_of_it(layer, h):
        tangent = jax.jvp(lambda h: layer(h), (h,), (jnp.cos(h),))[1]
        return layer(h), eqx.filter_grad(slope)(layer, h), jax.grad(lambda h: slope(layer, h))(h), tangent

    def convolutions(layer):
        jaxpr = jax.make_jaxpr(jax.grad(lambda h: slope(layer, h)))(h)
        return str(jaxpr).count("conv_general_dilated")

    straight = outside_loops(layer)
    inside, outside = all_of_it(layer, h), all_of_it(straight, h)
    assert convolutions(straight) > convolutions(layer), "control: two forms"
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), inside, outside)


@pytest.mark.parametrize(("channels", "groups"), [(4, 4), (16, 8), (12, 6), (7, 7), (22, 2)])
def test_group_norm_is_equinoxs(channels, groups, fill):
    """Up to 8 groups that divide the channels; the same numbers as equinox.nn.GroupNorm on channels-first input."""
    layer = fill(GroupNorm(channels))
    assert layer.groups == groups
    reference = eqx.nn.GroupNorm(groups, channels)
    reference = eqx.tree_at(lambda r: (r.weight, r.bias), reference, (layer.gain, layer.bias))
    h = 3 + 2 * values((5, 5, channels))
    expected = jnp.moveaxis(reference(jnp.moveaxis(h, -1, 0)), 0, -1)
    np.testing.assert_allclose(layer(h), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shape", IMAGES, ids=str)
@pytest.mark.parametrize("patch", PATCHES)
def test_patches_are_a_permutation(shape, patch):
    """from_patches inverts to_patches, and each patch holds exactly the pixels of its square."""
    image = jnp.arange(np.prod(shape)).reshape(shape)
    patches = to_patches(image, patch)
    assert patches.shape == (shape[1] // patch, shape[2] // patch, patch * patch * shape[0])
    np.testing.assert_array_equal(from_patches(patches, patch), image)
    square = np.asarray(image)[:, patch : 2 * patch, :patch]
    assert set(np.asarray(patches[1, 0]).tolist()) == set(square.ravel().tolist())


# --- Flax -------------------------------------------------------------------------------------------------------------


class FlaxMLP(nnx.Module):
    def __init__(self, out):
        rngs = nnx.Rngs(0)
        self.inner, self.outer = nnx.Linear(5, 8, rngs=rngs), nnx.Linear(8, out, rngs=rngs)

    def __call__(self, x, log_snr):
        return self.outer(jnp.tanh(self.inner(jnp.append(x, log_snr))))


class Normed(FlaxMLP):
    def __init__(self, out):
        super().__init__(out)
        self.norm = nnx.BatchNorm(8, rngs=nnx.Rngs(0))


def test_flax_network_computes_what_the_module_does():
    """The adapter adds nothing, and its arrays are leaves of the module."""
    module = FlaxMLP(4)
    network, x = FlaxNetwork(module), values((4,))
    np.testing.assert_allclose(network(x, LOW), module(x, LOW), rtol=1e-6)
    assert len(jax.tree.leaves(eqx.filter(network, eqx.is_inexact_array))) == 4


@pytest.mark.slow
@pytest.mark.parametrize("where", ["denoiser", "encoder"])
def test_flax_network_is_trained_inside_a_program(where, mlp):
    """One SVI step moves every parameter array of a Flax module, as denoiser network and as encoder network."""

    def prior():
        numpyro.sample("z", dist.Normal(0.0, 1.0).expand([2]).to_event(1))

    flax = {name: FlaxNetwork(FlaxMLP(4)) for name in ("denoiser", "encoder")}
    other = mlp(4, 4, key=KEY)
    networks = {name: flax[name] if name == where else other for name in flax}
    program = Program(
        prior,
        PreconditionedDenoiser(networks["denoiser"], SCHEDULE, (4,)),
        DiagonalEncoder(networks["encoder"], SCHEDULE, (4,), 2, key=KEY),
        sampler=DDIM(3),
    )
    svi = SVI(program.model, program.guide, optax.sgd(0.1), ScoreELBO())
    x = values((6, 4))
    state = svi.init(jax.random.key(3), x)
    state, loss = jax.jit(svi.update)(state, x)
    assert np.isfinite(loss)
    trained = program.with_params(svi.get_params(state))
    before, after = (jax.tree.leaves(getattr(p, where).network.params) for p in (program, trained))
    assert len(before) == 4
    for b, a in zip(before, after, strict=True):
        assert not np.array_equal(a, b)
    assert np.isfinite(trained.denoiser(x[0], LOW)).all()


def test_flax_batch_normalisation_is_refused():
    """State that other observations of the batch change: the message names the variables and what to use."""
    with pytest.raises(ValueError, match=r"(?s)Normed holds variables other than nnx.Param.*norm.*GroupNorm"):
        FlaxNetwork(Normed(4))


@pytest.mark.parametrize("schedule", [VariancePreserving(-4.0, 4.0), VarianceExploding(-4.0, 4.0)])
@pytest.mark.parametrize("level", [-4.0, 0.0, 4.0])
def test_encoder_networks_see_inputs_of_mean_0_and_variance_1(schedule, level):
    """At every noise level, for data of mean 3 and deviation .5; 5 standard errors over 40,000 numbers."""
    encoder = DiagonalEncoder(lambda x, log_snr: x, schedule, (40_000,), 1, mean=3.0, std=0.5, key=KEY)
    x_key, noise_key = jax.random.split(KEY)
    x, eps = 3.0 + 0.5 * jax.random.normal(x_key, (40_000,)), jax.random.normal(noise_key, (40_000,))
    seen = encoder.features(schedule.add_noise(x, jnp.asarray(level), eps), jnp.asarray(level))
    assert abs(float(seen.mean())) < 5 / 200
    assert abs(float(seen.var()) - 1) < 5 * 2**0.5 / 200
