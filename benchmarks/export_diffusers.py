"""Tiny networks of diffusers with random weights, and what diffusers computes with them: tests/data/diffusers.

    env/bin/python benchmarks/export_diffusers.py tests/data/diffusers

Takes torch and diffusers, and nothing of this library. For every network, the outputs of every block, by hooks; for
every scheduler, its noise levels and the denoised mean of one network's output; for the checkpoint that
`benchmarks/train_diffusers.py` leaves there, its outputs and an image sampled by DDIM.
"""

import argparse
import json
from pathlib import Path

from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    DiTTransformer2DModel,
    EDMEulerScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    UNet2DModel,
)
import numpy as np
import torch

SMALL = {"sample_size": 8, "in_channels": 2, "out_channels": 2, "norm_num_groups": 4, "layers_per_block": 1}
NETWORKS = {
    "plain": SMALL
    | {
        "block_out_channels": (8, 16),
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    },
    "resampled": SMALL
    | {
        "block_out_channels": (8, 12),
        "down_block_types": ("AttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "AttnUpBlock2D"),
        "downsample_type": "resnet",
        "upsample_type": "resnet",
        "resnet_time_scale_shift": "scale_shift",
        "attention_head_dim": None,
        "center_input_sample": True,
        "norm_eps": 1e-3,
    },
    "old": SMALL
    | {
        "block_out_channels": (8, 8, 12),
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        "layers_per_block": 2,
        "attention_head_dim": None,
        "flip_sin_to_cos": False,
        "freq_shift": 1,
        "downsample_padding": 0,
        "mid_block_scale_factor": 2.0,
        "attn_norm_num_groups": 2,
    },
    "oblong": SMALL
    | {
        "sample_size": (8, 4),
        "block_out_channels": (8, 8),
        "down_block_types": ("ResnetDownsampleBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "ResnetUpsampleBlock2D"),
        "add_attention": False,
        "time_embedding_dim": 10,
    },
    "bottomless": SMALL
    | {
        "block_out_channels": (8, 8),
        "down_block_types": ("DownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "UpBlock2D"),
        "mid_block_type": None,
    },
}
TRANSFORMERS = {
    "latent/transformer": {  # with variances, as those of the paper
        "sample_size": 8,
        "in_channels": 2,
        "out_channels": 4,
        "num_attention_heads": 2,
        "attention_head_dim": 8,
        "num_layers": 3,
        "num_embeds_ada_norm": 3,
    },
    "single": {
        "sample_size": 6,
        "in_channels": 1,
        "num_attention_heads": 3,
        "attention_head_dim": 4,
        "num_layers": 2,
        "patch_size": 3,
        "num_embeds_ada_norm": 1,
        "attention_bias": False,
        "norm_elementwise_affine": True,
        "norm_eps": 1e-3,
    },
}
AUTOENCODERS = {
    "latent/vae": {  # of the transformer above: images of 32 × 32
        "in_channels": 1,
        "out_channels": 1,
        "block_out_channels": (4, 8, 8),
        "down_block_types": ("DownEncoderBlock2D",) * 3,
        "up_block_types": ("UpDecoderBlock2D",) * 3,
        "latent_channels": 2,
        "norm_num_groups": 4,
        "sample_size": 32,
    },
    "shifted": {
        "block_out_channels": (4, 6),
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
        "layers_per_block": 2,
        "latent_channels": 3,
        "norm_num_groups": 2,
        "scaling_factor": 0.3611,
        "shift_factor": 0.1159,
        "use_quant_conv": False,
        "use_post_quant_conv": False,
        "mid_block_add_attention": False,
    },
}
SCHEDULERS = {
    "linear": DDPMScheduler(clip_sample=False),
    "scaled": DDIMScheduler(
        beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, prediction_type="sample", clip_sample=False
    ),
    "cosine": DDPMScheduler(
        beta_schedule="squaredcos_cap_v2", num_train_timesteps=400, prediction_type="v_prediction", clip_sample=False
    ),
    "zero": DDIMScheduler(rescale_betas_zero_snr=True, prediction_type="v_prediction", clip_sample=False),
    "given": DDPMScheduler(
        trained_betas=[0.01 * (i + 1) for i in range(20)], num_train_timesteps=20, clip_sample=False
    ),
    "euler": EulerDiscreteScheduler(beta_schedule="scaled_linear"),
    "edm": EDMEulerScheduler(),
    "edm_v": EDMEulerScheduler(sigma_data=1.0, sigma_max=40.0, prediction_type="v_prediction"),
    "flow": FlowMatchEulerDiscreteScheduler(shift=3.0),
}
OLD = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}


def tiny(name: str, out: Path) -> UNet2DModel:
    """A network with random weights, biases and gains too, saved in one of the forms that there are."""
    torch.manual_seed(len(name))
    network = UNet2DModel(**NETWORKS[name]).eval()
    for parameter in network.parameters():
        parameter.data += 0.2 * torch.randn_like(parameter)
    if name == "plain":
        network = network.to(torch.bfloat16)
    network.save_pretrained(out / name, safe_serialization=name in ("plain", "resampled"))
    network = network.float()
    if name == "old":  # attention as it was named before version 0.15
        file = out / name / "diffusion_pytorch_model.bin"
        torch.save(as_before(torch.load(file)), file)
    return network


def as_before(weights: dict) -> dict:
    """Weights whose attention is named as before version 0.15."""
    for key in [key for key in weights if "attentions" in key]:
        renamed = key
        for new, old in OLD.items():
            renamed = renamed.replace(f".{new}.", f".{old}.")
        weights[renamed] = weights.pop(key)
    return weights


def tiny_transformer(name: str, out: Path) -> DiTTransformer2DModel:
    """A transformer with random weights; that of a single class is saved as older versions did, by another name."""
    torch.manual_seed(len(name))
    network = DiTTransformer2DModel(**TRANSFORMERS[name]).eval()
    for parameter in network.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    network.save_pretrained(out / name, safe_serialization=name != "single")
    if name == "single":
        config = json.loads((out / name / "config.json").read_text())
        (out / name / "config.json").write_text(json.dumps(config | {"_class_name": "Transformer2DModel"}, indent=2))
        weights = network.state_dict() | {"pos_embed.pos_embed": network.pos_embed.pos_embed}
        torch.save(weights, out / name / "diffusion_pytorch_model.bin")
    return network


@torch.no_grad()
def outputs_of_transformer(network: DiTTransformer2DModel) -> dict[str, np.ndarray]:
    """Input, time steps and output of two images, told the class that stands for none; of every part its output."""
    found: dict[str, np.ndarray] = {}

    def keep(name):
        def hook(_, arguments, result):
            found[f"{name}.out"] = result.numpy()

        return hook

    parts = {"pos_embed": network.pos_embed, "emb": network.transformer_blocks[0].norm1.emb}
    parts |= {f"transformer_blocks.{i}": block for i, block in enumerate(network.transformer_blocks)}
    hooks = [part.register_forward_hook(keep(name)) for name, part in parts.items()]
    classes, size = network.config.num_embeds_ada_norm, network.config.sample_size
    x, t = torch.randn(2, network.config.in_channels, size, size), torch.tensor([3.0, 700.25])
    labels = torch.full((2,), classes if classes > 1 else 0)
    y = network(x, t, class_labels=labels).sample
    for hook in hooks:
        hook.remove()
    return {"x": x.numpy(), "t": t.numpy(), "y": y.numpy()} | found


def tiny_autoencoder(name: str, out: Path) -> AutoencoderKL:
    """An autoencoder with random weights; that of the pipeline has attention as it was named before version 0.15."""
    torch.manual_seed(len(name))
    network = AutoencoderKL(**AUTOENCODERS[name]).eval()
    for parameter in network.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    network.save_pretrained(out / name, safe_serialization=name == "shifted")
    if name == "latent/vae":
        file = out / name / "diffusion_pytorch_model.bin"
        torch.save(as_before(torch.load(file)), file)
        scheduler, index = out / "latent" / "scheduler", {"_class_name": "DiTPipeline"}
        DDIMScheduler(clip_sample=False).save_pretrained(scheduler)
        (out / "latent" / "model_index.json").write_text(json.dumps(index, indent=2))
    return network


@torch.no_grad()
def outputs_of_autoencoder(network: AutoencoderKL) -> dict[str, np.ndarray]:
    """Two oblong images, the means of their latents, scaled, what becomes of them, and the outputs of every part."""
    found: dict[str, np.ndarray] = {}

    def keep(name):
        def hook(_, arguments, result):
            found[f"{name}.in"], found[f"{name}.out"] = arguments[0].numpy(), result.numpy()

        return hook

    parts: dict[str, torch.nn.Module] = {}
    for half, blocks in (("encoder", "down_blocks"), ("decoder", "up_blocks")):
        module = getattr(network, half)
        parts |= {f"{half}.{name}": getattr(module, name) for name in ("conv_in", "mid_block", "conv_out")}
        parts |= {f"{half}.{blocks}.{i}": block for i, block in enumerate(getattr(module, blocks))}
    hooks = [part.register_forward_hook(keep(name)) for name, part in parts.items()]
    x = torch.randn(2, network.config.in_channels, 16, 8)
    shift, scale = network.config.shift_factor or 0.0, network.config.scaling_factor
    latent = (network.encode(x).latent_dist.mean - shift) * scale
    y = network.decode(latent / scale + shift).sample
    for hook in hooks:
        hook.remove()
    return {"x": x.numpy(), "latent": latent.numpy(), "y": y.numpy()} | found


@torch.no_grad()
def outputs(network: UNet2DModel) -> dict[str, np.ndarray]:
    """Input, time steps and output, and of every block what came in and what came out, of two images."""
    size = network.config.sample_size
    size = size if isinstance(size, tuple) else (size, size)
    found: dict[str, np.ndarray] = {}

    def keep(name):
        def hook(_, arguments, named, result):
            taken = [*arguments, *named.values()]
            hidden = named.get("hidden_states", arguments[0] if arguments else None)
            found[f"{name}.in"] = hidden.numpy()
            for i, state in enumerate(next((a for a in taken if isinstance(a, tuple)), ())):
                found[f"{name}.skip{i}"] = state.numpy()
            if isinstance(result, tuple):
                for i, state in enumerate(result[1]):
                    found[f"{name}.map{i}"] = state.numpy()
            else:
                found[f"{name}.out"] = result.numpy()

        return hook

    parts = {"conv_in": network.conv_in, "time_embedding": network.time_embedding, "conv_out": network.conv_out}
    parts |= {f"down_blocks.{i}": block for i, block in enumerate(network.down_blocks)}
    parts |= {f"up_blocks.{i}": block for i, block in enumerate(network.up_blocks)}
    parts |= {"mid_block": network.mid_block} if network.mid_block is not None else {}
    hooks = [part.register_forward_hook(keep(name), with_kwargs=True) for name, part in parts.items()]
    x, t = torch.randn(2, network.config.in_channels, *size), torch.tensor([3.0, 700.25])
    y = network(x, t).sample
    for hook in hooks:
        hook.remove()
    return {"x": x.numpy(), "t": t.numpy(), "y": y.numpy()} | found


@torch.no_grad()
def levels(network: UNet2DModel, scheduler) -> dict[str, np.ndarray]:
    """Noise levels by the step, and of noisy images what the network takes and puts out, and the denoised mean of that.

    x_s = a x + s ε, with `a` and `s` as the scheduler has them.
    """
    config = {k: v for k, v in scheduler.config.items() if not k.startswith("_")}
    found = {"config": {**config, "_class_name": type(scheduler).__name__}}
    x = torch.randn(4, 2, 8, 8)
    if isinstance(scheduler, EDMEulerScheduler | FlowMatchEulerDiscreteScheduler):
        scheduler.set_timesteps(8)
        places = [0, 3, 5, 7] if isinstance(scheduler, EDMEulerScheduler) else [1, 3, 5, 7]
        s, t = scheduler.sigmas[places], scheduler.timesteps[places]
        flow = isinstance(scheduler, FlowMatchEulerDiscreteScheduler)
        a = 1 - s if flow else torch.ones_like(s)
        x = x * s[:, None, None, None] if not flow else x
        means, inputs, outs = [], [], []
        for i, place in enumerate(places):
            scheduler._step_index = place
            given = x[i : i + 1] if flow else scheduler.scale_model_input(x[i : i + 1], t[i])
            out = network(given, t[i : i + 1]).sample
            inputs.append(given)
            outs.append(out)
            if flow:  # a step from s to s' adds (s' − s) F, hence to s' = 0 gives the mean
                moved = scheduler.step(out, t[i], x[i : i + 1], return_dict=False)[0]
                change = scheduler.sigmas[place + 1] - s[i]
                means.append(x[i : i + 1] - s[i] * (moved - x[i : i + 1]) / change)
            else:
                means.append(scheduler.step(out, t[i], x[i : i + 1]).pred_original_sample)
        given, out, mean = torch.cat(inputs), torch.cat(outs), torch.cat(means)
    else:
        alphas = scheduler.alphas_cumprod
        found["alphas_cumprod"] = alphas.numpy()
        t = torch.tensor([0, len(alphas) // 3, len(alphas) // 2, len(alphas) - 2])
        a, s = alphas[t] ** 0.5, (1 - alphas[t]) ** 0.5
        given, out = x, network(x, t).sample
        if isinstance(scheduler, EulerDiscreteScheduler):
            mean = (x - s[:, None, None, None] * out) / a[:, None, None, None]
        else:
            scheduler.set_timesteps(len(alphas))
            steps = [scheduler.step(out[i : i + 1], int(t[i]), x[i : i + 1]) for i in range(len(t))]
            mean = torch.cat([step.pred_original_sample for step in steps])
    named = {"x": x, "t": t, "a": a, "s": s, "given": given, "out": out, "mean": mean}
    return found | {name: value.numpy() for name, value in named.items()}


@torch.no_grad()
def trained(folder: Path) -> dict[str, np.ndarray]:
    """Outputs of the trained checkpoint at four steps, and an image sampled from given noise in ten steps of DDIM."""
    pipeline = DDPMPipeline.from_pretrained(folder, torch_dtype=torch.float32)
    torch.manual_seed(0)
    network = pipeline.unet.eval()
    x, t = torch.randn(4, 1, 32, 32), torch.tensor([0, 100, 500, 999])
    found = {"x": x, "t": t, "y": network(x, t).sample, "alphas_cumprod": pipeline.scheduler.alphas_cumprod}
    sampler = DDIMScheduler.from_config(pipeline.scheduler.config, clip_sample=False)
    sampler.set_timesteps(10)
    image = torch.randn(1, 1, 32, 32)
    found |= {"start": image, "timesteps": sampler.timesteps}
    for step in sampler.timesteps:
        image = sampler.step(network(image, step).sample, step, image).prev_sample
    return {name: value.numpy() for name, value in (found | {"image": image}).items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    out = parser.parse_args().out
    made = {name: tiny(name, out) for name in NETWORKS}
    for name, network in made.items():
        np.savez_compressed(out / name / "outputs.npz", **outputs(network))
    found = {name: levels(made["plain"], scheduler) for name, scheduler in SCHEDULERS.items()}
    configs = {name: case.pop("config") for name, case in found.items()}
    (out / "schedulers.json").write_text(json.dumps(configs, indent=1))
    arrays = {f"{name}.{key}": value for name, case in found.items() for key, value in case.items()}
    np.savez_compressed(out / "schedulers.npz", **arrays)
    for name in TRANSFORMERS:
        np.savez_compressed(out / name / "outputs.npz", **outputs_of_transformer(tiny_transformer(name, out)))
    for name in AUTOENCODERS:
        np.savez_compressed(out / name / "outputs.npz", **outputs_of_autoencoder(tiny_autoencoder(name, out)))
    if (out / "clothes").exists():
        np.savez_compressed(out / "clothes" / "outputs.npz", **trained(out / "clothes"))


if __name__ == "__main__":
    main()
