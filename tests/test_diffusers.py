"""Checkpoints of diffusers: every block, every kind of noise level and a trained model, against diffusers itself.

What diffusers computed is in `tests/data/diffusers`, which `benchmarks/export_diffusers.py` made.
"""

import json
from pathlib import Path
import shutil

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sami_ppl as sp
from sami_ppl.diffusion.diffusers import DiffusersDenoiser
from sami_ppl.diffusion.schedulers import scheduler_of
from sami_ppl.nn.diffusers.settings import UNet2DSettings

FOLDER = Path(__file__).parent / "data" / "diffusers"
LINEAR = {"_class_name": "DDPMScheduler"}
NETWORKS = ("plain", "resampled", "old", "oblong", "bottomless")
TRANSFORMERS = ("latent/transformer", "single")
CONFIGS = json.loads((FOLDER / "schedulers.json").read_text())
LEVELS = dict(np.load(FOLDER / "schedulers.npz"))


def close(found, expected):
    np.testing.assert_allclose(np.asarray(found), expected, rtol=1e-4, atol=1e-4)


def last(image):
    """Channels last, as the blocks have them."""
    return jnp.asarray(image).transpose(1, 2, 0)


def first(image):
    return np.asarray(image).transpose(2, 0, 1)


@pytest.fixture(scope="module")
def plain():
    return sp.diffusion.from_diffusers(FOLDER / "plain", scheduler=LINEAR)


@pytest.mark.slow
@pytest.mark.parametrize("name", NETWORKS)
def test_every_block_is_that_of_diffusers(name):
    """Each block is given what diffusers gave its own, so that errors do not add up; then the whole."""
    network = sp.diffusion.from_diffusers(FOLDER / name, scheduler=LINEAR).network
    golden = dict(np.load(FOLDER / name / "outputs.npz"))
    call = eqx.filter_jit(lambda part, *inputs: part(*inputs))
    for i in range(2):
        embedding = call(network.time_embedding, jnp.asarray(golden["t"][i]))
        close(embedding, golden["time_embedding.out"][i])
        close(first(call(network.conv_in, last(golden["conv_in.in"][i]))), golden["conv_in.out"][i])
        for level, block in enumerate(network.down_blocks):
            maps = call(block, last(golden[f"down_blocks.{level}.in"][i]), embedding)
            for j, found in enumerate(maps):
                close(first(found), golden[f"down_blocks.{level}.map{j}"][i])
        if network.mid_block is not None:
            close(
                first(call(network.mid_block, last(golden["mid_block.in"][i]), embedding)), golden["mid_block.out"][i]
            )
        for level, block in enumerate(network.up_blocks):
            skips = [last(golden[f"up_blocks.{level}.skip{j}"][i]) for j in range(len(block.resnets))]
            found = call(block, last(golden[f"up_blocks.{level}.in"][i]), skips, embedding)
            close(first(found), golden[f"up_blocks.{level}.out"][i])
        close(call(network, jnp.asarray(golden["x"][i]), jnp.asarray(golden["t"][i])), golden["y"][i])


@pytest.mark.slow
@pytest.mark.parametrize("name", TRANSFORMERS)
def test_every_block_of_a_transformer_is_that_of_diffusers(name):
    """Told the class that stands for none, or its only one; variances that it puts out too are left out."""
    network = sp.diffusion.from_diffusers(FOLDER / name, scheduler=LINEAR).network
    golden = dict(np.load(FOLDER / name / "outputs.npz"))
    call = eqx.filter_jit(lambda part, *inputs: part(*inputs))
    half = call(lambda x, t: network.half.features(x, t), jnp.asarray(golden["x"][0]), jnp.asarray(golden["t"][0]))
    middle = len(network.transformer_blocks) // 2 - (len(network.transformer_blocks) % 2 == 0)
    close(half, golden[f"transformer_blocks.{middle}.out"][0])
    for i in range(2):
        x, t, h = jnp.asarray(golden["x"][i]), jnp.asarray(golden["t"][i]), golden["pos_embed.out"][i]
        close(call(network.pos_embed, x), h)
        close(call(network.transformer_blocks[0].norm1.emb, t), golden["emb.out"][i])
        for level, block in enumerate(network.transformer_blocks):
            expected = golden[f"transformer_blocks.{level}.out"][i]
            close(call(block, jnp.asarray(h), t), expected)
            h = expected
        close(call(network, x, t), golden["y"][i][: len(x)])


@pytest.mark.parametrize("name", [name for name in CONFIGS if f"{name}.alphas_cumprod" in LEVELS])
def test_steps_have_the_noise_levels_of_diffusers(name):
    scheduler, alphas = scheduler_of(CONFIGS[name]), LEVELS[f"{name}.alphas_cumprod"].astype(np.float64)
    alphas = alphas[alphas > 1e-8]  # what is next to nothing, float32 does not tell from it
    log_snr, steps = np.log(alphas) - np.log1p(-alphas), np.arange(len(alphas))
    np.testing.assert_allclose(jax.vmap(scheduler.timestep)(jnp.asarray(log_snr, jnp.float32)), steps, atol=0.01)
    np.testing.assert_allclose(scheduler.ends[1], log_snr[0], atol=1e-3)
    if not CONFIGS[name].get("rescale_betas_zero_snr"):
        np.testing.assert_allclose(scheduler.ends[0], log_snr[-1], atol=1e-3)
    halfway = scheduler.timestep(jnp.asarray((log_snr[3] + log_snr[4]) / 2, jnp.float32))
    np.testing.assert_allclose(halfway, 3.5, atol=0.01)


class Recorded(eqx.Module):
    """A network that puts out what that of diffusers did, and keeps what it was given."""

    settings: UNet2DSettings
    out: np.ndarray
    given: list

    def __call__(self, x, timestep):
        self.given[:] = [x, timestep]
        return self.out


@pytest.mark.parametrize("name", CONFIGS)
def test_the_denoised_mean_is_that_of_diffusers(name):
    """At the same image and noise level the network is given the same, and its output means the same."""
    case = {key.partition(".")[2]: value for key, value in LEVELS.items() if key.startswith(f"{name}.")}
    settings = UNet2DSettings.of(json.loads((FOLDER / "plain" / "config.json").read_text()))
    for i in range(4):
        network = Recorded(settings, case["out"][i], [])
        denoiser = DiffusersDenoiser(network, scheduler_of(CONFIGS[name]))
        a, s = float(case["a"][i]), float(case["s"][i])
        log_snr = jnp.asarray(2 * np.log(a / s), jnp.float32)
        scale = denoiser.schedule.sigma(log_snr) / s
        found = denoiser.x_hat(jnp.asarray(case["x"][i]) * scale, log_snr)
        close(network.given[0], case["given"][i])
        np.testing.assert_allclose(network.given[1], case["t"][i], atol=1e-2)
        # Where signal is a thousandth, the mean is the difference of what is a thousand times larger.
        close(found * a, case["mean"][i] * a)
        low, high = denoiser.scheduler.ends
        assert (low, high) == (denoiser.schedule.log_snr_min, denoiser.schedule.log_snr_max)
        assert low - 1e-3 < log_snr < high + 1e-3


def test_what_is_asked_of_a_folder(tmp_path, plain):
    """A pipeline, a model with its scheduler beside it, a scheduler by its folder, and a range of one's own."""
    for unet, beside in (("a/unet", "a/scheduler"), ("b", "b"), ("c/unet", "c/scheduler")):
        shutil.copytree(FOLDER / "plain", tmp_path / unet, ignore=shutil.ignore_patterns("outputs.npz"))
        (tmp_path / beside).mkdir(exist_ok=True)
        (tmp_path / beside / "scheduler_config.json").write_text(json.dumps(LINEAR))
    shutil.copytree(tmp_path / "a", tmp_path / "d")
    (tmp_path / "d" / "unet").rename(tmp_path / "d" / "transformer")
    for folder in (tmp_path / "a", tmp_path / "d", tmp_path / "b", tmp_path / "c" / "unet"):
        assert eqx.tree_equal(sp.diffusion.from_diffusers(folder), plain)
    for scheduler in (tmp_path / "b", tmp_path / "b" / "scheduler_config.json", LINEAR):
        assert eqx.tree_equal(sp.diffusion.from_diffusers(FOLDER / "plain", scheduler=scheduler), plain)
    narrow = sp.diffusion.from_diffusers(tmp_path / "a", log_snr_min=-5, log_snr_max=4)
    assert narrow.schedule == sp.VariancePreserving(-5.0, 4.0)
    with pytest.raises(ValueError, match=r"trained at log_snr from -10\.12 to 9\.21"):
        sp.diffusion.from_diffusers(tmp_path / "a", log_snr_max=12)


def test_a_repository_is_found_in_the_cache(tmp_path, monkeypatch, plain):
    """By either variable that says where it is; of two snapshots, the one that is main."""
    snapshots = tmp_path / "hub" / "models--someone--clothes" / "snapshots"
    for name in ("aa", "bb"):
        shutil.copytree(FOLDER / "plain", snapshots / name)
    (snapshots / "aa" / "scheduler_config.json").write_text(json.dumps(LINEAR))
    (snapshots.parent / "refs").mkdir()
    (snapshots.parent / "refs" / "main").write_text("aa")
    monkeypatch.delenv("HF_HUB_CACHE", raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    assert eqx.tree_equal(sp.diffusion.from_diffusers("someone/clothes"), plain)
    monkeypatch.setenv("HF_HOME", "elsewhere")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    assert eqx.tree_equal(sp.diffusion.from_diffusers("someone/clothes"), plain)
    with pytest.raises(FileNotFoundError, match="hf download someone/shoes"):
        sp.diffusion.from_diffusers("someone/shoes")


def test_what_is_missing_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="no folder nowhere"):
        sp.diffusion.from_diffusers("nowhere")
    with pytest.raises(FileNotFoundError, match=r"no config\.json"):
        sp.diffusion.from_diffusers(tmp_path)
    with pytest.raises(FileNotFoundError, match="scheduler="):
        sp.diffusion.from_diffusers(FOLDER / "plain")
    shutil.copy(FOLDER / "plain" / "config.json", tmp_path)
    with pytest.raises(FileNotFoundError, match=r"diffusion_pytorch_model\.safetensors"):
        sp.diffusion.from_diffusers(tmp_path, scheduler=LINEAR)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="damaged"):
        sp.diffusion.from_diffusers(tmp_path, scheduler=LINEAR)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"_class_name": "UNet2DConditionModel"}, "a UNet2DConditionModel, supported is UNet2DModel or DiTTransformer"),
        ({"class_embed_type": "timestep"}, "class_embed_type = 'timestep'"),
        ({"num_class_embeds": 10}, "num_class_embeds = 10"),
        ({"time_embedding_type": "fourier"}, "time_embedding_type = 'fourier'"),
        ({"act_fn": "gelu"}, "act_fn = 'gelu'"),
        ({"out_channels": 4}, "out_channels = 4"),
        ({"down_block_types": ["SkipDownBlock2D", "DownBlock2D"]}, "SkipDownBlock2D"),
        ({"up_block_types": ["UpBlock2D", "AttnSkipUpBlock2D"]}, "AttnSkipUpBlock2D"),
        ({"up_block_types": ["UpBlock2D"]}, "1 up blocks of 2 widths"),
        ({"resnet_time_scale_shift": "spatial"}, "resnet_time_scale_shift = 'spatial'"),
        ({"norm_num_groups": None}, "norm_num_groups = None"),
        ({"sample_size": None}, "sample_size"),
        ({"sample_size": 9}, "multiples of 2"),
        ({"encoder_hid_dim": 3}, "encoder_hid_dim = 3"),
        ({"time_embedding_dim": 12}, "time_embedding.linear_1.weight of shape"),
        ({"layers_per_block": 2}, "lacks down_blocks.0.resnets.1.conv1.bias"),
        ({"mid_block_type": None}, "has, beside those of the network, mid_block"),
    ],
)
def test_a_network_that_is_not_supported_is_refused_by_name(changed, message, tmp_path):
    _refused("plain", changed, message, tmp_path)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"_class_name": "PixArtTransformer2DModel"}, "a PixArtTransformer2DModel, supported is"),
        ({"norm_type": "layer_norm", "_class_name": "Transformer2DModel"}, "norm_type = 'layer_norm'"),
        ({"activation_fn": "geglu"}, "activation_fn = 'geglu'"),
        ({"out_channels": 3}, "out_channels = 3, supported is None or 2 or 4"),
        ({"sample_size": [8, 8]}, r"sample_size = \[8, 8\], supported is a number"),
        ({"sample_size": 9}, "9 × 9 pixels into patches of 2"),
        ({"attention_head_dim": 3}, "2 heads of 3 numbers"),
        ({"cross_attention_dim": 8}, "cross_attention_dim = 8"),
        ({"num_embeds_ada_norm": None}, "num_embeds_ada_norm = None"),
        ({"num_embeds_ada_norm": 4}, r"one of 4 classes and knows none .*embedding_table.weight has no row 4"),
        ({"num_embeds_ada_norm": 7}, r"embedding_table.weight of shape \(4, 16\), its config.json wants \(8, 16\)"),
        ({"patch_size": 4}, r"pos_embed.proj.weight of shape \(16, 2, 2, 2\), its config.json wants \(16, 2, 4, 4\)"),
        ({"num_layers": 4}, "lacks transformer_blocks.3.attn1.to_k.bias"),
        ({"num_layers": 2}, "has, beside those of the network, transformer_blocks.2.attn1"),
        ({"norm_elementwise_affine": True}, "lacks transformer_blocks.0.norm3.bias"),
    ],
)
def test_a_transformer_that_is_not_supported_is_refused_by_name(changed, message, tmp_path):
    """With a row for each class and no more there is none to stand for no class."""
    _refused("latent/transformer", changed, message, tmp_path)


def _refused(name, changed, message, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(FOLDER / name, folder)
    config = json.loads((folder / "config.json").read_text()) | changed
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=message):
        sp.diffusion.from_diffusers(folder, scheduler=LINEAR)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({}, "the scheduler is a None"),
        ({"_class_name": "ScoreSdeVeScheduler"}, "ScoreSdeVeScheduler"),
        ({"_class_name": "DDPMScheduler", "beta_schedule": "sigmoid"}, "beta_schedule = 'sigmoid'"),
        ({"_class_name": "DDPMScheduler", "prediction_type": "flow_prediction"}, "prediction_type = 'flow_prediction'"),
        ({"_class_name": "EulerDiscreteScheduler", "timestep_type": "continuous"}, "timestep_type = 'continuous'"),
        ({"_class_name": "EDMEulerScheduler", "prediction_type": "sample"}, "prediction_type = 'sample'"),
    ],
)
def test_a_scheduler_that_is_not_supported_is_refused_by_name(config, message):
    with pytest.raises(ValueError, match=message):
        sp.diffusion.from_diffusers(FOLDER / "plain", scheduler=config)


@pytest.mark.slow
def test_a_trained_model_is_that_of_diffusers_end_to_end():
    """A pipeline in half precision: its noise predictions, and an image sampled in ten steps of DDIM."""
    golden = dict(np.load(FOLDER / "clothes" / "outputs.npz"))
    denoiser = sp.diffusion.from_diffusers(FOLDER / "clothes")
    assert denoiser.event_shape == (1, 32, 32)
    alphas = golden["alphas_cumprod"].astype(np.float64)

    @jax.jit
    def predicted(x, log_snr):
        return denoiser(x, log_snr)

    def log_snr(t):
        return jnp.asarray(np.log(alphas[t]) - np.log1p(-alphas[t]), jnp.float32)

    for x, t, y in zip(golden["x"], golden["t"], golden["y"], strict=True):
        close(predicted(jnp.asarray(x), log_snr(t)), y)
    x, steps = golden["start"][0].astype(np.float64), golden["timesteps"]
    for t, following in zip(steps, [*steps[1:], None], strict=True):
        after = 1.0 if following is None else alphas[following]
        eps = np.asarray(predicted(jnp.asarray(x, jnp.float32), log_snr(t)))
        x = np.sqrt(after / alphas[t]) * (x - np.sqrt(1 - alphas[t]) * eps) + np.sqrt(1 - after) * eps
    np.testing.assert_allclose(x, golden["image"][0], atol=1e-3)
