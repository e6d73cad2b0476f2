"""Times as people have them, dates in days or seconds, are processes of their differences."""

import numpy as np
import pytest

from sami_ppl.distributions.matern import Matern


@pytest.mark.parametrize(("start", "step"), [(2_460_000.5, 0.01), (1_700_000_000.0, 1.0)], ids=["julian", "unix"])
def test_dates_have_the_density_of_the_times_since_the_first(start, step):
    times = np.arange(6) * step
    z = np.random.default_rng(0).normal(size=(6, 1)).astype(np.float32)
    wanted = Matern(times, 2 * step).log_prob(z)
    np.testing.assert_allclose(Matern(start + times, 2 * step).log_prob(z), wanted, rtol=1e-3)


def test_whole_seconds_are_times_too():
    z = np.zeros((3, 1), np.float32)
    seconds = 1_700_000_000 + np.arange(3)
    np.testing.assert_allclose(Matern(seconds, 2.0).log_prob(z), Matern(np.arange(3), 2.0).log_prob(z), rtol=1e-6)


def test_times_whose_differences_are_lost_are_refused():
    with pytest.raises(ValueError, match=r"float32 up to 1\.7e\+09.*np\.asarray\(times, float\)"):
        Matern((1_700_000_000 + 128.0 * np.arange(4)).astype(np.float32), 100.0)
    with pytest.raises(ValueError, match="which 32 bits do not hold"):
        Matern(np.array([0.0, 1e9, 1e9 + 1]), 100.0)
