"""What a synthetic task is, and what several of them need."""

import functools
import zlib
from collections.abc import Callable
from typing import Literal, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, Key

from minitf.train.batch import NO_TARGET, Batch

Objective = Literal["next_token", "classification", "regression"]
OneSequence = Int[Array | np.ndarray, " position"]

HELD_OUT = 512  # sequences on which tasks without end are measured
HELD_OUT_KEY = 20_261_127  # of no run: they count their seeds from 0


# What held-out sequences are where they are drawn as those of training, with another key.
NONE_DRAWN = "sequences that training does not draw"
SOME_DRAWN = "sequences drawn with another key, some of which training may have drawn too"


@runtime_checkable
class Task(Protocol):
    """Sequences without end, or all there are, and what is asked of them.

    ``next_token``: a target is the token that follows. ``classification``: there is one target for a sequence, at
    its last position, and it need not be a token of the sequence's kind. ``regression``: targets are real
    numbers, and the prediction at a position is the model's logit number 0 there.
    """

    @property
    def vocabulary(self) -> int:
        """How many different tokens there are; every token and every target is below it."""

    @property
    def length(self) -> int:
        """Positions of ``tokens``."""

    @property
    def objective(self) -> Objective:
        """What kind of answer is asked."""

    def draw(self, key: Key[Array, ""], count: int) -> Batch:
        """``count`` fresh sequences; of finite data, some of the training part. Pure: for jit, vmap and scan."""

    def held_out(self) -> Batch:
        """A fixed batch to measure on; each task says whether training can draw it."""

    @property
    def measured_on(self) -> str:
        """What ``held_out`` is, for people: :data:`NONE_DRAWN`, :data:`SOME_DRAWN`, or in words of its own."""

    def references(self) -> dict[str, float]:
        """Losses on ``held_out`` that need no model, by name: nats a target, or the mean squared error."""

    def spell(self, tokens: OneSequence) -> str:
        """A sequence as people would write it."""


def check_at_least(least: int, **settings: int) -> None:
    """Refuse a setting below ``least``, by name, with a ValueError."""
    for name, value in settings.items():
        if not value >= least:
            raise ValueError(f"{name} is {value}; it must be at least {least}")


@functools.lru_cache(maxsize=32)
def drawn_once(draw: Callable[[Key[Array, ""], int], Batch], name: str) -> Batch:
    """A task's held-out sequences, from a key that is the same everywhere, in one compiled program."""
    key = jax.random.fold_in(jax.random.key(HELD_OUT_KEY), zlib.crc32(name.encode()))
    return jax.jit(draw, static_argnums=1)(key, HELD_OUT)


def choose(key: Key[Array, ""], every: int, count: int) -> Int[Array, " count"]:
    """``count`` numbers below ``every``, none twice before all were drawn: ``count = every`` is each once."""
    rounds = -(-count // every)
    orders = jax.vmap(lambda key: jax.random.permutation(key, every))(jax.random.split(key, rounds))
    return orders.reshape(-1)[:count]


def asked_last(tokens: Int[Array, "batch position"], answers: Int[Array, " batch"]) -> Batch:
    """Sequences with one answer each, at their last position."""
    targets = jnp.full(tokens.shape, NO_TARGET, jnp.int32).at[:, -1].set(answers.astype(jnp.int32))
    return Batch(tokens=tokens.astype(jnp.int32), targets=targets)


def asked_where(batch: Batch, places: Array) -> Batch:
    """The batch with targets only where ``places`` (bool, of the targets' shape or broadcast to it) is true."""
    return Batch(batch.tokens, jnp.where(places, batch.targets, NO_TARGET))


def different_sequences(
    rng: np.random.Generator, symbols: int, count: int, size: int
) -> Int[np.ndarray, "count size"]:
    """``count`` random sequences of ``size`` symbols, no two the same; there must be as many."""
    every = symbols**size
    if every <= 4 * count:
        return rng.permutation(every)[:count, None] // symbols ** np.arange(size) % symbols
    # There may be too many to number them all; of these at most every fourth is taken, so few are drawn twice.
    found = np.zeros((0, size), np.int64)
    while len(found) < count:
        found = np.unique(np.concatenate([found, rng.integers(symbols, size=(count, size))]), axis=0)
    return rng.permutation(found)[:count]
