"""The network of others that docs/diffusers.md wraps, against what their own code computes.

That is in `tests/data/psdenoiser`, which `benchmarks/export_foreign.py` made: of a tiny network, whose random weights
are beside it, and of the published one, whose weights are those of an installed 21cmPSDenoiser.
"""

from importlib.util import find_spec
from pathlib import Path
import re

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sami_ppl as sp

FOLDER = Path(__file__).parent / "data" / "psdenoiser"
PAGE = Path(__file__).parents[1] / "docs" / "diffusers.md"
PUBLISHED = find_spec("psdenoiser")  # of a folder; nothing of it is imported


@pytest.fixture(scope="module")
def page():
    """The names that the page's network and adapter define."""
    names: dict = {"jax": jax, "np": np, "sp": sp}
    for block in re.findall(r"```python\n(.*?)```", PAGE.read_text(), flags=re.DOTALL):
        if re.search(r"^class ", block, flags=re.MULTILINE):
            exec(compile(block, str(PAGE), "exec"), names)
    return names


def compare(page, file, golden):
    """Noise, score and bottom map at every time, to 1e-4; the largest difference of ε̂."""
    arrays, golden = page["their_arrays"](file), dict(np.load(golden))
    call = eqx.filter_jit(lambda denoiser, x, log_snr: (denoiser(x, log_snr), denoiser.bottleneck(x, log_snr)))
    differences = []
    for i, t in enumerate(golden["t"].astype(np.float64)):
        decay = 0.1 * t + 19.9 * t**2 / 2
        condition = jnp.asarray(golden["condition"][i])
        denoiser = page["Cleaner"](page["TheirUNet"](arrays, condition), condition.shape)
        log_snr = jnp.asarray(-np.log(np.expm1(decay)), jnp.float32)
        eps_hat, bottom = call(denoiser, jnp.asarray(golden["x"][i]), log_snr)
        np.testing.assert_allclose(eps_hat, golden["eps"][i], rtol=0, atol=1e-4)
        np.testing.assert_allclose(
            -eps_hat / denoiser.schedule.sigma(log_snr), golden["score"][i], rtol=1e-3, atol=1e-3
        )
        np.testing.assert_allclose(bottom.transpose(2, 0, 1), golden["bottom"][i], rtol=1e-3, atol=1e-3)
        differences.append(float(np.abs(eps_hat - golden["eps"][i]).max()))
    return max(differences)


@pytest.mark.slow
def test_a_tiny_network_is_theirs(page):
    compare(page, FOLDER / "denoiser_model.pt", FOLDER / "outputs.npz")


@pytest.mark.slow
@pytest.mark.skipif(PUBLISHED is None, reason="needs the weights of: pip install --no-deps 21cmpsdenoiser==1.0.2")
def test_the_published_network_is_theirs(page):
    (folder,) = PUBLISHED.submodule_search_locations
    print(compare(page, Path(folder) / "denoiser_model.pt", FOLDER / "trained.npz"))


def test_times_are_those_of_their_noise_levels(page):
    t = np.geomspace(1e-3, 1, 50)
    log_snr = -np.log(np.expm1(0.1 * t + 19.9 * t**2 / 2))
    np.testing.assert_allclose(page["their_time"](jnp.asarray(log_snr, jnp.float32)), 999 * t, rtol=1e-5)
    # The schedule reaches from one end of their sampler to the other.
    field = page["Cleaner"].__dataclass_fields__["schedule"].default
    np.testing.assert_allclose([field.log_snr_max, field.log_snr_min], log_snr[[0, -1]], atol=0.02)
