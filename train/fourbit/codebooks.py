"""The levels that codes stand for, between -1 and 1: Dettmers' dynamic exponent, and even steps.

Li, Chen and Zhu, NeurIPS 2023, appendix E.2, whose numbers these are; the dynamic exponent is that of 8-bit Adam
(Dettmers et al., ICLR 2022).
"""

from dataclasses import dataclass, field
from functools import cached_property

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8

BITS = (4, 8)
# Fewer comparisons than this are added up, which vectorizes; more are searched.
COMPARED = 16


@dataclass(frozen=True)
class Codebook:
    """The levels of all codes, in increasing order; ``zero`` of them are negative.

    ``even`` says that they are ``(code + 1) / len(levels)``, so that neither coding nor decoding needs a table.
    Negative levels mirror positive ones.
    """

    levels: tuple[float, ...]
    zero: int = 0
    even: bool = field(default=False, kw_only=True)

    @cached_property
    def thresholds(self) -> np.ndarray:
        """Halfway between neighboring levels, float64 ``[level - 1]``."""
        levels = np.asarray(self.levels)
        return (levels[1:] + levels[:-1]) / 2

    @property
    def bits(self) -> int:
        """How many a code takes."""
        return (len(self.levels) - 1).bit_length()

    def nearest(self, x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
        """The code of the nearest level; halfway between two, of that nearer to 0. Codes come as floats.

        Numbers outside of [-1, 1] have the code of the outermost level. Floats, because XLA packs them faster.
        """
        if self.even:
            return jnp.clip(jnp.ceil(len(self.levels) * x - 0.5) - 1, 0, len(self.levels) - 1)
        positive = self.thresholds[self.zero :].astype(np.float32)
        if not self.zero:
            return _count_below(x, positive)
        # There is one positive level more than negative ones, 1.
        magnitude = _count_below(jnp.abs(x), positive[:-1])
        return self.zero + jnp.where(x < 0, -magnitude, magnitude) + (x > positive[-1]).astype(jnp.float32)

    def stochastic(self, x: Float[Array, "*shape"], uniform: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
        """The code of a neighboring level, chosen by ``uniform`` numbers in [0, 1) so that its mean is ``x``.

        Below the lowest level and above the highest there is one neighbor, and the mean is that level.
        """
        levels = jnp.asarray(self.levels, jnp.float32)
        # On a level, the one below it and a share of 1 are that level too.
        below = _count_below(x, np.asarray(self.levels[1:-1], np.float32)).astype(jnp.int32)
        width = levels[below + 1] - levels[below]
        share = (x - levels[below]) / jnp.where(width == 0, 1, width)
        return below.astype(jnp.float32) + (uniform < share)

    def decode(self, codes: UInt8[Array, "*shape"]) -> Float[Array, "*shape"]:
        """The levels of codes, float32."""
        if self.even:
            return (codes.astype(jnp.float32) + 1) * np.float32(1 / len(self.levels))
        levels = jnp.asarray(self.levels, jnp.float32)
        return levels.at[codes.astype(jnp.int32)].get(mode="promise_in_bounds")


def _count_below(x: Array, thresholds: np.ndarray) -> Array:
    """How many of the thresholds are below each number, float32."""
    if len(thresholds) > COMPARED:
        return jnp.searchsorted(jnp.asarray(thresholds), x, side="left").astype(jnp.float32)
    count = jnp.zeros(x.shape, jnp.float32)
    for threshold in thresholds:
        count = count + jnp.where(x > threshold, 1.0, 0.0)
    return count


def dynamic_exponent(bits: int = 4, *, signed: bool, zero: bool = True) -> Codebook:
    """Levels that are dense near 0: E zeros, an indicator bit and F bits of a fraction within decade ``10^-E``.

    A level is the middle of one of the ``2^F`` equal parts of [.1, 1], times ``10^-E``; all bits zero are 0, and
    the code left over is 1, which has no negative. Without ``zero`` (DE-0) the smallest positive level stands in
    the place of 0 too.

    Raises ValueError when ``bits`` is neither 4 nor 8, or for signed levels without 0.
    """
    _check_bits(bits)
    if signed and not zero:
        raise ValueError("signed levels without 0 are not known: a first moment of 0 must stay 0; leave zero=True")
    fractions = bits - 1 - signed
    positive: list[float] = []
    # Unsigned, the code of the most zeros is that of the level 1; signed, that of minus 0 is.
    for zeros in range(fractions + signed):
        edges = np.linspace(0.1, 1.0, 2 ** (fractions - zeros) + 1)
        positive += list(10.0**-zeros * (edges[1:] + edges[:-1]) / 2)
    positive.sort()
    least = 0.0 if zero else positive[0]
    negative = [-level for level in reversed(positive)] if signed else []
    return Codebook((*map(float, negative), least, *map(float, positive), 1.0), zero=len(negative))


def linear(bits: int = 4, *, zero: bool = False) -> Codebook:
    """Even steps up to 1, without 0: ``(code + 1) / 2^bits``; with ``zero``, ``code / (2^bits - 1)``.

    Raises ValueError when ``bits`` is neither 4 nor 8.
    """
    _check_bits(bits)
    count = 2**bits
    if zero:
        return Codebook(tuple(code / (count - 1) for code in range(count)))
    return Codebook(tuple((code + 1) / count for code in range(count)), even=True)


def _check_bits(bits: int) -> None:
    if bits not in BITS:
        raise ValueError(f"bits is {bits}; a code takes 4 or 8")
