"""Curvature against angles known by geometry, its nulls, and the clips of moving disks."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
from numpyro import distributions as dist
import pytest

from sami_ppl import analyses
from sami_ppl.data import moving_disks, render
from sami_ppl.decoders.exact import LinearGaussian
from sami_ppl.diffusion.schedule import VariancePreserving
from sami_ppl.program.program import Program


def prior():
    numpyro.sample("z", dist.Normal(0.0, 1.0).expand([2]).to_event(1))


@pytest.fixture(scope="module")
def program():
    weights = np.linalg.qr(np.random.default_rng(0).normal(size=(6, 2)))[0] * [2.0, 1.0]
    model = LinearGaussian(jnp.asarray(weights, jnp.float32), 0.3, VariancePreserving(-8.0, 8.0))
    return Program(prior, model.denoiser, model.encoder)


def test_curvature_by_geometry():
    """A line 0°, a zigzag 90°, a way there and back 180°, a regular polygon 360°/n."""
    line = np.arange(5)[:, None] * np.array([1.0, -2.0, 0.5])
    assert analyses.curvature(line) < 1e-5
    assert analyses.curvature([[0, 0], [1, 0], [1, 1], [2, 1]]) == pytest.approx(90)
    assert analyses.curvature([[0.0], [1.0], [0.0], [1.0]]) == pytest.approx(180)
    for n in (5, 12):
        turn = 2 * np.pi * np.arange(n + 1) / n
        assert analyses.curvature(np.stack([np.cos(turn), np.sin(turn)], 1)) == pytest.approx(360 / n)


def test_frames_that_stand_still_are_left_out():
    """A line with pauses is a line; one that never moves has no curvature."""
    line = np.array([0, 1, 1, 1, 2, 3, 3])[:, None] * np.array([1.0, 2.0])
    assert analyses.curvature(line) == pytest.approx(0, abs=1e-5)
    assert np.isnan(analyses.curvature(np.zeros((4, 2))))
    many = analyses.curvature(np.stack([line, np.zeros_like(line)]))
    assert many.shape == (2,)
    assert np.isnan(many).tolist() == [False, True]


def test_curvature_is_the_mean_angle():
    """By arccos, on random points."""
    points = np.random.default_rng(0).normal(size=(20, 7, 3))
    for one in points:
        v = np.diff(one, axis=0)
        cosine = [a @ b / np.linalg.norm(a) / np.linalg.norm(b) for a, b in itertools.pairwise(v)]
        assert analyses.curvature(one) == pytest.approx(np.degrees(np.arccos(cosine)).mean())


def test_nulls():
    """In 200 dimensions independent points have 120°, a random walk 90°, within a degree; each is not the other."""
    points = np.random.default_rng(0).normal(size=(50, 30, 200))
    assert analyses.curvature(points).mean() == pytest.approx(120, abs=1)
    assert analyses.curvature(points.cumsum(1)).mean() == pytest.approx(90, abs=1)


@pytest.mark.slow
def test_straightness_of_linear_codes(program):
    """Codes linear in x: straight lines stay straight, random walks stay at 90°, and a circle is not straight."""
    rng = np.random.default_rng(1)
    start, way = rng.normal(size=(2, 40, 1, 6))
    time = np.arange(9)[:, None]
    key = jax.random.key(0)
    lines = analyses.straightness(program, start + 0.5 * way * time, key=key)
    for name in ("pixels", "codes", "projected"):
        assert float(lines[name].max()) < 0.1
    walks = analyses.straightness(program, rng.normal(size=(40, 9, 6)).cumsum(1), key=key)
    for name in ("pixels", "codes", "projected", "walk"):
        assert float(walks[name].mean()) == pytest.approx(90, abs=6)
    np.testing.assert_allclose(walks["straightening"], walks["pixels"] - walks["codes"])
    turn = 2 * np.pi * np.arange(9) / 8
    circle = np.stack([np.cos(turn), np.sin(turn)], 1) @ np.asarray(program.encoder.model.weights).T
    round_ = analyses.straightness(program, circle[None], key=key)
    assert float(round_["pixels"][0]) > 40, "negative control"
    assert float(round_["codes"][0]) > 40
    # Mean angle of independent points in two dimensions, by simulation of its own: near 120°, not at it.
    points = np.random.default_rng(2).normal(size=(4000, 9, 2))
    assert float(lines["independent"].mean()) == pytest.approx(analyses.curvature(points).mean(), abs=8)
    assert len(analyses.plot_straightness(walks).axes[0].collections) == 5


@pytest.mark.slow
def test_bad_clips(program):
    key = jax.random.key(0)
    clips = np.random.default_rng(0).normal(size=(3, 5, 6))
    with pytest.raises(ValueError, match=r"clips must have shape \(clip, frame, 6\).*add the leading dim: clips\[None"):
        analyses.straightness(program, clips[0], key=key)
    with pytest.raises(ValueError, match="clips must have shape"):
        analyses.straightness(program, clips[..., :4], key=key)
    with pytest.raises(ValueError, match="an angle takes 3 frames"):
        analyses.straightness(program, clips[:, :2], key=key)
    with pytest.raises(ValueError, match="all axes have collapsed"):
        analyses.straightness(program, np.zeros((2, 4, 6)), key=key)


@pytest.mark.slow
def test_moving_disks_move_straight_and_bounce():
    """Frames are those of `render`; steps have length `speed` but where the disk bounces, and it stays inside."""
    clips = moving_disks(jax.random.key(0), 80, frames=8, speed=0.03, resolution=8)
    assert clips["x"].shape == (80, 8, 1, 8, 8)
    a, b, sky = (clips[name].values for name in ("centre_x", "centre_y", "background"))
    np.testing.assert_allclose(clips["x"].values[:, 3], render(a[:, 3], b[:, 3], sky, resolution=8), atol=1e-6)
    for place in (a, b):
        assert place.min() >= 0.2 - 1e-6
        assert place.max() <= 0.8 + 1e-6
    places = np.stack([a, b], -1)
    length = np.linalg.norm(np.diff(places, axis=1), axis=-1)
    assert np.all(length < 0.03 + 1e-5)
    free = np.all((places > 0.23) & (places < 0.77), axis=(1, 2))  # clips too far from the ends to bounce
    assert 10 <= free.sum() <= 70
    np.testing.assert_allclose(length[free], 0.03, rtol=1e-3)
    assert analyses.curvature(places[free]).max() < 0.1
    assert analyses.curvature(places[~free]).max() > 5, "bouncing clips are bent"
    still = moving_disks(jax.random.key(0), 2, speed=0.0, resolution=8)
    assert np.ptp(still["x"].values, axis=1).max() == 0


@pytest.mark.parametrize("wrong", [{"frames": 1}, {"speed": -1.0}, {"centre": (0.5, 1.5)}])
def test_moving_disks_refuse(wrong):
    with pytest.raises(ValueError, match=r"frames must be at least 2|centre must be a range"):
        moving_disks(jax.random.key(0), 2, **wrong)
