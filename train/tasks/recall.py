"""The value that stood beside a key: multi-query associative recall (Arora et al. 2024)."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, Key

from minitf.train.batch import Batch, next_token
from minitf.train.tasks.task import SOME_DRAWN, Objective, OneSequence, asked_where, check_at_least, drawn_once


@dataclasses.dataclass(frozen=True)
class Recall:
    """Pairs of a key and a value, then the same pairs in another order; the targets are its values.

    The keys of a sequence are different, its values any: tokens 0 to ``keys`` - 1 are keys, as many after them
    are values. Where the answer stands, only the data tells.

    Raises:
        ValueError: no pair, fewer than two keys, or more pairs than keys.
    """

    pairs: int = 6
    keys: int = 16

    def __post_init__(self) -> None:
        check_at_least(1, pairs=self.pairs)
        check_at_least(2, keys=self.keys)
        if self.pairs > self.keys:
            raise ValueError(f"pairs is {self.pairs}; it must be at most the number of keys, {self.keys}")

    @property
    def vocabulary(self) -> int:
        """Keys and as many values."""
        return 2 * self.keys

    @property
    def length(self) -> int:
        """Every pair twice, but the last value, which is only ever a target."""
        return 4 * self.pairs - 1

    @property
    def objective(self) -> Objective:
        """What follows a key, the second time."""
        return "next_token"

    def draw(self, key: Key[Array, ""], count: int) -> Batch:
        """Fresh sequences."""
        place = jnp.arange(self.length)
        batch = next_token(jax.vmap(self._one)(jax.random.split(key, count)))
        return asked_where(batch, (place >= 2 * self.pairs) & (place % 2 == 0))

    def _one(self, key: Key[Array, ""]) -> Int[Array, " length_plus_one"]:
        of_keys, of_values, of_order = jax.random.split(key, 3)
        keys = jax.random.permutation(of_keys, self.keys)[: self.pairs]
        values = self.keys + jax.random.randint(of_values, (self.pairs,), 0, self.keys)
        pairs = jnp.stack([keys, values], axis=1)
        return jnp.concatenate([pairs, jax.random.permutation(of_order, pairs)]).reshape(-1)

    def held_out(self) -> Batch:
        """Sequences drawn with a fixed key."""
        return drawn_once(self.draw, "recall")

    @property
    def measured_on(self) -> str:
        """What ``held_out`` is, for people."""
        return SOME_DRAWN

    def references(self) -> dict[str, float]:
        """Guessing among all values; the held-out sequences' own, each equally likely."""
        batch = self.held_out()
        own = np.asarray(batch.tokens)[:, 1 : 2 * self.pairs : 2]
        asked = np.asarray(batch.targets)[:, 2 * self.pairs :: 2]
        share = np.mean(own[:, None, :] == asked[:, :, None], axis=-1)
        return {"chance": math.log(self.keys), "the sequence's own values": float(-np.mean(np.log(share)))}

    def spell(self, tokens: OneSequence) -> str:
        """Such as ``3:7 1:0 1:0 3``: keys and values, both counted from 0."""
        shown = [one if one < self.keys else one - self.keys for one in np.asarray(tokens).tolist()]
        return " ".join(":".join(map(str, shown[at : at + 2])) for at in range(0, len(shown), 2))
