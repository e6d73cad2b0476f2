"""What 21cmPSDenoiser computes, with its own weights and with a tiny network of random ones: tests/data/psdenoiser.

    env/bin/pip install torch einops astropy scipy tqdm && env/bin/pip install --no-deps 21cmpsdenoiser==1.0.2
    env/bin/python benchmarks/export_foreign.py tests/data/psdenoiser

Takes that package, and nothing of this library. docs/diffusers.md wraps its network, tests/test_foreign.py compares.
"""

import argparse
from pathlib import Path

import numpy as np
from psdenoiser import VPSDE, Denoiser, UNet, get_score_fn
import torch

TIMES = (1e-3, 0.03, 0.2, 0.45, 0.8, 1.0)
"""From the end of its own sampler to the noisiest."""


def tiny() -> UNet:
    """Two levels, of random weights, biases and gains, few enough digits to be stored in half precision."""
    torch.manual_seed(0)
    network = UNet(dim=(8, 4), dim_mults=(1, 2)).eval()
    for parameter in network.parameters():
        parameter.data += 0.2 * torch.randn_like(parameter)
        parameter.data = parameter.data.half().float()
    return network


def spectra(denoiser: Denoiser) -> torch.Tensor:
    """Flat power spectra, 10^1.5 mK² and less on small scales, with the sample variance of their modes, in [−1, 1].

    They stand for the noisy ones that it was trained to clean, and are scaled as it scales them.
    """
    constants, generator = denoiser.csts, np.random.default_rng(0)
    k = np.hypot(constants.kperp.value[:, None], constants.kpar.value)
    log_power = 1.5 - 0.3 * np.log10(k / 0.1) ** 2
    spread = np.minimum(1 / np.sqrt(np.maximum(constants.modes, 1)), 0.3)
    noisy = 10**log_power * np.exp(spread * generator.normal(size=(len(TIMES), *k.shape)))
    scaled = (np.log10(noisy) - constants.noisy_bias) / constants.noisy_scale * 2 - 1
    return torch.tensor(scaled[:, None], dtype=torch.float32)


@torch.no_grad()
def outputs(network: UNet, condition: torch.Tensor) -> dict[str, np.ndarray]:
    """Of noisy spectra, each with a condition and a time of its own: ε̂, the score, and the map of the middle."""
    found = {}
    network.mid_block2.register_forward_hook(lambda *call: found.update(bottom=call[-1]))
    torch.manual_seed(1)
    sde, t = VPSDE(beta_min=0.1, beta_max=20.0), torch.tensor(TIMES)
    mean, sigma = sde.marginal_prob(condition, t)
    x = mean + sigma[:, None, None, None] * torch.randn_like(condition)
    found["score"] = get_score_fn(sde, network, continuous=True)(x, t, x_cdn=condition)
    found |= {"x": x, "condition": condition, "t": t, "eps": network(x, 999 * t, x_cdn=condition)}
    return {name: value.numpy() for name, value in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    out = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    denoiser, small = Denoiser(device=torch.device("cpu")), tiny()
    condition = spectra(denoiser)
    np.savez_compressed(out / "trained.npz", **outputs(denoiser.model, condition))
    np.savez_compressed(out / "outputs.npz", **outputs(small, condition[..., ::2, ::2]))
    torch.save({name: array.half() for name, array in small.state_dict().items()}, out / "denoiser_model.pt")


if __name__ == "__main__":
    main()
