"""Facts without any rule, to be learned by heart."""

import dataclasses
import math
from functools import cached_property

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, Key

from minitf.train.batch import Batch
from minitf.train.tasks.task import Objective, OneSequence, asked_last, check_at_least, choose, different_sequences


@dataclasses.dataclass(frozen=True)
class Memorisation:
    """Which random symbol belongs to each of ``facts`` random sequences, all different.

    There is nothing to generalize to, so `held_out` is all facts, those that training draws from: it measures how
    many are known. ``draw`` with ``count = facts`` is every fact once.

    Raises:
        ValueError: a number too small, or more facts than there are sequences.
    """

    facts: int = 1024
    symbols: int = 32
    length: int = 4
    data_seed: int = 0

    def __post_init__(self) -> None:
        check_at_least(1, facts=self.facts, length=self.length)
        check_at_least(2, symbols=self.symbols)
        check_at_least(0, data_seed=self.data_seed)
        if self.facts > self.symbols**self.length:
            raise ValueError(
                f"facts is {self.facts}; with {self.symbols} symbols there are only {self.symbols**self.length} "
                f"different sequences of length {self.length}"
            )

    @property
    def vocabulary(self) -> int:
        """The symbols."""
        return self.symbols

    @property
    def objective(self) -> Objective:
        """One answer for a sequence."""
        return "classification"

    @cached_property
    def known(self) -> tuple[Int[np.ndarray, "fact position"], Int[np.ndarray, " fact"]]:
        """The sequences and what belongs to each."""
        rng = np.random.default_rng(self.data_seed)
        sequences = different_sequences(rng, self.symbols, self.facts, self.length)
        return sequences.astype(np.int32), rng.integers(self.symbols, size=self.facts).astype(np.int32)

    def draw(self, key: Key[Array, ""], count: int) -> Batch:
        """Some of the facts, none twice before all were drawn."""
        sequences, answers = map(jnp.asarray, self.known)
        chosen = choose(key, self.facts, count)
        return asked_last(sequences[chosen], answers[chosen])

    def held_out(self) -> Batch:
        """Every fact."""
        return asked_last(*map(jnp.asarray, self.known))

    @property
    def measured_on(self) -> str:
        """What ``held_out`` is, for people."""
        return "all facts, which are what is trained on"

    def references(self) -> dict[str, float]:
        """Guessing among all symbols."""
        return {"chance": math.log(self.symbols)}

    def spell(self, tokens: OneSequence) -> str:
        """The symbols as numbers."""
        return " ".join(map(str, np.asarray(tokens).tolist()))
