"""One step of Adam on one weight whose moments are codes: decode, take in the gradient, move, code.

A weight is ``layers`` tensors of one shape. Where it is large and the device a CPU, slices of a tensor's first
axis take the step one after another and in place: the gradient becomes the update. All that is needed from the
other slices are the largest numbers of the columns (rank 1) or their means (factored), which a pass before
collects.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float

from minitf.train.fourbit.codebooks import Codebook
from minitf.train.fourbit.coding import MomentCoding
from minitf.train.fourbit.layout import Layout, slices
from minitf.train.fourbit.packing import as_blocks, block_shape, from_blocks, pack
from minitf.train.fourbit.quantized import (
    Quantized,
    block_scales,
    decoded_blocks,
    dequantize,
    inverse_rank1,
    inverted,
    largest_along,
    quantize,
)


@struct.dataclass
class Moments:
    """Of one weight: ``mean`` of gradients and ``square``, of their squares; float32 or :class:`Quantized`."""

    mean: Any
    square: Any


@dataclass(frozen=True)
class Setting:
    """What all weights share: Adam's numbers, which may be traced, and how moments are coded."""

    b1: Any
    b2: Any
    epsilon: Any
    coding: MomentCoding


@struct.dataclass
class _Slice:
    """Part of the first axis of a tensor: its gradient or update, and its moments. ``rows`` are the scales of the
    second moment that the slice has for itself: those of its blocks, or of the places on its first axis.
    """

    gradient: Any
    mean: Quantized
    codes: Any
    rows: Any


# Scales of the second moment that all slices share: of the places on the other axes.
Columns = tuple[Array, ...]


def empty(layout: Layout, coding: MomentCoding) -> Moments:
    """Moments that are all exactly 0."""
    shape, scale = layout.shape, coding.scale_of(layout.shape)
    blocks = block_shape(shape, coding.block)
    lead = (layout.layers,) if layout.stacked else ()

    def codes(levels: Codebook) -> Array:
        return jnp.zeros((*lead, *blocks, coding.block * levels.bits // 8), jnp.uint8)

    zeros = lambda *axes: jnp.zeros((*lead, *axes), jnp.float32)
    mean = Quantized(codes(coding.first_levels), (zeros(*blocks),))
    if scale == "block":
        return Moments(mean, Quantized(codes(coding.second_levels), (zeros(*blocks),)))
    per_axis = tuple(zeros(size) for size in shape)
    return Moments(mean, Quantized(None if scale == "factored" else codes(coding.second_levels), per_axis))


def encoded(
    mean: Float[Array, "*shape"], square: Float[Array, "*shape"], layout: Layout, coding: MomentCoding
) -> Moments:
    """Moments of one weight as codes of the nearest levels."""
    scale = coding.scale_of(layout.shape)

    def of_tensor(mean: Array, square: Array) -> Moments:
        first = quantize(mean, coding.first_levels, block=coding.block, signed_scale=coding.signed_scale)
        if scale == "factored":
            means = tuple(jnp.mean(square, axis=axis) for axis in (1, 0))
            return Moments(first, Quantized(None, means))
        return Moments(first, quantize(square, coding.second_levels, block=coding.block, scale=scale))

    one = lambda x: x.astype(jnp.float32).reshape((layout.layers,) * layout.stacked + layout.shape)
    return (jax.vmap(of_tensor) if layout.stacked else of_tensor)(one(mean), one(square))


def decoded(moments: Moments, layout: Layout, coding: MomentCoding) -> Moments:
    """Moments of one weight in float32, in the shape of the layout."""
    shape, scale = layout.shape, coding.scale_of(layout.shape)

    def of_tensor(moments: Moments) -> Moments:
        mean, square = moments.mean, moments.square
        first = dequantize(mean, shape, coding.first_levels, block=coding.block)
        if scale == "factored":
            return Moments(first, _outer(*square.scales))
        return Moments(first, dequantize(square, shape, coding.second_levels, block=coding.block, scale=scale))

    return (jax.vmap(of_tensor) if layout.stacked else of_tensor)(moments)


def step(
    gradient: Float[Array, "..."],
    moments: Moments,
    count: Any,
    key: Any,
    layout: Layout,
    setting: Setting,
) -> tuple[Float[Array, "..."], Moments]:
    """The update of one weight, before rate and decay, and its new moments.

    Args:
        gradient: of the weight, any shape with as many numbers as the layout.
        moments: of the last step, or :func:`empty`.
        count: number of this step, from 1.
        key: for rounding at random; None rounds to the nearest level.
        layout: what tensors the weight is.
        setting: of all weights.
    """
    lead = lambda tree: tree if layout.stacked else jax.tree.map(lambda x: x[None], tree)
    cut = slices(layout, setting.coding.block)
    parts = cut or 1

    def sliced(x: Array) -> Array:
        return x.reshape(layout.layers * parts, x.shape[1] // parts, *x.shape[2:]) if x.ndim > 1 else x

    mean, square = lead(moments.mean), lead(moments.square)
    numbers = gradient.astype(jnp.float32).reshape(layout.layers, *layout.shape)
    whole = jax.tree.map(sliced, _Slice(numbers, mean, square.codes, square.scales[0]))
    old = square.scales[1:]
    collect = partial(_columns, setting=setting, parts=parts)
    advance = partial(_advance, setting=setting, count=count, key=key)
    numbered = jnp.arange(layout.layers * parts)
    if cut is None:
        new = jax.vmap(collect)(whole, old)
        whole = jax.vmap(advance)(whole, old, new, numbered)
    else:
        new = _collected(collect, whole, old, parts, setting) if old else old
        whole = _one_after_another(advance, whole, old, new, parts)
    gathered = lambda x, like: x.reshape(like.shape)
    return whole.gradient.reshape(gradient.shape), jax.tree.map(
        gathered, Moments(whole.mean, Quantized(whole.codes, (whole.rows, *new))), moments
    )


def _at(tree: Any, index: Any) -> Any:
    return jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, index, keepdims=False), tree)


def _put(tree: Any, part: Any, index: Any) -> Any:
    return jax.tree.map(lambda x, y: jax.lax.dynamic_update_index_in_dim(x, y, index, 0), tree, part)


def _collected(collect: Any, whole: _Slice, old: Columns, parts: int, setting: Setting) -> Columns:
    """The new columns of every layer, from one slice after another."""
    join = jnp.add if setting.coding.scale == "factored" else jnp.maximum

    def take_in(index: Array, new: Columns) -> Columns:
        layer = index // parts
        found = collect(_at(whole, index), _at(old, layer))
        return _put(new, jax.tree.map(join, _at(new, layer), found), layer)

    return jax.lax.fori_loop(0, len(whole.gradient), take_in, jax.tree.map(jnp.zeros_like, old))


def _one_after_another(advance: Any, whole: _Slice, old: Columns, new: Columns, parts: int) -> _Slice:
    def move(index: Array, whole: _Slice) -> _Slice:
        layer = index // parts
        return _put(whole, advance(_at(whole, index), _at(old, layer), _at(new, layer), index), index)

    return jax.lax.fori_loop(0, len(whole.gradient), move, whole)


def _squares(part: _Slice, columns: Columns, setting: Setting) -> Array:
    """What the second moment was, as blocks; of a factored one, the tensor."""
    shape = part.gradient.shape
    scale = setting.coding.scale_of(shape)
    if scale == "factored":
        return _outer(part.rows, columns[0])
    return decoded_blocks(
        Quantized(part.codes, (part.rows, *columns)), setting.coding.second_levels, setting.coding.block, scale
    )


def _outer(rows: Array, columns: Array) -> Array:
    """The matrix of rank 1 with these means of rows and columns; 0 where all are."""
    return rows[:, None] * (columns * inverted(jnp.mean(columns)))


def _averaged(old: Array, new: Array, decay: Any, finite: Array) -> Array:
    """The moving average, which what is not finite leaves alone."""
    return jnp.where(finite, decay * old + (1 - decay) * new, old)


def _finite(gradient: Array) -> Array:
    """Whether the square is finite; then so is the gradient."""
    return gradient * gradient < jnp.inf


def _columns(part: _Slice, old: Columns, *, setting: Setting, parts: int) -> Columns:
    """What this slice adds to the columns' new scales: their largest numbers, or its share of their means."""
    gradient, scale = part.gradient, setting.coding.scale_of(part.gradient.shape)
    if scale == "block":
        return ()
    if scale == "factored":
        return (jnp.mean(_averaged_matrix(part, old, setting), axis=0) / parts,)
    blocks = as_blocks(gradient, setting.coding.block)
    new = _averaged(_squares(part, old, setting), blocks * blocks, setting.b2, _finite(blocks))
    whole = from_blocks(new, gradient.shape)
    return tuple(largest_along(whole, axis) for axis in range(1, gradient.ndim))


def _averaged_matrix(part: _Slice, old: Columns, setting: Setting) -> Array:
    """Of which rows and columns a factored second moment keeps the means."""
    squares = _squares(part, old, setting)
    return _averaged(squares, part.gradient * part.gradient, setting.b2, _finite(part.gradient))


def _advance(
    part: _Slice, old: Columns, new: Columns, number: Array, *, setting: Setting, count: Array, key: Any
) -> _Slice:
    """The step of one slice; ``number`` is its own."""
    s, coding, shape = setting, setting.coding, part.gradient.shape
    scale = coding.scale_of(shape)
    blocks = as_blocks(part.gradient, coding.block)
    finite = _finite(blocks)
    mean = _averaged(decoded_blocks(part.mean, coding.first_levels, coding.block, "block"), blocks, s.b1, finite)
    mean_scale = block_scales(mean, coding.signed_scale)
    if scale == "factored":
        rows = jnp.mean(_averaged_matrix(part, old, s), axis=1)
        square, codes = as_blocks(_outer(rows, new[0]), coding.block), None
    else:
        square = _averaged(_squares(part, old, s), blocks * blocks, s.b2, finite)
        if scale == "block":
            rows = jnp.max(square, axis=-1)
            inverse = inverted(rows)[..., None]
        else:
            rows = largest_along(from_blocks(square, shape), 0)
            inverse = as_blocks(inverse_rank1((rows, *new)), coding.block)
        codes = _coded(square * inverse, coding.second_levels, key, number, 1)
    mean_codes = _coded(mean * inverted(mean_scale)[..., None], coding.first_levels, key, number, 0)
    # Bias corrections: both moments started at 0.
    root = jnp.sqrt(square / (1 - s.b2**count))
    moved = jnp.where(finite, mean / (1 - s.b1**count) / (root + s.epsilon), jnp.nan)
    return _Slice(from_blocks(moved, shape), Quantized(mean_codes, (mean_scale,)), codes, rows)


def _coded(x: Array, levels: Codebook, key: Any, number: Array, which: int) -> Array:
    if key is None:
        return pack(levels.nearest(x), levels.bits)
    own = jax.random.fold_in(jax.random.fold_in(key, number), which)
    return pack(levels.stochastic(x, jax.random.uniform(own, x.shape)), levels.bits)
