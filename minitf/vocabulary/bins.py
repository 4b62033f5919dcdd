"""Numbers as symbols: the columns of a table in bins, which follow from its rows."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int32

from minitf.vocabulary.kinds import checked, describe


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
            f"{every[one]:.6g}" + ("\n" if one >= of_last else ",") for one in checked(ids, self.size).tolist()
        )

    def piece(self, token: int) -> bytes:
        """What one token stands for."""
        return self.decode([token]).encode()

    def save(self, folder: Path) -> None:
        """Write columns, edges and centers."""
        describe(folder, "bins", {"columns": self.columns, "edges": self.edges, "centers": self.centers})


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
