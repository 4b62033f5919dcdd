"""The files of weights: safetensors, one or sharded, opened without reading and checked before anything else.

Format: 8 bytes of header length (little-endian), a JSON header, the numbers. It is read here rather than by the
library so that what is wrong with a file can be said in numbers; no code is ever run from a file.
"""

import json
import math
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

ONE, INDEX = "model.safetensors", "model.safetensors.index.json"
_DTYPES = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": jnp.bfloat16,
    "I64": np.int64,
    "I32": np.int32,
    "I16": np.int16,
    "I8": np.int8,
    "U8": np.uint8,
    "BOOL": np.bool_,
}


def open_folder(folder: Path) -> dict[str, np.ndarray]:
    """All tensors of a folder, by name, mapped into memory.

    Raises:
        ValueError: no safetensors there, a shard that is missing or does not hold what the index says, a file that
            is damaged.
    """
    if (folder / ONE).is_file():
        return open_file(folder / ONE)
    if not (folder / INDEX).is_file():
        raise ValueError(_nothing(folder))
    arrays: dict[str, np.ndarray] = {}
    by_file = shards(folder / INDEX)
    for name, wanted in by_file.items():
        found = open_file(folder / name)
        odd = set(found) ^ wanted
        if odd:
            raise ValueError(f"{folder / name} and {INDEX} differ in which tensors the file holds: {min(odd)}")
        arrays |= found
    return arrays


def shards(index: Path) -> dict[str, set[str]]:
    """The files that an index names, and the tensors that each is to hold. Raises ValueError."""
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{index} has no 'weight_map' that says which file holds which tensor")
    by_file: dict[str, set[str]] = {}
    for tensor, file in weight_map.items():
        if not isinstance(file, str) or Path(file).name != file or not file.endswith(".safetensors"):
            raise ValueError(f"{index}: the tensor {tensor} is said to be in {file!r}, which is no file beside it")
        by_file.setdefault(file, set()).add(tensor)
    return by_file


def open_file(path: Path) -> dict[str, np.ndarray]:
    """The tensors of one safetensors file, by name, mapped into memory.

    Raises:
        ValueError: the file is missing, is no safetensors file, or is not as long as its header says.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            start = file.read(8)
            length = int.from_bytes(start, "little")
            # A header is text of some kilobytes: a first number beyond the file means another format.
            if len(start) < 8 or length > size - 8:
                raise ValueError(_no_safetensors(path, start, size))
            header = file.read(length)
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror or error}") from error
    entries = _entries(path, header)
    end = max((entry["data_offsets"][1] for entry in entries.values()), default=0)
    if size != 8 + length + end:
        raise ValueError(
            f"{path} should have {8 + length + end} bytes by its header, but it has {size}: the file is "
            f"{'cut off' if size < 8 + length + end else 'longer than it should be'}"
        )
    if not end:
        return {name: np.zeros(entry["shape"], _DTYPES[entry["dtype"]]) for name, entry in entries.items()}
    data = np.memmap(path, np.uint8, "r", offset=8 + length)
    return {
        name: data[slice(*entry["data_offsets"])].view(_DTYPES[entry["dtype"]]).reshape(entry["shape"])
        for name, entry in entries.items()
    }


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object. Raises ValueError with the file's name."""
    try:
        found = json.loads(path.read_bytes())
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} holds a JSON {type(found).__name__}, not an object of settings")
    return found


def _entries(path: Path, header: bytes) -> dict[str, Any]:
    try:
        entries = json.loads(header)
    except (ValueError, RecursionError):
        raise ValueError(f"{path} is no safetensors file: its header is not JSON") from None
    if not isinstance(entries, dict):
        raise ValueError(f"{path} is no safetensors file: its header is not a table of tensors")
    entries.pop("__metadata__", None)
    for name, entry in entries.items():
        _check_entry(path, name, entry)
    place = 0
    for name, entry in sorted(entries.items(), key=lambda item: item[1]["data_offsets"]):
        if entry["data_offsets"][0] != place:
            raise ValueError(f"{path}: the tensor {name} does not begin where the one before it ends")
        place = entry["data_offsets"][1]
    return entries


def _check_entry(path: Path, name: str, entry: Any) -> None:
    def counts(value: Any) -> bool:
        return isinstance(value, list) and all(type(n) is int and n >= 0 for n in value)

    if not isinstance(entry, dict) or not counts(entry.get("shape")) or not counts(entry.get("data_offsets")):
        raise ValueError(f"{path}: the header's entry of the tensor {name} is damaged")
    if entry.get("dtype") not in _DTYPES:
        raise ValueError(
            f"{path}: the tensor {name} is of type {entry.get('dtype')!r}; minitf reads {', '.join(_DTYPES)}"
        )
    offsets, shape = entry["data_offsets"], entry["shape"]
    needed = math.prod(shape) * np.dtype(_DTYPES[entry["dtype"]]).itemsize
    if len(offsets) != 2 or offsets[1] - offsets[0] != needed:
        raise ValueError(
            f"{path}: the tensor {name} of shape {tuple(shape)} and type {entry['dtype']} needs {needed} bytes, "
            f"but the header gives it {offsets}"
        )


def _no_safetensors(path: Path, start: bytes, size: int) -> str:
    if start == b"version ":
        return f"{path} is a Git LFS pointer and not the file itself: fetch it with 'git lfs pull'"
    if start[:2] in (b"PK", b"\x80\x02"):
        return f"{path} is a pickle of PyTorch with another name; minitf reads only safetensors"
    return f"{path} ({size} bytes) is no safetensors file, or only the beginning of one"


def _nothing(folder: Path) -> str:
    pickles = sorted(file.name for pattern in ("*.bin", "*.pt", "*.pth") for file in folder.glob(pattern))
    if pickles:
        return (
            f"{folder} has weights only as a pickle ({pickles[0]}), which can run any code when it is opened; "
            f"minitf reads only safetensors. Convert it where you trust it, or get a copy with {ONE}"
        )
    return f"{folder} has no weights: neither {ONE} nor {INDEX}"
