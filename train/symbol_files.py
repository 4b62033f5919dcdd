"""Files of symbols as documents, read piece by piece: text, FASTA and tokens (tables: ``table_files``).

A document is a text (or, of token files, an array of tokens) that is small enough to be held in memory, whatever
the size of its file; one after another they are the file, less what is no data. Each is wholly on one side of the
split into training and validation, so their sizes are a compromise, which each reader states.
"""

import codecs
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Integer

from minitf.train.corpus import files_below
from minitf.train.token_file import description_of, open_tokens

SNIFFED_BYTES = 1 << 16
UNDECODABLE_SHARE = 0.1
# A small source is cut in at least so many documents where it can be, so that a tenth of them is not none.
DOCUMENTS = 100
TEXT_CHARACTERS = 2000
# Where order goes on from document to document (sequences, series), they are longer, to be interrupted rarely.
SERIES_CHARACTERS = 1 << 16
LEAST_RECORD = 1024
# Of tokens in a file without a header: how many are looked at, and what none of them can be.
BEGINNING = 4096
LARGEST_TOKEN = 2**24


@dataclass(frozen=True)
class Example:
    """A sequence, and the cell that is to be told from it: a label, or a number."""

    text: str
    cell: str

    def __len__(self) -> int:
        return len(self.text)


# By its name, which files of a folder are of a format; of text those that are not tokens, if they can be read.
NAMED = {
    "fasta": (".fa", ".fasta", ".fas", ".fna", ".ffn", ".faa", ".frn"),
    "csv": (".csv", ".tsv", ".tab"),
    "tokens": (".npy", ".bin", ".tokens"),
}


Document = str | Integer[np.ndarray, " token"] | Example
# What is trained on, False, and what only measures, True.
Sided = tuple[bool, Document]


def source_files(paths: Iterable[str], form: str = "text") -> list[Path]:
    """All files that are named, and those in folders that are, all the way down, each once, in sorted order.

    In a folder those count whose names are of the format ``form`` (``NAMED``); of text all but hidden, empty and
    binary ones, and token files with what describes them. What runs left in folders of their own is no data.
    Raises ValueError naming the path: missing, unreadable, or a folder without a file that counts.
    """
    found: dict[Path, Path] = {}
    for path in map(Path, paths):
        if path.is_dir():
            inside = [file for file in files_below(path) if _is_of(file, form)]
            if not inside:
                which = f"of {form}, by its name: {', '.join(NAMED[form])}" if form in NAMED else "of text"
                raise ValueError(f"The folder {path} holds no file {which} (hidden and empty ones do not count).")
        elif path.is_file():
            inside = [path]
        elif path.exists():
            raise ValueError(f"{path} is neither a file nor a folder: data is read from ordinary files only.")
        else:
            raise ValueError(f"There is no file or folder {path}.")
        for file in inside:
            found.setdefault(file.resolve(), file)
    return list(found.values())


def _is_of(file: Path, form: str) -> bool:
    """Whether a file in a folder is of a format."""
    if form in NAMED:
        return file.suffix.lower() in NAMED[form] and file.stat().st_size > 0
    described = file.suffix == ".json" and file.with_suffix("").suffix == ".tokens"
    return file.suffix.lower() not in NAMED["tokens"] and not described and not text_problem(file)


def text_problem(file: Path) -> str:
    """What is wrong with a file as text, by how it begins, or nothing. Raises ValueError: unreadable."""
    try:
        with open(file, "rb") as opened:
            data = opened.read(SNIFFED_BYTES)
    except OSError as error:
        raise ValueError(f"The file {file} cannot be read: {error.strerror or error}.") from error
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        return "is UTF-16, but text is read as UTF-8: save it as UTF-8"
    if b"\0" in data:
        return "is binary, not text (it holds NUL bytes)"
    # The last character may be cut in two, which is not its fault.
    text = codecs.getincrementaldecoder("utf-8-sig")("replace").decode(data)
    wrong = text.count("\ufffd") - data.count("\ufffd".encode())
    if wrong > UNDECODABLE_SHARE * len(text):
        return f"is not UTF-8 text ({wrong} of its first {len(text)} characters cannot be decoded)"
    return "" if text.strip() or len(data) == SNIFFED_BYTES else "is empty: it holds no text"


def text_documents(files: Sequence[Path]) -> Iterator[str]:
    """Text, cut after a blank line once a document has 2000 characters (of a small source, fewer).

    Without a blank line it is cut at the end of a line once it has four times as many, and inside a line longer
    than that. UTF-8; wrong bytes are replaced by U+FFFD, line ends become "\\n", and a file ends with one.
    """
    size = document_size(files, 1, TEXT_CHARACTERS)
    for file in files:
        last = ""
        for document in _cut_text(file, size):
            if last:
                yield last
            last = document
        yield last.removesuffix("\n") + "\n"


def _cut_text(file: Path, size: int) -> Iterator[str]:
    held, length = [], 0
    for line in _lines(file, 4 * size):
        held.append(line)
        length += len(line)
        if length >= 4 * size or (length >= size and not line.strip()):
            yield "".join(held)
            held, length = [], 0
    if held:
        yield "".join(held)


def fasta_documents(files: Sequence[Path]) -> Iterator[str]:
    """FASTA (DNA, RNA, proteins): a record is a document, its letters in upper case and then a line end.

    Headers (from > on), comments (;) and spaces are dropped. A record above 65 536 letters (of a small source,
    fewer, but at least 1024) is cut in documents of that size, the last of which has the line end.

    Raises ValueError naming file and line for what is neither a letter, nor one of "*", "-" and ".".
    """
    size = document_size(files, LEAST_RECORD, SERIES_CHARACTERS)
    for file in files:
        held = ""
        number, starts_line, skipping = 1, True, False
        for line in _lines(file, size):
            if starts_line:
                skipping = line[:1] in (">", ";")
                if line[:1] == ">" and held:
                    yield held + "\n"
                    held = ""
            if not skipping:
                letters = "".join(line.split()).upper()
                if not re.fullmatch("[A-Z*.-]*", letters):
                    raise ValueError(f"{file}, line {number}: {line[:60].rstrip()!r} is no sequence of letters.")
                held += letters
                while len(held) > size:
                    yield held[:size]
                    held = held[size:]
            starts_line = line.endswith("\n")
            number += starts_line
        if held:
            yield held + "\n"


def token_documents(
    files: Sequence[Path], raw: str, vocabulary: int | None = None
) -> Iterator[Integer[np.ndarray, " token"]]:
    """Tokens of .npy files, of our own .tokens files, and of others as little-endian numbers of type ``raw``.

    A document is 65 536 tokens (of a small source, fewer). Raises ValueError naming the file: see `token_array`;
    and a token that is none of ``vocabulary``, where that is known.
    """
    arrays = [token_array(file, raw) for file in files]
    size = min(max(sum(map(len, arrays)) // DOCUMENTS, 1), SERIES_CHARACTERS)
    for file, array in zip(files, arrays, strict=True):
        for start in range(0, len(array), size):
            tokens = np.asarray(array[start : start + size])
            least, largest = int(tokens.min()), int(tokens.max())
            if least < 0:
                raise ValueError(f"{file} has the token {least}; tokens are counted from 0")
            if vocabulary is not None and largest >= vocabulary:
                raise ValueError(f"{file} has the token {largest}; the vocabulary is {vocabulary}, counted from 0")
            yield tokens


def token_array(file: Path, raw: str) -> Integer[np.ndarray, " token"]:
    """The tokens of a file, which stay on disk.

    Raises ValueError naming it: damaged, empty, of another size than whole numbers, not one row of integers.
    """
    if description_of(file).exists():
        return open_tokens(file).ids
    try:
        array = _numpys(file) if file.suffix == ".npy" else _raw(file, np.dtype(raw))
    except (OSError, ValueError, EOFError) as error:
        raise ValueError(f"The tokens in {file} cannot be read: {error}.") from error
    if array.ndim != 1 or not np.issubdtype(array.dtype, np.integer) or not array.size:
        raise ValueError(
            f"{file} holds {array.dtype} of shape {array.shape}; tokens are one row of integers, at least one"
        )
    return array


def _numpys(file: Path) -> np.ndarray:
    with open(file, "rb") as opened:
        if opened.read(len(np.lib.format.MAGIC_PREFIX)) != np.lib.format.MAGIC_PREFIX:
            raise ValueError("it does not begin as a file that numpy.save writes")
    return np.load(file, "r", allow_pickle=False)


def _raw(file: Path, dtype: np.dtype) -> np.ndarray:
    size = file.stat().st_size
    if not size or size % dtype.itemsize:
        raise ValueError(f"it has {size} bytes, which are not whole numbers of {dtype.itemsize} bytes")
    found = np.memmap(file, dtype.newbyteorder("<"), "r")
    # Numbers of another size would be a vocabulary of millions, or a zero between all tokens, and train.
    first = np.asarray(found[:BEGINNING])
    if dtype.itemsize == 2 and len(first) >= 64 and first[::2].any() and not first[1::2].any():
        raise ValueError(
            "every second number is 0, as in a file of uint32: choose data.raw=uint32 (if these are tokens, make "
            "it a .npy file, which says itself what it holds)"
        )
    if dtype.itemsize == 4 and first.max() >= LARGEST_TOKEN:
        raise ValueError(f"it has a token {first.max()}, as a file of uint16 would: choose data.raw=uint16")
    return found


def document_size(files: Sequence[Path], least: int, most: int) -> int:
    """Of a document of these files, in bytes: so that there are enough of them, within limits."""
    return min(max(sum(file.stat().st_size for file in files) // DOCUMENTS, least), most)


def _lines(file: Path, most: int) -> Iterator[str]:
    """The lines of a text file with their ends, those above ``most`` characters in pieces."""
    problem = text_problem(file)
    if problem:
        raise ValueError(f"The file {file} {problem}.")
    with open(file, encoding="utf-8-sig", errors="replace") as opened:
        while line := opened.readline(most):
            yield line
