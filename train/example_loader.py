"""Sequences with a label or a number in random order, each once in an epoch; any step's batch at any time.

The token file is one sequence after another, each with the token of its label last (of those with numbers, with a
token that there is not), and these are above all others: so it says itself where sequences end.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from jaxtyping import Float32, Int, Int32, Integer

from minitf.train.loader import by_epoch, check_shares, indices_of, shuffled

READ_AT_A_TIME = 1 << 24  # tokens


@dataclass(frozen=True)
class Examples:
    """The examples of a token file, as rows of ``length`` tokens, and the token of the label or a number's bits.

    Shorter ones are filled up with ``filler``; of longer ones the first ``length`` tokens count.

    Attributes:
        ids: the tokens, in memory or on disk; only the rows asked for are read.
        first_label: the smallest token of a label, or the one after a sequence that has a number.
        length: of a row, without what is told of it.
        filler: a token that is in no sequence.
        numbers: what a model is to tell of each sequence, where that is no label.

    Raises:
        ValueError: there are not as many numbers as sequences.
    """

    ids: Integer[np.ndarray, " token"]
    first_label: int
    length: int
    filler: int
    numbers: Float32[np.ndarray, " example"] | None = None

    def __post_init__(self) -> None:
        if self.numbers is not None and len(self.numbers) != len(self):
            raise ValueError(f"there are {len(self)} sequences, and numbers of {len(self.numbers)}")

    @cached_property
    def ends(self) -> Int[np.ndarray, " example"]:
        """Where the labels are; read once, a part of the file at a time."""
        parts = range(0, len(self.ids), READ_AT_A_TIME)
        found = [s + np.flatnonzero(self.ids[s : s + READ_AT_A_TIME] >= self.first_label) for s in parts]
        return np.concatenate(found)

    def __len__(self) -> int:
        return len(self.ends)

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence."""
        return int(np.max(np.diff(self.ends, prepend=-1)) - 1)

    @property
    def labels(self) -> Int[np.ndarray, " example"]:
        """Of each, the number of its label, from 0."""
        return np.asarray(self.ids[self.ends], np.int64) - self.first_label

    def rows(self, places: Int[np.ndarray, " example"]) -> Int32[np.ndarray, "example length_plus_one"]:
        """Those examples."""
        found = np.full((len(places), self.length + 1), self.filler, np.int32)
        for row, place in zip(found, places.tolist(), strict=True):
            start, end = (self.ends[place - 1] + 1 if place else 0), self.ends[place]
            tokens = self.ids[start : min(end, start + self.length)]
            row[: len(tokens)] = tokens
            row[self.length] = self.ids[end]
        if self.numbers is not None:
            # A step reads whole numbers alone.
            found[:, self.length] = self.numbers[places].view(np.int32)
        return found


@dataclass(frozen=True)
class ExampleLoader:
    """Batches of examples; `batch` is a pure function of the seed and the step.

    Attributes:
        examples: what is drawn from.
        batch_size: rows of a step, of all processes together.
        seed: of the order.
        process_index, process_count: this process makes the process_index-th of so many equal parts of each batch.

    Raises:
        ValueError: a number out of its range, by name.
    """

    examples: Examples
    batch_size: int
    seed: int = 0
    process_index: int = 0
    process_count: int = 1

    def __post_init__(self) -> None:
        check_shares(self.batch_size, self.seed, self.process_index, self.process_count)

    def batch(self, step: int) -> Int32[np.ndarray, "part length_plus_one"]:
        """This process's rows of a step; a batch may hold the last of one epoch and the first of the next."""
        indices = indices_of(step, self.batch_size, self.process_index, self.process_count)
        drawn = np.zeros(len(indices), np.int64)
        for here, places, rng in by_epoch(indices, len(self.examples), self.seed):
            drawn[here] = shuffled(places, len(self.examples), rng)
        return self.examples.rows(drawn)


def spread_examples(examples: Examples, most: int) -> Int32[np.ndarray, "example length_plus_one"]:
    """At most ``most`` of them, evenly spread and always the same: for validation."""
    count = min(most, len(examples))
    return examples.rows(np.arange(count) * len(examples) // count)
