"""Autoencoders of latent diffusion against diffusers itself, and programs on their latents.

What diffusers computed is in `tests/data/diffusers`, which `benchmarks/export_diffusers.py` made.
"""

import json
from pathlib import Path
import shutil

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from numpyro import distributions as dist
import pytest
import xarray as xr

import sami_ppl as sp

FOLDER = Path(__file__).parent / "data" / "diffusers"
AUTOENCODERS = ("latent/vae", "shifted")
BYTES = np.random.default_rng(0).integers(0, 256, size=(5, 32, 32), dtype=np.uint8)


def close(found, expected):
    np.testing.assert_allclose(np.asarray(found), expected, rtol=1e-4, atol=1e-4)


@pytest.fixture(scope="module")
def autoencoder():
    return sp.diffusion.autoencoder_from_diffusers(FOLDER / "latent")


@pytest.mark.slow
@pytest.mark.parametrize("name", AUTOENCODERS)
def test_every_block_is_that_of_diffusers(name):
    """Each block is given what diffusers gave its own; then latents and images, of two images that are not square."""
    autoencoder = sp.diffusion.autoencoder_from_diffusers(FOLDER / name)
    golden = dict(np.load(FOLDER / name / "outputs.npz"))
    call = eqx.filter_jit(lambda part, *inputs: part(*inputs))

    def same(part, where, *embedding, out=lambda found: found):
        for given, expected in zip(golden[f"{where}.in"], golden[f"{where}.out"], strict=True):
            found = out(call(part, jnp.asarray(given).transpose(1, 2, 0), *embedding))
            close(np.asarray(found).transpose(2, 0, 1), expected)

    for half in ("encoder", "decoder"):
        network = getattr(autoencoder, half)
        same(network.conv_in, f"{half}.conv_in")
        same(network.mid_block, f"{half}.mid_block", None)
        same(network.conv_out, f"{half}.conv_out")
    for i, block in enumerate(autoencoder.encoder.down_blocks):
        same(block, f"encoder.down_blocks.{i}", None, out=lambda maps: maps[-1])
    for i, block in enumerate(autoencoder.decoder.up_blocks):
        same(block, f"decoder.up_blocks.{i}")
    for x, latent, y in zip(golden["x"], golden["latent"], golden["y"], strict=True):
        close(call(type(autoencoder).encode, autoencoder, jnp.asarray(x)), latent)
        close(call(type(autoencoder).decode, autoencoder, jnp.asarray(latent)), y)


def test_data_become_latents_and_samples_images(autoencoder):
    """8-bit images without a channel, as an array and in a Dataset, whose other variables stay; in chunks or one."""
    latents = sp.diffusion.to_latents(autoencoder, BYTES)
    one = eqx.filter_jit(type(autoencoder).encode)(autoencoder, jnp.asarray(BYTES[3] / 127.5 - 1, jnp.float32)[None])
    assert latents.shape == (5, 2, 8, 8)
    close(latents[3], one)
    coords = {"row": np.arange(32), "obs": np.arange(5)}
    data = xr.Dataset(
        {"x": (("obs", "row", "column"), BYTES), "label": ("obs", np.arange(5))}, coords, {"of": "clothes"}
    )
    found = sp.diffusion.to_latents(autoencoder, data)
    assert found["x"].dims == ("obs", "channel", "row", "column")
    assert {*found.variables} == {"x", "label", "obs"}
    assert found.attrs == {"of": "clothes"}
    np.testing.assert_array_equal(found["x"], latents)
    images = sp.diffusion.to_images(autoencoder, np.tile(latents, (2, 4, 1, 1, 1)))
    assert images.shape == (2, 20, 1, 32, 32)
    close(images[1, 8], eqx.filter_jit(type(autoencoder).decode)(autoencoder, one))


@pytest.mark.slow
def test_a_program_is_fitted_to_latents_and_seen_in_pixels(autoencoder):
    """Denoiser and autoencoder are of one folder; what is drawn are latents, and images once they are decoded."""
    denoiser = sp.diffusion.from_diffusers(FOLDER / "latent")
    latents = sp.diffusion.to_latents(autoencoder, np.tile(BYTES, (4, 1, 1)))
    assert denoiser.event_shape == latents.shape[1:]
    prior = sp.factors(z=dist.Normal(0, 1).expand([2]))
    program = sp.autoencoder(prior, latents, network=denoiser, progress=False, key=jax.random.key(0))
    assert program.denoiser is denoiser
    sampler = sp.DDIM(2)
    samples = sp.generate(program, size=2, guided=False, sampler=sampler, key=jax.random.key(1))
    images = sp.diffusion.to_images(autoencoder, samples)
    assert images.shape == (2, 1, 32, 32)
    assert np.isfinite(images).all()


def test_what_does_not_fit_is_said(autoencoder, tmp_path):
    with pytest.raises(ValueError, match=r"images \(1, h, w\) of sides that 4 divides, got \(1, 30, 32\)"):
        sp.diffusion.to_latents(autoencoder, BYTES[:, :30])
    with pytest.raises(ValueError, match=r"got \(3, 32, 32\)"):
        sp.diffusion.to_latents(autoencoder, np.tile(BYTES[..., None], 3))
    with pytest.raises(ValueError, match=r"latents \(2, h, w\), got \(8, 8\)"):
        autoencoder.decode(jnp.zeros((8, 8)))
    for shape in ((3, 4, 8, 8), (2, 8, 8)):
        with pytest.raises(ValueError, match=r"latents must have shape \(…, 2, row, column\)"):
            sp.diffusion.to_images(autoencoder, np.zeros(shape))
    with pytest.raises(FileNotFoundError, match=r"no vae/config\.json"):
        sp.diffusion.autoencoder_from_diffusers(tmp_path)
    with pytest.raises(ValueError, match="the autoencoder is a UNet2DModel, supported is AutoencoderKL"):
        sp.diffusion.autoencoder_from_diffusers(FOLDER / "plain")


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"_class_name": "AutoencoderTiny"}, "the autoencoder is a AutoencoderTiny"),
        ({"act_fn": "gelu"}, "act_fn = 'gelu'"),
        ({"out_channels": 3}, "out_channels = 3"),
        ({"up_block_types": ["AttnUpDecoderBlock2D"] * 3}, "up_block_types"),
        ({"down_block_types": ["DownEncoderBlock2D"] * 2}, "down_block_types"),
        ({"latents_mean": [0.1, 0.2]}, r"latents_mean = \[0.1, 0.2\]"),
        ({"temporal_downsample": True}, "temporal_downsample = True"),
        ({"use_quant_conv": False}, "has, beside those of the network, quant_conv.bias, quant_conv.weight"),
        ({"layers_per_block": 2}, "lacks decoder.up_blocks.0.resnets.2.conv1.bias"),
        ({"latent_channels": 3}, r"encoder.conv_out.weight of shape \(72, 4\), its config.json wants \(72, 6\)"),
    ],
)
def test_an_autoencoder_that_is_not_supported_is_refused_by_name(changed, message, tmp_path):
    folder = tmp_path / "vae"
    shutil.copytree(FOLDER / "latent" / "vae", folder)
    config = json.loads((folder / "config.json").read_text()) | changed
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=message):
        sp.diffusion.autoencoder_from_diffusers(tmp_path)
