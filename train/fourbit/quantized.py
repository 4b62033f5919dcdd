"""A tensor as codes and scales: a number is its code's level times its scale.

A scale is the largest magnitude of a block, or (rank 1, for numbers that are not negative) the least, over the
axes, of the largest number that shares the number's place on that axis: ``min_r mu_r[i_r]``. Li, Chen and Zhu,
NeurIPS 2023, sections 3 and 4; the idea of the second is that of SM3 (Anil et al., NeurIPS 2019).
"""

from functools import reduce
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Float

from minitf.train.fourbit.codebooks import Codebook
from minitf.train.fourbit.packing import as_blocks, from_blocks, pack, unpack

ScaleKind = Literal["block", "rank1"]
SMALLEST_NORMAL = float(np.finfo(np.float32).tiny)


@struct.dataclass
class Quantized:
    """``codes`` are uint8 ``[..., block, byte]``, ``scales`` a tuple of float32 arrays: ``[..., block]`` alone, or
    one vector for each axis.

    Its shape, levels and block are not in it; they follow from the weight and the settings. All zero is exactly 0.
    Without codes (None) it is a factored tensor, of which the means of rows and columns are kept.
    """

    codes: Any
    scales: Any


def quantize(
    x: Float[Array, "*shape"],
    codebook: Codebook,
    *,
    block: int = 128,
    scale: ScaleKind = "block",
    signed_scale: bool = False,
) -> Quantized:
    """A tensor as codes of the nearest levels.

    Args:
        x: the tensor; for ``rank1`` no number may be negative.
        codebook: the levels.
        block: how many consecutive numbers have one scale (``block``), and one piece of packed codes.
        scale: of blocks, or of places on the axes.
        signed_scale: a block's scale has the sign of its largest number, whose level then is 1 exactly.
    """
    blocks = as_blocks(x, block)
    if scale == "rank1":
        scales = axis_maxima(x)
        inverse = as_blocks(inverse_rank1(scales), block)
    else:
        scales = (block_scales(blocks, signed_scale),)
        inverse = inverted(scales[0])[..., None]
    return Quantized(pack(codebook.nearest(blocks * inverse), codebook.bits), scales)


def dequantize(
    quantized: Quantized,
    shape: tuple[int, ...],
    codebook: Codebook,
    *,
    block: int = 128,
    scale: ScaleKind = "block",
) -> Float[Array, "*shape"]:
    """The tensor of this shape that :func:`quantize` was given, up to rounding; float32."""
    return from_blocks(decoded_blocks(quantized, codebook, block, scale), shape)


def decoded_blocks(
    quantized: Quantized, codebook: Codebook, block: int, scale: ScaleKind
) -> Float[Array, "*blocks number"]:
    """Levels times scales, as blocks."""
    levels = codebook.decode(unpack(quantized.codes, codebook.bits))
    if scale == "rank1":
        return levels * as_blocks(rank1(quantized.scales), block)
    return levels * quantized.scales[0][..., None]


def block_scales(blocks: Float[Array, "*blocks number"], signed: bool) -> Float[Array, "*blocks"]:
    """The largest magnitude of each block; ``signed``, with the sign of the number that has it."""
    most, least = jnp.max(blocks, axis=-1), jnp.min(blocks, axis=-1)
    return jnp.where(most >= -least, most, least) if signed else jnp.maximum(most, -least)


def axis_maxima(x: Float[Array, "*shape"]) -> tuple[Float[Array, " _"], ...]:
    """For each axis, the largest number at each of its places."""
    return tuple(largest_along(x, axis) for axis in range(x.ndim))


def largest_along(x: Float[Array, "*shape"], axis: int) -> Float[Array, " place"]:
    """The largest number at each place of an axis."""
    return jnp.max(x, axis=tuple(other for other in range(x.ndim) if other != axis))


def rank1(maxima: tuple[Float[Array, " _"], ...]) -> Float[Array, "..."]:
    """The scale of every number from the largest ones of the axes: the least of its places'."""
    return reduce(jnp.minimum, _along_axes(maxima))


def inverse_rank1(maxima: tuple[Float[Array, " _"], ...]) -> Float[Array, "..."]:
    """One over :func:`rank1`, finite. A number is 0 where any of its places' maxima is."""
    return reduce(jnp.maximum, _along_axes(tuple(inverted(largest) for largest in maxima)))


def inverted(scale: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """One over a scale, and 1 over that of zeros, or of numbers so small that one over them is infinite."""
    return 1 / jnp.where(jnp.abs(scale) < SMALLEST_NORMAL, 1, scale)


def _along_axes(vectors: tuple[Array, ...]) -> list[Array]:
    order = len(vectors)
    return [
        vector.reshape(*(-1 if axis == other else 1 for other in range(order)))
        for axis, vector in enumerate(vectors)
    ]
