"""What symbols are numbered as, as far as it follows from the data that they are in."""

import itertools
from array import array
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from minitf.tokenizer import gpt2_encoding, load_encoding, train_encoding
from minitf.tokenizer_file import NAMES, load_tokenizer_file
from minitf.train.data_settings import LEARNED, MOST_NAMES, DataSettings
from minitf.train.symbol_files import Document, Example, Sided, token_array
from minitf.train.table_files import table_columns
from minitf.train.token_file import LARGEST_VOCABULARY
from minitf.vocabulary import (
    FILE,
    Bytes,
    Characters,
    Ids,
    Labelled,
    Measured,
    Names,
    Pieces,
    Vocabulary,
    bins_of,
    load_vocabulary,
    numbers,
)

MOST_CHARACTERS = 4096
MOST_LABELS = 4096
BPE_PIECES = 4096
BPE_CHARACTERS = 50_000_000  # that a BPE is trained on, at most
BIN_ROWS = 1_000_000  # that the limits of bins come from, at most


def known_vocabulary(settings: DataSettings, vocabulary: Path | None) -> Vocabulary | None:
    """The vocabulary, where it does not follow from the data."""
    if vocabulary is None:
        return None if settings.bins or settings.encoding in LEARNED else _given(settings.encoding)
    for name in ("encoding", "vocabulary", "bins"):
        if getattr(settings, name):
            raise ValueError(
                f"data.{name} is {getattr(settings, name)!r}; with a model to start from, data has the tokens of "
                "that model: leave it out"
            )
    return load_vocabulary(vocabulary)


def learned(settings: DataSettings, files: list[Path], read: Callable[[str], Iterator[Any]]) -> Vocabulary:
    """The encoding, as far as it follows from the data: from all of it, or from the training documents."""
    training = lambda: _texts(_training(read("Learning the encoding"), settings))
    encoding = settings.encoding or {"text": "bytes", "tokens": "ids"}.get(settings.format, "characters")
    if settings.bins:
        columns = table_columns(files[0], settings.columns, settings.dialect)
        return bins_of(columns, _first_rows(training(), len(columns)), settings.bins)
    if encoding == "ids":
        return Ids(settings.vocabulary or 1 + max(_largest(file, settings.raw) for file in files))
    if encoding == "bpe":
        return Pieces(train_encoding(_beginning(training()), settings.vocabulary or BPE_PIECES))
    if encoding in ("characters", "symbols"):
        return _listed(encoding, _texts(document for _, document in read(f"Finding the {encoding}")))
    return Bytes()


def _largest(file: Path, raw: str) -> int:
    """The largest token of a file. Raises ValueError where no token file can hold it."""
    largest = int(token_array(file, raw).max())
    if largest >= LARGEST_VOCABULARY:
        raise ValueError(f"{file} has the token {largest}; tokens are below {LARGEST_VOCABULARY}")
    return largest


def labelled(symbols: Vocabulary, settings: DataSettings, read: Callable[[str], Iterator[Sided]]) -> Labelled:
    """With a token for each label. Raises ValueError where there are too many, or a single one."""
    if isinstance(symbols, Labelled):  # of a model to start from
        return symbols
    labels = ([one.cell] for _, one in read("Finding the labels") if isinstance(one, Example))
    found = tuple(_found(labels, MOST_LABELS, f"labels in the column {settings.label}", ""))
    if len(found) < 2:
        raise ValueError(f"every row has the {settings.label} {found[0]!r}: there is nothing to tell")
    return Labelled(text_of(symbols), found)


def measured(symbols: Vocabulary, settings: DataSettings, read: Callable[[str], Iterator[Sided]]) -> Measured:
    """With what numbers are told in: mean and deviation of those that are trained on.

    Raises ValueError where they are all the same, or too large for their deviation to be a number.
    """
    if isinstance(symbols, Measured) and symbols.name == settings.target:  # of a model to start from
        return symbols
    rows = _training(read("Reading the numbers"), settings)
    found = np.array(array("d", (float(one.cell) for one in rows if isinstance(one, Example))))
    with np.errstate(over="ignore", invalid="ignore"):
        mean, deviation = float(found.mean()), float(found.std())
    if not np.isfinite(deviation):
        raise ValueError(f"the {settings.target} goes up to {np.abs(found).max():g}: its deviation is no number")
    if not deviation:
        raise ValueError(f"every row has the {settings.target} {mean:g}: there is nothing to tell")
    return Measured(text_of(symbols), settings.target, mean, deviation)


def text_of(known: Vocabulary) -> Vocabulary:
    """What the sequences of a vocabulary are in, without what is told of them."""
    return known.inner if isinstance(known, Labelled | Measured) else known


def _texts(documents: Iterable[Document]) -> Iterator[Any]:
    return (document.text if isinstance(document, Example) else document for document in documents)


def _given(encoding: str) -> Vocabulary:
    if encoding == "gpt2":
        return Pieces(gpt2_encoding())
    if not Path(encoding).exists():
        raise ValueError(
            f"encoding is {encoding!r}, which is neither bytes, characters, bpe, gpt2 or symbols, nor a file: a "
            "rank file, a tokenizer.json, llama2.c's tokenizer.bin, or the folder of one"
        )
    path = Path(encoding)
    if path.is_dir() and not (path / FILE).exists():
        # The folder of a model that was made elsewhere.
        path = next((path / name for name in NAMES.values() if (path / name).exists()), path)
    if path.is_dir():
        return load_vocabulary(path)
    return load_tokenizer_file(path) if path.suffix in (".json", ".bin") else Pieces(load_encoding(path))


def _listed(encoding: str, documents: Iterator[str]) -> Vocabulary:
    if encoding == "characters":
        return Characters("".join(_found(map(set, documents), MOST_CHARACTERS, "characters", "bytes or bpe")))
    lines = (text.removesuffix("\n").split("\n") for text in documents)
    return Names(tuple(_found(lines, MOST_NAMES, "symbols", "characters or bpe")))


def _found(groups: Iterable[Iterable[str]], most: int, what: str, instead: str) -> list[str]:
    found: set[str] = set()
    for group in groups:
        found.update(group)
        if len(found) > most:
            use = f": use the encoding {instead}" if instead else ""
            raise ValueError(f"the data has more than {most} different {what}{use}")
    return sorted(found)


def _first_rows(documents: Iterable[str], columns: int) -> np.ndarray:
    blocks, held = [], 0
    for document in documents:
        blocks.append(numbers(document, columns))
        held += len(blocks[-1])
        if held >= BIN_ROWS:
            break
    return np.concatenate(blocks)[:BIN_ROWS]


def _beginning(documents: Iterable[str]) -> Iterator[str]:
    held = 0
    for document in documents:
        if held >= BPE_CHARACTERS:
            return
        yield document
        held += len(document)


def _training(documents: Iterable[Sided], settings: DataSettings) -> Iterator[Document]:
    kept = (document for is_validation, document in documents if not is_validation)
    first = next(kept, None)
    if first is None:
        raise ValueError(cannot_be_split(settings, "training"))
    return itertools.chain([first], kept)


def cannot_be_split(settings: DataSettings, side: str) -> str:
    """A sentence on there being no document on a side."""
    if settings.validation_paths:
        return f"the files for {side} hold nothing"
    return (
        f"the data cannot be split into training and validation: with a share of {settings.validation} for "
        f"validation (by the hash of each document) no document is for {side}. Give more data, or another share."
    )
