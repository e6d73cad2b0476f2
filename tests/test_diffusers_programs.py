"""Programs on denoisers of diffusers: built, fitted by the command, saved and loaded."""

import json
from pathlib import Path
import shutil

from commands import sets, stages
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
from numpyro import distributions as dist
import pytest

import sami_ppl as sp
from sami_ppl.diagnostics.fitted import not_fitted
from sami_ppl.saving.save import LoadError, load_denoiser

FOLDER = Path(__file__).parent / "data" / "diffusers"
KEY = jax.random.key(0)
PRIOR = sp.factors(z=dist.Normal(0, 1).expand([3]))
X = np.random.default_rng(0).uniform(-1, 1, size=(12, 2, 8, 8)).astype(np.float32)
SAVED = {"_class_name": "DDPMScheduler", "num_train_timesteps": 100, "beta_end": 0.1}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A pipeline of the smallest network."""
    folder = tmp_path_factory.mktemp("pipeline")
    shutil.copytree(FOLDER / "bottomless", folder / "unet", ignore=shutil.ignore_patterns("outputs.npz"))
    (folder / "scheduler").mkdir()
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(SAVED))
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "DDPMPipeline"}))
    return folder


@pytest.fixture(scope="module")
def denoiser(folder):
    return sp.diffusion.from_diffusers(folder)


@pytest.fixture(scope="module")
def program(denoiser):
    return sp.autoencoder(PRIOR, X, network=denoiser, progress=False, key=KEY)


def test_a_program_takes_schedule_scale_and_features_of_its_denoiser(program, denoiser):
    assert program.denoiser is denoiser
    assert program.encoder.schedule == denoiser.schedule
    assert (program.encoder.mean, program.encoder.std) == (0.0, 1.0)
    trunk, network = program.encoder.network, denoiser.network
    for part in ("conv_in", "time_embedding", "down_blocks"):
        assert eqx.tree_equal(getattr(trunk.network, part), getattr(network, part))
    assert not_fitted(program) == ["encoder"]
    # Copies, since a training step takes the encoder's own away.
    own = trunk.network.conv_in.weight
    assert own.unsafe_buffer_pointer() != network.conv_in.weight.unsafe_buffer_pointer()


@pytest.mark.slow
def test_the_encoder_looks_at_what_its_denoiser_looks_at(denoiser):
    """The bottom map of the encoder is that of the denoiser, for every kind of scheduler, at the same x and λ."""
    network = denoiser.network
    for config in ({"_class_name": "DDPMScheduler"}, {"_class_name": "EDMEulerScheduler"},
                   {"_class_name": "FlowMatchEulerDiscreteScheduler"}):  # fmt: skip
        found = sp.diffusion.from_diffusers(FOLDER / "bottomless", scheduler=config)
        program = sp.autoencoder(PRIOR, X, network=found, progress=False, key=KEY)
        x, log_snr, seen = jnp.asarray(X[0]), jnp.asarray(1.3), []

        class Watched(eqx.Module):
            settings = network.settings

            def features(self, x, timestep, seen=seen):
                seen.append((x, timestep))
                return jnp.zeros((4, 4, 8))

            def __call__(self, x, timestep):
                self.features(x, timestep)
                return x

        eqx.tree_at(lambda d: d.network, found, Watched())(x, log_snr)
        eqx.tree_at(lambda e: e.network.network, program.encoder, Watched()).parameters(x, log_snr)
        np.testing.assert_allclose(seen[0][0], seen[1][0], rtol=1e-5)
        assert seen[0][1] == seen[1][1]


def test_what_a_denoiser_brings_is_not_given_twice(denoiser):
    build = lambda **settings: sp.autoencoder(PRIOR, X, network=denoiser, progress=False, key=KEY, **settings)  # noqa: E731
    for settings, message in (
        ({"schedule": sp.VariancePreserving()}, "brings its own schedule"),
        ({"std": 0.5}, "brings its own std"),
        ({"decoder": "conditioned"}, "takes codes"),
        ({"noise": "blind"}, "depend on the noise level"),
    ):
        with pytest.raises(ValueError, match=message):
            build(**settings)
    with pytest.raises(ValueError, match=r"of shape \(2, 8, 8\), the data are of \(2, 16, 16\)"):
        sp.autoencoder(PRIOR, np.tile(X, (2, 2)), network=denoiser, progress=False, key=KEY)
    gaussian = sp.GaussianDenoiser(jnp.zeros(5), jnp.eye(5), sp.VariancePreserving())
    with pytest.raises(ValueError, match="GaussianDenoiser has no features"):
        sp.autoencoder(PRIOR, X[:, 0, 0, :5], network=gaussian, progress=False, key=KEY)


def test_another_program_takes_the_denoiser(program, denoiser, folder, tmp_path):
    """By hand or out of a folder, of diffusers or of a program saved with it; the prior stays."""
    own = sp.autoencoder(PRIOR, X, network="mlp", size={"width": 4, "depth": 1}, progress=False, key=KEY)
    sp.save(program, tmp_path / "model")
    for other in (
        sp.with_denoiser(own, denoiser, key=KEY), load_denoiser(folder, own), load_denoiser(tmp_path / "model", own)
    ):  # fmt: skip
        assert eqx.tree_equal(other.denoiser, denoiser)
        assert other.latents == own.latents
        assert other.encoder.schedule == denoiser.schedule
    with pytest.raises(FileNotFoundError, match="hf download someone/else"):
        load_denoiser("someone/else", own)
    with pytest.raises(LoadError, match="holds no saved program"):
        load_denoiser("none", own)


@pytest.mark.slow
def test_a_program_of_sequences_takes_the_denoiser_of_its_frames(program, denoiser, folder, tmp_path):
    frames = sp.autoencoder(PRIOR, X, network="mlp", size={"width": 4, "depth": 1}, progress=False, key=KEY)

    def smooth():
        numpyro.sample("z", sp.Matern(jnp.arange(4.0), jnp.ones(3)))

    clips = load_denoiser(folder, sp.over_time(frames, smooth))
    assert clips.event_shape == (4, 2, 8, 8)
    assert eqx.tree_equal(sp.frames_of(clips).denoiser, denoiser)
    sp.save(clips, tmp_path / "clips")
    assert eqx.tree_equal(load_denoiser(tmp_path / "clips", frames).denoiser, denoiser)


def test_a_program_is_saved_with_its_denoiser(program, tmp_path):
    sp.save(program, tmp_path / "model")
    empty = eqx.tree_at(lambda p: p.denoiser.network.conv_in.bias, program, jnp.zeros(8))
    assert not eqx.tree_equal(empty, program)
    assert eqx.tree_equal(sp.load(tmp_path / "model", empty), program)


@pytest.mark.slow
def test_a_program_stands_on_a_transformer(tmp_path):
    """Its encoder begins with the first half of the blocks; saved and loaded, and put into another program."""
    denoiser = sp.diffusion.from_diffusers(FOLDER / "latent" / "transformer", scheduler=SAVED)
    program = sp.autoencoder(PRIOR, X, network=denoiser, progress=False, key=KEY)
    trunk = program.encoder.network
    assert eqx.tree_equal(trunk.network.transformer_blocks, denoiser.network.transformer_blocks[:2])
    assert trunk.narrow.out_features * 16 == trunk.exit.in_features
    parameters = program.encoder.parameters(jnp.asarray(X[0]), jnp.asarray(1.0))
    assert np.isfinite(jax.flatten_util.ravel_pytree(parameters)[0]).all()
    assert denoiser.bottleneck(jnp.asarray(X[0]), jnp.asarray(1.0)) is None
    sp.save(program, tmp_path / "model")
    empty = eqx.tree_at(lambda p: p.denoiser.network.proj_out_2.bias, program, jnp.zeros(16))
    assert eqx.tree_equal(sp.load(tmp_path / "model", empty), program)
    own = sp.autoencoder(PRIOR, X, network="mlp", size={"width": 4, "depth": 1}, progress=False, key=KEY)
    assert eqx.tree_equal(load_denoiser(tmp_path / "model", own).denoiser, denoiser)


@pytest.mark.slow
@pytest.mark.release
# Two steps teach nothing, which is said.
@pytest.mark.filterwarnings("ignore")
def test_the_command_takes_a_folder_of_diffusers(sami, tmp_path, folder, denoiser):
    """Only the encoder is fitted; the saved program needs the folder no more."""
    shutil.copytree(folder, tmp_path / "clothes")
    np.savez(tmp_path / "x.npz", x=np.tile(X, (4, 1, 1, 1)))
    settings = [*stages("encoder"), "warm_steps=2", "align=False", "denoiser=clothes", "latents=2", "posterior_obs=2",
                "draws=2"]  # fmt: skip
    code, _, err = sami("run", "images", "--with", "pretrained", "--data", "x.npz", "--out", "run", "--quiet",
                        *sets(*settings))  # fmt: skip
    assert code == 0, err
    shutil.rmtree(tmp_path / "clothes")
    program = sp.load(tmp_path / "run" / "model")
    assert eqx.tree_equal(program.denoiser, denoiser)
    assert program.encoder.schedule == denoiser.schedule
    trunk = program.encoder.network.network
    assert not eqx.tree_equal(trunk.conv_in, denoiser.network.conv_in)
    assert (tmp_path / "run" / "report.html").exists()
