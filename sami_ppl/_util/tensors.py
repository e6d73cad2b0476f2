"""Named arrays out of the files in which PyTorch programs keep weights: `.safetensors`, and those of `torch.save`.

Neither takes PyTorch, and nothing in a file is ever executed. A `.safetensors` file is a JSON header and raw bytes. A
file of `torch.save` is an archive of raw bytes beside a pickle, a little program whose instructions may call anything.
It is read here instruction by instruction: those that build dicts, lists, tuples, numbers and strings are followed, and
of calls only those that put a tensor together, by name; whatever else is asked for, the file is refused by that name.
"""

from collections.abc import Callable, Mapping
import json
from pathlib import Path
import pickletools
from typing import Any, NamedTuple
import zipfile

import numpy as np

DTYPES = {
    "F64": "f8", "F32": "f4", "F16": "f2", "BF16": "bf16",
    "I64": "i8", "I32": "i4", "I16": "i2", "I8": "i1", "U8": "u1", "BOOL": "?",
}  # fmt: skip
STORAGES = {
    "DoubleStorage": "f8", "FloatStorage": "f4", "HalfStorage": "f2", "BFloat16Storage": "bf16",
    "LongStorage": "i8", "IntStorage": "i4", "ShortStorage": "i2", "CharStorage": "i1", "ByteStorage": "u1",
    "BoolStorage": "?",
}  # fmt: skip
# What numpy, json and zipfile raise of bytes that are not what they should be.
DAMAGE = (
    ValueError, LookupError, TypeError, AttributeError, ArithmeticError, EOFError, RuntimeError, zipfile.BadZipFile,
)  # fmt: skip


class TensorFileError(ValueError):
    """A file of weights is damaged, of another format, or asks for more than tensors."""


def read_tensors(file: str | Path) -> dict[str, np.ndarray]:
    """Name → array, of a `.safetensors` file or one of `torch.save`. bfloat16 comes as float32.

    Raises TensorFileError for a file that is neither, is damaged, or whose pickle asks for anything but tensors.
    """
    file = Path(file)
    try:
        return _read_safetensors(file) if file.suffix == ".safetensors" else _read_torch(file)
    except TensorFileError:
        raise
    except DAMAGE as error:
        raise TensorFileError(
            f"{file} is damaged, or no file of weights ({type(error).__name__}: {error}): copy it again, or save the "
            "model again, model.save_pretrained(folder)"
        ) from error


def _as_array(raw: bytes | memoryview, kind: str) -> np.ndarray:
    """Numbers of little-endian bytes, (count,)."""
    if kind != "bf16":
        return np.frombuffer(raw, np.dtype(kind).newbyteorder("<"))
    return (np.frombuffer(raw, "<u2").astype(np.uint32) << 16).view(np.float32)  # the upper half of a float32


def _read_safetensors(file: Path) -> dict[str, np.ndarray]:
    raw = memoryview(file.read_bytes())
    length = int.from_bytes(raw[:8], "little")
    if not 2 <= length <= len(raw) - 8:
        raise TensorFileError(f"{file} is damaged (header of {length} bytes in a file of {len(raw)}): copy it again")
    header, body = json.loads(bytes(raw[8 : 8 + length])), raw[8 + length :]
    tensors = {}
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        if entry["dtype"] not in DTYPES:
            raise TensorFileError(f"{file}: {name} is of type {entry['dtype']}, read are {', '.join(DTYPES)}")
        begin, end = entry["data_offsets"]
        if not 0 <= begin <= end <= len(body):
            raise TensorFileError(f"{file} is truncated: {name} ends at byte {end} of {len(body)}: copy it again")
        tensors[name] = _as_array(body[begin:end], DTYPES[entry["dtype"]]).reshape(entry["shape"])
    return tensors


class _Name(NamedTuple):
    """What a pickle calls by its name; it is never imported."""

    name: str


class _Dict(dict):
    """A dict that bears the attributes which PyTorch gives its own; they are dropped."""


def _read_torch(file: Path) -> dict[str, np.ndarray]:
    if not zipfile.is_zipfile(file):
        raise TensorFileError(
            f"{file} is no archive: of torch.save before PyTorch 1.6, or no file of weights. Save the model again, "
            "model.save_pretrained(folder, safe_serialization=True)"
        )
    with zipfile.ZipFile(file) as archive:
        names = archive.namelist()
        program = next((name for name in names if name.endswith("data.pkl")), None)
        if program is None:
            raise TensorFileError(f"{file} holds no weights of torch.save (no data.pkl)")
        root = program.removesuffix("data.pkl")
        if f"{root}byteorder" in names and archive.read(f"{root}byteorder") != b"little":
            raise TensorFileError(f"{file} was written with the other order of bytes: save it as safetensors")
        found = _follow(archive.read(program), lambda key: archive.read(f"{root}data/{key}"), file)
    if isinstance(found, dict) and isinstance(found.get("state_dict"), dict):
        found = found["state_dict"]
    if not isinstance(found, dict) or not all(isinstance(v, np.ndarray) for v in found.values()):
        raise TensorFileError(f"{file} holds something else than named tensors: save model.state_dict()")
    return dict(found)


def _storage(identity: tuple, read: Callable[[str], bytes], file: Path) -> np.ndarray:
    """The numbers that a pickle keeps beside itself: ("storage", type, key, device, count)."""
    kind = getattr(identity[1], "name", str(identity[1])).rpartition(".")[2]
    if identity[0] != "storage" or kind not in STORAGES:
        raise TensorFileError(f"{file} keeps numbers of type {kind}, read are {', '.join(STORAGES)}")
    return _as_array(read(str(identity[2])), STORAGES[kind])


def _tensor(storage: np.ndarray, offset: int, shape: tuple[int, ...], stride: tuple[int, ...], *_: Any) -> np.ndarray:
    """A tensor on its storage, copied; a file that reaches beyond the storage is damaged, or means harm."""
    last = offset + sum((n - 1) * s for n, s in zip(shape, stride, strict=True))
    if min((offset, *shape, *stride)) < 0 or (0 not in shape and last >= len(storage)):
        raise TensorFileError(f"a tensor of shape {shape} does not fit its {len(storage)} numbers: copy the file again")
    view = np.lib.stride_tricks.as_strided(
        storage[offset:], shape, [s * storage.itemsize for s in stride], writeable=False
    )
    return np.array(view)


# What a file of weights may call, and what stands for it here.
CALLS: Mapping[str, Callable[..., Any]] = {
    "collections.OrderedDict": lambda *pairs: _Dict(*pairs),
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_parameter": lambda tensor, *_: tensor,
}


def _follow(program: bytes, read: Callable[[str], bytes], file: Path) -> Any:
    """What a pickle builds, of the few instructions that tensors take. Raises TensorFileError for any other."""
    stack: list[Any] = []
    marks: list[int] = []
    memo: dict[int, Any] = {}

    def top() -> Any:
        return stack[-1]

    def since_mark() -> list[Any]:
        start = marks.pop()
        taken = stack[start:]
        del stack[start:]
        return taken

    def named(name: str) -> _Name:
        known = name in CALLS or (name.startswith("torch.") and name.removeprefix("torch.") in STORAGES)
        if not known:
            raise TensorFileError(
                f"{file} asks for {name}, which is no tensor, and nothing of it was read or run: weights from a source "
                "you trust can be saved as safetensors, model.save_pretrained(folder, safe_serialization=True)"
            )
        return _Name(name)

    argument: Any
    for opcode, argument, _ in pickletools.genops(program):
        match opcode.name:
            case "PROTO" | "FRAME":
                pass
            case "STOP":
                return stack.pop()
            case "MARK":
                marks.append(len(stack))
            case "NONE":
                stack.append(None)
            case "NEWTRUE" | "NEWFALSE":
                stack.append(opcode.name == "NEWTRUE")
            case "BININT" | "BININT1" | "BININT2" | "LONG1" | "BINFLOAT" | "BINUNICODE" | "SHORT_BINUNICODE":
                stack.append(argument)
            case "EMPTY_TUPLE":
                stack.append(())
            case "EMPTY_LIST":
                stack.append([])
            case "EMPTY_DICT":
                stack.append(_Dict())
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                count = int(opcode.name[-1])
                stack[-count:] = [tuple(stack[-count:])]
            case "TUPLE":
                taken = since_mark()
                stack.append(tuple(taken))
            case "APPEND":
                value = stack.pop()
                list.append(top(), value)
            case "APPENDS":
                taken = since_mark()
                list.extend(top(), taken)
            case "SETITEM":
                value, key = stack.pop(), stack.pop()
                dict.update(top(), {key: value})
            case "SETITEMS":
                taken = since_mark()
                dict.update(top(), zip(taken[::2], taken[1::2], strict=True))
            case "BINPUT" | "LONG_BINPUT":
                memo[argument] = stack[-1]
            case "MEMOIZE":
                memo[len(memo)] = stack[-1]
            case "BINGET" | "LONG_BINGET":
                stack.append(memo[argument])
            case "GLOBAL":
                stack.append(named(str(argument).replace(" ", ".")))
            case "STACK_GLOBAL":
                name, module = stack.pop(), stack.pop()
                stack.append(named(f"{module}.{name}"))
            case "BINPERSID":
                stack.append(_storage(stack.pop(), read, file))
            case "REDUCE":
                arguments, call = stack.pop(), stack.pop()
                if not isinstance(call, _Name) or call.name not in CALLS:
                    raise TensorFileError(f"{file} calls {getattr(call, 'name', call)}, which makes no tensor")
                stack.append(CALLS[call.name](*arguments))
            case "BUILD":
                stack.pop()  # attributes, such as the versions of modules
                if not isinstance(stack[-1], _Dict):
                    raise TensorFileError(f"{file} gives attributes to what is no dict of tensors")
            case other:
                raise TensorFileError(f"{file} has the instruction {other}, which no file of tensors needs")
    raise TensorFileError(f"{file} is truncated: copy it again")
