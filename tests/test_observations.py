"""What users hand over as observations and as variables of the prior is converted, warned of or refused, everywhere."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
from numpyro import distributions as dist
import pytest
import xarray as xr

import sami_ppl as sp
from sami_ppl.data import check_data
from sami_ppl.data.checks import as_floats, as_numbers

X = np.random.default_rng(0).normal(size=(12, 4)).astype(np.float32)
KEY = jax.random.key(0)


def with_value(value):
    x = X.copy()
    x[3, 2] = value
    return x


CALLS = {
    "fit": lambda p, x: sp.fit(p, x, sp.Stage(steps=1, batch=4), key=KEY, progress=False),
    "warm_start": lambda p, x: sp.warm_start(p, x, key=KEY, steps=1, progress=False),
    "encode": lambda p, x: p.encode(x),
    "posterior": lambda p, x: p.posterior(x, key=KEY),
    "evidence_bound": lambda p, x: sp.evidence_bound(p, x, key=KEY),
    "importance_weighted_bound": lambda p, x: sp.importance_weighted_bound(p, x, key=KEY),
}
REFUSED = {
    "infinite": (with_value(np.inf), ValueError, r"x is infinite at observation 3, index \(2,\) in it.* of 1 values"),
    "NaN": (with_value(np.nan), ValueError, r"x is NaN at observation 3, .*only frames of sequences"),
    "too large for 32 bits": (with_value(0).astype(float) + 1e300, ValueError, "x is infinite at observation 0"),
    "masked records": (np.ma.zeros((12, 4), "f4,i4"), TypeError, r"array of numbers .* got MaskedArray of .*f0"),
    "masked": (np.ma.masked_less(X, -1), ValueError, r"masked array that hides \d of 48 values.*x\.filled\(value\)"),
    "complex": (X + 1j, TypeError, r"of complex64: write x\.real"),
    "objects": (X.astype(object), TypeError, r"of object: write np\.asarray\(x\.tolist\(\)"),
    "words": (X.astype(str), TypeError, "of <U"),
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("name", REFUSED)
def test_refused_by_every_call(tiny_program, call, name):
    x, error, message = REFUSED[name]
    with pytest.raises(error, match=message):
        CALLS[call](tiny_program(), x)


SAME = {
    "big-endian": X.astype(">f4"),
    "big-endian, 64 bits": X.astype(">f8"),
    "a list": X.tolist(),
    "a mask that hides nothing": np.ma.masked_array(X, mask=np.zeros_like(X, bool)),
    "a Dataset": xr.Dataset({"x": (("obs", "feature"), X.astype(">f4"))}),
    "of JAX": jnp.asarray(X),
}


@pytest.mark.parametrize("name", SAME)
def test_what_can_be_converted_is(tiny_program, name):
    found = tiny_program().observed(SAME[name])
    assert (found.dtype, found.dtype.isnative) == (np.float32, True)
    np.testing.assert_allclose(found, X, rtol=1e-6)


@pytest.mark.parametrize("dtype", [np.float16, jnp.bfloat16])
def test_half_precision_is_computed_in_single(tiny_program, dtype):
    assert tiny_program().observed(X.astype(dtype)).dtype == np.float32


def test_observations_on_another_scale_are_warned_of(tiny_program):
    """By the statistics that the denoiser knows: pixels from 0 to 255 given to a program of [−1, 1], say."""
    program = tiny_program()
    with pytest.warns(UserWarning, match=r"ranges from 0 to 255.*mean 0 and standard deviation 1: .*/ 127.5 - 1"):
        program.observed(np.linspace(0, 255, 8).reshape(2, 4))
    hundred = sp.PreconditionedDenoiser(program.denoiser.network, program.denoiser.schedule, (4,), mean=5, std=100)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        program.replace(denoiser=hundred).observed(X * 100)
        program.observed(X * 5)
    with pytest.warns(UserWarning, match="standard deviation 100"):
        program.replace(denoiser=hundred).observed(X * 1e4)


@pytest.mark.slow
def test_a_posterior_of_many_chunks_warns_of_the_scale_once(tiny_program, tmp_path):
    program, data = tiny_program(), xr.Dataset({"x": (("obs", "feature"), 100 * X)})
    for out in (None, tmp_path / "posterior.zarr"):
        with pytest.warns(UserWarning, match="another scale") as caught:
            program.posterior(data, key=KEY, draws=1, predictive=0, levels=0, chunk=3, out=out)
        assert len([w for w in caught if "another scale" in str(w.message)]) == 1
    with pytest.warns(UserWarning, match="another scale") as caught:
        sp.encode(program, data, tmp_path / "codes.zarr", chunk=3, progress=False)
    assert len(caught) == 1


def test_a_network_that_knows_no_statistics_takes_any_scale(tiny_program):
    program = tiny_program()
    exact = sp.GaussianDenoiser(jnp.zeros(4), 1e4 * jnp.eye(4), program.denoiser.schedule)
    np.testing.assert_array_equal(program.replace(denoiser=exact).observed(X * 100), X * 100)


def test_frames_are_missing_as_a_whole():
    x = np.ones((2, 3, 4), np.float32)
    x[1, 2] = np.nan
    np.testing.assert_array_equal(as_floats(x, missing="frames"), x)
    x[0, 1, 1] = np.inf
    with pytest.raises(ValueError, match=r"infinite at observation 0, index \(1, 1\)"):
        as_floats(x, missing="frames")


def test_a_fill_value_is_named():
    """Of a store written by others, whose fill value, 0, is a pixel: xarray reads such pixels as NaN."""
    x = xr.DataArray(with_value(np.nan), dims=("obs", "feature"))
    x.encoding["_FillValue"] = np.uint8(0)
    with pytest.raises(ValueError, match=r"fill value is 0: .*mask_and_scale=False"):
        check_data(xr.Dataset({"x": x}))


# Variables that the prior takes


TIMES = 1_700_000_000_000 + 60_000 * np.arange(12)  # milliseconds since 1970, a minute apart
BAD_VARIABLES = {
    "too wide": (TIMES, r"int64 from 17\d* .* lost in the 32 bits .*\(u - u.mean\(\)\) / u.std\(\)"),
    "too fine": (TIMES.astype(float), "float64 from .* lost in the 32 bits"),
    "dates": (TIMES.astype("datetime64[ms]"), r"write \(u - u.min\(\)\) / np.timedelta64\(1, 'D'\)"),
    "words": (np.array(list("abcabcabcabc")), r"np.unique\(u, return_inverse=True\)\[1\]"),
    "objects": (np.array([0, 1, None] * 4), r"'u' as numbers, got object"),
    "complex": (np.arange(12) * 1j, "'u' as numbers, got complex128"),
    "masked": (np.ma.masked_equal(np.arange(12) % 3, 2), "u is a masked array that hides 4 of 12"),
    "infinite": (np.where(np.arange(12) == 5, np.inf, 0), "'u', which the prior takes, is NaN or infinite"),
}


@pytest.mark.parametrize("name", BAD_VARIABLES)
def test_variables_of_the_prior_are_refused(name):
    values, message = BAD_VARIABLES[name]
    with pytest.raises(ValueError, match=message):
        sp.read_prior(lambda u: None, {"u": values})
    with pytest.raises(ValueError, match=message):
        as_numbers("u", values)


def test_what_32_bits_hold_passes():
    for values in (
        TIMES - TIMES.mean(),
        0.1 * np.arange(5),
        np.full(3, 0.1),
        np.array([True]),
        np.arange(3, dtype=">i8"),
    ):
        found = as_numbers("u", values)
        assert found.dtype.isnative
        np.testing.assert_array_equal(found, values)


@pytest.mark.slow
def test_whole_numbers_that_the_program_never_saw_are_warned_of(tiny_program):
    prior = lambda u: numpyro.sample("z", dist.Normal(0.1 * u[:, None] * jnp.ones(2), 1).to_event(1))  # noqa: E731
    program = tiny_program().replace(prior=prior, given={"u": np.arange(12) % 3})
    data = xr.Dataset({"x": (("obs", "feature"), X), "u": ("obs", np.arange(12) % 3)})
    program.observations(data)
    placeholder = program.replace(given={"u": np.zeros(1, int)})
    placeholder.observations(data)  # of one value nothing follows
    for label, told in ((7, "from 7 to 7"), (-1, "from -1 to -1")):
        with pytest.warns(UserWarning, match=rf"'u' holds .*{told}, but .* from 0 to 2 \(given\)"):
            program.observations(data.assign(u=("obs", np.full(12, label))))
