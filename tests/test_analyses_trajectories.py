"""Curvature against angles known by geometry, its nulls, and the clips of moving disks."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
from numpyro import distributions as dist
import pytest
import xarray as xr

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


def test_curvature_is_the_mean_angle_and_the_cosine_its_other_form():
    """By arccos, on random points; a line 1, a polygon cos 360°/n."""
    points = np.random.default_rng(0).normal(size=(20, 7, 3))
    for one in points:
        v = np.diff(one, axis=0)
        cosine = [a @ b / np.linalg.norm(a) / np.linalg.norm(b) for a, b in itertools.pairwise(v)]
        assert analyses.curvature(one) == pytest.approx(np.degrees(np.arccos(cosine)).mean())
        assert analyses.mean_cosine(one) == pytest.approx(np.mean(cosine))
    assert analyses.mean_cosine(np.arange(5.0)[:, None] * [1, 2]) == pytest.approx(1)
    turn = 2 * np.pi * np.arange(8) / 7
    assert analyses.mean_cosine(np.stack([np.cos(turn), np.sin(turn)], 1)) == pytest.approx(np.cos(2 * np.pi / 7))


def test_nulls():
    """In 200 dimensions independent points have 120°, a random walk 90°, within a degree; each is not the other."""
    points = np.random.default_rng(0).normal(size=(50, 30, 200))
    assert analyses.curvature(points).mean() == pytest.approx(120, abs=1)
    assert analyses.curvature(points.cumsum(1)).mean() == pytest.approx(90, abs=1)
    assert analyses.mean_cosine(points).mean() == pytest.approx(-0.5, abs=0.01)
    assert analyses.mean_cosine(points.cumsum(1)).mean() == pytest.approx(0, abs=0.01)


@pytest.mark.slow
def test_straightness_of_linear_codes(program):
    """Codes linear in x: straight lines stay straight, random walks stay at 90°, and a circle is not straight."""
    rng = np.random.default_rng(1)
    start, way = rng.normal(size=(2, 40, 1, 6))
    time = np.arange(9)[:, None]
    key = jax.random.key(0)

    def mean(found, name, measure="curvature"):
        return float(found[measure].sel(trajectory=name).mean())

    lines = analyses.straightness(program, start + 0.5 * way * time, key=key)
    for name in ("pixels", "codes", "projected", "components"):
        assert float(lines.curvature.sel(trajectory=name).max()) < 0.1
        assert mean(lines, name, "cosine") == pytest.approx(1)
        # Along a line all steps are forth or back, and in random order two of three that follow each other turn.
        assert mean(lines, name, "shuffled") == pytest.approx(120, abs=8), "frames in random order are not straight"
    walks = analyses.straightness(program, rng.normal(size=(40, 9, 6)).cumsum(1), key=key)
    for name in ("pixels", "codes", "projected", "components", "walk"):
        assert mean(walks, name) == pytest.approx(90, abs=6)
    turn = 2 * np.pi * np.arange(9) / 8
    circle = np.stack([np.cos(turn), np.sin(turn)], 1) @ np.asarray(program.encoder.model.weights).T
    round_ = analyses.straightness(program, circle[None], key=key)
    assert mean(round_, "pixels") > 40, "negative control"
    assert mean(round_, "codes") > 40
    # Mean angle of independent points in two dimensions, by simulation of its own: near 120°, not at it.
    points = np.random.default_rng(2).normal(size=(4000, 9, 2))
    assert mean(lines, "independent") == pytest.approx(analyses.curvature(points).mean(), abs=8)
    assert len(analyses.plot_straightness(walks).axes[0].collections) == 6


@pytest.mark.slow
def test_straightness_of_several_programs(program):
    """Each by its name, all beside one set of nulls; components of stills that span the plane of a circle keep it."""
    key, turn = jax.random.key(0), 2 * np.pi * np.arange(9) / 8
    weights = np.linalg.qr(np.asarray(program.encoder.model.weights))[0]
    circle = np.stack([np.cos(turn), np.sin(turn)], 1) @ weights.T
    stills = np.random.default_rng(0).normal(size=(50, 2)) @ weights.T
    found = analyses.straightness({"a": program, "b": program}, circle[None], stills=stills, key=key)
    assert found.trajectory.values.tolist() == ["a", "b", "pixels", "components", "projected", "walk", "independent"]
    np.testing.assert_array_equal(found.curvature.sel(trajectory="a"), found.curvature.sel(trajectory="b"))
    for name in ("pixels", "components"):
        assert float(found.curvature.sel(trajectory=name)[0]) == pytest.approx(45, abs=1e-3)
    elsewhere = np.random.default_rng(1).normal(size=(50, 6)) @ (np.eye(6) - weights @ weights.T)
    blind = analyses.straightness(program, circle[None], stills=elsewhere, key=key)
    left = float(blind.curvature.sel(trajectory="components")[0])
    assert not abs(left - 45) < 1, "control: components that know nothing of the plane"
    # An ellipse is a circle where stills vary as it does; codes of one plane are then alike, whatever their axes.
    points = np.random.default_rng(2).normal(size=(50, 2))
    points = (points - points.mean(0)) @ np.linalg.inv(np.linalg.cholesky(np.cov(points.T))).T
    flatter = np.array([1, 0.3])
    ellipse, stills = (np.stack([np.cos(turn), np.sin(turn)], 1) * flatter) @ weights.T, (points * flatter) @ weights.T
    found = analyses.straightness(program, ellipse[None], stills=stills, key=key)
    for name in ("codes", "components"):
        assert float(found.whitened.sel(trajectory=name)[0]) == pytest.approx(45, abs=1e-2)
    assert abs(float(found.curvature.sel(trajectory="components")[0]) - 45) > 0.5, "control: axes as they are"
    assert np.isnan(found.whitened.sel(trajectory=["pixels", "walk"])).all()
    with pytest.raises(ValueError, match="stills must be like the frames"):
        analyses.straightness(program, circle[None], stills=stills[:, :4], key=key)
    with pytest.raises(ValueError, match="names other than pixels"):
        analyses.straightness({"pixels": program}, circle[None], key=key)


def made_up(videos, clips, between, within, seed=0):
    """What `straightness` might find, in many clips of each of some videos."""
    rng = np.random.default_rng(seed)
    means = between * rng.normal(size=(videos, 1))
    values = 60 + (means + within * rng.normal(size=(videos, clips))).ravel()
    measures = {name: (("trajectory", "clip"), np.stack([values, values + 20])) for name in ("curvature", "cosine")}
    measures["shuffled"] = measures["whitened"] = measures["cosine"]
    found = xr.Dataset(measures, coords={"trajectory": ["codes", "pixels"]})
    return found, np.repeat(np.arange(videos), clips)


def test_intervals_over_videos_and_clips():
    """Their width is that of a bootstrap in two stages in closed form; over clips alone it is too narrow."""
    found, video = made_up(8, 30, between=5, within=10)
    values = found.curvature.sel(trajectory="codes").values.reshape(8, 30)
    variance = values.mean(1).var() / 8 + values.var(1).mean() / (8 * 30)

    def width(found):
        row = analyses.straightness_table(found, resamples=4000, key=jax.random.key(0)).loc["codes"]
        assert row["curvature"] == pytest.approx(values.mean())
        assert row["straightening"] == pytest.approx(20)
        assert row["straightening_low"] == pytest.approx(20)
        return row["curvature_high"] - row["curvature_low"]

    expected = 2 * 1.96 * np.sqrt(variance)
    assert width(found.assign_coords(video=("clip", video))) == pytest.approx(expected, rel=0.08)
    assert width(found) == pytest.approx(2 * 1.96 * values.std() / np.sqrt(240), rel=0.06)
    assert width(found) < 0.6 * expected, "control: clips of one video are alike"


def test_clips_that_do_not_move_count_nothing():
    found, _ = made_up(1, 20, between=0, within=1)
    still = found.where(xr.DataArray(np.arange(20) > 4, dims="clip"))
    table = analyses.straightness_table(still, resamples=50, key=jax.random.key(0))
    assert table.loc["codes", "curvature"] == pytest.approx(float(still.curvature.sel(trajectory="codes").mean()))


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
