"""All that is worth knowing of a GPU while one is at hand: `python -m benchmarks.gpu --out FOLDER`, 25 minutes at most.

Each part is a process of its own with a limit in seconds, so that one that fails or hangs costs no other. What a part
printed is in FOLDER/PART.txt, what it found in FOLDER/gpu.json, which is written after every part:

- `steps`: a training step of U-Nets and transformers at 32, 64 and 128 pixels: one per dispatch, and eight in a
  compiled loop, by the step; the products of matrices in float32 and in bfloat16 that the card does beside them;
- `pytorch`: the same steps by PyTorch, as called and as a CUDA graph, with `--pytorch PYTHON`, an environment with it;
- `maths`: the tests of schedules, bound, guidance, samplers and evidence, on this device;
- `fashion`, `scenes`: the rows of the panel, fits with default settings (`--fashion` says where the images are).

`--tiny` takes networks of no interest, to see on any machine that all of it runs.
"""

import argparse
from collections.abc import Callable
import json
from pathlib import Path
import subprocess
import sys
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.cases import Case, Step, steps_of
from benchmarks.export_weights import export_case
from benchmarks.steps import compile_step
from benchmarks.timing import interleaved, machine, ratio, spread

LOOP = 8
"""Steps of a compiled loop."""
TRAINING = ("plain", "encoder")
CASES = (
    Case("unet", 32, 64, 16, (32, 64)),
    Case("dit", 32, 64, 16, (64, 6, 4)),
    Case("unet", 64, 64, 16, (32, 64, 128), channels=3),
    Case("dit", 64, 64, 16, (256, 6, 8), channels=3),
    Case("unet", 128, 32, 16, (64, 128, 256), channels=3),
    Case("dit", 128, 32, 16, (384, 8, 16), channels=3),
)
TINY = (Case("unet", 8, 4, 2, (8, 8)), Case("dit", 8, 4, 2, (8, 2, 4)))
MATHS = ("schedule", "bound", "guidance", "samplers", "twisted", "evidence")
LIMITS = {"steps": 420, "pytorch": 300, "maths": 240, "fashion": 420, "scenes": 420}
"""Seconds of each part, at most."""


def looped(step: Step) -> Step:
    """`LOOP` training steps, one after the other, in one dispatch; the loss is the last one's."""
    function, arguments, _ = step

    def steps(*state: Any) -> tuple:
        state, losses = jax.lax.scan(lambda state, _: ((found := function(*state))[:-1], found[-1]), state, length=LOOP)
        return *state, losses[-1]

    return steps, arguments, True


def products(size: int) -> dict[str, tuple[Callable[[], Any], float]]:
    """Products of square matrices in two precisions, and their operations."""
    calls = {}
    for dtype in (jnp.float32, jnp.bfloat16):
        a = jax.random.normal(jax.random.key(0), (size, size)).astype(dtype)
        product = jax.jit(lambda a: a @ a)
        calls[f"product, {jnp.dtype(dtype).name}"] = (
            lambda a=a, product=product: jax.block_until_ready(product(a)), 2.0 * size**3
        )  # fmt: skip
    return calls


def steps_part(cases: tuple[Case, ...], rounds: int) -> dict[str, Any]:
    """Milliseconds by training step, of one in a dispatch and of one in a loop, and their ratio."""
    found: dict[str, Any] = {}
    of_products = products(256 if cases is TINY else 8192)
    for case in cases:
        calls: dict[str, Callable[[], Any]] = {}
        for name in TRAINING:
            step = steps_of(case)[name]
            calls |= {name: compile_step(step)[0], f"{name}, loop": compile_step(looped(step))[0]}
        seconds = interleaved(calls | {name: call for name, (call, _) in of_products.items()}, rounds)
        rows: dict[str, Any] = {}
        for name in TRAINING:
            loop = seconds[f"{name}, loop"] / LOOP
            rows[name] = {
                "ms": _in_ms(seconds[name]), "ms in a loop": _in_ms(loop), "one over loop": ratio(seconds[name], loop),
            }  # fmt: skip
        for name, (_, operations) in of_products.items():
            rows[f"TFLOP/s, {name}"] = spread(operations / seconds[name] / 1e12)
        found[case.name] = rows
        print(case.name, json.dumps(rows), flush=True)
        jax.clear_caches()
    return found


def _in_ms(seconds: np.ndarray) -> dict[str, float]:
    return spread(1e3 * seconds)


def commands(options: argparse.Namespace) -> dict[str, list[list[str]]]:
    """What each part runs, one command after the other."""
    own, out = [sys.executable, "-m"], options.out
    tiny = ["--tiny"] if options.tiny else []
    parts = {"steps": [[*own, "benchmarks.gpu", "--steps-only", "--out", str(out), *tiny]]}
    if options.pytorch:
        device = "cpu" if jax.default_backend() == "cpu" else "cuda"
        parts["pytorch"] = [
            [options.pytorch, "-m", "benchmarks.pytorch_reference", str(_weights(out, i)), "--device", device, "--out",
             str(out / f"pytorch_{i}.json")]
            for i in range(len(TINY if options.tiny else CASES))
        ]  # fmt: skip
    files = [f"tests/test_{name}.py" for name in MATHS[: 1 if options.tiny else None]]
    parts["maths"] = [[*own, "pytest", "-q", "-p", "no:cacheprovider", *files]]
    panel = [*own, "benchmarks.panel", "--out", str(out / "panel"), "--progress"]
    if not options.tiny:
        if options.fashion:
            parts["fashion"] = [[*panel, "--only", "--data", f"fashion={options.fashion}"]]
        parts["scenes"] = [[*panel, "--only", "scenes"]]
    return parts


def _weights(out: Path, index: int) -> Path:
    return out / f"weights_{index}.npz"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/gpu"))
    parser.add_argument("--minutes", type=float, default=25.0, help="after these no further part is begun")
    parser.add_argument("--pytorch", help="Python of an environment with PyTorch and NumPy; default: ours alone")
    parser.add_argument("--fashion", help="folder of Fashion-MNIST's files")
    parser.add_argument("--tiny", action="store_true", help="networks of no interest, to see that all of it runs")
    parser.add_argument("--steps-only", action="store_true", help="the part `steps`, in this process")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    cases = TINY if options.tiny else CASES
    if options.steps_only:
        (options.out / "steps.json").write_text(json.dumps(steps_part(cases, 3 if options.tiny else 20), indent=1))
        return
    if options.pytorch:
        for i, case in enumerate(cases):
            export_case(case, _weights(options.out, i))
    device = jax.devices()[0]
    report: dict[str, Any] = {"machine": machine(), "device": device.device_kind, "jax": jax.__version__, "parts": {}}
    began = time.monotonic()
    for part, lines in commands(options).items():
        left = 60 * options.minutes - (time.monotonic() - began)
        if left <= 0:
            report["parts"][part] = {"said": "not begun: the time is over"}
            continue
        report["parts"][part] = _run(part, lines, options.out, min(LIMITS[part], left))
        for name in (options.out / f"{part}.json", options.out / "panel" / "panel.json"):
            if name.exists():
                report["parts"][part][name.stem] = json.loads(name.read_text())
        found = sorted(options.out.glob("pytorch_*.json")) if part == "pytorch" else []
        report["parts"][part] |= {name.stem: json.loads(name.read_text()) for name in found}
        (options.out / "gpu.json").write_text(json.dumps(report, indent=1))
        print(f"{part}: {report['parts'][part]['said']}, {report['parts'][part]['seconds']:.0f} s", flush=True)
    print(f"written: {options.out / 'gpu.json'}")


def _run(part: str, lines: list[list[str]], out: Path, limit: float) -> dict[str, Any]:
    """Run the commands of a part; what they print is kept, and said is how the last of them ended."""
    began, said = time.monotonic(), "done"
    with (out / f"{part}.txt").open("w") as printed:
        for line in lines:
            left = limit - (time.monotonic() - began)
            try:
                ended = subprocess.run(
                    line, stdout=printed, stderr=subprocess.STDOUT, timeout=max(left, 1), check=False
                )
            except subprocess.TimeoutExpired:
                said = f"stopped after {limit:.0f} s"
                break
            if ended.returncode:
                said = f"failed with exit code {ended.returncode}: {part}.txt says why"
    return {"said": said, "seconds": time.monotonic() - began}


if __name__ == "__main__":
    main()
