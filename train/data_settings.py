"""Which files are trained on, and how what is in them becomes tokens: settings, checked."""

from dataclasses import dataclass
from typing import Literal, get_args

from minitf.train.table_files import Dialect

# Encodings that follow from the data, or need nothing; "": one of them.
LEARNED = ("", "bytes", "characters", "bpe", "symbols")
MOST_NAMES = 65_536

Format = Literal["text", "fasta", "csv", "tokens"]


@dataclass(frozen=True)
class DataSettings:
    """Which files to train on, and how their symbols are numbered.

    Raises:
        ValueError: a value that is out of its range, or says nothing about the format, by name.
    """

    format: Format = "text"  # of the files: fasta has DNA or proteins, csv tables, tokens are numbers already
    paths: tuple[str, ...] = ()  # files and folders; none: the documentation of this Python, as text
    encoding: str = ""  # bytes, characters, bpe, gpt2, symbols (csv: a cell is a token), a file; "": as usual
    vocabulary: int = 0  # bpe: pieces to train, 0 for 4096; tokens: how many there are, 0 for up to the largest
    columns: tuple[str, ...] = ()  # csv: which are read, by their header; none: the only one
    bins: int = 0  # csv: columns are numbers, cut in so many bins with as many rows in each; 0: they are text
    delimiter: str = ""  # csv: between cells; "" for a comma, and a tab in files named .tsv
    quotes: bool = True  # csv: cells may stand in quotes, as they must around delimiters and line ends
    raw: Literal["uint16", "uint32"] = "uint16"  # tokens: the numbers in files other than .npy, little-endian
    validation: float = 0.1  # share of the documents that is not trained on
    validation_paths: tuple[str, ...] = ()  # files for validation alone; then all of ``paths`` is trained on
    label: str = ""  # csv: the column that says of which class a row is, for objective.kind=classification
    target: str = ""  # csv: the column of the number that is to be told of a row, for objective.kind=regression

    def __post_init__(self) -> None:
        if self.format not in get_args(Format):
            raise ValueError(f"format is {self.format!r}; it must be one of {', '.join(get_args(Format))}")
        if not self.paths and (self.format != "text" or self.validation_paths):
            raise ValueError(f"paths is empty; name the files of the format {self.format} to train on")
        if not 0 < self.validation < 0.5:
            raise ValueError(f"validation is {self.validation}; it must be above 0 and below 0.5")
        if self.bins and not 2 <= self.bins <= MOST_NAMES:
            raise ValueError(f"bins is {self.bins}; it must be from 2 to {MOST_NAMES}, or 0 for none")
        if self.vocabulary < 0:
            raise ValueError(f"vocabulary is {self.vocabulary}; it must be at least 0")
        if len(self.delimiter) > 1:
            raise ValueError(f"delimiter is {self.delimiter!r}; it must be a single character")
        self._check_meaning()

    @property
    def dialect(self) -> Dialect:
        """How tables are written."""
        return Dialect(self.delimiter, self.quotes)

    @property
    def told(self) -> str:
        """The column of what is to be told of a row; none where rows are only read."""
        return self.label or self.target

    def _check_meaning(self) -> None:
        for name in ("columns", "bins", "delimiter", "label", "target"):
            if getattr(self, name) and self.format != "csv":
                raise ValueError(f"{name} is {getattr(self, name)!r}, which only csv has, not {self.format}")
        if not self.quotes and self.format != "csv":
            raise ValueError(f"quotes is False; only csv has cells in quotes, not {self.format}")
        if self.encoding == "symbols" and self.format != "csv":
            raise ValueError("encoding is 'symbols', which only csv has: try 'characters'")
        twice = [name for name in self.columns if self.columns.count(name) > 1]
        if twice:
            raise ValueError(f"columns has {twice[0]!r} more than once")
        if self.label and self.target:
            raise ValueError(f"label is {self.label!r} and target is {self.target!r}; a run learns to tell one")
        for name in ("label", "target"):
            told = getattr(self, name)
            if told and told in self.columns:
                raise ValueError(f"{name} is {told!r}, which is in columns too: it would be told, not guessed")
            if told and not self.columns:
                raise ValueError(f"{name} is {told!r}; say in columns which others are the sequence")
        if self.encoding and self.bins:
            raise ValueError(f"encoding is {self.encoding!r}; with bins, numbers are encoded by their bins")
        if self.encoding in ("bytes", "characters", "bpe") and self.format == "tokens":
            raise ValueError(
                f"encoding is {self.encoding!r}; tokens are encoded already: name what they came from (gpt2, or a "
                "rank file), or nothing"
            )
        if self.vocabulary and self.format != "tokens" and self.encoding != "bpe":
            raise ValueError(
                f"vocabulary is {self.vocabulary}, which only the encoding bpe and the format tokens have"
            )
