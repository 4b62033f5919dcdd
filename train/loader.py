"""Windows of a token file in random order, none twice in an epoch; any step's batch can be had at any time.

In each epoch the stream is cut anew, from a random offset on, in windows of ``length`` inputs, so that windows end
elsewhere each time. The order of many windows is a pseudorandom permutation that is computed place by place
(grain's ``index_shuffle``), so nothing is kept, and a run that goes on at step k needs nothing but k.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Bool, Int, Int32, Integer

# So many are permuted as a whole: grain's cipher is of 16 bits at least, so that it takes 51 us for a window of a
# thousand, 7 us for one of 2**16 or more, and numpy 0.4 ms for all of 2**14.
FEW = 2**14
ROUNDS = 4  # of grain's block cipher, as its own datasets have it
MOST_WINDOWS = 2**32  # it counts in 32 bits


@dataclass(frozen=True)
class Loader:
    """Batches of windows of a token stream; `batch` is a pure function of the seed and the step.

    Attributes:
        ids: the tokens, in memory or on disk; only the windows asked for are read.
        length: inputs of a window, which has one token more.
        batch_size: windows in a step, of all processes together.
        seed: of the order and the offsets.
        process_index, process_count: this process makes the process_index-th of so many equal parts of each batch.

    Raises:
        ValueError: a number out of its range, by name; fewer tokens than one window.
    """

    ids: Integer[np.ndarray, " token"]
    length: int
    batch_size: int
    seed: int = 0
    process_index: int = 0
    process_count: int = 1

    def __post_init__(self) -> None:
        if self.length < 1:
            raise ValueError(f"length is {self.length}; it must be at least 1")
        check_shares(self.batch_size, self.seed, self.process_index, self.process_count)
        _check_length(len(self.ids), self.length)
        if self.windows > MOST_WINDOWS:
            raise ValueError(
                f"length is {self.length}; that cuts the {len(self.ids)} tokens in {self.windows} windows, and "
                f"{MOST_WINDOWS} are the most"
            )

    @property
    def windows(self) -> int:
        """Windows in an epoch: as many as there are wherever the first one starts."""
        return max(len(self.ids) // self.length - 1, 1)

    @property
    def offsets(self) -> int:
        """At how many places an epoch's first window may start."""
        return min(self.length, len(self.ids) - self.windows * self.length)

    def batch(self, step: int) -> Int32[np.ndarray, "part length_plus_one"]:
        """This process's windows of a step, int32 [batch_size / process_count, length + 1].

        Steps follow each other through the epochs: a batch may hold the last windows of one and the first of the
        next.
        """
        indices = indices_of(step, self.batch_size, self.process_index, self.process_count)
        places = self.starts(indices)[:, None] + np.arange(self.length + 1)
        return np.asarray(self.ids[places], np.int32)

    def starts(self, indices: Int[np.ndarray, " window"]) -> Int[np.ndarray, " window"]:
        """Where windows start in the stream; ``indices`` count all windows of all epochs in their order."""
        starts = np.zeros(len(indices), np.int64)
        for here, places, rng in by_epoch(indices, self.windows, self.seed):
            offset = int(rng.integers(self.offsets))
            starts[here] = offset + self.length * shuffled(places, self.windows, rng)
        return starts


def check_shares(batch_size: int, seed: int, process_index: int, process_count: int) -> None:
    """Raises ValueError, by name, where processes cannot take equal parts of a batch."""
    least = {"batch_size": (batch_size, 1), "seed": (seed, 0), "process_count": (process_count, 1)}
    for name, (value, at_least) in least.items():
        if value < at_least:
            raise ValueError(f"{name} is {value}; it must be at least {at_least}")
    if not 0 <= process_index < process_count:
        raise ValueError(
            f"process_index is {process_index}; with {process_count} processes it goes from 0 to "
            f"{process_count - 1}"
        )
    if batch_size % process_count:
        raise ValueError(f"batch_size is {batch_size}; {process_count} processes cannot take equal parts of it")


def indices_of(step: int, batch_size: int, process_index: int, process_count: int) -> Int[np.ndarray, " index"]:
    """What one of several processes takes in a step, of all that is taken in all steps, counted in order."""
    part = batch_size // process_count
    first = step * batch_size + process_index * part
    return np.arange(first, first + part)


def by_epoch(
    indices: Int[np.ndarray, " index"], size: int, seed: int
) -> Iterator[tuple[Bool[np.ndarray, " index"], Int[np.ndarray, " place"], np.random.Generator]]:
    """Of each epoch of ``size`` among the indices: which are of it, their places in it, and its random numbers."""
    epochs, places = np.divmod(indices, size)
    for epoch in np.unique(epochs):
        here = epochs == epoch
        yield here, places[here], np.random.default_rng([seed, int(epoch)])


def shuffled(places: Int[np.ndarray, " place"], size: int, rng: np.random.Generator) -> Int[np.ndarray, " place"]:
    """What stands at these places of a random permutation of the numbers below ``size``."""
    if size <= FEW:
        return rng.permutation(size)[places]
    # Imported only here: it takes 0.3 s.
    from grain.experimental import index_shuffle  # noqa: PLC0415

    key = int(rng.integers(2**32))
    found = [index_shuffle(place, max_index=size - 1, seed=key, rounds=ROUNDS) for place in places.tolist()]
    return np.array(found, np.int64)


@runtime_checkable
class Batches(Protocol):
    """What has the batch of every step."""

    def batch(self, step: int) -> Int32[np.ndarray, "part length_plus_one"]:
        """Of this process."""


def chunk(loader: Batches, first_step: int, steps: int) -> Int32[np.ndarray, "step part length_plus_one"]:
    """The batches of ``steps`` steps from ``first_step`` on, stacked."""
    return np.stack([loader.batch(step) for step in range(first_step, first_step + steps)])


def spread_windows(
    ids: Integer[np.ndarray, " token"], length: int, most: int
) -> Int32[np.ndarray, "window length_plus_one"]:
    """At most ``most`` windows of the stream, evenly spread and always the same: for validation.

    When the stream has fewer, they are all its consecutive windows; neighbors then share one token, so that every
    token but the first is a target once. Raises ValueError for fewer tokens than one window, and ``most`` below 1.
    """
    _check_length(len(ids), length)
    if most < 1:
        raise ValueError(f"most is {most}; at least 1 window is needed")
    every = (len(ids) - 1) // length
    count = min(most, every)
    starts = np.arange(count) * every // count * length
    return np.asarray(ids[starts[:, None] + np.arange(length + 1)], np.int32)


def _check_length(tokens: int, length: int) -> None:
    if tokens < length + 1:
        raise ValueError(
            f"The data is too short: it has {tokens} tokens, and one window of length {length} (and the token "
            f"after it) needs {length + 1}. Give more data or a shorter window."
        )
