"""Encoding from store to store: the values of `Program.encode`, each chunk read once, in memory that does not grow."""

import collections
import subprocess
import sys
import tracemalloc

import jax
import numpy as np
import pytest
import xarray as xr
import zarr

import sami_ppl as sp
from sami_ppl.data import load_data, open_data
from sami_ppl.encoders.affine import AffineEncoder
from sami_ppl.encoders.encoder import AbstractEncoder

RNG = np.random.default_rng(0)


def store(path, x, chunk, **coords):
    data = xr.Dataset({"x": (("obs", "feature"), x)}, coords={k: ("obs", v) for k, v in coords.items()})
    data.to_zarr(path, consolidated=False, encoding={"x": {"chunks": (chunk, *x.shape[1:])}})
    return path


def vectors(count):
    return RNG.normal(size=(count, 4)).astype(np.float32)


def same(codes, expected):
    return all(
        np.array_equal(codes[name].values, values)
        for name, values in zip(("location", "scale"), expected, strict=True)
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("stored", [7, 32, 100, 500])
@pytest.mark.parametrize("count", [20, 96, 100])
def test_a_store_is_encoded_as_an_array_is(tiny_program, tmp_path, stored, count):
    program, x = tiny_program(), vectors(count)
    codes = sp.encode(
        program, store(tmp_path / "x.zarr", x, stored), tmp_path / "z.zarr", chunk=32, progress=False
    ).load()  # fmt: skip
    assert same(codes, program.encode(x, chunk=32))
    assert codes["location"].dtype == np.float32
    np.testing.assert_allclose(codes["location"], program.encode(x, chunk=1)[0], rtol=0, atol=1e-5)


def test_dims_and_labels(tiny_program, tmp_path):
    path = store(tmp_path / "x.zarr", vectors(50), 16, obs=np.arange(50) + 100)
    codes = sp.encode(tiny_program(), path, tmp_path / "z.zarr", chunk=16, progress=False)
    assert codes["location"].dims == codes["scale"].dims == ("obs", "axis")
    assert codes["axis"].values.tolist() == ["z[0]", "z[1]"]
    assert codes["obs"].values.tolist() == list(range(100, 150))
    assert codes.sel(obs=117)["location"].shape == (2,)
    assert zarr.open_group(tmp_path / "z.zarr")["location"].chunks == (16, 2)


def test_scale_of_correlated_codes_is_that_of_their_axes(tiny_program, tmp_path):
    program, x = tiny_program(), vectors(50)
    turn = jax.numpy.asarray([[0.6, 0.8], [-0.8, 0.6]])
    program = program.replace(encoder=AffineEncoder(program.encoder, turn))
    codes = sp.encode(program, store(tmp_path / "x.zarr", x, 16), tmp_path / "z.zarr", chunk=16, progress=False)
    assert same(codes, program.encode(x, chunk=16))
    root = np.asarray(program.code_law(jax.numpy.asarray(x)).root)
    np.testing.assert_allclose(codes["scale"], np.sqrt((root**2).sum(-1)), rtol=1e-5)


@pytest.mark.parametrize("high", [2, 256])
def test_bytes_are_scaled_as_load_data_scales_them(tiny_program, tmp_path, high):
    x = RNG.integers(0, high, (60, 4)).astype(np.uint8)
    x[:20] = np.minimum(x[:20], 1)  # the first chunk alone would pass for a mask
    path = store(tmp_path / "x.zarr", x, 10)
    codes = sp.encode(tiny_program(), path, tmp_path / "z.zarr", chunk=10, progress=False)
    assert same(codes, tiny_program().encode(load_data(path)["x"].values, chunk=10))


def test_netcdf_and_data_opened_before(tiny_program, tmp_path):
    x = vectors(40)
    xr.Dataset({"x": (("obs", "feature"), x)}).to_netcdf(tmp_path / "x.nc")
    for i, data in enumerate((tmp_path / "x.nc", open_data(tmp_path / "x.nc").isel(obs=slice(10, None)))):
        codes = sp.encode(tiny_program(), data, tmp_path / f"{i}.zarr", chunk=16, progress=False)
        assert same(codes, tiny_program().encode(x[10 * i :], chunk=16))


def test_every_chunk_is_read_once(tiny_program, tmp_path, monkeypatch):
    path, reads = store(tmp_path / "x.zarr", vectors(100), 7), collections.Counter()
    right = zarr.storage.LocalStore.get

    async def get(self, key, *arguments, **options):
        if "x.zarr" in str(self.root) and "/c/" in key:
            reads[key] += 1
        return await right(self, key, *arguments, **options)

    monkeypatch.setattr(zarr.storage.LocalStore, "get", get)
    sp.encode(tiny_program(), path, tmp_path / "z.zarr", chunk=32, progress=False)
    assert len(reads) == 15
    assert set(reads.values()) == {1}
    for start in range(0, 100, 32):  # the control: batches that cut chunks in two
        open_data(path)["x"].isel(obs=slice(start, start + 32)).load()
    assert max(reads.values()) > 2


def test_compiled_once(tiny_program, tmp_path, monkeypatch, counted):
    right = AbstractEncoder.guide
    traced = counted(right)
    monkeypatch.setattr(AbstractEncoder, "guide", lambda self, x, prior: traced(self, x, prior))
    jax.clear_caches()  # what another test has compiled is found again
    tiny_program().encode(vectors(100), chunk=32)
    assert traced.calls == 1
    sp.encode(
        tiny_program(), store(tmp_path / "x.zarr", vectors(100), 7), tmp_path / "z.zarr", chunk=32, progress=False
    )
    assert traced.calls == 2, "once more for the shapes; the step is the one that is there"
    jax.clear_caches()


def test_mistakes(tiny_program, tmp_path):
    program, out = tiny_program(), tmp_path / "z.zarr"
    bad = vectors(50)
    bad[23, 1] = np.nan
    cases = {
        "nan": (bad, ValueError, r"x is NaN at observation 23"),
        "wide": (RNG.normal(size=(9, 5)), ValueError, r"shape \(5,\), expected event_shape \(4,\)"),
        "int": (np.ones((9, 4), np.int32), TypeError, r"floating point or uint8, got int32"),
    }
    missing = xr.Dataset({"x": (("obs", "time"), np.where(np.arange(9)[:, None] == 3, np.nan, np.ones((9, 4))))})
    with pytest.raises(ValueError, match="NaN at observation 3"):
        sp.encode(program, missing, out, progress=False)  # "time" does not make a program one of sequences
    for name, (x, error, message) in cases.items():
        with pytest.raises(error, match=message):
            sp.encode(program, store(tmp_path / f"{name}.zarr", x, 8), out, chunk=8, progress=False)
        assert not list(tmp_path.glob("*z.zarr*")), "nothing is left behind"
    with pytest.raises(ValueError, match="chunk must be at least 1 observation, got 0"):
        sp.encode(program, tmp_path / "nan.zarr", out, chunk=0)
    with pytest.raises(FileNotFoundError, match=r"no data at .*none.zarr"):
        sp.encode(program, tmp_path / "none.zarr", out)
    (tmp_path / "x.npz").write_bytes(b"")
    with pytest.raises(ValueError, match=r"suffix '.npz', expected .zarr, .nc or .h5, .*load_data\("):
        sp.encode(program, tmp_path / "x.npz", out)
    out.mkdir()
    with pytest.raises(FileExistsError, match=r"z.zarr exists and is not overwritten"):
        sp.encode(program, tmp_path / "nan.zarr", out)


# Memory


def peak(function, *arguments, **options):
    """Bytes that Python and NumPy held at most during a call."""
    tracemalloc.start()
    try:
        function(*arguments, **options)
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.slow
def test_host_memory_does_not_grow_with_the_observations(tiny_program, tmp_path):
    program = tiny_program()
    found = []
    for i, count in enumerate((500, 5_000, 50_000)):  # the first call of all pays for imports and compilation
        path = store(tmp_path / f"{i}.zarr", vectors(count), 1000)
        streamed = peak(sp.encode, program, path, tmp_path / f"z{i}.zarr", chunk=4000, progress=False)
        found.append((streamed, peak(lambda path: program.encode(load_data(path)["x"].values, chunk=4000), path)))
    (_, _), (small, small_whole), (large, large_whole) = found
    more = 45_000 * 4 * 4
    assert large - small < 0.1 * more, f"{small} {large}"
    assert large_whole - small_whole > more, "the control reads everything, and that is seen"


MEMORY = """
import sys
import jax, numpy as np, numpyro, xarray as xr
from numpyro import distributions as dist
import sami_ppl as sp
from sami_ppl.data import load_data
from sami_ppl.nn import ResidualMLP

def prior():
    numpyro.sample("z", dist.Normal(0, 1).expand([2]).to_event(1))

keys = jax.random.split(jax.random.key(0), 3)
schedule, size = sp.VariancePreserving(-4.0, 4.0), {"width": 8, "depth": 1}
program = sp.Program(
    prior,
    sp.PreconditionedDenoiser(ResidualMLP((64,), (64,), **size, key=keys[0]), schedule, (64,)),
    sp.DiagonalEncoder(ResidualMLP((64,), (4,), **size, key=keys[1]), schedule, (64,), 2, key=keys[2]),
)
folder = sys.argv[1]
for name, count in (("small", 40_000), ("large", 600_000)):
    block = np.random.default_rng(0).normal(size=(2000, 64)).astype("float32")
    data = xr.Dataset({"x": (("obs", "feature"), block)})
    data.to_zarr(f"{folder}/{name}.zarr", consolidated=False, encoding={"x": {"compressors": None}})
    array = __import__("zarr").open_group(f"{folder}/{name}.zarr")["x"]
    array.resize((count, 64))
    for start in range(2000, count, 2000):
        array[start : start + 2000] = block

def peak():
    # Of this program alone: getrusage begins at what the process that started it held.
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM")) / 1024

for name in ("small", "large"):
    sp.encode(program, f"{folder}/{name}.zarr", f"{folder}/codes_{name}.zarr", chunk=2000, progress=False)
    print(peak())
program.encode(load_data(f"{folder}/large.zarr")["x"].values, chunk=2000)
print(peak())
"""


@pytest.mark.slow
@pytest.mark.release
def test_memory_of_the_process_does_not_grow_with_the_observations(tmp_path):
    """XLA's buffers too: 10 MB of observations, then 150 MB, then, the control, these 150 MB at once."""
    found = subprocess.run(
        [sys.executable, "-c", MEMORY, str(tmp_path)], capture_output=True, text=True, check=False
    )  # fmt: skip
    assert found.returncode == 0, found.stderr
    small, large, whole = map(float, found.stdout.split())
    assert large - small < 30, f"{small:.0f} MB, then {large:.0f} MB"
    assert whole - large > 110, f"{large:.0f} MB, at once {whole:.0f} MB"
