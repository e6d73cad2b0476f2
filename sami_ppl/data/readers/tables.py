"""Tables with a column of images: parquet files, and folders of the Hugging Face library `datasets`, by pyarrow."""

from collections.abc import Iterable, Iterator
import json
from pathlib import Path
from typing import Any
import warnings

import numpy as np
import xarray as xr

from sami_ppl._util.errors import attempt
from sami_ppl.data.readers.images import Decoding, ImageSource, stack_images
from sami_ppl.data.readers.known import Factor, variable
from sami_ppl.data.readers.opened import Files, Opened
from sami_ppl.data.readers.parts import are_parts, split_labels

USUAL = ("image", "img", "picture", "x")
"""Names of the column of images, where there are several that may be it."""
TAKEN = ("obs", "channel", "row", "column", "x")
ROWS = 256
"""Rows of a parquet file that are held at a time, with their images as they are stored."""


def is_table(path: Path) -> bool:
    """Whether a path is a parquet or arrow file, a folder of these, or one that `save_to_disk` wrote."""
    return path.suffix in (".parquet", ".arrow") or (path.is_dir() and bool(_saved(path) or _parquet_files(path)))


def read_table(path: Path, how: Decoding) -> xr.Dataset:
    """Images x (obs, channel, row, column), and the other columns that are numbers or text, on obs.

    Classes have their names in `attrs["names"]`; parts of training and testing are the `split`. Columns of anything
    else are left out, with a warning. Raises ImportError without pyarrow; ValueError for files that cannot be read,
    tables without images, or with several columns of them, and what `stack_images` raises.
    """
    parts, schema, image, others = _found(path)
    columns: dict[str, list[np.ndarray]] = {name: [] for name in others}
    counts = dict.fromkeys(parts, 0)

    def images() -> Iterator[tuple[str, bytes | str]]:
        for part, some in parts.items():
            for file in some:
                row = 0
                for batch in _batches(file, schema.names):
                    yield from _images(file, batch.column(image), row)
                    for name, pieces in columns.items():
                        pieces.append(_values(batch.column(name)))
                    row += batch.num_rows
                counts[part] += row

    x, kept = stack_images(images(), how)
    data, names = xr.Dataset({"x": (("obs", "channel", "row", "column"), x)}), _class_names(schema)
    for name, pieces in columns.items():
        data[name] = _variable(name, np.concatenate(pieces)[kept], names)
    if are_parts(parts):
        data = data.assign_coords(split=("obs", split_labels(np.repeat([*parts], [*counts.values()]))[kept]))
    return data


class TableSource(ImageSource):
    """Rows of tables with a column of images: of parquet a group of rows is read at once, of arrow files single rows.

    Raises what `read_table` raises.
    """

    def __init__(self, path: Path, how: Decoding):
        self.parts, schema, self.image, self.others = _found(path)
        self.columns, self.class_names = schema.names, _class_names(schema)
        self.paths = [file for some in self.parts.values() for file in some]
        self.files = Files(Path(), map(str, self.paths))
        self.groups = [(file, group, rows) for file in self.paths for group, rows in enumerate(self._sizes(file))]
        self.starts = np.cumsum([0, *(rows for _, _, rows in self.groups)])
        self.last: tuple[int, Any] = (-1, None)
        super().__init__(how)

    def _sizes(self, file: Path) -> list[int]:
        """Rows of each group of a file. Raises ValueError where it is damaged, or has other columns."""
        if file.suffix != ".parquet":
            return [batch.num_rows for batch in _batches(file, self.columns)]
        next(_batches(file, self.columns), None)  # which looks at the columns
        from pyarrow.parquet import ParquetFile

        table = ParquetFile(file).metadata
        return [table.row_group(i).num_rows for i in range(table.num_row_groups)]

    def __len__(self) -> int:
        return int(self.starts[-1])

    @property
    def chunks(self) -> int | list[int]:
        """Rows that are read at once."""
        return 1 if all(file.suffix != ".parquet" for file in self.paths) else np.diff(self.starts).tolist()

    @property
    def test(self) -> np.ndarray | None:
        """Which rows are for testing, where the table has parts."""
        if not are_parts(self.parts):
            return None
        counts = {file: sum(rows for other, _, rows in self.groups if other == file) for file in self.paths}
        sizes = [sum(counts[file] for file in some) for some in self.parts.values()]
        return split_labels(np.repeat([*self.parts], sizes)) == "test"

    def _group(self, g: int) -> Any:
        """One group of rows, or the last one again."""
        held, found = self.last  # of several threads another may put its own there
        if held != g:
            file, group, _ = self.groups[g]
            self.files.check([str(file)])
            found = _read_group(file, group, [self.image, *self.others])
            self.last = (g, found)
        return found

    def _pieces(self, i: np.ndarray) -> Iterator[tuple[Path, np.ndarray, Any]]:
        """The rows at these places by their groups: file, their numbers there, and themselves."""
        group = np.searchsorted(self.starts, i, "right") - 1
        for g in np.unique(group):
            inside, file = i[group == g] - self.starts[g], self.groups[g][0]
            first = sum(rows for other, _, rows in self.groups[:g] if other == file)
            yield file, inside + first, self._group(int(g)).take(inside)

    def images(self, i: np.ndarray) -> Iterator[tuple[str, bytes | str]]:
        """Their images, as bytes."""
        for file, numbers, rows in self._pieces(i):
            for number, (_, content) in zip(numbers, _images(file, rows.column(self.image), 0), strict=True):
                yield f"row {number} of {file.name}", content

    def variables(self, i: np.ndarray) -> dict[str, xr.Variable]:
        """Their other columns."""
        pieces = [rows for _, _, rows in self._pieces(i)]
        values = {name: np.concatenate([_values(rows.column(name)) for rows in pieces]) for name in self.others}
        return {name: _variable(name, v, self.class_names) for name, v in values.items()}


def open_table(path: Path, how: Decoding) -> Opened:
    """A table as a source. Raises what `read_table` raises."""
    source = TableSource(path, how)
    return Opened(source, source.chunks, source.test, source.kept)


def _read_group(file: Path, group: int, columns: list[str]) -> Any:
    """Some columns of one group of rows, as a record batch. Raises ValueError where they cannot be read."""
    if file.suffix != ".parquet":
        batches = (batch for _, batch in zip(range(group + 1), _stream(file)[1], strict=False))
        *_, found = batches
        return found.select(columns)
    from pyarrow.lib import RecordBatch
    from pyarrow.parquet import ParquetFile

    table, error = attempt(lambda: ParquetFile(file).read_row_group(group, columns=columns).combine_chunks())
    if table is None:
        raise _damaged(file, error) from error
    return RecordBatch.from_arrays([table.column(name).chunk(0) for name in columns], names=columns)


def _variable(name: str, values: np.ndarray, class_names: dict[str, list[str]]) -> xr.Variable:
    if name in class_names:  # −1 is no class, as in `datasets`
        return variable(Factor(name, class_names[name]), np.nan_to_num(values, nan=-1))
    return xr.Variable("obs", values)


def _found(path: Path) -> tuple[dict[str, list[Path]], Any, str, list[str]]:
    """Files by their part, their schema, the column of images, and the others that are taken."""
    parts = _parts(path)
    files = [file for some in parts.values() for file in some]
    if not files:
        raise ValueError(f"{path.name} names no files of data: write the folder again, dataset.save_to_disk(path)")
    schema = _schema(files[0])
    return parts, schema, *_chosen(files[0], schema)


def _parquet_files(folder: Path) -> list[Path]:
    return sorted([*folder.glob("*.parquet"), *folder.glob("data/*.parquet")])


def _saved(folder: Path) -> bool:
    return (folder / "dataset_dict.json").is_file() or (folder / "dataset_info.json").is_file()


def _parts(path: Path) -> dict[str, list[Path]]:
    """Files of each part of a data set, by its name; "" where it has no parts."""
    if not path.is_dir():
        return {"": [path]}
    if (path / "dataset_dict.json").is_file():
        names = _json(path / "dataset_dict.json", "splits")
        if len(names) > 1 and not are_parts(names):
            raise ValueError(
                f"{path.name} has the parts {', '.join(names)}, expected train, validation, test: give the folder of "
                f"one, {path / names[0]}"
            )
        return {name: _arrow_files(path / name) for name in names}
    if _saved(path):
        return {"": _arrow_files(path)}
    files = _parquet_files(path)
    named = {file: file.stem.split("-")[0] for file in files}  # train-00000-of-00002.parquet
    if not are_parts(named.values()):
        return {"": files}
    return {part: [file for file in files if named[file] == part] for part in dict.fromkeys(named.values())}


def _arrow_files(folder: Path) -> list[Path]:
    """Files of a saved data set, in their order."""
    return [folder / str(entry.get("filename")) for entry in _json(folder / "state.json", "_data_files")]


def _json(file: Path, name: str) -> list[Any]:
    found, error = attempt(lambda: json.loads(file.read_text())[name])
    if not isinstance(found, list):
        raise ValueError(
            f"{file.parent.name}/{file.name} cannot be read ({error or f'no list {name!r}'}): write the folder again, "
            "dataset.save_to_disk(path)"
        ) from error
    return found


def _stream(file: Path) -> tuple[Any, Iterator[Any]]:
    """The schema of a file, and its rows, some at a time."""
    try:
        from pyarrow.ipc import open_stream
        from pyarrow.lib import memory_map
        from pyarrow.parquet import ParquetFile
    except ImportError as error:
        raise ImportError(f"{file.name} is read by pyarrow: pip install 'sami_ppl[datasets]'") from error

    def opened() -> tuple[Any, Iterator[Any]]:
        if file.suffix == ".parquet":
            table = ParquetFile(file)
            return table.schema_arrow, table.iter_batches(batch_size=ROWS)
        stream = open_stream(memory_map(str(file)))
        return stream.schema, iter(stream)

    found, error = attempt(opened)
    if found is None:
        raise _damaged(file, error) from error
    return found


def _damaged(file: Path, error: Exception | None) -> ValueError:
    return ValueError(f"{file.name} cannot be read ({error or type(error).__name__}): fetch or write it again")


def _schema(file: Path) -> Any:
    return _stream(file)[0]


def _batches(file: Path, names: list[str]) -> Iterator[Any]:
    schema, batches = _stream(file)
    if schema.names != names:
        raise ValueError(
            f"{file.name} has the columns {', '.join(schema.names)}, the files before it {', '.join(names)}: give "
            "files of one set"
        )
    error = None
    while error is None:
        batch, error = attempt(lambda: next(batches, None))
        if error is not None:
            raise _damaged(file, error) from error
        if batch is None:
            return
        yield batch


def _chosen(file: Path, schema: Any) -> tuple[str, list[str]]:
    """The column that holds bytes, alone or with the path that they came from, and those that hold numbers or text."""
    import pyarrow.types as types

    def holds_bytes(kind: Any) -> bool:
        if types.is_struct(kind):
            return any(kind.field(i).name == "bytes" for i in range(kind.num_fields))
        return types.is_binary(kind) or types.is_large_binary(kind)

    columns = list(zip(schema.names, schema.types, strict=True))
    found = [name for name, kind in columns if holds_bytes(kind)]
    usual = [name for name in USUAL if name in found]
    if not found or (len(found) > 1 and not usual):
        has = "several columns of bytes" if found else "no column of images, of bytes of image files"
        raise ValueError(
            f"{file.name} has {has}; its columns are {', '.join(f'{name} ({kind})' for name, kind in columns)}: rename "
            "that of the images to image, or write np.savez(path, x=array)"
        )
    image = found[0] if len(found) == 1 else usual[0]
    plain = (types.is_integer, types.is_floating, types.is_boolean, types.is_string, types.is_large_string)
    taken = [name for name, kind in columns if name != image and any(test(kind) for test in plain)]
    if clash := [name for name in taken if name in TAKEN]:
        raise ValueError(f"{file.name} has the column {clash[0]!r}, which is the name of a dim here: rename it")
    if rest := [f"{name} ({kind})" for name, kind in columns if name not in (image, *taken)]:
        warnings.warn(f"{file.name}: {', '.join(rest)} left out, as neither numbers nor text", stacklevel=4)
    return image, taken


def _images(file: Path, column: Any, start: int) -> Iterator[tuple[str, bytes | str]]:
    """Name and bytes of each image, or why there are none."""
    for i, value in enumerate(column):
        content = value.as_py()
        path = content.get("path") if isinstance(content, dict) else None
        content = content.get("bytes") if isinstance(content, dict) else content
        where = f", only the path {path}: save the images themselves" if path else ""
        yield f"row {start + i} of {file.name}", f"there are no bytes{where}" if content is None else content


def _values(column: Any) -> np.ndarray:
    """Numbers as they are, NaN where they are missing; bool as 0 and 1; text."""
    import pyarrow.types as types

    if types.is_string(column.type) or types.is_large_string(column.type):
        return np.array(["" if value is None else value for value in column.to_pylist()], str)
    values = column.to_numpy(zero_copy_only=False)
    if types.is_boolean(column.type):
        return np.asarray(values, float) if column.null_count else values.astype(np.int32)
    return values


def _class_names(schema: Any) -> dict[str, list[str]]:
    """Names of the classes of columns, as `datasets` writes them beside the schema."""
    found, _ = attempt(lambda: json.loads(schema.metadata[b"huggingface"])["info"]["features"])
    features: Iterable[tuple[str, Any]] = (found or {}).items()
    return {name: feature["names"] for name, feature in features if isinstance(feature, dict) and "names" in feature}
