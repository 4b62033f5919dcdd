"""Text as bytes, characters, pieces or whole names, and tokens that came as numbers."""

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import tiktoken
from jaxtyping import Int32, Integer

from minitf.files import write_atomically
from minitf.tokenizer import decode_bytes, encode, save_encoding
from minitf.tokenizer_file import DESCRIPTION as FILE
from minitf.tokenizer_file import NAMES

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

    def piece(self, token: int) -> bytes:
        """What one token stands for; pieces of a character are not text yet."""

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
        return checked(ids, self.size).astype(np.uint8).tobytes().decode("utf-8", errors="replace")

    def piece(self, token: int) -> bytes:
        """What one token stands for."""
        return bytes([token])

    def save(self, folder: Path) -> None:
        """Write what it is."""
        describe(folder, "bytes", {})


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

    def piece(self, token: int) -> bytes:
        """What one token stands for."""
        return self.encoding.decode_single_token_bytes(token)

    def save(self, folder: Path) -> None:
        """Write the ranks to a file of their own, and the special tokens, which such a file cannot hold."""
        save_encoding(self.encoding, folder / RANKS_FILE)
        special = {one: self.encoding.encode_single_token(one) for one in self.encoding.special_tokens_set}
        describe(folder, "pieces", {"name": self.encoding.name, "special": special})


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
        return "".join(self.alphabet[one] for one in checked(ids, self.size).tolist())

    def piece(self, token: int) -> bytes:
        """What one token stands for."""
        return self.decode([token]).encode()

    def save(self, folder: Path) -> None:
        """Write the alphabet."""
        describe(folder, "characters", {"alphabet": list(self.alphabet)})


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
        return "".join(f"{self.names[one]}\n" for one in checked(ids, self.size).tolist())

    def piece(self, token: int) -> bytes:
        """What one token stands for."""
        return self.decode([token]).encode()

    def save(self, folder: Path) -> None:
        """Write the names."""
        describe(folder, "names", {"names": list(self.names)})


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
        return " ".join(map(str, checked(ids, self.size).tolist()))

    def piece(self, token: int) -> bytes:
        """What one token stands for."""
        return self.decode([token]).encode()

    def save(self, folder: Path) -> None:
        """Write the size."""
        describe(folder, "ids", {"size": self.size})


def describe(folder: Path, kind: str, what: Mapping[str, Any]) -> None:
    """Write of which kind the vocabulary in a folder is, and what else it is made of."""
    write_atomically(folder / FILE, (json.dumps({"kind": kind, **what}) + "\n").encode())


def checked(ids: Iterable[Any], size: int) -> Integer[np.ndarray, " token"]:
    """Tokens as an array. Raises ValueError for what is none, or none of ``size``."""
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
