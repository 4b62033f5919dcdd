"""The tokenizer of a model that was made elsewhere, kept as the file that it came in."""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int32

from minitf.families import llama2c_tokenizer, tokenizer_json
from minitf.families.llama2c_tokenizer import Llama2cTokenizer
from minitf.families.tokenizer_json import JsonTokenizer
from minitf.files import write_atomically

# What says of which kind the vocabulary in a folder is.
DESCRIPTION = "vocabulary.json"
NAMES = {"tokenizer_json": "tokenizer.json", "llama2c": "tokenizer.bin"}


@dataclass(frozen=True)
class TokenizerFile:
    """A vocabulary (:class:`minitf.vocabulary.Vocabulary`) that a tokenizer.json or a llama2.c file holds.

    A text has the tokens that these put before and after it too, such as one that says that it begins.
    """

    tokenizer: JsonTokenizer | Llama2cTokenizer

    @property
    def size(self) -> int:
        """One more than the largest token that the model has."""
        return min(self.tokenizer.n_vocab, self.tokenizer.rows)

    def encode(self, text: str) -> Int32[np.ndarray, " token"]:
        """The tokens of a text. Raises ValueError for a text that has none."""
        return np.array(self.tokenizer.encode(text), np.int32)

    def decode(self, ids: Iterable[Any]) -> str:
        """The text of tokens. Raises ValueError for one that there is not."""
        return self.tokenizer.decode(ids)

    def piece(self, token: int) -> bytes:
        """What one token stands for."""
        return self.tokenizer.decode_single_token_bytes(token)

    def save(self, folder: Path) -> None:
        """Write the file, and what it is."""
        kind = "tokenizer_json" if isinstance(self.tokenizer, JsonTokenizer) else "llama2c"
        write_atomically(folder / NAMES[kind], self.tokenizer.file)
        told = {"kind": kind, "rows": self.tokenizer.rows}
        write_atomically(folder / DESCRIPTION, (json.dumps(told) + "\n").encode())


def load_tokenizer_file(path: Path, rows: int | None = None) -> TokenizerFile:
    """The tokenizer of a file: a tokenizer.json, or llama2.c's, which ends in .bin.

    ``rows`` are those of the model's embedding; None: as many as there are tokens.

    Raises:
        NotInstalled: the package ``tokenizers`` is needed.
        ValueError: the file is missing or damaged, or not of a model of so many tokens.
    """
    if path.suffix == ".bin":
        return TokenizerFile(llama2c_tokenizer.load_tokenizer(path, rows))
    found = tokenizer_json.load_tokenizer(path, rows)
    if found is None:
        raise tokenizer_json.NotInstalled(path)
    return TokenizerFile(found)
