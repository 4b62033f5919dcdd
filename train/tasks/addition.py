"""The sum of two numbers digit by digit, with or without carries."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, Key

from minitf.train.batch import Batch, next_token
from minitf.train.tasks.task import SOME_DRAWN, Objective, OneSequence, asked_where, drawn_once

PLUS, EQUALS = 10, 11
# Two digits whose sum is a digit: 55 pairs.
_WITHOUT_CARRY = np.array([(a, b) for a in range(10) for b in range(10 - a)])


@dataclasses.dataclass(frozen=True)
class Addition:
    """``a + b = c``, every number with its lowest digit first; the targets are c's digits.

    With ``carry`` both terms are uniform, and c has one digit more than they have (it may be 0). Without, the two
    digits of each place are uniform among the 55 pairs whose sum is at most 9, so that no carry occurs, and c has
    as many digits as the terms. The held-out sums come from a fixed key: of the few that there are with few
    digits, training draws some too (with three, each of the million sums once in a million sequences).

    Raises:
        ValueError: digits outside 1 to 9.
    """

    digits: int = 3
    carry: bool = True

    def __post_init__(self) -> None:
        if not 1 <= self.digits <= 9:
            raise ValueError(f"digits is {self.digits}; it must be from 1 to 9")

    @property
    def vocabulary(self) -> int:
        """Ten digits, the plus and the equals sign."""
        return 12

    @property
    def length(self) -> int:
        """All of the sum, but the last digit, which is only ever a target."""
        return 3 * self.digits + 1 + self.carry

    @property
    def objective(self) -> Objective:
        """What follows, after the equals sign."""
        return "next_token"

    def draw(self, key: Key[Array, ""], count: int) -> Batch:
        """Fresh sums."""
        if self.carry:
            terms = jax.random.randint(key, (2, count, self.digits), 0, 10)
        else:
            pairs = jax.random.randint(key, (count, self.digits), 0, len(_WITHOUT_CARRY))
            terms = jnp.moveaxis(jnp.asarray(_WITHOUT_CARRY)[pairs], -1, 0)
        mark = lambda symbol: jnp.full((count, 1), symbol)
        window = jnp.concatenate([terms[0], mark(PLUS), terms[1], mark(EQUALS), self._sum(*terms)], axis=1)
        return asked_where(next_token(window), jnp.arange(self.length) > 2 * self.digits)

    def _sum(
        self, first: Int[Array, "batch digit"], second: Int[Array, "batch digit"]
    ) -> Int[Array, "batch answer"]:
        carried, digits = jnp.zeros_like(first[:, 0]), []
        for place in range(self.digits):
            total = first[:, place] + second[:, place] + carried
            digits.append(total % 10)
            carried = total // 10
        return jnp.stack(digits + [carried] * self.carry, axis=1)

    def held_out(self) -> Batch:
        """Sums drawn with a fixed key."""
        return drawn_once(self.draw, "addition")

    @property
    def measured_on(self) -> str:
        """What ``held_out`` is, for people."""
        return SOME_DRAWN

    def references(self) -> dict[str, float]:
        """Guessing among the ten digits."""
        return {"chance": math.log(10)}

    def spell(self, tokens: OneSequence) -> str:
        """Such as ``321+400=72``: as the model reads it, lowest digit first."""
        return "".join("0123456789+="[one] for one in np.asarray(tokens).tolist())
