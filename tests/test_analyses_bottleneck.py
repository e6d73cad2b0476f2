"""Components of a U-Net's bottom map against the same computed by hand, for our own networks and those of diffusers."""

from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sami_ppl as sp
from sami_ppl import analyses
from sami_ppl.nn import ResidualMLP, UNet
from sami_ppl.nn.embed import padded, to_patches

FOLDER = Path(__file__).parent / "data" / "diffusers"
KEY = jax.random.key(0)
SCHEDULE = sp.VariancePreserving(-5.0, 5.0)


@pytest.fixture(scope="module")
def own():
    """A denoiser of images whose sides do not halve evenly, by a U-Net of random weights."""
    from conftest import fill

    network = fill(UNet((1, 6, 6), widths=(4, 8), patch=1, key=KEY))
    return sp.PreconditionedDenoiser(network, SCHEDULE, (1, 6, 6), mean=0.5, std=2.0)


def by_hand(denoiser, x, log_snr):
    """The bottom map of one noisy image, out of the layers of the network."""
    network, alpha, sigma = denoiser.network, denoiser.schedule.alpha(log_snr), denoiser.schedule.sigma(log_snr)
    u = (x - alpha * denoiser.mean) / jnp.sqrt(alpha**2 * denoiser.std**2 + sigma**2)
    embedding = network.embedding(log_snr)
    return network.middle(network.down(to_patches(padded(u, 2), 1), embedding)[-1], embedding)


@pytest.mark.slow
def test_components_are_those_of_maps_computed_one_by_one(own):
    """By the eigenvectors of the covariance; signs are free. Codes of other noise differ."""
    x = np.random.default_rng(0).normal(size=(12, 1, 6, 6)).astype(np.float32)
    log_snr, level = 1.0, jnp.asarray(1.0)
    found = analyses.bottleneck_components(own, x, 3, log_snr=log_snr, key=KEY)
    maps = []
    for one, key in zip(x, jax.random.split(KEY, 12), strict=True):
        noisy = SCHEDULE.alpha(level) * one + SCHEDULE.sigma(level) * jax.random.normal(key, one.shape)
        maps.append(np.asarray(by_hand(own, noisy, level), float).ravel())
    centred = np.array(maps) - np.mean(maps, axis=0)
    values, vectors = np.linalg.eigh(centred.T @ centred / 12)
    expected = centred @ vectors[:, ::-1][:, :3] / np.sqrt(values[::-1][:3])
    codes = found.encode(x, key=KEY)
    signs = np.sign((codes * expected).sum(0))
    np.testing.assert_allclose(codes * signs, expected, atol=2e-3)
    np.testing.assert_allclose(found.share, (values[::-1] / values.sum())[:3], rtol=1e-3)
    np.testing.assert_allclose(codes.var(0), 1, rtol=1e-3)
    assert abs(found.encode(x, key=jax.random.key(1)) - codes).max() > 0.05, "control: another draw of the noise"


@pytest.mark.slow
def test_the_bottom_map_is_what_the_network_goes_on_with(own):
    """What rises from it does not change the map, what descends to it does; and a U-Net's output is as it was."""
    x, level = jnp.asarray(np.random.default_rng(0).normal(size=(1, 6, 6)), jnp.float32), jnp.asarray(0.5)
    risen = eqx.tree_at(lambda d: d.network.exit.weight, own, replace_fn=lambda w: w + 1)
    sunk = eqx.tree_at(lambda d: d.network.down.entry.weight, own, replace_fn=lambda w: w + 1)
    np.testing.assert_array_equal(risen.bottleneck(x, level), own.bottleneck(x, level))
    assert abs(risen(x, level) - own(x, level)).max() > 1e-3
    assert abs(sunk.bottleneck(x, level) - own.bottleneck(x, level)).max() > 1e-3
    assert own.bottleneck(x, level).shape == (3, 3, 8)


@pytest.mark.slow
def test_the_bottom_map_of_diffusers_is_what_its_middle_gave():
    """The output of its own middle, where the network is given what diffusers gave it."""
    golden = dict(np.load(FOLDER / "plain" / "outputs.npz"))
    denoiser = sp.diffusion.from_diffusers(FOLDER / "plain", scheduler={"_class_name": "DDPMScheduler"})
    for x, t, expected in zip(golden["x"], golden["t"], golden["mid_block.out"], strict=True):
        levels = np.linspace(denoiser.schedule.log_snr_min, denoiser.schedule.log_snr_max, 20001)
        steps = np.asarray(jax.vmap(denoiser.scheduler.timestep)(jnp.asarray(levels, jnp.float32)))
        log_snr = jnp.asarray(levels[np.argmin(abs(steps - t))], jnp.float32)
        found = denoiser.bottleneck(jnp.asarray(x) / denoiser._scale(log_snr), log_snr)
        np.testing.assert_allclose(np.asarray(found).transpose(2, 0, 1), expected, rtol=1e-2, atol=1e-2)
        assert (
            abs(np.asarray(denoiser.bottleneck(jnp.asarray(x), log_snr + 3)).transpose(2, 0, 1) - expected).max() > 0.1
        )


def test_what_components_are_refused(own):
    x = np.zeros((5, 1, 6, 6), np.float32)
    with pytest.raises(ValueError, match="knows noise levels from -5 to 5"):
        analyses.bottleneck_components(own, x, 2, log_snr=7.0, key=KEY)
    with pytest.raises(ValueError, match=r"x must have shape \(obs, 1, 6, 6\), got \(5, 1, 6\)"):
        analyses.bottleneck_components(own, x[..., 0], 2, log_snr=0.0, key=KEY)
    plain = sp.PreconditionedDenoiser(ResidualMLP((4,), (4,), width=4, depth=1, key=KEY), SCHEDULE, (4,))
    with pytest.raises(ValueError, match=r"has no bottom map.*network='unet'"):
        analyses.bottleneck_components(plain, np.zeros((5, 4)), 2, log_snr=0.0, key=KEY)


@pytest.mark.slow
def test_more_components_than_observations_are_refused(own):
    x = np.random.default_rng(0).normal(size=(5, 1, 6, 6)).astype(np.float32)
    with pytest.raises(ValueError, match="there are 5 observations of 72 features"):
        analyses.bottleneck_components(own, x, 5, log_snr=0.0, key=KEY)
