"""Tensors in blocks, and two codes of four bits in a byte.

A block is consecutive numbers of the flattened tensor. Where its last axis is a multiple of the block, a tensor
``[..., width]`` is ``[..., block, number]``, and how its leading axes lie on devices is kept; any other is
flattened, filled up with zeros, and ``[block, number]``.
"""

import math

import jax.numpy as jnp
from jaxtyping import Array, Float, Num, UInt8


def aligned(shape: tuple[int, ...], block: int) -> bool:
    """Whether the blocks of such a tensor lie along its last axis."""
    return bool(shape) and shape[-1] > 0 and shape[-1] % block == 0


def block_shape(shape: tuple[int, ...], block: int) -> tuple[int, ...]:
    """The axes of such a tensor's blocks, without that of the numbers within one."""
    if aligned(shape, block):
        return (*shape[:-1], shape[-1] // block)
    return (-(-math.prod(shape) // block),)


def as_blocks(x: Float[Array, "*shape"], block: int) -> Float[Array, "*blocks number"]:
    """A tensor as blocks of ``block`` numbers."""
    blocks = block_shape(x.shape, block)
    if not aligned(x.shape, block):
        x = jnp.pad(x.reshape(-1), (0, math.prod(blocks) * block - x.size))
    return x.reshape(*blocks, block)


def from_blocks(blocks: Float[Array, "*blocks number"], shape: tuple[int, ...]) -> Float[Array, "*shape"]:
    """The tensor of this shape whose blocks these are; what filled it up is dropped."""
    if blocks.size == math.prod(shape):
        return blocks.reshape(shape)
    return blocks.reshape(-1)[: math.prod(shape)].reshape(shape)


def pack(codes: Num[Array, "*blocks number"], bits: int) -> UInt8[Array, "*blocks byte"]:
    """Codes as bytes. Of four bits, a block's first half has the low ones, the second half the high ones.

    Halves, not neighbors, share a byte: both are consecutive in memory. Raises ValueError for an odd block of
    codes of four bits.
    """
    if bits == 8:
        return codes.astype(jnp.uint8)
    half, odd = divmod(codes.shape[-1], 2)
    if odd:
        raise ValueError(f"a block has {codes.shape[-1]} codes; two share a byte, so the number must be even")
    return (codes[..., :half] + 16 * codes[..., half:]).astype(jnp.uint8)


def unpack(packed: UInt8[Array, "*blocks byte"], bits: int) -> UInt8[Array, "*blocks number"]:
    """What :func:`pack` packed."""
    return packed if bits == 8 else jnp.concatenate([packed & 15, packed >> 4], axis=-1)
