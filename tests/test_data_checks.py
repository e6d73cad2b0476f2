"""Every fault of a data set gives its own message."""

import jax
import numpy as np
import pytest
import xarray as xr

from sami_ppl.data import check_data, labelled, split, train_test

IMAGE = ("obs", "channel", "row", "column")


def images(shape=(6, 1, 4, 4), dims=IMAGE, dtype=np.float32):
    return xr.Dataset({"x": (dims, np.random.default_rng(0).uniform(-1, 1, shape).astype(dtype))})


def with_value(value):
    data = images()
    data.x.values[2, 0, 1, 3] = value
    return data


def test_good_data_pass_unchanged():
    data = images().assign(size=("obs", np.arange(6)))
    xr.testing.assert_identical(check_data(data, event_shape=(1, 4, 4), batch=6), data)


def test_float64_becomes_float32():
    data = check_data(images(dtype=np.float64))
    assert data.x.dtype == np.float32
    xr.testing.assert_allclose(data, images())


def test_vectors_and_one_observation_pass():
    check_data(images((6, 3), ("obs", "feature")), event_shape=(3,))
    check_data(images((1, 1, 4, 4)))


def test_a_last_dim_of_three_passes_where_it_is_meant():
    check_data(images((6, 8, 8, 3)), event_shape=(8, 8, 3))


VALUE_ERRORS = {
    "no x": (images().rename(x="y"), {}, r"no variable 'x'.* its variables are 'y': write data.rename"),
    "x is a coordinate": (images().set_coords("x"), {}, r"no variable 'x'.* none"),
    "obs not first": (images().transpose(..., "obs"), {}, r"first dim of x must be 'obs'.*transpose\(\"obs\", ...\)"),
    "obs under another name": (
        images().rename(obs="n"),
        {},
        r"first dim of x .*rename\({\"n\": \"obs\"}\)",
    ),
    "obs only": (images((6,), ("obs",)), {}, r"x has the dim 'obs' only.*expand_dims"),
    "empty": (images((0, 1, 4, 4)), {}, r"x is empty: .*'obs': 0"),
    "event shape": (images(), {"event_shape": (1, 8, 8)}, r"shape \(1, 4, 4\), expected event_shape \(1, 8, 8\)"),
    "channels last": (images((6, 8, 8, 3)), {}, r"channels-last .*\(6, 8, 8, 3\).*transpose\(0, 3, 1, 2\)"),
    "small": (images(), {"batch": 7}, "x has 6 observations, fewer than a batch of 7"),
    "factor": (
        images().assign(size=("n", np.arange(3))),
        {},
        r"'size' must have 'obs'.*\('n',\).*drop_vars",
    ),
    "records": (
        images().assign(mark=("obs", np.zeros(6, [("id", "i4"), ("w", "f4")]))),
        {},
        r"'mark' holds records, .* a variable for each field, or data.drop_vars\(\"mark\"\)",
    ),
    "period": (
        images().assign(angle=("obs", np.zeros(6), {"period": "π"})),
        {},
        r"'angle' has attrs\['period'\] = 'π', expected a positive number",
    ),
    "name": (images().assign({"a/b": ("obs", np.zeros(6))}), {}, "a variable is called 'a/b', but .* without '/'"),
    "number as dim": (images().rename(row=1), {}, "a dim of variable 'x' is called 1, but"),
    "dim x": (images().rename(row="x"), {}, "a dim and a variable are both called 'x'"),
    "inf": (with_value(-np.inf), {}, "infinite at observation 2, .* of 1 values that are NaN or infinite"),
    "range": (images() * 255, {}, r"x has values from .* expected about unit scale.*at most 20"),
    "constant": (images() * 0, {}, "x has no spread: all observations are equal"),
    "all the same": (images().isel(obs=[0, 0, 0]), {}, "x has no spread"),
}


@pytest.mark.parametrize("case", VALUE_ERRORS)
def test_fault(case):
    data, options, message = VALUE_ERRORS[case]
    with pytest.raises(ValueError, match=message):
        check_data(data, **options)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ((images() * 100).astype(np.uint8), r"x must be floating point.*got uint8.*/ 127.5 - 1"),
        (images() > 0, "x must be floating point.*got bool"),
        (images().astype(np.complex64), "x must be floating point.*got complex64"),
    ],
)
def test_other_dtypes_are_refused(data, message):
    with pytest.raises(TypeError, match=message):
        check_data(data)


def test_dims_of_one_name_are_refused():
    with pytest.warns(UserWarning, match="Duplicate dimension"):
        data = xr.Dataset({"x": (("obs", "side", "side"), images().x.values[:, 0])})
    with pytest.raises(ValueError, match="dims of x must have different names"):
        check_data(data)


def test_split_is_random_disjoint_and_reproducible():
    data = images((50, 2), ("obs", "feature")).assign(index=("obs", np.arange(50)))
    train, test = train_test(split(data, test=0.3, key=jax.random.key(0)))
    assert (train.sizes["obs"], test.sizes["obs"]) == (35, 15)
    assert sorted([*train["index"].values, *test["index"].values]) == list(range(50))
    again = split(data, test=0.3, key=jax.random.key(0))
    xr.testing.assert_identical(train, train_test(again)[0])
    other = split(data, test=0.3, key=jax.random.key(1))
    assert not again.split.equals(other.split)
    check_data(again)


@pytest.mark.parametrize("as_coordinate", [True, False])
def test_a_given_split_is_kept(as_coordinate):
    labels = np.array(["test", "train", "train", "train", "train", "test"])
    data = images().assign(split=("obs", labels))
    data = data.set_coords("split") if as_coordinate else data
    done = split(data, key=jax.random.key(0))
    assert "split" in done.coords
    np.testing.assert_array_equal(done.split, labels)
    assert train_test(done)[1].sizes["obs"] == 2


def test_split_errors():
    key = jax.random.key(0)
    for test in (0.0, 1.0, 0.99):
        with pytest.raises(ValueError, match=r"test must be a share in \(0, 1\) that fills both parts of 6"):
            split(images(), test=test, key=key)
    with pytest.raises(ValueError, match=r"split must label each obs .*\['train', 'valid'\]"):
        split(images().assign_coords(split=("obs", ["train"] * 5 + ["valid"])), key=key)
    for labels in (np.zeros(6, "f4,i4"), np.array([b"\xff"] * 6), np.full((6, 2), "train")):
        odd = images().assign_coords(split=(("obs", "twice")[: labels.ndim], labels))
        with pytest.raises(ValueError, match="split must label each obs"):
            split(odd, key=key)
    with pytest.raises(ValueError, match=r"no coordinate 'split': write data = split\("):
        train_test(images())


def test_labels_are_told_of_training_observations_only():
    data = split(xr.Dataset({"x": (("obs", "feature"), np.zeros((5000, 1)))}), test=0.4, key=jax.random.key(0))
    train = data["split"].values == "train"
    found = labelled(data, 0.1, key=jax.random.key(1))
    assert not found[~train].any()
    assert 225 < found.sum() < 375  # 300 expected, standard deviation 16
    assert np.array_equal(labelled(data, 1.0, key=jax.random.key(1)), train)
    with pytest.raises(ValueError, match=r"\[0, 1\], got 5"):
        labelled(data, 5, key=jax.random.key(1))
    with pytest.raises(ValueError, match="split"):
        labelled(data.drop_vars("split"), 0.1, key=jax.random.key(1))
