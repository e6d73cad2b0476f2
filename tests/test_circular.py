"""Factors that go round: bars, their scores, and the start of a code on a circle."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
from numpyro import distributions as dist
import pytest

from sami_ppl.analyses.scores import circular_figures
from sami_ppl.data import bars, render_bars, unrolled
from sami_ppl.fitting.components import start_codes
from sami_ppl.fitting.start import arrange
from sami_ppl.metrics import circular_correlation, largest_jump
from sami_ppl.priors.read import read_prior

RNG = np.random.default_rng(0)


def angle_and_light():
    numpyro.sample("light", dist.Normal(0, 1))
    numpyro.sample("angle", dist.VonMises(0.0, 1e-3))


def test_circular_correlation_in_closed_form():
    """±1 for turned and mirrored angles; for b = a + wrapped normal noise of variance v, e^(−2v), as both uniform."""
    a = RNG.uniform(-np.pi, np.pi, 200_000)
    assert circular_correlation(a, a + 1.3) == pytest.approx(1, abs=1e-12)
    assert circular_correlation(a, 0.4 - a) == pytest.approx(-1, abs=1e-12)
    noise = RNG.normal(size=len(a))
    for spread in (0.1, 0.5):
        expected = np.exp(-(spread**2))
        assert circular_correlation(a, a + spread * noise) == pytest.approx(expected, abs=0.01)
    assert abs(circular_correlation(a, RNG.permutation(a))) < 0.01, "negative control"
    assert circular_correlation(np.zeros(9), a[:9]) == 0


def test_largest_jump_tells_a_tear_from_a_circle():
    angle = RNG.uniform(0, 2 * np.pi, 5000)
    circle = np.stack([np.cos(angle), np.sin(angle)], 1)
    assert largest_jump(circle, angle) < 1.3
    assert largest_jump(np.mod(angle - 1, 2 * np.pi)[:, None], angle) > 20, "a tear"
    with pytest.raises(ValueError, match="bins of angles are empty"):
        largest_jump(circle[:10], angle[:10])


def test_wrong_angles_are_refused():
    with pytest.raises(ValueError, match=r"two lists of at least 3 angles of one length, got \(4,\) and \(5,\)"):
        circular_correlation(np.zeros(4), np.zeros(5))


@pytest.mark.slow
def test_bars_look_the_same_after_half_a_turn():
    theta = jnp.linspace(-1.5, 1.5, 7)
    images = render_bars(theta, -0.5, resolution=16)
    np.testing.assert_allclose(images, render_bars(theta + jnp.pi, -0.5, resolution=16), atol=1e-5)
    assert np.abs(images - render_bars(theta + jnp.pi / 2, -0.5, resolution=16)).max() > 1
    np.testing.assert_allclose(
        render_bars(0.0, -1.0, resolution=16)[0], render_bars(jnp.pi / 2, -1.0, resolution=16)[0].T, atol=1e-5
    )
    # Area of the bar: a rectangle with half a disk at each end, within a pixel's anti-aliasing.
    area = float(jnp.mean((render_bars(0.3, -1.0, resolution=64) + 1) / 2))
    assert area == pytest.approx(0.7 * 0.15 + np.pi * 0.075**2, rel=0.02)


def test_bars_are_uniform_and_know_their_period():
    data = bars(jax.random.key(0), 4000)
    assert data["angle"].attrs["period"] == pytest.approx(np.pi)
    assert abs(np.exp(2j * data["angle"].values).mean()) < 4 / 4000**0.5
    assert data["x"].dims == ("obs", "channel", "row", "column")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"n": 0}, "n must be at least 1"),
        ({"resolution": 1}, "at least 2 pixels"),
        ({"width": 0.9}, "0 < width < length <= 1"),
        ({"background": (0.5, -0.5)}, "background must be a range"),
    ],
)
def test_wrong_bars_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        bars(jax.random.key(0), **{"n": 5, **settings})


@pytest.mark.slow
def test_components_that_go_round_start_the_angle():
    """Of three components of blurred bars, the two that lie on a circle go to the angle, wherever that site stands."""
    data = bars(jax.random.key(0), 3000)
    latents = read_prior(angle_and_light)
    codes, count, _ = start_codes(data["x"].values, latents.size)
    assert count == 3
    codes = arrange(codes, latents, count)
    turn = 2 * data["angle"].values
    angle = np.arctan2(codes[:, latents.sites[1].code][:, 1], codes[:, latents.sites[1].code][:, 0])
    assert abs(circular_correlation(turn, angle)) > 0.9
    assert abs(np.corrcoef(codes[:, 0], data["background"].values)[0, 1]) > 0.9
    unit = latents.onto_support(jnp.asarray(codes))
    np.testing.assert_allclose(np.linalg.norm(unit[:, latents.sites[1].code], axis=1), 1, atol=1e-5)
    np.testing.assert_array_equal(unit[:, 0], codes[:, 0])


@pytest.mark.slow
def test_figures_of_a_factor_that_goes_round():
    """A code that turns with the bar, and one that does not: scores for the factor itself, not for its cosine."""
    data = bars(jax.random.key(0), 3000)
    turn = 2 * data["angle"].values
    names = ["angle", "background"]
    wide = unrolled(data, names)
    np.testing.assert_allclose(wide["cos_angle"], np.cos(turn), atol=1e-6)
    assert "period" not in wide["sin_angle"].attrs
    program = SimpleNamespace(latents=read_prior(angle_and_light))
    codes = np.stack([data["background"].values, np.cos(turn + 1), np.sin(turn + 1)], 1)
    found = circular_figures(program, codes, wide)
    assert found["circular_corr"] == {"angle": {"angle": pytest.approx(1, abs=1e-6)}}
    assert found["largest_jump"]["angle"]["angle"] < 1.5
    wrong = circular_figures(program, RNG.permutation(codes), wide)
    assert wrong["circular_corr"]["angle"]["angle"] < 0.1
    assert circular_figures(program, codes, data.drop_vars("angle")) == {}
