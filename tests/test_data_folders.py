"""Folders of images of every kind: sizes, colours, classes, parts, faults; and CelebA's, with its lists."""

import numpy as np
from PIL import Image
import pytest

from sami_ppl._util.progress import telling
from sami_ppl.data import check_data, factor_names, load_data

RNG = np.random.default_rng(0)


def noise(height, width, *channels, dtype=np.uint8):
    return RNG.integers(0, np.iinfo(dtype).max, (height, width, *channels), dtype=dtype)


def save(path, array, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path, **options)
    return path


def scaled(x, top=255):
    return x.astype(np.float32) * 2 / top - 1


def test_the_shorter_side_is_resized_and_the_centre_cropped(tmp_path, capsys):
    """Of stripes twice as wide as high, the middle ones are left; a square is resized as it is; a line says so."""
    wide = np.repeat(np.array([0, 100, 200, 50], np.uint8), 8)[None].repeat(16, 0)
    square = np.full((4, 4), 80, np.uint8)
    save(tmp_path / "a.png", wide)
    save(tmp_path / "b.png", wide.T)
    save(tmp_path / "c.png", square)
    with telling(True):
        x = load_data(tmp_path, resize=8).x.values
    assert x.shape == (3, 1, 8, 8)
    np.testing.assert_allclose(x[0, 0, :, [1, 6]], scaled(np.array([[100] * 8, [200] * 8])), atol=0.03)
    np.testing.assert_array_equal(x[1, 0], x[0, 0].T)
    np.testing.assert_array_equal(x[2], np.full((1, 8, 8), scaled(np.uint8([80]))[0]))
    assert capsys.readouterr().err == (
        "3 images of 3 sizes, 4×4 to 16×32, 1 of them enlarged: the shorter side is resized to 8, the centre cropped\n"
    )


def test_images_of_that_size_are_left_as_they_are(tmp_path, capsys):
    save(tmp_path / "a.png", noise(8, 8))
    with telling(True):
        assert load_data(tmp_path, resize=8).identical(load_data(tmp_path))
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("shape", [(3, 12, 12), (3, 1, 12, 16), (3, 12, 16, 3)])
def test_arrays_of_images_are_resized_too(tmp_path, shape):
    """As image files are, to the rounding of these; floating point on its own scale."""
    x = RNG.integers(0, 256, shape, dtype=np.uint8)
    np.savez(tmp_path / "data.npz", x=x)
    np.savez(tmp_path / "floats.npz", x=x / 100)
    found = load_data(tmp_path / "data.npz", resize=6).x.values
    gray = x.reshape(3, 12, -1) if shape[-1] != 3 else x
    for i, image in enumerate(gray):
        save(tmp_path / "images" / f"{i}.png", image)
    np.testing.assert_allclose(found, load_data(tmp_path / "images", resize=6).x.values, atol=2 / 255)
    np.testing.assert_allclose(load_data(tmp_path / "floats.npz", resize=6).x, (found + 1) * 1.275, atol=1e-5)


def test_what_cannot_be_resized_is_refused(tmp_path):
    np.savez(tmp_path / "data.npz", x=np.zeros((4, 5)))
    with pytest.raises(ValueError, match=r"resize=4 is for images .* but x is float64 of shape \(4, 5\)"):
        load_data(tmp_path / "data.npz", resize=4)
    with pytest.raises(ValueError, match="resize=0: must be at least 1"):
        load_data(tmp_path, resize=0)
    save(tmp_path / "images" / "a.png", noise(4, 6))
    save(tmp_path / "images" / "b.png", noise(8, 8))
    with pytest.raises(ValueError, match=r"the odd one is a.png \(6×4\): resize .* by resize=8"):
        load_data(tmp_path / "images")


def test_transparent_pixels_are_white(tmp_path):
    """In colour, in gray, in palettes and by a transparent colour; half transparent is half white."""
    colour, gray = np.zeros((4, 4, 4), np.uint8), np.zeros((4, 4, 2), np.uint8)
    colour[:2, :, 3] = gray[:2, :, 1] = 255
    colour[3, :, 3] = gray[3, :, 1] = 128
    palette = Image.new("P", (4, 4), 1)
    palette.putpalette([200, 0, 0, 0, 0, 0])
    palette.paste(0, (0, 2, 4, 4))
    for name, image, shown in (
        ("rgba", Image.fromarray(colour, "RGBA"), [0, 0, 255, 127]),
        ("la", Image.fromarray(gray, "LA"), [0, 0, 255, 127]),
        ("p", palette, [0, 0, 255, 255]),
        ("l", Image.fromarray(np.uint8([[0], [0], [9], [9]]).repeat(4, 1)), [0, 0, 255, 255]),
    ):
        (tmp_path / name).mkdir()
        image.save(tmp_path / name / "a.png", **({"p": {"transparency": 0}, "l": {"transparency": 9}}.get(name, {})))
        x = load_data(tmp_path / name).x
        assert x.sizes["channel"] == (3 if name == "rgba" else 1)
        np.testing.assert_allclose(x[0, 0, :, 0], scaled(np.array(shown)), atol=1e-6)


def test_palettes_have_their_colours(tmp_path):
    image = Image.fromarray(noise(4, 4, 3)).quantize(8)
    image.save(tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as stored:
        assert stored.mode == "P"
    wanted = np.asarray(image.convert("RGB")).transpose(2, 0, 1)
    np.testing.assert_allclose(load_data(tmp_path).x[0], scaled(wanted), atol=1e-6)


@pytest.mark.parametrize("suffix", [".png", ".tif", ".pgm"])
def test_sixteen_bits_are_kept(tmp_path, suffix):
    """Beside 8-bit images too, which then are on the same scale; resized, and turned as they say."""
    deep, shallow = noise(8, 8, dtype=np.uint16), noise(8, 8)
    save(tmp_path / "deep" / f"a{suffix}", deep)
    exif = Image.Exif()
    exif[0x0112] = 6
    save(tmp_path / "deep" / "b.png", deep, exif=exif)
    x = load_data(tmp_path / "deep").x.values
    np.testing.assert_allclose(x[0, 0], scaled(deep, 65535), atol=1e-6)
    np.testing.assert_array_equal(x[1, 0], np.rot90(x[0, 0], -1))
    save(tmp_path / "deep" / "c.png", shallow)
    data = check_data(load_data(tmp_path / "deep"))
    np.testing.assert_allclose(data.x[2, 0], scaled(shallow), atol=1e-6)
    small = load_data(tmp_path / "deep", resize=4).x.values
    save(tmp_path / "bytes" / "a.png", (deep // 257).astype(np.uint8))
    np.testing.assert_allclose(small[0], load_data(tmp_path / "bytes", resize=4).x.values[0], atol=0.02)


@pytest.fixture
def pets(tmp_path):
    """Three classes of one colour each, in folders of unequal depth; a hidden one, and one without images."""
    for name, level, count in (("cat", 10, 4), ("dog/large", 20, 3), ("dog/small", 20, 3), ("big horse", 30, 2)):
        for i in range(count):
            save(tmp_path / "pets" / name / f"{i}.png", np.full((4, 4), level, np.uint8))
    save(tmp_path / "pets" / ".thumbnails" / "0.png", noise(2, 2))
    (tmp_path / "pets" / "notes").mkdir()
    return tmp_path / "pets"


def test_sub_folders_are_classes(pets):
    """In alphabetical order, with their names; the images are mixed, always alike, and `obs` says their places."""
    data = check_data(load_data(pets))
    names = data["label"].attrs["names"]
    assert names == ["big horse", "cat", "dog"]
    assert factor_names(data, "class") == ["label"]
    level = np.rint((data.x.values[:, 0, 0, 0] + 1) * 127.5)
    assert level.tolist() == [{"big horse": 30, "cat": 10, "dog": 20}[names[i]] for i in data["label"].values]
    assert [file.split("/")[0] for file in data["file"].values] == [names[i] for i in data["label"].values]
    assert len(set(data["label"].values[:4])) > 1
    in_order = data.sortby("obs")
    assert in_order["file"].values.tolist() == sorted(data["file"].values)
    assert in_order.obs.values.tolist() == list(range(12))
    assert load_data(pets).identical(load_data(pets))


def test_folders_of_training_and_testing_are_the_split(pets):
    """With classes in them; of validation too, which is for training where there is a test part."""
    for name in ("train", "val"):
        save(pets.parent / "both" / name / "cat" / "a.png", noise(4, 4))
        save(pets.parent / "both" / name / "dog" / "b.png", noise(4, 4))
    data = load_data(pets.parent / "both").sortby("obs")
    assert data["file"].values.tolist() == ["train/cat/a.png", "train/dog/b.png", "val/cat/a.png", "val/dog/b.png"]
    assert data["split"].values.tolist() == ["train", "train", "test", "test"]
    assert data["label"].values.tolist() == [0, 1, 0, 1]
    save(pets.parent / "both" / "Test" / "dog" / "c.png", noise(4, 4))
    data = load_data(pets.parent / "both").sortby("obs")
    assert data["split"].values.tolist() == ["test", "train", "train", "train", "train"]


def test_one_sub_folder_is_no_class(tmp_path):
    save(tmp_path / "inner" / "a.png", noise(4, 4))
    assert [*load_data(tmp_path).data_vars] == ["x", "file"]


def test_images_beside_classes_are_refused(pets):
    save(pets / "stray.png", noise(4, 4))
    with pytest.raises(ValueError, match=r"images in sub-folders, big horse/0.png, and beside these, stray.png"):
        load_data(pets)


def test_what_cannot_be_read_is_left_out_on_request(pets):
    """By a warning that names it; classes and files are those of what is left. Nothing left is refused."""
    (pets / "cat" / "1.png").write_bytes(b"no image")
    (pets / "dog" / "large" / "2.png").write_bytes((pets / "cat" / "0.png").read_bytes()[:50])
    with pytest.raises(ValueError, match=r"(?s)cat/1.png cannot be read .*dog/large/2.png .*skip_unreadable=True"):
        load_data(pets)
    with pytest.warns(UserWarning, match=r"(?s)2 of 12 images left out:\ncat/1.png .*\ndog/large/2.png"):
        data = load_data(pets, skip_unreadable=True)
    assert data.sizes["obs"] == 10
    assert not {"cat/1.png", "dog/large/2.png"} & {*data["file"].values}
    names = data["label"].attrs["names"]
    assert [file.split("/")[0] for file in data["file"].values] == [names[i] for i in data["label"].values]
    (pets.parent / "torn").mkdir()
    (pets.parent / "torn" / "a.png").touch()
    with pytest.raises(ValueError, match=r"a.png cannot be read as an image[^\n]*$"):
        load_data(pets.parent / "torn", skip_unreadable=True)


ATTRIBUTES = ["5_o_Clock_Shadow", "Bald", "Male"]


@pytest.fixture(params=["columns", "handed out", "csv"])
def celeba(request, tmp_path):
    """Four faces and their lists: in columns beside the images, in the folders of the download, or as Kaggle has them.

    The first is for training, the second for validation, the others for testing.
    """
    folder, comma = tmp_path / "celeba", request.param == "csv"
    values = [[1, -1, 1], [-1, -1, 1], [1, 1, -1], [-1, 1, -1]]
    names = [f"{i:06d}.jpg" for i in range(1, 5)]
    for i, name in enumerate(names):
        save(folder / "img_align_celeba" / name, np.full((12, 10, 3), 40 * i, np.uint8))
    end, between = (".csv", ",") if comma else (".txt", "  ")
    head = ["image_id," + ",".join(ATTRIBUTES)] if comma else ["4", " ".join(ATTRIBUTES) + " "]
    rows = [between.join([name, *map(str, row)]) for name, row in zip(names, values, strict=True)]
    lists = {"Anno": ("list_attr_celeba", head + rows)}
    partition = [between.join(pair) for pair in zip(names, "0122", strict=True)]
    lists["Eval"] = ("list_eval_partition", (["image_id,partition"] if comma else []) + partition)
    for place, (name, lines) in lists.items():
        inside = folder / place if request.param == "handed out" else folder
        inside.mkdir(exist_ok=True)
        (inside / f"{name}{end}").write_text("\n".join(lines) + "\n")
    return folder


def test_celeba(celeba):
    data = check_data(load_data(celeba, resize=8))
    assert data.x.shape == (4, 3, 8, 8)
    assert data["file"].values.tolist() == [f"{i:06d}.jpg" for i in range(1, 5)]
    assert data["split"].values.tolist() == ["train", "train", "test", "test"]
    assert factor_names(data, "binary") == ATTRIBUTES
    assert [data[name].values.tolist() for name in ATTRIBUTES] == [[1, 0, 1, 0], [0, 0, 1, 1], [1, 1, 0, 0]]
    assert load_data(celeba).x.shape == (4, 3, 12, 10)


def test_lists_that_do_not_belong_to_the_images_are_refused(celeba):
    """A row too many, which may be skipped, a row too few, other values, a row that is short; all by name."""
    images = celeba / "img_align_celeba"
    (images / "000002.jpg").rename(celeba / "aside")
    with pytest.raises(ValueError, match=r"000002.jpg: is in list_attr_celeba.* and not in the folder: fetch it"):
        load_data(celeba, resize=8)
    with pytest.warns(UserWarning, match=r"1 of 4 images left out:\n000002.jpg"):
        data = load_data(celeba, resize=8, skip_unreadable=True)
    assert data["Bald"].values.tolist() == [0, 1, 1]
    assert data["split"].values.tolist() == ["train", "test", "test"]
    (celeba / "aside").rename(images / "000002.jpg")
    save(images / "strange.jpg", noise(12, 10, 3))
    with pytest.raises(ValueError, match=r"list_attr_celeba\.\w+ has no row for strange.jpg"):
        load_data(celeba, resize=8)
    (images / "strange.jpg").unlink()
    listed = next(celeba.rglob("list_attr*"))
    whole = listed.read_text()
    for found, message in (
        (whole.replace("-1", "7", 1), "has the values 7, expected 1 and -1"),
        (whole.rstrip().removesuffix("-1"), "has other than 3 values for 000004.jpg"),
        ("", "names no images"),
    ):
        listed.write_text(found.rstrip(","))
        with pytest.raises(ValueError, match=message):
            load_data(celeba, resize=8)
    listed.write_text(whole)
    parts = next(celeba.rglob("list_eval*"))
    for found, message in (
        (parts.read_text().replace("000003", "000009"), "has no row for 000003.jpg"),
        (parts.read_text().replace("jpg  2", "jpg  5").replace("jpg,2", "jpg,5"), "has the values 5, expected 0, 1"),
    ):
        parts.write_text(found)
        with pytest.raises(ValueError, match=rf"list_eval_partition\.\w+ {message}"):
            load_data(celeba, resize=8)
        parts.write_text(found.replace("000009", "000003"))
