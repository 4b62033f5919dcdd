"""Sequences with structure at every scale: the random hierarchy model (Cagnetta et al. 2024)."""

import dataclasses
import math
from functools import cached_property

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key

from minitf.train.batch import Batch, next_token
from minitf.train.tasks.task import (
    SOME_DRAWN,
    Objective,
    OneSequence,
    check_at_least,
    different_sequences,
    drawn_once,
)

LONGEST = 2**16


@dataclasses.dataclass(frozen=True)
class Grammar:
    """A probabilistic context-free grammar whose trees are all full, of ``depth`` levels.

    Each level has ``symbols`` symbols of its own. Each of these has ``rules`` rules, equally likely: what
    ``branching`` symbols of the level below stand for it. The rules are random, fixed by ``data_seed``; no two of
    a level have the same right side, so a sequence has one tree only, and the entropy is known exactly. The root
    is uniform among its level's symbols. The sequence is the leaves, after a token ``symbols`` that begins it.

    Raises:
        ValueError: a number too small, more rules than different right sides, or sequences above 65 536 positions.
    """

    symbols: int = 8
    rules: int = 4
    branching: int = 2
    depth: int = 5
    data_seed: int = 0

    def __post_init__(self) -> None:
        check_at_least(2, symbols=self.symbols, branching=self.branching)
        check_at_least(1, rules=self.rules, depth=self.depth)
        check_at_least(0, data_seed=self.data_seed)
        if self.length > LONGEST:
            raise ValueError(
                f"depth is {self.depth}; with a branching of {self.branching} a sequence has {self.length} "
                f"positions, and {LONGEST} are the most"
            )
        if self.symbols * self.rules > self.symbols**self.branching:
            raise ValueError(
                f"rules is {self.rules}; {self.symbols} symbols need {self.symbols * self.rules} different right "
                f"sides, and there are {self.symbols**self.branching} of {self.branching} symbols: at most "
                f"{self.symbols ** (self.branching - 1)} rules"
            )

    @property
    def vocabulary(self) -> int:
        """The leaves' symbols, and the token that begins a sequence."""
        return self.symbols + 1

    @property
    def length(self) -> int:
        """As many positions as a tree has leaves."""
        return self.branching**self.depth

    @property
    def objective(self) -> Objective:
        """What follows, at every position."""
        return "next_token"

    @cached_property
    def productions(self) -> Int[np.ndarray, "depth symbols rules branching"]:
        """The right sides of the rules, from the root's level down."""
        rng = np.random.default_rng(self.data_seed)
        levels = [
            different_sequences(rng, self.symbols, self.symbols * self.rules, self.branching)
            for _ in range(self.depth)
        ]
        return np.stack(levels).reshape(self.depth, self.symbols, self.rules, self.branching)

    def draw(self, key: Key[Array, ""], count: int) -> Batch:
        """Fresh sequences."""
        of_root, *of_levels = jax.random.split(key, self.depth + 1)
        symbols = jax.random.randint(of_root, (count, 1), 0, self.symbols)
        for of_level, rules in zip(of_levels, jnp.asarray(self.productions), strict=True):
            chosen = jax.random.randint(of_level, symbols.shape, 0, self.rules)
            symbols = rules[symbols, chosen].reshape(count, -1)
        return next_token(jnp.pad(symbols, ((0, 0), (1, 0)), constant_values=self.symbols))

    def held_out(self) -> Batch:
        """Sequences drawn with a fixed key; of a small grammar training draws them too (see `sequences`)."""
        return drawn_once(self.draw, "grammar")

    @property
    def measured_on(self) -> str:
        """What ``held_out`` is, for people."""
        return SOME_DRAWN

    @property
    def choices(self) -> int:
        """How many rules a tree applies: its inner nodes."""
        return (self.length - 1) // (self.branching - 1)

    @property
    def sequences(self) -> int:
        """How many different sequences there are, all equally likely: symbols * rules ** choices."""
        return self.symbols * self.rules**self.choices

    @property
    def entropy(self) -> float:
        """Of a sequence, in nats: the root's and one choice for each inner node, as the tree can be told."""
        return math.log(self.symbols) + self.choices * math.log(self.rules)

    def references(self) -> dict[str, float]:
        """The best loss there can be, over all sequences; and that of knowing how often each symbol comes."""
        often = self.frequencies()
        alone = -sum(share * math.log(share) for share in often.tolist() if share > 0)
        return {"entropy": self.entropy / self.length, "frequencies alone": alone}

    def frequencies(self) -> Float[np.ndarray, " symbols"]:
        """How often each symbol is a leaf, over all sequences."""
        share = np.full(self.symbols, 1 / self.symbols)
        for rules in self.productions:
            below = np.zeros(self.symbols)
            np.add.at(below, rules, share[:, None, None] / (self.rules * self.branching))
            share = below
        return share

    def spell(self, tokens: OneSequence) -> str:
        """The leaves as numbers, a dot for the beginning."""
        return " ".join("." if one == self.symbols else str(one) for one in np.asarray(tokens).tolist())
