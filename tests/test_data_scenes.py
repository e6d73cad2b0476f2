"""Colour scenes of known factors, and the program on them."""

import jax
import numpy as np
from numpyro.infer import Predictive
import pytest

from sami_ppl.data import check_data, render_scenes, scenes
from sami_ppl.data.scenes import CAMERA, LAMP, SHAPES, TARGET, VIEW
from sami_ppl.saving.files import find, load_file

KEY = jax.random.key(0)
SIDE = 16
# Of the solids at scale 1: the height of their middle, and whether a point lies in them, seen from there.
INSIDE = {
    "cube": (0.8, lambda p: np.abs(p).max(-1) < 0.8),
    "cylinder": (0.9, lambda p: (np.hypot(p[..., 0], p[..., 1]) < 0.8) & (np.abs(p[..., 2]) < 0.9)),
    "sphere": (1.0, lambda p: np.linalg.norm(p, axis=-1) < 1),
    "capsule": (1.15, lambda p: np.linalg.norm(p - [[0, 0, 1]] * np.clip(p[..., 2:], -0.55, 0.55), axis=-1) < 0.6),
}


def hue_of(pixels):
    """The angle of a colour (3, ...) about grey."""
    third = 2 * np.pi / 3 * np.arange(3)
    return np.arctan2(np.tensordot(np.sin(third), pixels, 1), np.tensordot(np.cos(third), pixels, 1))


def shares(scale, shape, azimuth):
    """How much of the colours of floor, walls and object each pixel has: of three hues that are independent."""
    hues = 2 * np.pi / 3 * np.arange(3)
    colours = 0.5 + 0.5 * np.cos(hues[:, None] - hues)
    x = np.asarray(render_scenes(*hues, scale, shape, azimuth, resolution=SIDE), float)
    return np.tensordot(np.linalg.inv(colours.T), (x + 1) / 2, 1)


def camera(azimuth):
    """Where it is, and the directions (2 side, 2 side, 3) of the rays through a quarter of each pixel."""
    turn = azimuth + np.pi / 4
    rotation = np.array([[np.cos(turn), -np.sin(turn), 0], [np.sin(turn), np.cos(turn), 0], [0, 0, 1]])
    eye, target = rotation @ CAMERA, rotation @ TARGET
    ahead = (target - eye) / np.linalg.norm(target - eye)
    right = np.cross(ahead, [0, 0, 1]) / np.linalg.norm(np.cross(ahead, [0, 0, 1]))
    at = VIEW * (np.arange(2 * SIDE) - SIDE + 0.5) / SIDE
    rays = ahead + at[:, None] * right - at[:, None, None] * np.cross(right, ahead)
    return eye, rays / np.linalg.norm(rays, axis=-1, keepdims=True)


def test_scenes_are_a_valid_data_set():
    data = check_data(scenes(KEY, 300, resolution=8), event_shape=(3, 8, 8), batch=32)
    assert data["x"].dims == ("obs", "channel", "row", "column")
    assert data["x"].dtype == np.float32
    assert np.abs(data["x"]).max() <= 1
    for name in ("floor_hue", "wall_hue", "object_hue"):
        assert data[name].attrs == {"units": "radians", "period": 2 * np.pi}
        assert abs(np.exp(1j * data[name].values).mean()) < 4 / 300**0.5
    assert data["scale"].min() >= 0.7
    assert data["scale"].max() <= 1.3
    assert np.abs(data["azimuth"]).max() <= np.pi / 6
    assert np.bincount(data["shape"].values).min() > 300 / 4 - 4 * (300 * 3 / 16) ** 0.5
    # Correlations of 300 independent draws stay within 4.5 standard errors: p < 1e-4 for all fifteen.
    factors = np.stack([data[name].values for name in data.data_vars if name != "x"])
    assert np.abs(np.corrcoef(factors) - np.eye(6)).max() < 4.5 / 300**0.5
    np.testing.assert_array_equal(data["x"], scenes(KEY, 300, resolution=8)["x"])
    assert not np.array_equal(data["x"], scenes(jax.random.key(1), 300, resolution=8)["x"])


def test_every_hue_is_told_by_its_own_pixels():
    """Floor in the lower corners, walls in the upper ones, object in the middle, at every azimuth."""
    hues = np.random.default_rng(0).uniform(-np.pi, np.pi, (3, 20))
    azimuth = np.linspace(-np.pi / 6, np.pi / 6, 20)
    x = np.asarray(render_scenes(*hues, 1.0, np.arange(20) % 4, azimuth, resolution=SIDE)).transpose(1, 2, 3, 0)
    places = [(-1, 0), (0, 0), (SIDE // 2, SIDE // 2)]
    for hue, (row, column) in zip(hues, places, strict=True):
        np.testing.assert_allclose(np.exp(1j * hue_of(x[:, row, column])), np.exp(1j * hue), atol=1e-4)
    np.testing.assert_allclose(hue_of(x[:, -1, 0]), hue_of(x[:, -1, -1]), atol=1e-4)


def test_the_corner_of_the_room_is_seen_from_everywhere():
    """The walls are lit differently, and where the one becomes the other moves with the azimuth."""
    azimuth = np.linspace(-np.pi / 6, np.pi / 6, 9)
    top = np.asarray(render_scenes(0.0, 0.0, 0.0, 0.7, 0, azimuth, resolution=64))[:, 0, 0]
    edges = [np.flatnonzero(np.abs(np.diff(row)) > 0.05) for row in top]
    assert all(len(edge) in (1, 2) for edge in edges)
    places = np.array([edge.mean() for edge in edges])
    assert np.all(np.abs(np.diff(places)) > 2), "pixels"
    assert 3 < places.min() < places.max() < 60


def test_shape_changes_only_the_pixels_of_the_object():
    light = np.stack([shares(1.0, shape, 0.2) for shape in range(4)])
    seen = light[:, 2] > 1e-3
    for i, j in ((0, 1), (1, 2), (2, 3), (3, 0)):
        neither = ~(seen[i] | seen[j])
        np.testing.assert_allclose(light[i][:, neither], light[j][:, neither], atol=1e-6)
        assert (seen[i] ^ seen[j]).sum() >= 4


@pytest.mark.parametrize("shape", SHAPES)
def test_pixels_of_the_object_are_those_whose_rays_meet_it(shape):
    """Against points along each ray that lie in the solid, of which a ray that grazes it may have none."""
    azimuth, scale = 0.3, 1.2
    eye, rays = camera(azimuth)
    height, inside = INSIDE[shape]
    points = eye + np.linspace(5, 9, 1000)[:, None, None, None] * rays
    hit = inside(points / scale - [0, 0, height]).any(0).reshape(SIDE, 2, SIDE, 2).mean((1, 3))
    light = shares(scale, SHAPES.index(shape), azimuth)
    np.testing.assert_array_equal(light[2] > 1e-3, hit > 0)
    np.testing.assert_array_equal(light[:2].sum(0) > 1e-3, hit < 1)


def test_a_sphere_is_lit_as_the_closed_form_says():
    eye, rays = camera(-0.2)
    to_middle = eye - [0, 0, 1]
    along = -(rays @ to_middle)
    root = along**2 - to_middle @ to_middle + 1
    normal = to_middle + (along - np.sqrt(np.maximum(root, 0)))[..., None] * rays
    shade = np.where(root > 0, 0.35 + 0.65 * np.maximum(normal @ LAMP, 0), 0)
    light = shares(1.0, SHAPES.index("sphere"), -0.2)[2]
    np.testing.assert_allclose(light, shade.reshape(SIDE, 2, SIDE, 2).mean((1, 3)), atol=1e-3)


def test_objects_grow_with_their_scale():
    areas = [[(shares(s, shape, 0.0)[2] > 1e-3).sum() for s in (0.7, 1.0, 1.3)] for shape in range(4)]
    assert np.all(np.diff(areas, axis=1) > 0)


@pytest.mark.slow
def test_single_precision_everywhere(x64, strict):
    data = scenes(jax.random.key(0), 4, resolution=8)
    assert {v.dtype for n, v in data.items() if n != "shape"} == {np.dtype("float32")}
    assert data["shape"].dtype == np.int32


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n": 0}, "n must be at least 1 image, got 0"),
        ({"resolution": 1}, "resolution must be at least 2 pixels, got 1"),
    ],
)
def test_wrong_arguments_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        scenes(KEY, **{"n": 4, **options})


def test_prior_knows_of_each_factor_what_it_is():
    """And holds where the true ones lie: hues on circles, scales that are positive, one of four kinds, limits."""
    prior = load_file(find("scenes", "models")).kinds
    truth = scenes(KEY, 300, resolution=8)
    names = {"floor": "floor_hue", "wall": "wall_hue", "object": "object_hue", "scale": "scale", "azimuth": "azimuth"}
    draws = Predictive(prior, num_samples=2000)(KEY)
    assert set(draws) == {*names, "kind"}
    for site, factor in names.items():
        values = truth[factor].values
        assert np.all(prior.laws[site].support(values)), site
        # A scale of the prior may lie outside of the data's range, but not the other way round.
        assert draws[site].min() < values.min() + 0.05, site
        assert draws[site].max() > values.max() - 0.05, site
    assert draws["kind"].shape == (2000, len(SHAPES))
    assert np.bincount(np.argmax(draws["kind"], -1)).min() > 400, "of 2,000, in four kinds"


@pytest.mark.slow
@pytest.mark.parametrize("prior", ["normal", "factors"])
def test_program_is_built_with_the_prior_that_is_asked_for(prior):
    module = load_file(find("scenes", "models"))
    config = module.Config(prior=prior, latents=5, resolution=8, observations=40, network="mlp")
    data = module.load(config, key=KEY)
    program = module.build(config, data, key=KEY)
    assert program.event_shape == (3, 8, 8)
    names = {"normal": ["z"], "factors": ["floor", "wall", "object", "scale", "kind", "azimuth"]}[prior]
    assert [site.name for site in program.latents.sites] == names
    codes = program.encode(data)[0]
    assert codes.shape == (40, {"normal": 5, "factors": 3 * 2 + 1 + 3 + 1}[prior])
    assert np.isfinite(codes).all()
