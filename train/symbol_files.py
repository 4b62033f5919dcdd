"""Files of symbols as documents, read piece by piece: text, FASTA, tables and tokens.

A document is a text (or, of token files, an array of tokens) that is small enough to be held in memory, whatever
the size of its file; one after another they are the file, less what is no data. Each is wholly on one side of the
split into training and validation, so their sizes are a compromise, which each reader states.
"""

import codecs
import csv
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Integer

from minitf.train.corpus import files_below
from minitf.train.token_file import description_of, open_tokens
from minitf.vocabulary import is_number

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

Check = Callable[[str], str]


@dataclass(frozen=True)
class Example:
    """A sequence, and the cell that is to be told from it: a label, or a number."""

    text: str
    cell: str

    def __len__(self) -> int:
        return len(self.text)


Document = str | Integer[np.ndarray, " token"] | Example
# What is trained on, False, and what only measures, True.
Sided = tuple[bool, Document]


def source_files(paths: Iterable[str]) -> list[Path]:
    """All files that are named, and those in folders that are, all the way down, each once, in sorted order.

    In a folder hidden, empty and binary files are passed over (but token files, .npy, .bin and .tokens, count).
    Raises ValueError naming the path: missing, unreadable, or a folder without a file that counts.
    """
    found: dict[Path, Path] = {}
    for path in map(Path, paths):
        if path.is_dir():
            inside = [file for file in files_below(path) if is_token_file(file) or not text_problem(file)]
            if not inside:
                raise ValueError(
                    f"The folder {path} holds no file to read (hidden, empty, binary ones do not count)."
                )
        elif path.is_file():
            inside = [path]
        elif path.exists():
            raise ValueError(f"{path} is neither a file nor a folder: data is read from ordinary files only.")
        else:
            raise ValueError(f"There is no file or folder {path}.")
        for file in inside:
            found.setdefault(file.resolve(), file)
    return list(found.values())


def is_token_file(file: Path) -> bool:
    """Whether its name says that it holds tokens."""
    return file.suffix in (".npy", ".bin", ".tokens")


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
    size = _document_size(files, 1, TEXT_CHARACTERS)
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
    size = _document_size(files, LEAST_RECORD, SERIES_CHARACTERS)
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


def table_documents(
    files: Sequence[Path], columns: Sequence[str], delimiter: str, check: Check | None, *, series: bool
) -> Iterator[str]:
    """Columns of tables (CSV with a header line; tab-separated when a file's name ends with .tsv or .tab).

    A row is a line of its cells: with ``series`` separated by commas or, when they are no numbers, by line ends,
    and a document is many rows (about 65 536 characters of the file, of a small one fewer); else separated by
    tabs, and every row is a document. ``check`` says what is wrong with a cell, or nothing.

    Raises ValueError naming file and line: a column that is not there, a row without it, a cell that is refused.
    """
    size = _document_size(files, 1, SERIES_CHARACTERS) if series else 0
    between = "," if check is not_a_number else "\n" if series else "\t"
    for file in files:
        held, length = [], 0
        for row, read in _rows(file, columns, delimiter, lambda name: check):
            held.append(between.join(row) + "\n")
            length += read
            if length >= size:
                yield "".join(held)
                held, length = [], 0
        if held:
            yield "".join(held)


def table_examples(
    files: Sequence[Path], columns: Sequence[str], told: str, delimiter: str, check: Check | None, of_told: Check
) -> Iterator[Example]:
    """Rows of tables as sequences, and the cell of the column ``told`` of each, with a check of its own.

    A sequence is its cells: of numbers with commas between, of symbols a line each, else with tabs between.
    Raises ValueError naming file and line as :func:`table_documents`.
    """
    between, end = (",", "\n") if check is not_a_number else ("\n", "\n") if check else ("\t", "")
    for file in files:
        for row, _ in _rows(file, [*columns, told], delimiter, lambda name: of_told if name == told else check):
            yield Example(between.join(row[:-1]) + end, row[-1])


def table_columns(file: Path, columns: Sequence[str], delimiter: str) -> tuple[str, ...]:
    """The columns that are read: those named, or the only one. Raises ValueError naming those that there are."""
    with open(file, encoding="utf-8-sig", errors="replace", newline="") as opened:
        header = next(csv.reader(opened, delimiter=_delimiter(file, delimiter)), [])
    names = [name.strip() for name in header]
    chosen = tuple(columns) or tuple(names if len(names) == 1 else ())
    missing = [name for name in chosen if name not in names]
    if missing or not chosen:
        asked = f"has no column {missing[0]!r}" if missing else "has several columns: say which to read"
        raise ValueError(f"The table {file} {asked}. Its columns are {', '.join(map(repr, names))}.")
    return chosen


def not_a_number(cell: str) -> str:
    """What is wrong with a cell of numbers."""
    return "" if is_number(cell) else "is not a finite number"


def not_a_label(cell: str) -> str:
    """What is wrong with a cell that is a label."""
    return "" if cell else "is empty"


def not_a_name(cell: str) -> str:
    """What is wrong with a cell that is one symbol."""
    return (
        "is empty, or has several lines: it must be a symbol" if not cell or "\n" in cell or "\r" in cell else ""
    )


def token_documents(files: Sequence[Path], raw: str) -> Iterator[Integer[np.ndarray, " token"]]:
    """Tokens of .npy files, of our own .tokens files, and of others as little-endian numbers of type ``raw``.

    A document is 65 536 tokens (of a small source, fewer). Raises ValueError naming the file: see `token_array`.
    """
    arrays = [token_array(file, raw) for file in files]
    size = min(max(sum(map(len, arrays)) // DOCUMENTS, 1), SERIES_CHARACTERS)
    for array in arrays:
        for start in range(0, len(array), size):
            yield np.asarray(array[start : start + size])


def token_array(file: Path, raw: str) -> Integer[np.ndarray, " token"]:
    """The tokens of a file, which stay on disk.

    Raises ValueError naming it: damaged, empty, of another size than whole numbers, not one row of integers.
    """
    if description_of(file).exists():
        return open_tokens(file).ids
    try:
        array = np.load(file, "r", allow_pickle=False) if file.suffix == ".npy" else _raw(file, np.dtype(raw))
    except (OSError, ValueError, EOFError) as error:
        raise ValueError(f"The tokens in {file} cannot be read: {error}.") from error
    if array.ndim != 1 or not np.issubdtype(array.dtype, np.integer) or not array.size:
        raise ValueError(
            f"{file} holds {array.dtype} of shape {array.shape}; tokens are one row of integers, at least one"
        )
    return array


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


def _document_size(files: Sequence[Path], least: int, most: int) -> int:
    return min(max(sum(file.stat().st_size for file in files) // DOCUMENTS, least), most)


def _lines(file: Path, most: int) -> Iterator[str]:
    """The lines of a text file with their ends, those above ``most`` characters in pieces."""
    problem = text_problem(file)
    if problem:
        raise ValueError(f"The file {file} {problem}.")
    with open(file, encoding="utf-8-sig", errors="replace") as opened:
        while line := opened.readline(most):
            yield line


def _rows(
    file: Path, columns: Sequence[str], delimiter: str, check_of: Callable[[str], Check | None]
) -> Iterator[tuple[list[str], int]]:
    """The chosen cells of every row, and how many characters the row has; columns have checks by their names."""
    problem = text_problem(file)
    if problem:
        raise ValueError(f"The file {file} {problem}.")
    chosen = table_columns(file, columns, delimiter)
    with open(file, encoding="utf-8-sig", errors="replace", newline="") as opened:
        reader = csv.reader(opened, delimiter=_delimiter(file, delimiter))
        try:
            names = [name.strip() for name in next(reader)]
            places = [names.index(name) for name in chosen]
            for row in filter(None, reader):
                if len(row) <= max(places):
                    raise ValueError(f"{file}, line {reader.line_num}: there are only {len(row)} cells.")
                cells = [row[place].strip() for place in places]
                for name, cell in zip(chosen, cells, strict=True):
                    if (check := check_of(name)) and (wrong := check(cell)):
                        raise ValueError(f"{file}, line {reader.line_num}: the {name} {cell[:60]!r} {wrong}.")
                yield cells, sum(map(len, row)) + len(row)
        except csv.Error as error:
            raise ValueError(f"{file}, line {reader.line_num}: this is not a table ({error}).") from error


def _delimiter(file: Path, delimiter: str) -> str:
    return delimiter or ("\t" if file.suffix in (".tsv", ".tab") else ",")
