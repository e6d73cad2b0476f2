"""Training from a stream: its speed beside the same fit in memory, and a store larger than the memory it is given.

python -m benchmarks.streams speed              # steps of the default U-Net, interleaved; ratio of medians
python -m benchmarks.streams memory --gib 4     # a store of 4 GiB, one epoch, in a process that may have half of it
python -m benchmarks.streams train STORE LIMIT  # that process: bytes that it may allocate, -1 for no limit
"""

import argparse
from pathlib import Path
import resource
import shutil
import subprocess
import sys
from tempfile import TemporaryDirectory
import time

import numpy as np

SIDE, CHUNK = 64, 256


def write(path: Path, count: int, side: int) -> None:
    """Images (count, 3, side, side) of 8 bits that cannot be compressed, a chunk at a time."""
    import zarr

    group, rng = zarr.open_group(path, mode="w"), np.random.default_rng(0)
    x = group.create_array(
        "x", shape=(count, 3, side, side), chunks=(CHUNK, 3, side, side), dtype="uint8", compressors=None,
        dimension_names=("obs", "channel", "row", "column"),
    )  # fmt: skip
    noise = rng.integers(0, 256, (CHUNK, 3, side, side), dtype=np.uint8)
    for start in range(0, count, CHUNK):
        x[start : start + CHUNK] = np.roll(noise, start, axis=-1)[: count - start]


def speed(blocks: int, steps: int) -> None:
    """Blocks of steps in memory and from a zarr store by turns: what a step of each takes, by clock and processor.

    Where others compute on the same machine the clock tells of them too.
    """
    import jax
    from numpyro import distributions as dist

    from sami_ppl import Stage, autoencoder, factors
    from sami_ppl.data import load_data, open_stream
    from sami_ppl.fitting.loop import Loop

    with TemporaryDirectory() as folder:
        path = Path(folder, "images.zarr")
        write(path, 1024, 32)
        data, stream = load_data(path), open_stream(path)
        prior = factors(z=dist.Normal(0, 1).expand([8]))
        program = autoencoder(prior, data, network="unet", key=jax.random.key(0))
        stage = Stage(steps=10_000, batch=64, target="marginal", validate_every=10_000)
        held_out = data.isel(obs=slice(64))
        found: dict[str, list[tuple[float, float]]] = {"memory": [], "stream": []}
        loops = {}
        for name, source in (("memory", data), ("stream", stream)):
            loop = Loop(program, stage, source, held_out, key=jax.random.key(1), name=name, callback=None)
            loops[name] = loop, loop.init(None, resume=False)
        for block in range(blocks + 1):
            for name, (loop, state) in loops.items():
                began = np.array([time.perf_counter(), time.process_time()])
                after, _ = loop.fit.run_block(state, loop.feed.steps(int(state.step), steps))
                loops[name] = loop, after
                if block:  # the first compiles
                    taken = np.array([time.perf_counter(), time.process_time()]) - began
                    found[name].append(tuple(taken / steps))
        for loop, _ in loops.values():
            loop.feed.close()
    medians = {name: np.median(seconds, axis=0) for name, seconds in found.items()}
    for name, (clock, processors) in medians.items():
        print(f"{name}: {1e3 * clock:.1f} ms a step, {1e3 * processors:.1f} ms of processors")
    clock, processors = medians["memory"] / medians["stream"]
    print(f"a stream to memory: {clock:.1%} of the speed by the clock, {processors:.1%} of processors, {blocks} blocks")


def memory(gib: float, folder: Path | None) -> None:
    """One epoch through a store, in a process whose private memory may be half as large as the store."""
    with TemporaryDirectory(dir=folder) as place:
        path = Path(place, "large.zarr")
        write(path, int(gib * 2**30 / (3 * SIDE**2)), SIDE)
        size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
        limit = size // 2
        began = time.perf_counter()
        subprocess.run([sys.executable, "-m", "benchmarks.streams", "train", str(path), str(limit)], check=True)
        print(f"{size / 2**30:.2f} GiB with a limit of {limit / 2**30:.2f} GiB: {time.perf_counter() - began:.0f} s")
        shutil.rmtree(path)


def train(path: Path, limit: int) -> None:
    """One epoch under a limit, which is put on what the process allocates (RLIMIT_DATA)."""
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    import jax
    from numpyro import distributions as dist

    from sami_ppl import Stage, autoencoder, factors, fit
    from sami_ppl.data import open_stream

    stream = open_stream(path)
    prior = factors(z=dist.Normal(0, 1).expand([2]))
    program = autoencoder(prior, stream, network="mlp", size={"width": 16, "depth": 1}, key=jax.random.key(0))
    stage = Stage(epochs=1, batch=256, target="marginal", validate_every=10_000)
    _, history = fit(program, stream, stage, key=jax.random.key(1))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"{history.records[-1]['step']:,} steps of {stage.batch}; largest resident memory {peak:.2f} GiB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    quick = commands.add_parser("speed")
    quick.add_argument("--blocks", type=int, default=7)
    quick.add_argument("--steps", type=int, default=5)
    large = commands.add_parser("memory")
    large.add_argument("--gib", type=float, default=4.0)
    large.add_argument("--folder", type=Path)
    limited = commands.add_parser("train")
    limited.add_argument("path", type=Path)
    limited.add_argument("limit", type=int)
    given = vars(parser.parse_args())
    {"speed": speed, "memory": memory, "train": train}[given.pop("command")](**given)


if __name__ == "__main__":
    main()
