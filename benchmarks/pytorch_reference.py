"""The encoder step and guided sampling in PyTorch, in an environment of its own (PyTorch and NumPy; no JAX):

    python -m benchmarks.export_weights runs/bench/weights.npz
    PYTORCH_PYTHON -m benchmarks.pytorch_reference runs/bench/weights.npz --out runs/bench/pytorch.json
    python -m benchmarks.compare runs/bench/steps.json runs/bench/pytorch.json

With `--device cuda` each step is timed as PyTorch calls it and as a CUDA graph, both sides on the same card.
`--golden FILE` writes loss and gradients of the tiny pairs instead, for the parity test:

    python -m benchmarks.export_weights --golden /tmp/pairs.npz
    PYTORCH_PYTHON -m benchmarks.pytorch_reference /tmp/pairs.npz --golden tests/data/pytorch_parity.npz
"""

import argparse
from collections.abc import Callable
from functools import partial
import json
from pathlib import Path
import sys
from typing import Any

import numpy as np
import torch

from benchmarks.pytorch_model import TrainingStep, build, guided_sampling, noise_error
from benchmarks.pytorch_networks import named, to_ours
from benchmarks.timing import interleaved, machine, spread

VARIANTS = {  # name → (memory format, bfloat16 by autocast)
    "float32": (torch.contiguous_format, False),
    "float32, channels last": (torch.channels_last, False),
    "bfloat16": (torch.contiguous_format, True),
    "bfloat16, channels last": (torch.channels_last, True),
}
KEPT = 128
"""Entries kept of each array of gradients, evenly spaced."""


def read(arrays: dict[str, np.ndarray], name: str = "config") -> dict[str, Any]:
    return json.loads(arrays[name].tobytes())


def calls(config: dict[str, Any], arrays: dict[str, np.ndarray], device: str) -> dict[str, Callable[[], Any]]:
    """Every step in every variant, each with networks of its own; none returns before it is done."""
    table, weights = {}, {name: array for name, array in arrays.items() if name != "config"}
    shape, count = config["denoiser"]["size"]["shape"], config["batch"]
    for variant, (layout, low) in VARIANTS.items():
        for step in ("plain", "encoder", "guided sampling"):
            denoiser, encoder = (part.to(device, memory_format=layout) for part in build(config, weights))
            x = torch.randn(count, *shape, device=device).to(memory_format=layout)
            if step == "guided sampling":
                z = torch.randn(count, config["encoder"]["latents"], device=device)
                levels = torch.full((count,), 0.3, device=device)
                arguments = (denoiser.requires_grad_(False), encoder.requires_grad_(False), x, z, levels, low)
                call = partial(guided_sampling, *arguments)
            else:
                trained = None if step == "plain" else encoder
                call = TrainingStep(denoiser, trained, x, config["stage"], low)
            name = f"{step}, {variant}"
            table |= {name: call} if device == "cpu" else on_gpu(name, call)
    return table


def on_gpu(name: str, call: Callable[[], Any]) -> dict[str, Callable[[], Any]]:
    """A step launched kernel by kernel, and the same as one CUDA graph."""
    with torch.cuda.stream(torch.cuda.Stream()):  # libraries choose their kernels before the capture
        for _ in range(3):
            call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()

    def done(launch: Callable[[], Any]) -> None:
        launch()
        torch.cuda.synchronize()

    return {name: partial(done, call), f"{name}, CUDA graph": partial(done, graph.replay)}


def serve(folder: Path) -> None:
    """Take steps as told, by lines "FILE: STEP" on stdin, each answered by one; for a process that times them in turn
    with its own.
    """
    table = {}
    for file in sorted(folder.glob("*.npz")):
        with np.load(file) as found:
            arrays = dict(found)
        table |= {f"{file.stem}: {name}": call for name, call in calls(read(arrays), arrays, "cpu").items()}
    print("ready", flush=True)
    for line in sys.stdin:
        table[line.strip()]()
        print("done", flush=True)


def golden(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The pairs with PyTorch's loss and gradients added, in float64; z is the encoder's own draw.

    The first pair trains both networks; the second its encoder alone, against the same denoiser.
    """
    found, double = dict(arrays), torch.float64
    x, eps, noise, log_snr = (torch.tensor(arrays[k], dtype=double) for k in ("x", "eps", "noise", "log_snr"))
    for pair in ("half", "mlp"):
        own = {name.removeprefix(f"{pair}/"): array for name, array in arrays.items() if name.startswith(f"{pair}/")}
        weights = own | {name: array for name, array in arrays.items() if name.startswith("denoiser.")}
        config = read(weights)
        denoiser, encoder = build(config, {k: v for k, v in weights.items() if k != "config"}, double)
        loc, scale = encoder.posterior(x)
        trained = {"encoder": encoder} | ({"denoiser": denoiser} if pair == "half" else {})
        z, both = loc + scale * noise, len(trained) == 2
        loss = noise_error(denoiser, encoder, x, z, log_snr, eps, train_denoiser=both).sum()
        loss.backward()
        found[f"{pair}/loss"] = loss.detach().numpy()
        for name, part in trained.items():
            for leaf, parameter in named(part).items():
                gradient = to_ours(parameter.grad).flatten().numpy().astype(np.float32)
                found[f"{pair}/gradient/{name}.{leaf}"] = gradient[:: max(1, gradient.size // KEPT)]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("weights", type=Path, help="an .npz; with --serve, a folder of them")
    parser.add_argument("--serve", action="store_true", help="take steps as `benchmarks.transformers` tells")
    parser.add_argument("--golden", type=Path, help="write the parity test's file instead of timing")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--threads", type=int, default=None, help="default: the cores this process may use")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--out", type=Path, default=Path("runs/bench/pytorch.json"))
    arguments = parser.parse_args()
    if arguments.serve:
        torch.set_num_threads(arguments.threads or machine()["cores"])
        serve(arguments.weights)
        return
    with np.load(arguments.weights) as file:
        arrays = dict(file)
    if arguments.golden:
        arguments.golden.parent.mkdir(parents=True, exist_ok=True)
        np.savez_compressed(arguments.golden, **golden(arrays))
        return
    torch.set_num_threads(arguments.threads or machine()["cores"])
    torch.set_float32_matmul_precision("high")  # on a GPU TF32, which XLA uses too unless told otherwise
    config = read(arrays)
    seconds = interleaved(calls(config, arrays, arguments.device), arguments.rounds)
    report = {"machine": machine(), "torch": torch.__version__, "threads": torch.get_num_threads(),
              "device": torch.cuda.get_device_name() if arguments.device == "cuda" else "cpu",
              "case": config["case"], "steps": {name: spread(taken) for name, taken in seconds.items()}}  # fmt: skip
    for name, taken in report["steps"].items():
        print(f"{name:44s} {1e3 * taken['median']:9.1f} ms ({1e3 * taken['low']:.1f}–{1e3 * taken['high']:.1f})")
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
