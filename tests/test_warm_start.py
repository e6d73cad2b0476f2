"""Warm starts: what is copied, the fit to the codes, clusters. The codes themselves: test_components."""

import importlib

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
from numpyro import distributions as dist
import pytest
from sklearn.metrics import adjusted_rand_score

from sami_ppl.decoders.exact import LinearGaussian
from sami_ppl.diffusion.denoiser import GaussianDenoiser
from sami_ppl.diffusion.schedule import VariancePreserving
from sami_ppl.encoders.affine import AffineEncoder
from sami_ppl.encoders.encoder import encoder_for
from sami_ppl.encoders.rotation import TurningEncoder
from sami_ppl.fitting.components import low_pass_codes, start_codes
from sami_ppl.fitting.start import _with_features, arrange, fit_codes, transfer, warm_start
from sami_ppl.fitting.start_prior import cluster, fit_prior, with_clusters
from sami_ppl.nn import DiT, HalfUNet, ResidualMLP, UNet, ViT
from sami_ppl.priors.read import read_prior
from sami_ppl.program.program import Program

RNG = np.random.default_rng


def arrays(module):
    leaves = jax.tree_util.tree_leaves_with_path(eqx.filter(module, eqx.is_inexact_array))
    return {jax.tree_util.keystr(path): leaf for path, leaf in leaves}


KEYS = jax.random.split(jax.random.key(0), 2)
SMALL = {"width": 6, "depth": 2}
TRANSFERS = {
    "perceptron": (
        lambda: ResidualMLP((4,), (4,), **SMALL, key=KEYS[0]),
        lambda: ResidualMLP((4,), (5,), **SMALL, key=KEYS[1]),
        {".exit.weight", ".exit.bias"},
    ),
    "perceptron without noise": (
        lambda: ResidualMLP((4,), (4,), **SMALL, key=KEYS[0]),
        lambda: ResidualMLP((4,), (5,), **SMALL, noise=False, key=KEYS[1]),
        {".exit.weight", ".exit.bias"},
    ),
    "deeper perceptron": (
        lambda: ResidualMLP((4,), (4,), **SMALL, key=KEYS[0]),
        lambda: ResidualMLP((4,), (4,), width=6, depth=3, key=KEYS[1]),
        {f".blocks[2].{leaf}" for leaf in ("norm.weight", "norm.bias", "inner.weight", "inner.bias", "film.weight",
                                           "film.bias", "outer.weight", "outer.bias")},
    ),
    "U-Net": (
        lambda: UNet((1, 8, 8), widths=(3, 5), key=KEYS[0]),
        lambda: HalfUNet((1, 8, 8), (7,), widths=(3, 5), key=KEYS[1]),
        {".norm.gain", ".norm.bias", ".exit.weight", ".exit.bias"},
    ),
    "transformer": (
        lambda: DiT((1, 8, 8), **SMALL, key=KEYS[0]),
        lambda: ViT((1, 8, 8), (7,), **SMALL, key=KEYS[1]),
        {".narrow.weight", ".narrow.bias", ".exit.weight", ".exit.bias"},
    ),
    "nothing alike": (
        lambda: ResidualMLP((4,), (4,), **SMALL, key=KEYS[0]),
        lambda: ResidualMLP((4,), (4,), width=7, depth=2, noise=False, key=KEYS[1]),
        None,
    ),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", TRANSFERS)
def test_transfer_copies_what_is_alike_and_leaves_the_rest(name, fill):
    make_source, make_target, own = TRANSFERS[name]
    source, target = fill(make_source()), make_target()
    found = transfer(source, target)
    assert jax.tree.structure(found) == jax.tree.structure(target)
    before, given, after = arrays(target), arrays(source), arrays(found)
    own = (set(before) - {".exit.bias"}) if own is None else own
    assert own <= set(before)
    for path, leaf in after.items():
        np.testing.assert_array_equal(leaf, before[path] if path in own else given[path], err_msg=path)
    assert all(not np.array_equal(before[path], given[path]) for path in set(before) - own)


@pytest.mark.slow
def test_transferred_half_u_net_has_the_features_of_the_u_net(fill):
    """The maps of the descending half are the same, image for image."""
    source = fill(UNet((1, 8, 8), widths=(3, 5), key=KEYS[0]))
    target = transfer(source, HalfUNet((1, 8, 8), (7,), widths=(3, 5), key=KEYS[1]))
    h, lam = jax.random.normal(jax.random.key(1), (4, 4, 4)), jnp.asarray(0.3)
    for a, b in zip(source.down(h, source.embedding(lam)), target.down(h, target.embedding(lam)), strict=True):
        np.testing.assert_array_equal(a, b)


def correlated(obs=400, size=6, seed=0):
    rng = RNG(seed)
    return (3 + rng.normal(size=(obs, size)) @ rng.normal(size=(size, size))).astype(np.float32)


def nll(encoder, x, codes, noise=0.05):
    """Mean negative log density of the noisy codes over all noise levels, on fixed noise."""
    level_key, eps_key, code_key = jax.random.split(jax.random.key(5), 3)
    log_snr, _ = encoder.schedule.stratified(level_key, len(x))
    x_noisy = jax.vmap(encoder.schedule.add_noise)(jnp.asarray(x), log_snr, jax.random.normal(eps_key, x.shape))
    z = codes + noise * jax.random.normal(code_key, codes.shape)
    return float(-jnp.mean(jax.jit(jax.vmap(encoder.log_prob))(z, x_noisy, log_snr)))


@pytest.mark.slow
def test_fitting_codes_lowers_their_negative_log_likelihood(tiny_program):
    """Half a nat at least, on held-out observations too, and not on those whose codes are another's."""
    program = tiny_program()
    x = correlated(600, 4)
    codes = low_pass_codes(x, 2, width=0.0)
    settings = {"key": jax.random.key(0), "steps": 150, "batch": 64, "learning_rate": 1e-2, "progress": False}
    fitted = fit_codes(program, x[:500], codes[:500], **settings)
    before, after = nll(program.encoder, x[500:], codes[500:]), nll(fitted.encoder, x[500:], codes[500:])
    assert after < before - 0.5
    assert nll(fitted.encoder, x[500:], np.roll(codes[500:], 1, axis=0)) > before
    assert eqx.tree_equal(fitted.denoiser, program.denoiser)
    assert np.abs(np.corrcoef(fitted.encode(x[500:])[0].T, codes[500:].T)[[0, 1], [2, 3]]).min() > 0.7


def test_warm_start_copies_then_fits(tiny_program, monkeypatch, fill, capsys):
    """The encoder is fitted from the denoiser's features, to a component on every axis; how many have one is said."""
    program = tiny_program()
    program = program.replace(denoiser=fill(program.denoiser, 0.5))
    seen = {}

    def spy(program, x, codes, **settings):
        seen.update(program=program, codes=codes, **settings)
        return program

    module = importlib.import_module("sami_ppl.fitting.start")
    monkeypatch.setattr(module, "fit_codes", spy)
    x = correlated(300, 4)
    warm_start(program, x, key=jax.random.key(0), steps=7, progress=False)
    assert capsys.readouterr().err == ""
    network, encoder = seen["program"].encoder.network, program.encoder.network
    np.testing.assert_array_equal(network.inner, program.denoiser.network.inner)
    np.testing.assert_array_equal(network.outer, encoder.outer)
    np.testing.assert_array_equal(seen["codes"], start_codes(x, 2).codes)
    assert (seen["steps"], seen["progress"]) == (7, False)
    warm_start(program, np.repeat(x[:, :1], 4, axis=1), key=jax.random.key(0))
    assert "1 of 2 axes carry a component of observations as they are; 1 start at the prior" in capsys.readouterr().err


@pytest.mark.parametrize("around", [TurningEncoder, lambda e: AffineEncoder(e, jnp.eye(2))], ids=["turning", "rotated"])
def test_features_reach_the_encoder_inside_a_rotation(tiny_program, around):
    program = tiny_program()
    started = _with_features(program.replace(encoder=around(program.encoder)))
    np.testing.assert_array_equal(started.base.network.inner, program.denoiser.network.inner)


def test_an_encoder_without_a_network_keeps_what_it_has_and_says_so(tiny_program):
    model = LinearGaussian(jnp.eye(4)[:, :2], 0.5, VariancePreserving(-4.0, 4.0))
    program = tiny_program().replace(encoder=model.mean_field_encoder)
    with pytest.warns(UserWarning, match="MeanFieldEncoder as they are: it is no NetworkEncoder"):
        assert _with_features(program) is program.encoder


@pytest.mark.slow
def test_warm_start_with_a_denoiser_that_has_no_network(tiny_program, oracle):
    """An exact denoiser has no features to copy; the encoder is fitted all the same, spare axes stay at the prior."""

    def prior():
        numpyro.sample("z", dist.Normal(0.0, 1.0).expand([3]).to_event(1))

    tiny = tiny_program(prior)
    basis = np.linalg.qr(RNG(0).normal(size=(4, 4)))[0][:, :2] * 1.5
    denoiser = GaussianDenoiser(jnp.zeros(4), jnp.asarray(basis @ basis.T, jnp.float32), tiny.denoiser.schedule)
    program = Program(prior, denoiser, tiny.encoder)
    x = (RNG(1).normal(size=(500, 2)) @ basis.T).astype(np.float32)
    found = warm_start(program, x, key=jax.random.key(0), steps=300, progress=False)
    variance = found.encode(x)[0].var(0)
    assert variance[:2].min() > 0.2
    assert variance[2] < 0.05


# --- clusters ---------------------------------------------------------------------------------------------------------


def blobs(count=300):
    """Three well separated clusters in 4-D and their names."""
    rng = RNG(0)
    kind = rng.integers(0, 3, count)
    centres = 4 * np.array([[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0]])
    return (centres[kind] + 0.3 * rng.normal(size=(count, 4))).astype(np.float32), kind


def kinds(label):
    loc = numpyro.param("loc", jnp.zeros((3, 2)))
    which = numpyro.sample("kind", dist.Categorical(jnp.ones(3) / 3), obs=label, obs_mask=label >= 0)
    numpyro.sample("z", dist.Normal(loc[which], 1.0).to_event(1))


def test_clusters_are_found_and_take_the_names_of_known_labels():
    """Up to their names without labels; with one label of each, by their names."""
    x, kind = blobs()
    assert adjusted_rand_score(kind, cluster(x, 3, 2)) == 1
    known = np.full(len(x), -1)
    for value in range(3):
        known[np.flatnonzero(kind == value)[0]] = value
    np.testing.assert_array_equal(cluster(x, 3, 2, known=known), kind)


@pytest.mark.slow
def test_warm_start_puts_kinds_and_the_prior_on_clusters(mlp):
    """Codes of kinds are clusters, and the prior's means those of the codes in each; without parameters, refused."""
    x, kind = blobs()
    given, schedule = {"label": np.array([-1])}, VariancePreserving(-4.0, 4.0)
    encoder = encoder_for(kinds, mlp(4, 6, key=KEYS[0]), schedule, (4,), given=given, key=KEYS[1])
    program = Program(kinds, GaussianDenoiser(jnp.zeros(4), jnp.eye(4), schedule), encoder, given=given)
    label = np.where(np.arange(len(x)) < 30, kind, -1)
    codes = with_clusters(program, x, {"label": label}, start_codes(x, program.latents.size, 5).codes)
    np.testing.assert_array_equal(codes[:, :3].argmax(1), kind)
    fitted = fit_prior(program, codes, {"label": label})
    values = program.latents.from_code(jnp.asarray(codes))["z"]
    means = np.stack([values[kind == k].mean(0) for k in range(3)])
    np.testing.assert_allclose(fitted.prior_params["loc"], means, atol=0.02)
    with pytest.raises(ValueError, match="clusters is for priors with discrete sites or learned parameters"):
        warm_start(Program(plain, program.denoiser, encoder_for(plain, mlp(4, 6, key=KEYS[0]), schedule, (4,),
                   key=KEYS[1])), x, key=KEYS[0], clusters=True)  # fmt: skip


@pytest.mark.slow
def test_a_prior_is_fitted_at_the_variables_of_the_same_observations(tiny_program, monkeypatch):
    """Also where there are more than it is fitted to: of the last ones the classes are the other way round."""

    def by_class(u):
        numpyro.sample("z", dist.Normal(numpyro.param("loc", jnp.zeros((2, 2)))[u], 1.0).to_event(1))

    monkeypatch.setattr("sami_ppl.fitting.start_prior.MOST", 40)
    program, u = tiny_program().replace(prior=by_class, given={"u": np.arange(2)}), np.repeat([0, 1, 1, 0], 20)
    codes = np.stack([2.0 * u - 1, 0 * u], 1).astype(np.float32)
    values = program.latents.from_code(jnp.asarray(codes))["z"]
    fitted = fit_prior(program, codes, {"u": u})
    np.testing.assert_allclose(fitted.prior_params["loc"], values[jnp.array([0, 20])], atol=0.02)


@pytest.mark.slow
def test_components_go_to_continuous_axes_whatever_the_order_of_sites():
    """A discrete site first in the program does not take the components of a continuous one: its codes are noise."""
    x, _ = blobs()
    latents = read_prior(kinds, {"label": np.array([-1])})
    before = start_codes(x, latents.size, 2).codes
    found = arrange(before, latents, 2)
    np.testing.assert_array_equal(found[:, 3:], before[:, :2])
    np.testing.assert_array_equal(found[:, :3], before[:, 2:])


def plain():
    numpyro.sample("z", dist.Normal(0.0, 1.0).expand([2]).to_event(1))


@pytest.mark.slow
def test_parameters_of_a_prior_stay_under_their_constraints(tiny_program):
    """A scale fitted to codes is their spread, and positive; weights sum to one."""

    def prior():
        scale = numpyro.param("scale", jnp.full(2, 0.05), constraint=dist.constraints.positive)
        shares = numpyro.param("shares", jnp.full(3, 1 / 3), constraint=dist.constraints.simplex)
        means = dist.Normal(jnp.array([[-3.0], [0.0], [3.0]]) * jnp.ones(2), scale).to_event(1)
        numpyro.sample("z", dist.MixtureSameFamily(dist.Categorical(shares), means))

    program = tiny_program(prior)
    rng = np.random.default_rng(0)
    values = 3.0 * rng.choice([-1, 0, 1], (2000, 1), p=[0.2, 0.5, 0.3]) + 0.4 * rng.normal(size=(2000, 2))
    codes = np.asarray(program.latents.to_code({"z": jnp.asarray(values, jnp.float32)}))
    found = fit_prior(program, codes, {}).prior_params
    np.testing.assert_allclose(found["scale"], 0.4, rtol=0.1)
    np.testing.assert_allclose(found["shares"], [0.2, 0.5, 0.3], atol=0.04)
