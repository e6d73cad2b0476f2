"""Files of weights read without PyTorch: what is in them, and that nothing in them is executed."""

import json
import os
from pathlib import Path
import pickle
import shutil
import zipfile

import numpy as np
import pytest

from sami_ppl._util.tensors import DTYPES, TensorFileError, read_tensors

FOLDER = Path(__file__).parent / "data" / "diffusers"
BIN = FOLDER / "oblong" / "diffusion_pytorch_model.bin"


def safetensors(file, arrays, **changed):
    """A file as the format is described: length of the header, header, bytes."""
    header, body = {"__metadata__": {"format": "pt"}}, b""
    for name, (kind, array) in arrays.items():
        raw = array.tobytes()
        header[name] = {"dtype": kind, "shape": array.shape, "data_offsets": [len(body), len(body) + len(raw)]}
        header[name] |= changed
        body += raw
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + body)
    return file


def torch_file(file, pickled, **numbers):
    """An archive of torch.save around a pickle."""
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("archive/data.pkl", pickled)
        for key, raw in numbers.items():
            archive.writestr(f"archive/data/{key}", raw)
    return file


def test_safetensors_of_every_type(tmp_path):
    kinds = {kind: np.dtype(code) for kind, code in DTYPES.items() if code != "bf16"}
    arrays = {kind: (kind, np.arange(6).reshape(2, 3).astype(dtype)) for kind, dtype in kinds.items()}
    halves = np.array([1.0, -2.5, 3.25], np.float32)
    arrays["BF16"] = ("BF16", (halves.view(np.uint32) >> 16).astype(np.uint16))
    found = read_tensors(safetensors(tmp_path / "x.safetensors", arrays))
    assert found.keys() == arrays.keys()
    for kind, (_, array) in arrays.items():
        expected = halves if kind == "BF16" else array
        assert found[kind].dtype == expected.dtype
        np.testing.assert_array_equal(found[kind], expected)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"dtype": "F4"}, "of type F4"),
        ({"data_offsets": [0, 99]}, "truncated"),
        ({"data_offsets": [-4, 4]}, "truncated"),
        ({"shape": [5]}, "damaged"),
        ({"data_offsets": None}, "damaged"),
    ],
)
def test_damaged_safetensors_are_refused(changed, message, tmp_path):
    file = safetensors(tmp_path / "x.safetensors", {"x": ("F32", np.zeros(2, np.float32))}, **changed)
    with pytest.raises(TensorFileError, match=message):
        read_tensors(file)


def test_a_header_longer_than_the_file_is_refused(tmp_path):
    file = tmp_path / "x.safetensors"
    file.write_bytes(b"\xff" * 30)
    with pytest.raises(TensorFileError, match="header"):
        read_tensors(file)


class Harm:
    """What unpickling would run."""

    def __init__(self, call, *arguments):
        self.call, self.arguments = call, arguments

    def __reduce__(self):
        return self.call, self.arguments


@pytest.mark.parametrize("protocol", [0, 1, 2, 3, 4, 5])
def test_nothing_in_a_file_is_executed(protocol, tmp_path):
    """A file that would run a command is refused by the command's name, whatever the protocol; the control runs it."""
    marker = tmp_path / "harm"
    harm = pickle.dumps({"x": Harm(os.system, f"touch {marker}")}, protocol)
    with pytest.raises(TensorFileError, match=r"posix\.system|instruction"):
        read_tensors(torch_file(tmp_path / "x.bin", harm))
    assert not marker.exists()
    pickle.loads(harm)
    assert marker.exists()


@pytest.mark.parametrize("call", [eval, getattr, __import__, np.array, open], ids=lambda call: call.__name__)
def test_other_calls_are_refused_by_name(call, tmp_path):
    with pytest.raises(TensorFileError, match=rf"asks for [\w.]*{call.__name__}, which is no tensor"):
        read_tensors(torch_file(tmp_path / "x.bin", pickle.dumps({"x": Harm(call, "x")}, 2)))


# _rebuild_tensor_v2(("storage", FloatStorage, "0", "cpu", 4), …
REBUILD = (
    b"ctorch._utils\n_rebuild_tensor_v2\n((X\x07\x00\x00\x00storagectorch\nFloatStorage\n"
    b"X\x01\x00\x00\x000X\x03\x00\x00\x00cpuK\x04tQ"
)


def tensor(offset, shape, stride):
    """A pickle {"w": tensor} on four numbers, with these indices."""

    def numbers(values):
        return b"(" + b"".join(b"J" + value.to_bytes(4, "little", signed=True) for value in values) + b"t"

    indices = b"J" + offset.to_bytes(4, "little", signed=True) + numbers(shape) + numbers(stride)
    return b"\x80\x02}X\x01\x00\x00\x00w" + REBUILD + indices + b"\x89N" + b"tRs."


def test_a_tensor_on_its_storage(tmp_path):
    raw = np.arange(4, dtype="<f4").tobytes()
    file = torch_file(tmp_path / "x.bin", tensor(0, (2, 2), (1, 2)), **{"0": raw})
    np.testing.assert_array_equal(read_tensors(file)["w"], [[0, 2], [1, 3]])


@pytest.mark.parametrize(
    ("offset", "shape", "stride"),
    [(0, (5,), (1,)), (4, (1,), (1,)), (-1, (1,), (1,)), (0, (2,), (-1,)), (0, (2, 2), (2, 2))],
)
def test_a_tensor_beyond_its_storage_is_refused(offset, shape, stride, tmp_path):
    file = torch_file(tmp_path / "x.bin", tensor(offset, shape, stride), **{"0": np.zeros(4, "<f4").tobytes()})
    with pytest.raises(TensorFileError, match="does not fit"):
        read_tensors(file)


def test_files_that_are_none(tmp_path):
    plain = tmp_path / "x.bin"
    plain.write_bytes(b"nothing of the kind")
    with pytest.raises(TensorFileError, match="no archive"):
        read_tensors(plain)
    with zipfile.ZipFile(tmp_path / "empty.bin", "w") as archive:
        archive.writestr("readme", "")
    with pytest.raises(TensorFileError, match=r"no data\.pkl"):
        read_tensors(tmp_path / "empty.bin")
    with pytest.raises(TensorFileError, match="named tensors"):
        read_tensors(torch_file(tmp_path / "list.bin", pickle.dumps([1, 2], 2)))
    with pytest.raises(TensorFileError, match="damaged"):
        read_tensors(torch_file(tmp_path / "cut.bin", pickle.dumps({"x": 1.5}, 2)[:-3]))


def test_a_file_damaged_anywhere_is_refused_or_read(tmp_path):
    """Whatever one byte of the pickle becomes, nothing but TensorFileError comes of it."""
    with zipfile.ZipFile(BIN) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    name = next(name for name in members if name.endswith("data.pkl"))
    program, rng = members[name], np.random.default_rng(0)
    refused = 0
    for place in rng.integers(len(program), size=15):
        changed = bytearray(program)
        changed[place] = rng.integers(256)
        with zipfile.ZipFile(tmp_path / "x.bin", "w") as archive:
            for member, raw in members.items():
                archive.writestr(member, bytes(changed) if member == name else raw)
        try:
            read_tensors(tmp_path / "x.bin")
        except TensorFileError:
            refused += 1
    assert refused > 2
    shutil.copy(BIN, tmp_path / "whole.bin")
    assert read_tensors(tmp_path / "whole.bin").keys() == read_tensors(BIN).keys()
