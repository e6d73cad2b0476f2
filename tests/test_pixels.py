"""8-bit images: the last term of the bound as a table, the bins of a Gaussian, and bits per dimension of programs."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
from numpyro import distributions as dist
import pytest
from scipy import integrate, stats
import xarray as xr

import sami_ppl as sp
from sami_ppl.diffusion.schedule import VariancePreserving
from sami_ppl.evidence import bits_per_dim
from sami_ppl.evidence.pixels import bin_log_prob, pixel_values, reconstruction_table, value_table

KEY = jax.random.key(0)
BYTES = np.random.default_rng(0).integers(0, 256, (40, 1, 8, 8)).astype(np.uint8)


@pytest.mark.parametrize("log_snr_max", [1.0, 4.0, 8.0, 12.0])
@pytest.mark.parametrize("values", [2, 4, 16])
def test_the_table_is_the_integral_over_the_noise(log_snr_max, values):
    """By SciPy's adaptive quadrature of the density of y, value by value."""
    noise, grid = np.exp(-0.5 * log_snr_max), pixel_values(values)

    def surprise(y, v):
        weights = stats.norm.pdf(y, grid, noise)
        if (total := weights.sum()) == 0 or (own := stats.norm.pdf(y, v, noise)) == 0:
            return 0.0
        return -own * np.log(own / total)

    found = reconstruction_table(VariancePreserving(-6.0, log_snr_max), values)
    for i, v in enumerate(grid):
        edges = np.clip([v - 2 / (values - 1), v, v + 2 / (values - 1)], v - 9 * noise, v + 9 * noise)
        want = integrate.quad(surprise, v - 9 * noise, v + 9 * noise, (v,), points=edges, limit=400)[0]
        assert found[i] == pytest.approx(want, abs=2e-4), i


def test_the_table_at_its_ends():
    """Without noise nothing is left to tell; in much of it the values of the grid, all alike: log 256."""
    assert reconstruction_table(VariancePreserving(-6.0, 16.0)).max() < 1e-6
    np.testing.assert_allclose(reconstruction_table(VariancePreserving(-20.0, -16.0)), np.log(256), atol=1e-3)
    # Noise of many steps: a density's term less the logarithm of a step, inside of the range.
    at_six = reconstruction_table(VariancePreserving(-6.0, 6.0))[128]
    assert at_six == pytest.approx(0.5 * (np.log(2 * np.pi * np.e) - 6) - np.log(2 / 255), abs=1e-6)


@pytest.mark.parametrize("std", [0.003, 0.1, 3.0])
def test_bins_are_what_a_normal_has_in_them(std):
    """By SciPy's distribution function; they sum to 1, however far the mean lies."""
    grid = pixel_values()
    for mean in (-1.4, -0.2, 0.0, 0.9):
        edges = np.concatenate([[-np.inf], (grid[1:] + grid[:-1]) / 2, [np.inf]])
        want = np.diff(stats.norm.cdf(edges, mean, std))
        found = np.asarray(bin_log_prob(jnp.asarray(grid, jnp.float32), jnp.full(256, mean), jnp.asarray(std)))
        assert np.isfinite(found).all()
        assert np.exp(found).sum() == pytest.approx(1, abs=2e-3)
        np.testing.assert_allclose(np.exp(found), want, atol=2e-4, rtol=2e-2)


@pytest.mark.slow
@pytest.mark.parametrize("decoder", ["guided", "gaussian"])
def test_bits_of_noise_are_eight_at_least(decoder):
    """Bytes that are all alike cost 8 bits, by any model; bytes and scaled floats are the same data."""
    prior = sp.factors(z=dist.Normal(0, 1).expand([2]))
    size = {"width": 8, "depth": 1}
    schedule = VariancePreserving(-6.0, 12.0)
    program = sp.autoencoder(
        prior, BYTES, decoder=decoder, network="mlp", size=size, schedule=schedule,
        predict="noise" if decoder == "guided" else None, key=KEY, progress=False,
    )  # fmt: skip
    found = bits_per_dim(program, BYTES, key=KEY)
    assert found["mean"] + 3 * found["se"] > 8
    assert found["mean"] < 12
    scaled = bits_per_dim(program, BYTES / np.float32(127.5) - 1, key=KEY)
    assert scaled["mean"] == pytest.approx(found["mean"], rel=1e-5)
    with pytest.raises(ValueError, match="must be 8-bit images"):
        bits_per_dim(program, BYTES / np.float32(127.5) - 1.001, key=KEY)


@pytest.mark.slow
def test_bits_of_a_gaussian_are_those_of_its_bins():
    """By hand, of a program whose prior takes a variable: KL and the mass of the bins at many draws of the code."""

    def prior(place):
        numpyro.sample("z", dist.Normal(place, 1.0).expand([2]).to_event(1))

    data = xr.Dataset({"x": (("obs", "channel", "row", "column"), BYTES), "place": ("obs", np.linspace(-1, 1, 40))})
    program = sp.autoencoder(
        prior, data, decoder="gaussian", network="mlp", size={"width": 8, "depth": 1}, key=KEY, progress=False
    )
    found = bits_per_dim(program, data, key=KEY, levels=64)
    law = program.code_law(jnp.asarray(BYTES / 127.5 - 1, jnp.float32), {"place": jnp.linspace(-1, 1, 40)})
    z, x = law.sample(jax.random.key(1), (64,)), BYTES / 127.5 - 1
    edges = lambda side: np.where(side * x > 1 - 1 / 255, side * np.inf, x + side / 255)  # noqa: E731
    masses = []
    for codes in z:
        decoders = [program.decoder(code) for code in codes]
        mean, std = np.stack([d.mean for d in decoders]), float(decoders[0].std)
        masses.append(
            -np.log(stats.norm.cdf(edges(1), mean, std) - stats.norm.cdf(edges(-1), mean, std)).sum((1, 2, 3))
        )
    kl = sp.evidence_bound(program, data, key=KEY)["kl"].sum("site").values
    assert found["mean"] == pytest.approx(np.mean(np.mean(masses, 0) + kl) / (64 * np.log(2)), rel=5e-3)


def test_a_counted_table_is_the_law_of_the_values():
    """Of values that are the denoised one + 3 or + 9 alike it has nearly their bit; rows without a count are flat."""
    rng = np.random.default_rng(0)
    index = rng.integers(40, 200, (2000, 50))
    table = value_table(pixel_values()[index], index + rng.choice([3, 9], index.shape))
    np.testing.assert_allclose(table.sum(1), 1, rtol=1e-9)
    assert table.min() >= 0.01 / 256
    row = table[100]
    # Half of the counts are where they were, half smoothed over neighbours that have them beside their own.
    assert 0.5 < row[[103, 109]].sum() < 0.7
    np.testing.assert_allclose(table[255], 1 / 256, rtol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("decoder", ["guided", "gaussian"])
def test_told_from_denoised_values_bits_are_still_a_bound(decoder):
    """Bytes that are 0 or 255 alike cost a bit, and a table says so where noise of many steps does not."""
    data = (np.random.default_rng(1).integers(0, 2, (300, 1, 8, 8)) * 255).astype(np.uint8)
    program = sp.autoencoder(
        sp.factors(z=dist.Normal(0, 1).expand([2])), data, decoder=decoder, network="mlp",
        size={"width": 8, "depth": 1}, schedule=VariancePreserving(-6.0, 1.0), key=KEY, progress=False,
    )  # fmt: skip
    if decoder == "gaussian":  # its own noise is the spread of the data, and the first bins hold half of it
        plain, told = (bits_per_dim(program, data[200:], key=KEY, train=t) for t in (None, data[:200]))
        assert 1 < told["mean"] < 1.6 < plain["mean"]
        return
    # A denoiser that says at λmax what the noisy value says: at α/σ = e^½ that is not much.
    plain, told = (bits_per_dim(program, data[200:], key=KEY, train=t) for t in (None, data[:200]))
    assert told["mean"] > 1
    assert told["mean"] < plain["mean"]
