"""Rotary positions: how fast each pair of components turns, and how it is slowed for longer texts."""

import math
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
from jaxtyping import Float

RotaryRule = Literal["linear", "llama3", "yarn"]


@dataclass(frozen=True)
class RotaryScaling:
    """How a model that was trained on ``original_length`` positions was made to read ``factor`` times as many.

    Rules:
        linear: every pair turns ``factor`` times slower (Chen et al. 2023, arXiv 2306.15595).
        llama3: so do only the pairs that turn less than ``slow_turns`` times over the original length; those that
            turn more than ``fast_turns`` times keep their speed; between the two (1 and 4 in Llama 3.1), the
            share of it that is kept rises with the turns.
        yarn: the same, but the share falls with the number of the pair, between the pair of ``fast_turns`` and
            that of ``slow_turns`` (rounded down and up if ``whole_pairs``), 32 and 1 as published; and what turned
            grows by ``attention_factor``, there 0.1 ln(factor) + 1 (Peng et al. 2023, arXiv 2309.00071).

    Raises:
        ValueError: an unknown rule, or a number that its formula has no meaning for.
    """

    rule: RotaryRule
    factor: float
    original_length: int = 0  # "linear" does not ask
    slow_turns: float = 1.0
    fast_turns: float = 4.0
    attention_factor: float = 1.0
    whole_pairs: bool = True

    def __post_init__(self) -> None:
        if self.rule not in get_args(RotaryRule):
            raise ValueError(
                f"the rule of rotary_scaling is {self.rule!r}; choose one of {', '.join(get_args(RotaryRule))}"
            )
        for name in ("factor", "slow_turns", "fast_turns", "attention_factor"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(
                    f"{name} of rotary_scaling is {getattr(self, name)}; it must be a positive number"
                )
        if self.rule == "linear":
            return
        if self.original_length < 1:
            raise ValueError(f"original_length of rotary_scaling is {self.original_length}; it must be at least 1")
        if self.slow_turns >= self.fast_turns:
            raise ValueError(
                f"slow_turns of rotary_scaling is {self.slow_turns}, which must be less than its fast_turns, "
                f"{self.fast_turns}"
            )


def frequencies(rotated: int, base: float, scaling: RotaryScaling | None = None) -> Float[np.ndarray, " pair"]:
    """By how many radians each pair turns per position, in float64.

    Pair j of ``rotated / 2`` turns by ``base ** (-2 j / rotated)`` (Su et al. 2021), or less, as ``scaling`` says.

    Raises:
        ValueError: YaRN's formula has no meaning for these numbers.
    """
    plain = base ** (-np.arange(0, rotated, 2) / rotated)
    if scaling is None:
        return plain
    kept = _kept(plain, base, scaling)
    return plain * (kept + (1 - kept) / scaling.factor)


def _kept(plain: Float[np.ndarray, " pair"], base: float, scaling: RotaryScaling) -> Float[np.ndarray, " pair"]:
    """The share of its speed that each pair keeps, from 0 to 1."""
    slow, fast = scaling.slow_turns, scaling.fast_turns
    if scaling.rule == "linear":
        return np.zeros_like(plain)
    if scaling.rule == "llama3":
        turns = scaling.original_length * plain / (2 * math.pi)
        return np.clip((turns - slow) / (fast - slow), 0, 1)
    first, last = _yarn_bounds(2 * len(plain), base, scaling)
    return 1 - np.clip((np.arange(len(plain)) - first) / (last - first), 0, 1)


def _yarn_bounds(rotated: int, base: float, scaling: RotaryScaling) -> tuple[float, float]:
    """The pairs, as real numbers, between which the speed falls."""
    if base <= 1:
        raise ValueError(f"rotary_base is {base}; the rule yarn needs one above 1")
    first, last = (
        rotated * math.log(scaling.original_length / (2 * math.pi * turns)) / (2 * math.log(base))
        for turns in (scaling.fast_turns, scaling.slow_turns)
    )
    if scaling.whole_pairs:
        first, last = float(math.floor(first)), float(math.ceil(last))
    # The published models' code allows for twice as many pairs as there are.
    first, last = max(first, 0.0), min(last, rotated - 1.0)
    if first >= last:
        raise ValueError(
            f"the rule yarn cannot slow {rotated} components of base {base}: with an original_length of "
            f"{scaling.original_length} all of them turn too slowly, or too fast, for slow_turns "
            f"{scaling.slow_turns} and fast_turns {scaling.fast_turns}"
        )
    return first, last
