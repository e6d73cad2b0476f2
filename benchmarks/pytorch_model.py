"""Denoiser, encoder and the guided noise error in PyTorch, with the gradient by double backward."""

from contextlib import AbstractContextManager
import math
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks import pytorch_networks as networks


def alpha(log_snr: Tensor) -> Tensor:
    return torch.sigmoid(log_snr).sqrt()


def sigma(log_snr: Tensor) -> Tensor:
    return torch.sigmoid(-log_snr).sqrt()


def per_image(levels: Tensor, x: Tensor) -> Tensor:
    return levels.reshape(-1, *[1] * (x.ndim - 1))


class Denoiser(nn.Module):
    """Preconditioned, predicting the data: ε̂ = (x_λ − α m − α s F)/σ."""

    def __init__(self, size: dict[str, Any], mean: float, std: float):
        super().__init__()
        self.network, self.mean, self.std = networks.network(size), mean, std

    def forward(self, x_noisy: Tensor, log_snr: Tensor) -> Tensor:
        a, s = per_image(alpha(log_snr), x_noisy), per_image(sigma(log_snr), x_noisy)
        centred = x_noisy - a * self.mean
        out = self.network(centred / ((a * self.std) ** 2 + s**2).sqrt(), log_snr)
        return (centred - a * self.std * out) / s


class Encoder(nn.Module):
    """Diagonal Gaussian q(z | x_λ, λ) on the features of a network; log scales between `min_scale` and 2."""

    def __init__(
        self, size: dict[str, Any], features: int, latents: int, mean: float, std: float, min_scale: float,
        log_snr_max: float,
    ):  # fmt: skip
        super().__init__()
        self.network, self.mean, self.std = networks.network(size), mean, std
        self.loc, self.log_scale = nn.Linear(features, latents), nn.Linear(features, latents)
        self.low, self.high, self.log_snr_max = math.log(min_scale), math.log(2.0), log_snr_max

    def forward(self, x_noisy: Tensor, log_snr: Tensor) -> tuple[Tensor, Tensor]:
        a, s = per_image(alpha(log_snr), x_noisy), per_image(sigma(log_snr), x_noisy)
        features = self.network((x_noisy - a * self.mean) / ((a * self.std) ** 2 + s**2).sqrt(), log_snr)
        raw = torch.sigmoid(self.log_scale(features) + math.log(-self.low / self.high))
        return self.loc(features), (self.low + (self.high - self.low) * raw).exp()

    def posterior(self, x: Tensor) -> tuple[Tensor, Tensor]:
        log_snr = torch.full((len(x),), self.log_snr_max, dtype=x.dtype, device=x.device)
        return self(per_image(alpha(log_snr), x) * x, log_snr)

    def log_prob(self, z: Tensor, x_noisy: Tensor, log_snr: Tensor) -> Tensor:
        loc, scale = self(x_noisy, log_snr)
        return torch.distributions.Normal(loc, scale, validate_args=False).log_prob(z).sum(-1)


def guidance(encoder: Encoder, z: Tensor, x_noisy: Tensor, log_snr: Tensor, *, create_graph: bool) -> Tensor:
    """∇ log q(z | x_λ, λ) in x_λ; with `create_graph` it can itself be differentiated."""
    x_noisy = x_noisy.detach().requires_grad_()
    with torch.enable_grad():
        total = encoder.log_prob(z, x_noisy, log_snr).sum()
        return torch.autograd.grad(total, x_noisy, create_graph=create_graph)[0]


def noise_error(
    denoiser: Denoiser, encoder: Encoder | None, x: Tensor, z: Tensor | None, log_snr: Tensor, eps: Tensor,
    *, train_denoiser: bool,
) -> Tensor:  # fmt: skip
    """‖ε − ε̂(x_λ, λ; z)‖² per observation."""
    a, s = per_image(alpha(log_snr), x), per_image(sigma(log_snr), x)
    x_noisy = a * x + s * eps
    with torch.set_grad_enabled(train_denoiser):
        residual = eps - denoiser(x_noisy, log_snr)
    if encoder is not None:
        residual = residual + s * guidance(encoder, z, x_noisy, log_snr, create_graph=True)
    return residual.square().flatten(1).sum(-1)


def build(
    config: dict[str, Any], arrays: dict[str, np.ndarray], dtype: torch.dtype = torch.float32
) -> tuple[Denoiser, Encoder]:
    """Both, with the weights that `export_weights` wrote."""
    parts = {"denoiser": Denoiser(**config["denoiser"]), "encoder": Encoder(**config["encoder"])}
    for name, module in parts.items():
        own = {key.removeprefix(f"{name}."): array for key, array in arrays.items() if key.startswith(f"{name}.")}
        networks.load(module, own, dtype)
    return parts["denoiser"], parts["encoder"]


def autocast(x: Tensor, enabled: bool) -> AbstractContextManager:
    return torch.autocast(x.device.type, dtype=torch.bfloat16, enabled=enabled)


class TrainingStep:
    """The encoder step of `cases.steps_of`, or the plain one without an encoder: one step of Adam.

    Clipping, Adam and the running average are those of the library's stage; autocast covers the forward pass.
    """

    def __init__(self, denoiser: Denoiser, encoder: Encoder | None, x: Tensor, stage: dict[str, float], low: bool):
        self.denoiser, self.encoder, self.x, self.stage, self.low = denoiser, encoder, x, stage, low
        self.parameters = list((denoiser if encoder is None else encoder).parameters())
        self.average = [p.detach().clone() for p in self.parameters]
        self.optimiser = torch.optim.Adam(
            self.parameters, lr=stage["learning_rate"], betas=(0.9, 0.99), fused=True, capturable=x.is_cuda
        )

    def loss(self) -> Tensor:
        x, encoder, count = self.x, self.encoder, len(self.x)
        low, high = self.stage["log_snr_min"], self.stage["log_snr_max"]
        shift, grid = torch.rand((), device=x.device), torch.arange(count, device=x.device) / count
        log_snr = high - (high - low) * ((shift + grid) % 1.0)
        eps = torch.randn_like(x)
        if encoder is None:
            return (
                0.5 * (high - low) * noise_error(self.denoiser, None, x, None, log_snr, eps, train_denoiser=True).mean()
            )
        loc, scale = encoder.posterior(x)
        kl = (0.5 * (loc**2 + scale**2 - 1) - scale.log()).sum(-1)
        z = loc + scale * torch.randn_like(loc)
        error = noise_error(self.denoiser, encoder, x, z, log_snr, eps, train_denoiser=False)
        return (0.5 * (high - low) * error + self.stage["beta"] * kl).mean()

    def __call__(self) -> None:
        self.optimiser.zero_grad(set_to_none=True)
        with autocast(self.x, self.low):
            loss = self.loss()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, self.stage["clip"])
        self.optimiser.step()
        torch._foreach_lerp_(self.average, [p.detach() for p in self.parameters], 1 - self.stage["ema"])


def guided_sampling(denoiser: Denoiser, encoder: Encoder, x: Tensor, z: Tensor, log_snr: Tensor, low: bool) -> Tensor:
    """One evaluation of the guided denoiser, as a sampler makes it: the denoised mean."""
    a, s = per_image(alpha(log_snr), x), per_image(sigma(log_snr), x)
    with autocast(x, low), torch.no_grad():
        eps = denoiser(x, log_snr) - s * guidance(encoder, z, x, log_snr, create_graph=False)
    return (x - s * eps) / a
