"""Augmentation: every image is moved and mirrored by itself, evenly, in training and nowhere else."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
from numpyro import distributions as dist
import pytest

import sami_ppl as sp
from sami_ppl.data import augmented
from sami_ppl.fitting.step import Batch, Fit

KEY = jax.random.key(0)
IMAGES = np.random.default_rng(0).normal(size=(40, 2, 5, 6)).astype(np.float32)


def test_nothing_named_is_nothing_done():
    np.testing.assert_array_equal(augmented()(KEY, jnp.asarray(IMAGES)), IMAGES)


def test_shifts_are_those_of_the_padded_image_and_all_come_up_evenly():
    """Each is one of the nine windows of an image padded by one; of 4,000 each window has its share to five sd."""
    one = np.repeat(IMAGES[:1], 4000, axis=0)
    found = np.asarray(augmented(shift=1)(KEY, jnp.asarray(one)))
    wide = np.pad(IMAGES[0], ((0, 0), (1, 1), (1, 1)), mode="edge")
    windows = np.stack([wide[:, i : i + 5, j : j + 6] for i in range(3) for j in range(3)])
    counts = (found[:, None] == windows[None]).all((2, 3, 4)).sum(0)
    assert counts.sum() == 4000
    np.testing.assert_allclose(counts, 4000 / 9, atol=5 * np.sqrt(4000 * 8 / 81))


@pytest.mark.parametrize(("flip", "axes"), [("horizontal", (3,)), ("vertical", (2,)), ("both", (2, 3))])
def test_flips_are_the_named_ones_and_half_of_the_images(flip, axes):
    """Of 4,000 images each combination of the named axes has its share to five sd; no other image comes up."""
    one = np.repeat(IMAGES[:1], 4000, axis=0)
    found = np.asarray(augmented(flip=flip)(KEY, jnp.asarray(one)))
    turns = [(), *((axis,) for axis in axes), *([axes] if len(axes) == 2 else [])]
    wanted = np.stack([np.flip(one[0], [a - 1 for a in turn]) for turn in turns])
    counts = (found[:, None] == wanted[None]).all((2, 3, 4)).sum(0)
    share = 1 / len(turns)
    assert counts.sum() == 4000
    np.testing.assert_allclose(counts, 4000 * share, atol=5 * np.sqrt(4000 * share * (1 - share)))


def test_what_cannot_be_is_refused():
    with pytest.raises(ValueError, match="shift must be a whole number of pixels of at least 0, got -1"):
        augmented(shift=-1)
    with pytest.raises(ValueError, match="flip must be one of none, horizontal, vertical, both, got 'left'"):
        augmented(flip="left")
    with pytest.raises(ValueError, match="augment is for single images"):
        augmented(flip="both").check((5,), ("feature",))
    with pytest.raises(ValueError, match="augment is for single images"):
        augmented(flip="both").check((9, 1, 8, 8), ("time", "channel", "row", "column"))
    with pytest.raises(ValueError, match="shift must be below the image's sides"):
        augmented(shift=8).check((1, 8, 8), ("channel", "row", "column"))


@pytest.mark.slow
def test_a_step_sees_images_moved_and_validation_as_they_are():
    """A step is that of the images moved beforehand by the same key, and not that of the images as they are."""
    x = np.random.default_rng(1).normal(size=(32, 1, 8, 8)).astype(np.float32)
    prior = sp.factors(z=dist.Normal(0, 1).expand([2]))
    program = sp.autoencoder(prior, x, network="mlp", size={"width": 8, "depth": 1}, key=KEY, progress=False)
    stage = sp.Stage(steps=4, batch=32, warmup=1, target="marginal", augment=augmented(shift=2, flip="both"))
    rows, data = np.arange(32)[None], Batch(jnp.asarray(x), {})
    seen = {}

    class Spy(type(stage.augment)):
        def __call__(self, key, images):
            moved = super().__call__(key, images)
            jax.debug.callback(lambda moved: seen.update(x=np.asarray(moved)), moved)
            return moved

    spied = Fit(program, replace(stage, augment=Spy(2, "both")), steps=4)
    state = spied.init(KEY, data)
    after, losses = spied.run_block(state, data.steps(rows))
    jax.effects_barrier()
    assert not np.array_equal(seen["x"], x)
    plain = Fit(program, replace(stage, augment=None), steps=4)
    _, same = plain.run_block(plain.init(KEY, data), Batch(jnp.asarray(seen["x"]), {}).steps(rows))
    _, other = plain.run_block(plain.init(KEY, data), data.steps(rows))
    assert losses[0] == pytest.approx(same[0], rel=1e-5)
    assert losses[0] != pytest.approx(other[0], rel=1e-5)
    params = after.average
    assert spied.record(params, data, KEY)["loss"] == pytest.approx(plain.record(params, data, KEY)["loss"], rel=1e-6)
    with pytest.raises(ValueError, match="augment is for single images"):
        sp.fit(sp.autoencoder(prior, x[:, 0, 0], key=KEY, progress=False), x[:, 0, 0], stage, key=KEY, progress=False)
