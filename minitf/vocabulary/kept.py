"""A vocabulary read back from the folder that it was saved in."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import tiktoken

from minitf.tokenizer import GPT2_PATTERN, load_encoding
from minitf.tokenizer_file import NAMES, load_tokenizer_file
from minitf.vocabulary.bins import Bins
from minitf.vocabulary.examples import Labelled, Measured
from minitf.vocabulary.kinds import FILE, RANKS_FILE, Bytes, Characters, Ids, Names, Pieces, Vocabulary


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


def _read_measured(told: dict[str, Any], folder: Path) -> Measured:
    inner = told.pop("inner")
    return Measured(_READ[inner.pop("kind")](inner, folder), **told)


# What a description says, and its folder, as the vocabulary of its kind.
_READ: dict[str, Callable[[dict[str, Any], Path], Vocabulary]] = {
    "bytes": lambda told, folder: Bytes(**told),
    "pieces": _read_pieces,
    "characters": lambda told, folder: Characters("".join(told["alphabet"])),
    "names": lambda told, folder: Names(tuple(told["names"])),
    "bins": _read_bins,
    "ids": lambda told, folder: Ids(told["size"]),
    "labelled": _read_labelled,
    "measured": _read_measured,
    "tokenizer_json": lambda told, folder: load_tokenizer_file(folder / NAMES["tokenizer_json"], told["rows"]),
    "llama2c": lambda told, folder: load_tokenizer_file(folder / NAMES["llama2c"], told["rows"]),
}


def _with_special(encoding: tiktoken.Encoding, name: str, special: Mapping[str, int]) -> tiktoken.Encoding:
    ranks = {encoding.decode_single_token_bytes(rank): rank for rank in range(encoding.n_vocab)}
    return tiktoken.Encoding(name, pat_str=GPT2_PATTERN, mergeable_ranks=ranks, special_tokens=dict(special))
