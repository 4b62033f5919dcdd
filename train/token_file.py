"""Tokens in a file: raw numbers that are read where they lie, and beside them, in JSON, what they are.

``x.tokens`` holds little-endian uint16 (up to 65 536 different tokens) or uint32, and nothing else, so that
other programs can read it too; ``x.tokens.json`` says how many, of what vocabulary, their SHA-256 and what they
were made from.
"""

import hashlib
import json
import os
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Integer

from minitf.files import write_atomically

FORMAT = "minitf tokens 1"
LARGEST_VOCABULARY = 2**31  # ids are int32 in memory
CHECK_BYTES = 1 << 18


@dataclass(frozen=True)
class Tokens:
    """A token file: ``ids`` ``[token]`` is read-only and stays on disk; only what is looked at is read.

    ``vocabulary`` is one more than the largest id that there may be.
    """

    path: Path
    ids: Integer[np.ndarray, " token"]
    vocabulary: int
    sha256: str
    made_from: Mapping[str, Any]

    def __len__(self) -> int:
        return len(self.ids)


@contextmanager
def token_writer(
    path: Path, vocabulary: int, made_from: Mapping[str, Any] | None = None
) -> Iterator[Callable[[Integer[np.ndarray, " token"]], None]]:
    """A context that yields ``add(ids)``: the arrays that it is given are the token file, one after another.

    The file appears when the context ends without an error, whole, and its description last. Raises ValueError for
    ids outside the vocabulary, and at the end when there was no token at all.
    """
    if not 1 <= vocabulary <= LARGEST_VOCABULARY:
        raise ValueError(f"the vocabulary of {path} is {vocabulary}; it must be from 1 to 2**31")
    dtype = np.dtype("<u2" if vocabulary <= 2**16 else "<u4")
    digest = hashlib.sha256()
    count = 0
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        with open(temporary, "xb") as file:

            def add(ids: Integer[np.ndarray, " token"]) -> None:
                nonlocal count
                _check_ids(ids, vocabulary, path)
                data = ids.astype(dtype).tobytes()
                file.write(data)
                digest.update(data)
                count += ids.size

            yield add
        if not count:
            raise ValueError(f"there is not a single token to write to {path}")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    description = {
        "format": FORMAT,
        "count": count,
        "dtype": dtype.name,
        "vocabulary": vocabulary,
        "sha256": digest.hexdigest(),
        "made_from": dict(made_from or {}),
    }
    write_atomically(description_of(path), (json.dumps(description, indent=2) + "\n").encode())


def write_tokens(
    path: str | os.PathLike[str],
    arrays: Iterable[Integer[np.ndarray, " _"]],
    *,
    vocabulary: int,
    made_from: Mapping[str, Any] | None = None,
) -> Tokens:
    """Write all arrays, one after another, as one token file, and open it; one array at a time is in memory.

    ``made_from`` is kept as it is, for people (plain JSON). Raises ValueError for ids outside ``vocabulary``, for
    no token at all; then nothing is written. Raises OSError.
    """
    with token_writer(Path(path), vocabulary, made_from) as add:
        for ids in arrays:
            add(ids)
    return open_tokens(path, check=False)


def open_tokens(path: str | os.PathLike[str], check: bool = True) -> Tokens:
    """Open a token file; with ``check`` it is read once and compared with its SHA-256.

    Raises ValueError naming the file: missing, without its description, of another format, truncated, damaged.
    """
    file = Path(path)
    told = _description(file)
    dtype = np.dtype(told["dtype"]).newbyteorder("<")
    try:
        size = file.stat().st_size
        if size != told["count"] * dtype.itemsize:
            raise ValueError(
                f"The token file {file} is damaged: it has {size} bytes, and {told['count']} tokens of "
                f"{dtype.itemsize} bytes should be {told['count'] * dtype.itemsize}. Make it anew."
            )
        if check and (found := sha256_of(file)) != told["sha256"]:
            raise ValueError(
                f"The token file {file} is damaged: its SHA-256 is {found}, and {told['sha256']} was written. "
                "Make it anew."
            )
        ids = np.memmap(file, dtype, "r")
    except OSError as error:
        raise ValueError(f"The token file {file} cannot be read: {error.strerror or error}.") from error
    return Tokens(file, ids, told["vocabulary"], told["sha256"], told["made_from"])


def description_of(path: Path) -> Path:
    """Where the JSON beside a token file lies."""
    return path.with_name(path.name + ".json")


def sha256_of(file: Path) -> str:
    """The SHA-256 of a file of any size, in hexadecimal. Raises OSError."""
    digest = hashlib.sha256()
    with open(file, "rb") as opened:
        while block := opened.read(CHECK_BYTES):
            digest.update(block)
    return digest.hexdigest()


def _check_ids(ids: Integer[np.ndarray, " token"], vocabulary: int, path: Path) -> None:
    if ids.size and not (ids.min() >= 0 and ids.max() < vocabulary):
        wrong = ids[(ids < 0) | (ids >= vocabulary)][0]
        raise ValueError(f"there is a token {wrong} among those for {path}; ids go from 0 to {vocabulary - 1}")


def _description(file: Path) -> dict[str, Any]:
    beside = description_of(file)
    try:
        told = json.loads(beside.read_bytes())
    except OSError as error:
        raise ValueError(
            f"{file} is no token file that can be read: its description {beside.name}, which is written last, "
            f"cannot be read ({error.strerror or error})."
        ) from error
    except ValueError as error:
        raise ValueError(f"The description {beside} of a token file is damaged: no JSON ({error}).") from None
    if not isinstance(told, dict) or told.get("format") != FORMAT:
        raise ValueError(f"{beside} does not describe a token file of this format ({FORMAT!r}).")
    kinds = {"count": int, "vocabulary": int, "sha256": str, "made_from": dict}
    wrong = [name for name, kind in kinds.items() if type(told.get(name)) is not kind]
    if told.get("dtype") not in ("uint16", "uint32"):
        wrong.append("dtype")
    if wrong or told["count"] < 1:
        raise ValueError(f"The description {beside} of a token file is damaged: {', '.join(wrong) or 'count'}.")
    return told
