"""Tables as documents, read row by row: CSV and its kin, with a header line."""

import csv
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minitf.train.symbol_files import SERIES_CHARACTERS, Example, document_size, text_problem
from minitf.vocabulary import is_number

MOST_CHARACTERS = 2**30  # in a cell

Check = Callable[[str], str]


@dataclass(frozen=True)
class Dialect:
    """How a table is written.

    Attributes:
        delimiter: what is between cells; "" for a comma, and for a tab in files named .tsv or .tab.
        quotes: cells may stand in quotes, as they must around delimiters and line ends.
    """

    delimiter: str = ""
    quotes: bool = True


def table_documents(
    files: Sequence[Path], columns: Sequence[str], dialect: Dialect, check: Check | None, *, series: bool
) -> Iterator[str]:
    """Columns of tables (CSV with a header line; tab-separated when a file's name ends with .tsv or .tab).

    A row is a line of its cells: with ``series`` separated by commas or, when they are no numbers, by line ends,
    and a document is many rows (about 65 536 characters of the file, of a small one fewer); else separated by
    tabs, and every row is a document. ``check`` says what is wrong with a cell, or nothing.

    Raises ValueError naming file and line: a column that is not there, a row without it, a cell that is refused.
    """
    size = document_size(files, 1, SERIES_CHARACTERS) if series else 0
    between = "," if check is not_a_number else "\n" if series else "\t"
    for file in files:
        held, length = [], 0
        for row, read in _rows(file, columns, dialect, lambda name: check):
            held.append(between.join(row) + "\n")
            length += read
            if length >= size:
                yield "".join(held)
                held, length = [], 0
        if held:
            yield "".join(held)


def table_examples(
    files: Sequence[Path], columns: Sequence[str], told: str, dialect: Dialect, check: Check | None, of_told: Check
) -> Iterator[Example]:
    """Rows of tables as sequences, and the cell of the column ``told`` of each, with a check of its own.

    A sequence is its cells: of numbers with commas between, of symbols a line each, else with tabs between.
    Raises ValueError naming file and line as :func:`table_documents`.
    """
    between, end = (",", "\n") if check is not_a_number else ("\n", "\n") if check else ("\t", "")
    for file in files:
        for row, _ in _rows(file, [*columns, told], dialect, lambda name: of_told if name == told else check):
            yield Example(between.join(row[:-1]) + end, row[-1])


def table_columns(file: Path, columns: Sequence[str], dialect: Dialect) -> tuple[str, ...]:
    """The columns that are read: those named, or the only one. Raises ValueError naming those that there are."""
    with _table(file, dialect) as reader:
        names = [name.strip() for name in next(reader, [])]
    chosen = tuple(columns) or tuple(names if len(names) == 1 else ())
    missing = [name for name in chosen if name not in names]
    if missing or not chosen:
        asked = f"has no column {missing[0]!r}" if missing else "has several columns: say which to read"
        raise ValueError(f"The table {file} {asked}. Its columns are {', '.join(map(repr, names))}.")
    twice = [name for name in chosen if names.count(name) > 1]
    if twice:
        raise ValueError(f"The table {file} has several columns {twice[0]!r}: which to read cannot be said.")
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


def _rows(
    file: Path, columns: Sequence[str], dialect: Dialect, check_of: Callable[[str], Check | None]
) -> Iterator[tuple[list[str], int]]:
    """The chosen cells of every row, and how many characters the row has; columns have checks by their names."""
    problem = text_problem(file)
    if problem:
        raise ValueError(f"The file {file} {problem}.")
    chosen = table_columns(file, columns, dialect)
    with _table(file, dialect) as reader:
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


@contextmanager
def _table(file: Path, dialect: Dialect) -> Iterator[Any]:
    """A reader of the rows. Raises ValueError naming file and line for what is no table."""
    delimiter = dialect.delimiter or ("\t" if file.suffix.lower() in (".tsv", ".tab") else ",")
    csv.field_size_limit(MOST_CHARACTERS)  # by itself 131 072, less than many a text
    with open(file, encoding="utf-8-sig", errors="replace", newline="") as opened:
        # Strict, for else a quote that is not closed takes what follows, and nothing is said.
        reader = csv.reader(
            opened,
            delimiter=delimiter,
            quoting=csv.QUOTE_MINIMAL if dialect.quotes else csv.QUOTE_NONE,
            strict=True,
        )
        try:
            yield reader
        except csv.Error as error:
            where = f"{file}, line {reader.line_num}"
            advice = "; a cell that begins with a quote ends with one, or data.quotes=false"
            raise ValueError(f"{where}: this is not a table ({error}{advice * dialect.quotes}).") from error
