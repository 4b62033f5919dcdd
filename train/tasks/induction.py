"""A B ... A, to be answered with B: in-context copying, what induction heads do (Olsson et al. 2022)."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int, Key

from minitf.train.batch import Batch, next_token
from minitf.train.tasks.task import NONE_DRAWN, Objective, OneSequence, asked_where, check_at_least, drawn_once


@dataclasses.dataclass(frozen=True)
class Induction:
    """Random symbols, all different, but for one segment that comes back later.

    Its size (2 to half of the sequence) and both of its places are random. Targets are the second occurrence's
    symbols but the first, which nothing announces: there, and only there, the symbol before has occurred before,
    and what followed it then follows it again. As every other symbol occurs once, ``symbols`` is above ``length``.

    Raises:
        ValueError: a length below 3, or not more symbols than positions.
    """

    symbols: int = 64
    length: int = 32

    def __post_init__(self) -> None:
        check_at_least(3, length=self.length)
        if self.symbols <= self.length:
            raise ValueError(
                f"symbols is {self.symbols}; it must be above the length, {self.length}, so that a symbol outside "
                "the repeated segment need not occur twice"
            )

    @property
    def vocabulary(self) -> int:
        """The symbols."""
        return self.symbols

    @property
    def objective(self) -> Objective:
        """What follows, where the sequence tells."""
        return "next_token"

    def draw(self, key: Key[Array, ""], count: int) -> Batch:
        """Fresh sequences."""
        windows, places = jax.vmap(self._one)(jax.random.split(key, count))
        return asked_where(next_token(windows), places)

    def _one(self, key: Key[Array, ""]) -> tuple[Int[Array, " length_plus_one"], Bool[Array, " length"]]:
        of_symbols, of_size, of_first, of_second = jax.random.split(key, 4)
        total = self.length + 1
        size = jax.random.randint(of_size, (), 2, total // 2 + 1)
        first = jax.random.randint(of_first, (), 0, total - 2 * size + 1)
        second = jax.random.randint(of_second, (), first + size, total - size + 1)
        place = jnp.arange(total)
        again = (place >= second) & (place < second + size)
        different = jax.random.permutation(of_symbols, self.symbols)[:total]
        window = different[jnp.where(again, place - second + first, place)]
        return window, again[:-1] & again[1:]

    def held_out(self) -> Batch:
        """Sequences drawn with a fixed key; there are too many for training to draw one of them."""
        return drawn_once(self.draw, "induction")

    @property
    def measured_on(self) -> str:
        """What ``held_out`` is, for people."""
        return NONE_DRAWN

    def references(self) -> dict[str, float]:
        """Guessing among all symbols; knowing what follows what is a loss of 0."""
        return {"chance": math.log(self.symbols)}

    def spell(self, tokens: OneSequence) -> str:
        """The symbols as numbers."""
        return " ".join(map(str, np.asarray(tokens).tolist()))
