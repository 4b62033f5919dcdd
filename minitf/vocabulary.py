"""What symbols are numbered as: a small object that is kept with a run, so that its tokens can be read.

Each kind is a frozen dataclass with the methods of :class:`Vocabulary`; `load_vocabulary` reads any of them back.
"""

import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import tiktoken
from jaxtyping import Int32, Integer

from minitf.families.llama2c_tokenizer import Llama2cTokenizer
from minitf.families.tokenizer_json import JsonTokenizer
from minitf.files import write_atomically
from minitf.tokenizer import GPT2_PATTERN, decode_bytes, encode, load_encoding, save_encoding
from minitf.tokenizer_file import DESCRIPTION as FILE
from minitf.tokenizer_file import NAMES, TokenizerFile, load_tokenizer_file

RANKS_FILE = "vocabulary.ranks"
# All that a vocabulary may consist of, in its folder.
FILES = (FILE, RANKS_FILE, *NAMES.values())


@runtime_checkable
class Vocabulary(Protocol):
    """Text to tokens and back. ``size`` is the number of different tokens."""

    @property
    def size(self) -> int:
        """How many different tokens there are."""

    def encode(self, text: str) -> Int32[np.ndarray, " token"]:
        """The tokens of a text. Raises ValueError naming what has none."""

    def decode(self, ids: Iterable[Any]) -> str:
        """The text of tokens, of those of a whole text the text itself. Raises ValueError for an id too large."""

    def save(self, folder: Path) -> None:
        """Write it to a folder, for `load_vocabulary`."""


@dataclass(frozen=True)
class Bytes:
    """The 256 single bytes of UTF-8."""

    size: int = field(default=256, init=False)

    def encode(self, text: str) -> Int32[np.ndarray, " token"]:
        """One token for each byte."""
        return np.frombuffer(_utf8(text), np.uint8).astype(np.int32)

    def decode(self, ids: Iterable[Any]) -> str:
        """The text; bytes that are not UTF-8 become U+FFFD."""
        return _checked(ids, self.size).astype(np.uint8).tobytes().decode("utf-8", errors="replace")

    def save(self, folder: Path) -> None:
        """Write what it is."""
        _save(folder, "bytes", {})


@dataclass(frozen=True)
class Pieces:
    """Pieces of text by tiktoken: GPT-2's, or trained here, or from a rank file (see :mod:`minitf.tokenizer`)."""

    encoding: tiktoken.Encoding

    @property
    def size(self) -> int:
        """Pieces, and special tokens if any."""
        return self.encoding.n_vocab

    def encode(self, text: str) -> Int32[np.ndarray, " token"]:
        """Byte pair encoding."""
        return encode(self.encoding, text)

    def decode(self, ids: Iterable[Any]) -> str:
        """The text; pieces that together are not UTF-8 become U+FFFD."""
        return decode_bytes(self.encoding, ids).decode("utf-8", errors="replace")

    def save(self, folder: Path) -> None:
        """Write the ranks to a file of their own, and the special tokens, which such a file cannot hold."""
        save_encoding(self.encoding, folder / RANKS_FILE)
        special = {one: self.encoding.encode_single_token(one) for one in self.encoding.special_tokens_set}
        _save(folder, "pieces", {"name": self.encoding.name, "special": special})


@dataclass(frozen=True)
class Characters:
    """Single characters: token i is the i-th of ``alphabet``, which is in the order of Unicode."""

    alphabet: str

    @property
    def size(self) -> int:
        """Characters of the alphabet."""
        return len(self.alphabet)

    @cached_property
    def _token_of(self) -> Int32[np.ndarray, " code"]:
        """The token of each code point, -1 where there is none; the last stands for all that are larger."""
        codes = _code_points(self.alphabet)
        table = np.full(int(codes.max(initial=0)) + 2, -1, np.int32)
        table[codes] = np.arange(self.size)
        return table

    def encode(self, text: str) -> Int32[np.ndarray, " token"]:
        """One token for each character."""
        codes = _code_points(text)
        tokens = self._token_of[np.minimum(codes, len(self._token_of) - 1)]
        if tokens.size and tokens.min() < 0:
            unknown = np.unique(codes[tokens < 0])
            named = ", ".join(repr(chr(code)) for code in unknown[:10].tolist())
            more = f" and {unknown.size - 10} more" if unknown.size > 10 else ""
            raise ValueError(f"the characters {named}{more} are not in the alphabet of {self.size} characters")
        return tokens

    def decode(self, ids: Iterable[Any]) -> str:
        """The characters."""
        return "".join(self.alphabet[one] for one in _checked(ids, self.size).tolist())

    def save(self, folder: Path) -> None:
        """Write the alphabet."""
        _save(folder, "characters", {"alphabet": list(self.alphabet)})


@dataclass(frozen=True)
class Names:
    """Whole names, one a line: token i is the i-th of ``names``."""

    names: tuple[str, ...]

    @property
    def size(self) -> int:
        """How many names there are."""
        return len(self.names)

    @cached_property
    def _numbers(self) -> Mapping[str, int]:
        return {name: number for number, name in enumerate(self.names)}

    def encode(self, text: str) -> Int32[np.ndarray, " token"]:
        """One token for each line."""
        lines = text.removesuffix("\n").split("\n") if text else []
        try:
            return np.array([self._numbers[line] for line in lines], np.int32)
        except KeyError as error:
            known = f"{self.size} symbols of this vocabulary ({', '.join(map(repr, self.names[:3]))}, ...)"
            raise ValueError(f"{error.args[0]!r} is none of the {known}; each is a line") from None

    def decode(self, ids: Iterable[Any]) -> str:
        """Their names, one a line."""
        return "".join(f"{self.names[one]}\n" for one in _checked(ids, self.size).tolist())

    def save(self, folder: Path) -> None:
        """Write the names."""
        _save(folder, "names", {"names": list(self.names)})


@dataclass(frozen=True)
class Bins:
    """Numbers in bins: a row of a table has a token for each column, and each column has bins of its own.

    ``edges[c]`` are the limits between the bins of column c (a limit itself is in the bin above it), and
    ``centers[c]``, one more, the numbers that its bins are read back as. The tokens of column c follow those of
    the columns before it.
    """

    columns: tuple[str, ...]
    edges: tuple[tuple[float, ...], ...]
    centers: tuple[tuple[float, ...], ...]

    @property
    def size(self) -> int:
        """Bins of all columns."""
        return sum(map(len, self.centers))

    def encode(self, text: str) -> Int32[np.ndarray, " token"]:
        """A row a line, with commas between its numbers."""
        rows = numbers(text, len(self.columns))
        first = np.cumsum([0, *map(len, self.centers)])
        bins = [
            first[column] + np.searchsorted(np.array(edges), rows[:, column], side="right")
            for column, edges in enumerate(self.edges)
        ]
        return np.stack(bins, axis=1).reshape(-1).astype(np.int32)

    def decode(self, ids: Iterable[Any]) -> str:
        """The center of each bin, to six digits; a line ends after the last column."""
        every = [center for centers in self.centers for center in centers]
        of_last = self.size - len(self.centers[-1])
        return "".join(
            f"{every[one]:.6g}" + ("\n" if one >= of_last else ",") for one in _checked(ids, self.size).tolist()
        )

    def save(self, folder: Path) -> None:
        """Write columns, edges and centers."""
        _save(folder, "bins", {"columns": self.columns, "edges": self.edges, "centers": self.centers})


@dataclass(frozen=True)
class Ids:
    """Tokens that came as numbers: their text is the numbers, with spaces between them."""

    size: int

    def encode(self, text: str) -> Int32[np.ndarray, " token"]:
        """The numbers."""
        words = text.split()
        wrong = [word for word in words if not re.fullmatch("[0-9]{1,10}", word) or int(word) >= self.size]
        if wrong:
            raise ValueError(f"{wrong[0]!r} is no token: tokens are numbers from 0 to {self.size - 1}")
        return np.array([int(word) for word in words], np.int32)

    def decode(self, ids: Iterable[Any]) -> str:
        """The numbers."""
        return " ".join(map(str, _checked(ids, self.size).tolist()))

    def save(self, folder: Path) -> None:
        """Write the size."""
        _save(folder, "ids", {"size": self.size})


@dataclass(frozen=True)
class Labelled:
    """Another vocabulary, and after its tokens one for each label that a sequence may have."""

    inner: Vocabulary
    labels: tuple[str, ...]

    @property
    def size(self) -> int:
        """All tokens, those of labels included."""
        return self.inner.size + len(self.labels)

    def encode(self, text: str) -> Int32[np.ndarray, " token"]:
        """The tokens of a sequence."""
        return self.inner.encode(text)

    def example(self, text: str, label: str) -> Int32[np.ndarray, " token"]:
        """The tokens of a sequence, then that of its label. Raises ValueError for a label that there is not."""
        if label not in self.labels:
            raise ValueError(f"{label!r} is none of the labels {', '.join(map(repr, self.labels[:10]))}")
        return np.append(self.inner.encode(text), np.int32(self.inner.size + self.labels.index(label)))

    def decode(self, ids: Iterable[Any]) -> str:
        """The text; labels are in brackets."""
        tokens = _checked(ids, self.size)
        places = np.flatnonzero(tokens >= self.inner.size)
        parts = np.split(tokens, np.sort(np.concatenate([places, places + 1])))
        named = lambda part: "".join(f"[{self.labels[one - self.inner.size]}]" for one in part.tolist())
        is_label = lambda part: part.size and part[0] >= self.inner.size
        return "".join(named(part) if is_label(part) else self.inner.decode(part) for part in parts)

    def save(self, folder: Path) -> None:
        """Write the other vocabulary, and the labels."""
        self.inner.save(folder)
        _save(folder, "labelled", {"inner": json.loads((folder / FILE).read_bytes()), "labels": self.labels})


def load_vocabulary(folder: Path) -> Vocabulary:
    """The vocabulary that was saved in a folder.

    Raises ValueError naming the file: missing, damaged, or run by a package that is not installed.
    """
    file = folder / FILE
    try:
        told = json.loads(file.read_bytes())
        kind = told.pop("kind")
        if kind in _READ:
            return _READ[kind](told, folder)
    except OSError as error:
        raise ValueError(f"The vocabulary {file} cannot be read: {error.strerror or error}.") from error
    except (KeyError, TypeError, AttributeError, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"The vocabulary {file} is damaged ({type(error).__name__}: {error}).") from error
    raise ValueError(f"The vocabulary {file} is of an unknown kind, {kind!r}.")


def _read_pieces(told: dict[str, Any], folder: Path) -> Pieces:
    return Pieces(_with_special(load_encoding(folder / RANKS_FILE), told["name"], told["special"]))


def _read_bins(told: dict[str, Any], folder: Path) -> Bins:
    nested = (tuple(map(tuple, told[name])) for name in ("edges", "centers"))
    return Bins(tuple(told["columns"]), *nested)


def _read_labelled(told: dict[str, Any], folder: Path) -> Labelled:
    inner = told["inner"]
    return Labelled(_READ[inner.pop("kind")](inner, folder), tuple(told["labels"]))


# What a description says, and its folder, as the vocabulary of its kind.
_READ: dict[str, Callable[[dict[str, Any], Path], Vocabulary]] = {
    "bytes": lambda told, folder: Bytes(**told),
    "pieces": _read_pieces,
    "characters": lambda told, folder: Characters("".join(told["alphabet"])),
    "names": lambda told, folder: Names(tuple(told["names"])),
    "bins": _read_bins,
    "ids": lambda told, folder: Ids(told["size"]),
    "labelled": _read_labelled,
    "tokenizer_json": lambda told, folder: load_tokenizer_file(folder / NAMES["tokenizer_json"], told["rows"]),
    "llama2c": lambda told, folder: load_tokenizer_file(folder / NAMES["llama2c"], told["rows"]),
}


def bins_of(columns: tuple[str, ...], rows: np.ndarray, bins: int) -> Bins:
    """``bins`` bins for each column of ``rows`` ``[row, column]``, with about as many rows in each.

    Where a number is so frequent that limits between bins coincide, there are fewer. A bin's center is the median
    of its numbers. Raises ValueError for a column in which all numbers are the same.
    """
    edges, centers = [], []
    for name, column in zip(columns, rows.T, strict=True):
        # A limit at the smallest number would leave the bin below it empty.
        limits = np.unique(np.quantile(column, np.arange(1, bins) / bins, method="higher"))
        limits = limits[limits > column.min()]
        if not limits.size:
            raise ValueError(
                f"the column {name} cannot be cut in {bins} bins: nearly all of its numbers are {column.min():g}"
            )
        inside = np.searchsorted(limits, column, side="right")
        edges.append(tuple(limits.tolist()))
        centers.append(tuple(float(np.median(column[inside == one])) for one in range(limits.size + 1)))
    return Bins(columns, tuple(edges), tuple(centers))


def numbers(text: str, columns: int) -> np.ndarray:
    """Lines of numbers with commas between them as float64 ``[row, column]``.

    Raises ValueError for a line with another count of numbers, or with what is no finite number.
    """
    lines = text.removesuffix("\n").split("\n") if text else []
    cells = [line.split(",") for line in lines]
    try:
        rows = np.array(cells, np.float64).reshape(len(lines), columns)
    except ValueError:
        rows = np.full((1, 1), np.nan)
    if not np.all(np.isfinite(rows)):
        wrong = next((line for line in lines if not _is_row(line, columns)), lines[0])
        raise ValueError(
            f"{wrong!r} is not a row of {columns} finite numbers with commas between them; each row is a line"
        )
    return rows


def is_number(cell: str) -> bool:
    """Whether a cell of a table is a finite number."""
    try:
        return bool(np.isfinite(float(cell)))
    except ValueError:
        return False


def _is_row(line: str, columns: int) -> bool:
    cells = line.split(",")
    return len(cells) == columns and all(map(is_number, cells))


def _with_special(encoding: tiktoken.Encoding, name: str, special: Mapping[str, int]) -> tiktoken.Encoding:
    ranks = {encoding.decode_single_token_bytes(rank): rank for rank in range(encoding.n_vocab)}
    return tiktoken.Encoding(name, pat_str=GPT2_PATTERN, mergeable_ranks=ranks, special_tokens=dict(special))


def _save(folder: Path, kind: str, what: Mapping[str, Any]) -> None:
    write_atomically(folder / FILE, (json.dumps({"kind": kind, **what}) + "\n").encode())


def _checked(ids: Iterable[Any], size: int) -> Integer[np.ndarray, " token"]:
    array = np.asarray(ids if hasattr(ids, "__array__") else list(ids))
    if array.size == 0:
        return np.zeros(0, np.int32)
    if array.ndim != 1 or not np.issubdtype(array.dtype, np.integer):
        raise ValueError(f"tokens are a 1-D sequence of integers, not {array.dtype} of shape {array.shape}")
    wrong = array[(array < 0) | (array >= size)]
    if wrong.size:
        raise ValueError(f"there is no token {wrong[0]}: tokens go from 0 to {size - 1}")
    return array


def _code_points(text: str) -> Integer[np.ndarray, " character"]:
    return np.frombuffer(text.encode("utf-32-le", errors="surrogatepass"), np.uint32)


def _utf8(text: str) -> bytes:
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(
            f"the text holds a lone surrogate, U+{ord(text[error.start]):04X}, which has no bytes"
        ) from None


@dataclass(frozen=True)
class Tokenizer:
    """A vocabulary with the methods of a ``tiktoken.Encoding`` that readers of a model use."""

    vocabulary: Vocabulary
    name: str = FILE

    @property
    def n_vocab(self) -> int:
        """How many tokens there are."""
        return self.vocabulary.size

    def encode(self, text: str) -> list[int]:
        """The tokens of a text. Raises ValueError naming what has none."""
        return self.vocabulary.encode(text).tolist()

    def decode(self, ids: Iterable[Any]) -> str:
        """Their text; of tokens that only fill up a model's vocabulary, none."""
        return self.vocabulary.decode([one for one in ids if one < self.vocabulary.size])

    def decode_single_token_bytes(self, token: int) -> bytes:
        """What one token stands for."""
        if isinstance(self.vocabulary, Bytes):
            return bytes([token])
        if isinstance(self.vocabulary, Pieces):
            return self.vocabulary.encoding.decode_single_token_bytes(token)
        if isinstance(self.vocabulary, TokenizerFile):
            return self.vocabulary.tokenizer.decode_single_token_bytes(token)
        if isinstance(self.vocabulary, Labelled) and token < self.vocabulary.inner.size:
            return Tokenizer(self.vocabulary.inner).decode_single_token_bytes(token)
        return self.vocabulary.decode([token]).encode()


def vocabulary_of(tokenizer: Any) -> Vocabulary | None:
    """The vocabulary of a model's tokenizer, which can be kept with another model; None where there is none."""
    if isinstance(tokenizer, Tokenizer):
        return tokenizer.vocabulary
    if isinstance(tokenizer, tiktoken.Encoding):
        # A rank file holds no pattern, and with another one the same ranks are another encoding.
        return Pieces(tokenizer) if tokenizer._pat_str == GPT2_PATTERN else None
    return TokenizerFile(tokenizer) if isinstance(tokenizer, JsonTokenizer | Llama2cTokenizer) else None


def mask_token_of(vocabulary: Vocabulary) -> int | None:
    """The token that stands for what is to be guessed, where a vocabulary has one."""
    return vocabulary.tokenizer.mask_token if isinstance(vocabulary, TokenizerFile) else None
