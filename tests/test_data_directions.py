"""Images whose factors are directions: bars on ramps, a torus, and lit balls, a sphere."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sami_ppl.data import lit_balls, ramps, render_balls, render_ramps
from sami_ppl.fitting.components import start_codes
from sami_ppl.fitting.start import arrange
from sami_ppl.metrics import circular_correlation
from sami_ppl.priors.read import read_prior
from sami_ppl.saving.files import find, load_file

KEY = jax.random.key(0)


def test_ramps_have_the_periods_they_say():
    """Half a turn is none for the bar and the opposite for the ramp."""
    bar, ramp = jnp.linspace(-1.5, 1.5, 7), jnp.linspace(-3, 3, 7)
    images = np.asarray(render_ramps(bar, ramp))
    np.testing.assert_allclose(images, render_ramps(bar + jnp.pi, ramp), atol=1e-5)
    np.testing.assert_allclose(images, render_ramps(bar, ramp + 2 * jnp.pi), atol=1e-5)
    turned = np.asarray(render_ramps(bar + jnp.pi, ramp + jnp.pi))
    np.testing.assert_allclose(turned, images[..., ::-1, ::-1], atol=1e-5)
    assert np.abs(images - render_ramps(bar, ramp + jnp.pi)).max() > 0.5
    data = ramps(KEY, 4000)
    for name, period in (("bar", np.pi), ("ramp", 2 * np.pi)):
        assert data[name].attrs["period"] == pytest.approx(period)
        assert np.abs(data[name]).max() <= period / 2
        assert abs(np.exp(2j * np.pi * data[name].values / period).mean()) < 4 / 4000**0.5
    assert float(data["x"].min()) >= -1
    assert float(data["x"].max()) <= 1


def test_background_of_a_ramp_grows_in_its_direction():
    corner = np.asarray(render_ramps(jnp.pi / 2, 0.0, resolution=16))[0, :, [0, 15]]  # columns at both ends
    assert corner[1] - corner[0] == pytest.approx(0.7 * 15 / 16, abs=1e-5), "0.7 a side"
    np.testing.assert_allclose(
        render_ramps(0.0, jnp.pi / 2)[0], np.asarray(render_ramps(jnp.pi / 2, 0.0))[0].T, atol=1e-5
    )


def test_balls_are_lit_as_the_formula_says():
    """At the middle pixel the normal points to the viewer; a ball turned is the image turned."""
    front, back, side = np.eye(3)[2], -np.eye(3)[2], np.array([1.0, 0.0, 0.0])
    images = np.asarray(render_balls(np.stack([front, back, side]), resolution=15))[:, 0]
    assert images[:, 7, 7] == pytest.approx([1, -1, -1 + 2 * 0.25], abs=1e-5)
    assert np.all(images[:, 0, 0] == -1)
    np.testing.assert_allclose(render_balls(np.array([0.0, 1.0, 0.0]), resolution=15)[0], images[2].T, atol=1e-5)
    assert images[2, 7, 12] > images[2, 7, 7] > images[2, 7, 2], "brighter to the right"


def test_light_is_uniform_on_the_sphere():
    data = lit_balls(KEY, 4000)
    light = np.stack([data[name].values for name in ("light_x", "light_y", "light_z")], 1)
    np.testing.assert_allclose(np.linalg.norm(light, axis=1), 1, atol=1e-5)
    assert np.abs(light.mean(0)).max() < 4 / (3 * 4000) ** 0.5
    assert np.abs(light.T @ light / 4000 - np.eye(3) / 3).max() < 0.03
    assert float(data["x"].min()) == -1


@pytest.mark.parametrize("make", [ramps, lit_balls])
def test_wrong_arguments_are_refused(make):
    with pytest.raises(ValueError, match="n must be at least 1 image, got 0"):
        make(KEY, 0)
    with pytest.raises(ValueError, match="at least 2 pixels, got 1"):
        make(KEY, 5, resolution=1)


@pytest.mark.slow
def test_components_start_both_angles():
    """Of four components of blurred images the right pairs go to the two angles."""
    latents = read_prior(load_file(find("ramps", "models")).torus)
    data = ramps(KEY, 3000)
    codes, count, _ = start_codes(data["x"].values, latents.size)
    assert count == 4
    codes = arrange(codes, latents, count)
    found = [np.arctan2(*codes[:, site.code].T[::-1]) for site in latents.sites]
    turns = [2 * data["bar"].values, data["ramp"].values]
    corr = np.abs([[circular_correlation(turn, angle) for angle in found] for turn in turns])
    assert corr.max(0) == pytest.approx([1, 1], abs=0.01)
    assert corr.min() < 0.05


@pytest.mark.slow
def test_components_start_the_direction():
    latents = read_prior(load_file(find("lit_ball", "models")).sphere)
    data = lit_balls(KEY, 3000)
    codes, count, _ = start_codes(data["x"].values, latents.size)
    assert count == 3
    codes = arrange(codes, latents, count)
    unit = np.asarray(latents.onto_support(jnp.asarray(codes)))
    light = np.stack([data[name].values for name in ("light_x", "light_y", "light_z")], 1)
    turn = np.linalg.lstsq(unit, light, rcond=None)[0]
    assert np.linalg.norm(turn.T @ turn - np.eye(3)) < 0.3, "an isometry, nearly"
    assert np.corrcoef((unit @ turn).ravel(), light.ravel())[0, 1] > 0.98
