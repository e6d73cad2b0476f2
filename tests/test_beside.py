"""Guided decoders that start with the guide of a variational autoencoder."""

import jax
import jax.numpy as jnp
import numpy as np
from numpyro import distributions as dist
import pytest
from scripted_fits import same

import sami_ppl as sp
from sami_ppl.data.disks import disks
from sami_ppl.decoders.conditional import IsotropicDenoiser
from sami_ppl.fitting.beside import gaussian_decoder
from sami_ppl.nn import AscendingDiT, AscendingUNet, ResidualMLP

KEY = jax.random.key(2)
PRIOR = sp.factors(z=dist.Normal(0, 1).expand([3]))
SMALL = sp.Sized(steps=30, batch=32)


@pytest.fixture(scope="module")
def data():
    return disks(jax.random.key(0), 300, resolution=8)


@pytest.fixture(scope="module")
def fitted(data):
    """Few steps of each stage: what is trained, not how well."""
    program = sp.autoencoder(PRIOR, data, size={"width": 16, "depth": 1}, progress=False, key=KEY)
    gaussian = sp.Sized(steps=400, batch=64, learning_rate=3e-3)
    plan = sp.TwoStage(SMALL, SMALL, start="gaussian", gaussian=gaussian, warm_steps=20, align=False)
    return sp.fit(program, data, plan, key=KEY, progress=False)


@pytest.mark.slow
def test_the_guide_is_that_of_the_autoencoder_and_stays(fitted, data):
    """The stages are logged by name, the encoder's leaves the guide, and what guides is another network."""
    program, history = fitted
    assert list(dict.fromkeys(record["stage"] for record in history.records)) == ["denoiser", "gaussian", "encoder"]
    assert isinstance(program.encoder, sp.OwnGuideEncoder)
    assert not same(program.encoder.base, program.encoder.own)
    stage = sp.Stage(train=("encoder",), steps=5, batch=32, weight_decay=0.5)
    more, _ = sp.fit(program, data, stage, key=KEY, progress=False)
    assert same(program.encoder.own, more.encoder.own), "the guide is held"
    assert not same(program.encoder.base, more.encoder.base)


@pytest.mark.slow
def test_noisy_posteriors_come_to_agree_with_the_guide(fitted, data):
    """At the clean end they were one network; at high noise they were none of its business before."""
    program = fitted[0]
    before = program.replace(encoder=program.encoder.own)
    after = sp.warm_start(before, data, key=KEY, steps=300, source="guide", progress=False)
    gaps = [abs(sp.diagnostics.consistency(p, data, key=KEY, levels=6)["gap"].values) for p in (before, after)]
    assert gaps[1].mean() < 0.3 * gaps[0].mean()
    x = data.x.values[:5]
    np.testing.assert_array_equal(before.encode(x)[0], after.encode(x)[0])


@pytest.mark.slow
def test_the_whole_goes_through_a_folder_and_a_gauge(fitted, data, tmp_path):
    program, _ = fitted
    turned = sp.align(program, data.x.values).program
    fresh = sp.autoencoder(PRIOR, data, size={"width": 16, "depth": 1}, progress=False, key=jax.random.key(9))
    again = sp.load(sp.save(turned, tmp_path / "program"), fresh)
    x = data.x.values[:4]
    np.testing.assert_allclose(again.encode(x)[0], turned.encode(x)[0], atol=1e-6)
    np.testing.assert_allclose(sp.generate(again, x=x, key=KEY), sp.generate(turned, x=x, key=KEY), atol=1e-5)


def test_what_guides_is_the_base_and_what_is_read_is_the_own(tiny_program):
    """Two encoders of one network in axes of unequal lengths: each density has the Jacobian of its own."""
    base = tiny_program().encoder
    own = sp.AffineEncoder(base, 2.0 * jnp.eye(2))
    encoder = sp.OwnGuideEncoder(base, own)
    x, z, level = jnp.arange(4.0), jnp.asarray([0.3, -0.2]), jnp.asarray(0.5)
    assert encoder.log_prob(z, x, level) == base.log_prob(z, x, level) != own.log_prob(z, x, level)
    assert encoder.law(x).log_prob(z) == own.law(x).log_prob(z) != base.law(x).log_prob(z)
    np.testing.assert_array_equal(encoder.guide(x[None], lambda: None).mean[0], own.law(x).mean)


def test_the_decoder_is_of_the_kind_of_the_denoiser(data):
    kinds = {"mlp": ResidualMLP, "unet": AscendingUNet, "dit": AscendingDiT}
    for network, kind in kinds.items():
        program = sp.autoencoder(PRIOR, data, network=network, progress=False, key=KEY)
        decoder = gaussian_decoder(program, key=KEY)
        assert isinstance(decoder, IsotropicDenoiser)
        assert isinstance(decoder.network, kind)
        assert decoder.statistics == program.denoiser.statistics


def test_starts_that_make_no_sense_are_refused(data):
    program = sp.autoencoder(PRIOR, data, size={"width": 16, "depth": 1}, progress=False, key=KEY)
    for settings, message in (
        ({"start": "pca"}, "start must be 'components' or 'gaussian', got 'pca'"),
        ({"start": "gaussian", "warm_steps": 0}, "does not go with warm_steps=0"),
        ({"start": "gaussian", "warm_clusters": True}, "does not go with warm_clusters"),
    ):
        with pytest.raises(ValueError, match=message):
            sp.fit(program, data, sp.TwoStage(**settings), key=KEY, progress=False)
