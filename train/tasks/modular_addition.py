"""Addition modulo a prime, from some of all pairs: the task of grokking (Power et al. 2022; Nanda et al. 2023)."""

import dataclasses
import math
from functools import cached_property

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, Key

from minitf.train.batch import Batch
from minitf.train.tasks.task import Objective, OneSequence, asked_last, check_at_least, choose


@dataclasses.dataclass(frozen=True)
class ModularAddition:
    """``a b =``, to be answered with (a + b) mod ``modulus``.

    All modulus ** 2 ordered pairs are split once, by ``data_seed``: ``share`` of them (rounded) are for training,
    and `held_out` is all the rest, which training never draws. The defaults are those of Nanda et al. 2023. Token
    ``modulus`` is the equals sign. ``draw`` with ``count = training_pairs`` is every training pair once, in
    another order each time: full-batch training, as in the papers.

    Raises:
        ValueError: a modulus below 2, or a share that leaves one of the parts empty.
    """

    modulus: int = 113
    share: float = 0.3
    data_seed: int = 0

    def __post_init__(self) -> None:
        check_at_least(2, modulus=self.modulus)
        check_at_least(0, data_seed=self.data_seed)
        if not 0 < self.share < 1 or not 0 < self.training_pairs < self.modulus**2:
            raise ValueError(
                f"share is {self.share}; it must be above 0 and below 1, and leave some of the {self.modulus**2} "
                "pairs on each side"
            )

    @property
    def vocabulary(self) -> int:
        """The residues and the equals sign."""
        return self.modulus + 1

    @property
    def length(self) -> int:
        """a, b and the equals sign."""
        return 3

    @property
    def objective(self) -> Objective:
        """One answer, after the equals sign."""
        return "classification"

    @property
    def training_pairs(self) -> int:
        """How many pairs training draws from."""
        return round(self.share * self.modulus**2)

    @cached_property
    def order(self) -> Int[np.ndarray, " pair"]:
        """Every pair as a * modulus + b: those for training first."""
        return np.random.default_rng(self.data_seed).permutation(self.modulus**2)

    def draw(self, key: Key[Array, ""], count: int) -> Batch:
        """Some of the training pairs, none twice before all were drawn."""
        training = jnp.asarray(self.order[: self.training_pairs])
        return self._asked(training[choose(key, self.training_pairs, count)])

    def held_out(self) -> Batch:
        """Every pair that training never draws."""
        return self._asked(jnp.asarray(self.order[self.training_pairs :]))

    @property
    def measured_on(self) -> str:
        """What ``held_out`` is, for people."""
        return "the pairs that are not trained on"

    def references(self) -> dict[str, float]:
        """Guessing among all residues."""
        return {"chance": math.log(self.modulus)}

    def spell(self, tokens: OneSequence) -> str:
        """Such as ``45 + 100 =``."""
        first, second, _ = np.asarray(tokens).tolist()
        return f"{first} + {second} ="

    def _asked(self, pairs: Int[Array, " batch"]) -> Batch:
        first, second = pairs // self.modulus, pairs % self.modulus
        tokens = jnp.stack([first, second, jnp.full_like(first, self.modulus)], axis=1)
        return asked_last(tokens, (first + second) % self.modulus)
