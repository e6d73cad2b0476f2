"""A small unconditional diffusion model of clothes, trained and saved by diffusers alone.

    python -m venv env && env/bin/pip install torch diffusers accelerate
    env/bin/python benchmarks/train_diffusers.py /usr/share/datasets/fashion-mnist tests/data/diffusers/clothes

The loop is that of diffusers' example (examples/unconditional_image_generation): AdamW, a learning rate with warm-up
and cosine decay, clipped gradients, averaged weights, noise predicted at random steps. A quiet core takes 40 minutes.
Beside the folder it leaves 64 test images, `images.npz`. The checkpoint of the tests is the one after 2,000 steps.
"""

import argparse
import copy
import gzip
from pathlib import Path
import time

from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from diffusers.optimization import get_cosine_schedule_with_warmup
from diffusers.training_utils import EMAModel
import numpy as np
import torch

STEPS, BATCH, SAVE_EVERY = 3000, 64, 250


def pixels(folder: Path, part: str) -> np.ndarray:
    """8-bit images (count, 32, 32), padded from 28 to 32 pixels by black."""
    with gzip.open(folder / f"{part}-images-idx3-ubyte.gz") as file:
        found = np.frombuffer(file.read(), np.uint8, offset=16).reshape(-1, 28, 28)
    return np.pad(found, ((0, 0), (2, 2), (2, 2)))


def images(folder: Path) -> torch.Tensor:
    """The 60,000 training images, (count, 1, 32, 32) in [-1, 1]."""
    return torch.from_numpy(pixels(folder, "train")[:, None].astype(np.float32) / 127.5 - 1)


def network() -> UNet2DModel:
    return UNet2DModel(
        sample_size=32,
        in_channels=1,
        out_channels=1,
        layers_per_block=1,
        block_out_channels=(16, 32, 64),
        down_block_types=("DownBlock2D", "DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
        norm_num_groups=8,
    )


def save(unet: UNet2DModel, average: EMAModel, scheduler: DDPMScheduler, out: Path) -> None:
    """The averaged weights in half precision, as a pipeline."""
    averaged = copy.deepcopy(unet)
    average.copy_to(averaged.parameters())
    DDPMPipeline(averaged.half(), scheduler).save_pretrained(out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("out", type=Path)
    arguments = parser.parse_args()
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(arguments.out.parent / "images.npz", x=pixels(arguments.data, "t10k")[:64])
    torch.manual_seed(0)
    data, unet, scheduler = images(arguments.data), network(), DDPMScheduler(num_train_timesteps=1000)
    average = EMAModel(unet.parameters(), decay=0.9999, use_ema_warmup=True, inv_gamma=1.0, power=0.75)
    optimizer = torch.optim.AdamW(unet.parameters(), lr=1e-3, betas=(0.95, 0.999), weight_decay=1e-6)
    rate = get_cosine_schedule_with_warmup(optimizer, num_warmup_steps=200, num_training_steps=STEPS)
    print(f"{sum(p.numel() for p in unet.parameters()):,} parameters", flush=True)
    start, losses = time.time(), []
    for step in range(1, STEPS + 1):
        clean = data[torch.randint(len(data), (BATCH,))]
        noise = torch.randn_like(clean)
        times = torch.randint(0, 1000, (BATCH,))
        loss = torch.nn.functional.mse_loss(unet(scheduler.add_noise(clean, noise, times), times).sample, noise)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
        optimizer.step()
        rate.step()
        optimizer.zero_grad()
        average.step(unet.parameters())
        losses.append(loss.item())
        if step % SAVE_EVERY == 0:
            print(f"step {step}: loss {np.mean(losses[-SAVE_EVERY:]):.4f}, {time.time() - start:.0f} s", flush=True)
            save(unet, average, scheduler, arguments.out)


if __name__ == "__main__":
    main()
