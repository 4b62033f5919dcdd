"""A sequence and then the same again: what attention does with one fixed offset, and a state must remember."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Key

from minitf.train.batch import Batch, next_token
from minitf.train.tasks.task import SOME_DRAWN, Objective, OneSequence, asked_where, check_at_least, drawn_once


@dataclasses.dataclass(frozen=True)
class Copy:
    """``span`` random symbols, a separator, and the same symbols again, which are the targets.

    Token ``symbols`` is the separator. The held-out sequences come from a fixed key: with few symbols and a short
    span training may draw some of them too.

    Raises:
        ValueError: fewer than two symbols, or a span below 1.
    """

    symbols: int = 16
    span: int = 16

    def __post_init__(self) -> None:
        check_at_least(2, symbols=self.symbols)
        check_at_least(1, span=self.span)

    @property
    def vocabulary(self) -> int:
        """The symbols and the separator."""
        return self.symbols + 1

    @property
    def length(self) -> int:
        """Both halves and the separator, but the last symbol, which is only ever a target."""
        return 2 * self.span

    @property
    def objective(self) -> Objective:
        """What follows, in the second half."""
        return "next_token"

    def draw(self, key: Key[Array, ""], count: int) -> Batch:
        """Fresh sequences."""
        symbols = jax.random.randint(key, (count, self.span), 0, self.symbols)
        separator = jnp.full((count, 1), self.symbols)
        batch = next_token(jnp.concatenate([symbols, separator, symbols], axis=1))
        return asked_where(batch, jnp.arange(self.length) >= self.span)

    def held_out(self) -> Batch:
        """Sequences drawn with a fixed key."""
        return drawn_once(self.draw, "copy")

    @property
    def measured_on(self) -> str:
        """What ``held_out`` is, for people."""
        return SOME_DRAWN

    def references(self) -> dict[str, float]:
        """Guessing among all symbols."""
        return {"chance": math.log(self.symbols)}

    def spell(self, tokens: OneSequence) -> str:
        """Such as ``3 1 4 | 3 1``."""
        return " ".join("|" if one == self.symbols else str(one) for one in np.asarray(tokens).tolist())
