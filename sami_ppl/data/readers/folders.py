"""Folders of images: directly in them, or in a sub-folder for each class, or for training and testing; and CelebA."""

from collections.abc import Iterator
import os
from pathlib import Path
from typing import NamedTuple

import numpy as np
import xarray as xr

from sami_ppl.data.readers.images import IMAGE_SUFFIXES, Decoding, ImageSource, stack_images
from sami_ppl.data.readers.known import classes
from sami_ppl.data.readers.opened import Opened, stamp
from sami_ppl.data.readers.parts import are_parts, split_labels

ATTRIBUTES, PARTITION = ("list_attr_celeba", "list_eval_partition")
"""CelebA's lists, as text files in columns or, as Kaggle has them, as `.csv`."""
PARTITIONS = {"0": "train", "1": "validation", "2": "test"}


def image_files(folder: Path) -> list[Path]:
    """Image files of a folder and its sub-folders, relative to it, in order of their names; hidden ones left out."""
    found = []
    for place, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        inside = Path(place).relative_to(folder)
        # A link whose target is not there is no file, and an image that would be missed.
        found += [inside / n for n in names if not n.startswith(".") and Path(n).suffix.lower() in IMAGE_SUFFIXES]
    if not found:
        entries = [p for p in folder.iterdir() if not p.name.startswith(".")]
        inside = ", ".join(sorted(p.name + "/" * p.is_dir() for p in entries)[:5]) or "nothing"
        raise ValueError(
            f"folder {folder} has no image files ({', '.join(IMAGE_SUFFIXES)}), it has {inside}: put the images into "
            "it, directly or in a sub-folder for each class"
        )
    return sorted(found)


def has_sub_folders(folder: Path) -> bool:
    """Whether a folder of images has them in sub-folders."""
    return folder.is_dir() and any(len(file.parts) > 1 for file in image_files(folder))


class Listed(NamedTuple):
    """Images that are listed and not read: of each its name and its file, or, as text, why it has none.

    `variables` on obs, what is known of them, and the part of each, "train" or "test", where they have parts.
    """

    names: list[str]
    files: list[Path | str]
    variables: dict[str, xr.Variable]
    split: np.ndarray | None

    def read(self, how: Decoding) -> xr.Dataset:
        """Images x (obs, channel, row, column), their names, `file` (obs), and what is known of them."""
        x, kept = stack_images(zip(self.names, self.files, strict=True), how)
        known = {name: variable[kept] for name, variable in self.variables.items()}
        data = xr.Dataset(
            {"x": (("obs", "channel", "row", "column"), x), "file": ("obs", np.array(self.names)[kept]), **known}
        )
        return data if self.split is None else data.assign_coords(split=("obs", self.split[kept]))

    def opened(self, how: Decoding) -> Opened:
        """The same as a source."""
        source = FileSource(self, how)
        return Opened(source, test=None if self.split is None else self.split == "test", kept=source.kept)


class FileSource(ImageSource):
    """Image files that are decoded when they are needed."""

    def __init__(self, listed: Listed, how: Decoding):
        self.listed = listed
        self.stamps = [stamp(file) for file in listed.files]
        super().__init__(how)

    def __len__(self) -> int:
        return len(self.listed.names)

    def images(self, i: np.ndarray) -> Iterator[tuple[str, Path | str]]:
        """The files at these places; as text, where they have changed."""
        for row in i.tolist():
            name, file = self.listed.names[row], self.listed.files[row]
            if isinstance(file, Path) and (found := stamp(file)) != self.stamps[row]:
                what = "is gone" if found is None else "has been written to"
                file = f"{what} since it was opened: put back what was there, then go on with resume=True"
            yield name, file

    def variables(self, i: np.ndarray) -> dict[str, xr.Variable]:
        """Their names, and what is known of them."""
        names = np.array([self.listed.names[row] for row in i])
        return {"file": xr.Variable("obs", names), **{name: v[i] for name, v in self.listed.variables.items()}}


def read_images(folder: Path, how: Decoding) -> xr.Dataset:
    """Images x (obs, channel, row, column) and their names, `file` (obs), in order of these.

    Of images in several sub-folders, the first of these is the class, `label` (obs) with `attrs["names"]`, after those
    of training and testing, `split`. Raises ValueError for a folder without images, for images partly in sub-folders
    and partly beside them, and what `stack_images` raises.
    """
    return list_images(folder).read(how)


def open_images(folder: Path, how: Decoding) -> Opened:
    """The same as a source."""
    return list_images(folder).opened(how)


def list_images(folder: Path) -> Listed:
    """The images of a folder, in order of their names. Raises as `read_images` does, but for what is in the files."""
    files = image_files(folder)
    tops = {file.parts[0] if len(file.parts) > 1 else "" for file in files}
    parted = are_parts(tops)
    within = [file.parts[parted:-1] for file in files]  # folders below that of the part
    named = np.array([folders[0] if folders else "" for folders in within])
    if "" in named and any(within):
        beside, inside = (files[int(i)].as_posix() for i in (np.argmax(named == ""), np.argmax(named != "")))
        raise ValueError(
            f"folder {folder} has images in sub-folders, {inside}, and beside these, {beside}, so that they are no "
            "classes: give one of the folders, or put all images into sub-folders"
        )
    known = {"label": classes(named)} if len(set(named)) > 1 else {}
    split = split_labels([file.parts[0] for file in files]) if parted else None
    return Listed([file.as_posix() for file in files], [folder / file for file in files], known, split)


def celeba_list(folder: Path, name: str) -> Path | None:
    """One of CelebA's lists in its folder, or in the folders that it is handed out in."""
    places = (folder, folder / "Anno", folder / "Eval")
    return next((f for p in places for end in (".txt", ".csv") if (f := p / f"{name}{end}").is_file()), None)


def is_celeba(path: Path) -> bool:
    """Whether a folder has CelebA's list of attributes."""
    return path.is_dir() and celeba_list(path, ATTRIBUTES) is not None


def read_celeba(folder: Path, how: Decoding) -> xr.Dataset:
    """CelebA: x and `file` as of other folders, 40 attributes of 0 and 1 (obs), and the `split` where it is there.

    Raises ValueError for lists and images that do not belong together, by name, and what `stack_images` raises. Images
    that a list names and the folder has not are left out with those that cannot be read.
    """
    return list_celeba(folder).read(how)


def open_celeba(folder: Path, how: Decoding) -> Opened:
    """The same as a source."""
    return list_celeba(folder).opened(how)


def list_celeba(folder: Path) -> Listed:
    """The images of CelebA, in the order of its list. Raises as `read_celeba` does, but for what is in the images."""
    found = celeba_list(folder, ATTRIBUTES)
    if found is None:
        raise ValueError(f"folder {folder} has no {ATTRIBUTES}.txt")
    names, rows = _columns(found)
    files = {file.name: folder / file for file in image_files(folder)}
    if strange := sorted(files.keys() - rows.keys()):
        raise ValueError(f"{found.name} has no row for {_some(strange)}: take the list and the images of one set")
    values = np.array(list(rows.values()))
    if wrong := sorted({*values.flat} - {"1", "-1", "0"}):
        raise ValueError(f"{found.name} has the values {_some(wrong)}, expected 1 and -1: fetch it again")
    absent = f"is in {found.name} and not in the folder: fetch it"
    columns = zip(names, (values == "1").astype(np.int32).T, strict=True)
    known = {name: xr.Variable("obs", column) for name, column in columns}
    listed = celeba_list(folder, PARTITION)
    split = None if listed is None else _split_of(list(rows), listed)
    return Listed(list(rows), [files.get(name, absent) for name in rows], known, split)


def _split_of(files: list[str], listed: Path) -> np.ndarray:
    _, rows = _columns(listed)
    if missing := [name for name in files if name not in rows]:
        raise ValueError(f"{listed.name} has no row for {_some(missing)}: take the lists of one set")
    if wrong := sorted({value for (value, *_) in rows.values()} - {*PARTITIONS}):
        raise ValueError(f"{listed.name} has the values {_some(wrong)}, expected 0, 1 and 2: fetch it again")
    return split_labels([PARTITIONS[rows[name][0]] for name in files])


def _columns(file: Path) -> tuple[list[str], dict[str, list[str]]]:
    """Names of the columns, where they have some, and the values of each image by its name."""
    comma = file.suffix == ".csv"
    lines = [line.split("," if comma else None) for line in file.read_text().splitlines() if line.strip()]
    names: list[str] = []
    if comma and lines:
        names = lines.pop(0)[1:]
    elif lines and len(lines[0]) == 1:  # how many images there are
        names = lines[1] if len(lines) > 1 else []
        lines = lines[2:]
    width = len(names) or 1
    rows = {row[0]: [value.strip() for value in row[1:]] for row in lines}
    if wrong := [name for name, values in rows.items() if len(values) != width]:
        raise ValueError(f"{file.name} has other than {width} values for {_some(wrong)}: fetch it again")
    if not rows:
        raise ValueError(f"{file.name} names no images: fetch it again")
    return names, rows


def _some(names: list[str], most: int = 5) -> str:
    more = f" and {len(names) - most:,} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
