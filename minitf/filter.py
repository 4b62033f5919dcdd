"""Filters: maps applied at each position alone, the same whatever the other tokens are.

A filter takes rows, ``[rows, width]`` with rows = batch x position flattened, so by its type it cannot mix
positions. Whatever mixes them lives in :mod:`minitf.aggregate`.
"""

import math
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from minitf.rotary import RotaryScaling, frequencies

NormKind = Literal["none", "l2", "layer", "rms"]
ActivationKind = Literal["relu", "gelu", "gelu_tanh", "swiglu"]


def in_statistics_dtype(x: Array) -> Array:
    """Upcast to at least float32: means, norms and softmax are never taken in half precision."""
    return x.astype(statistics_dtype(x.dtype))


def statistics_dtype(dtype: Any) -> Any:
    """At least float32: of sums over positions, such as what a recurrence holds, and of what they are made of."""
    return jnp.promote_types(dtype, jnp.float32)


def linear(
    rows: Float[Array, "rows inputs"],
    weight: Float[Array, "inputs outputs"],
    bias: Float[Array, " outputs"] | None = None,
) -> Float[Array, "rows outputs"]:
    """``rows @ weight + bias``."""
    out = _product(rows, weight) if jax.default_backend() == "cpu" else rows @ weight
    return out if bias is None else out + bias


@jax.custom_jvp
def _product(
    rows: Float[Array, "rows inputs"], weight: Float[Array, "inputs outputs"]
) -> Float[Array, "rows outputs"]:
    """``rows @ weight``, where the slope of the weight is a product with rows that are laid out anew for it.

    XLA for CPUs is fast, often twice as fast, where the left side adds up along its last axis: the rows are copied
    for that. The fence behind the slope keeps it from being turned around again, as a tied table's would be.
    """
    return rows @ weight


@jax.checkpoint  # so that the rows are kept for the way back, and not their copy
def _along_weight(rows: Array, moved: Array) -> Array:
    return jax.lax.dot_general(fenced(rows.T), fenced(moved), (((0,), (0,)), ((), ())))


_product.defjvps(
    lambda moved, out, rows, weight: moved @ weight,
    lambda moved, out, rows, weight: _along_weight(rows, moved),
)


def embed(
    tokens: Int[Array, " rows"], table: Float[Array, "vocabulary width"], scale: float = 1.0
) -> Float[Array, "rows width"]:
    """The token vectors, ``scale * table[tokens]``."""
    vectors = table[tokens]
    return vectors if scale == 1.0 else vectors * scale


def unembed(
    rows: Float[Array, "rows width"],
    table: Float[Array, "width vocabulary"],
    bias: Float[Array, " vocabulary"] | None = None,
) -> Float[Array, "rows vocabulary"]:
    """Logits: the inner product of each row with every token's output vector."""
    return linear(rows, table, bias)


def sinusoidal_positions(length: int, width: int) -> Float[np.ndarray, "position width"]:
    """Vaswani et al. 2017, section 3.5: sines on even columns, cosines on odd, base 10000."""
    angle = np.arange(length)[:, None] / 10000.0 ** (np.arange(0, width, 2) / width)[None, :]
    table = np.zeros((length, width))
    table[:, 0::2] = np.sin(angle)
    table[:, 1::2] = np.cos(angle[:, : width // 2])
    return table


def rotate(
    rows: Float[Array, "rows head head_width"],
    positions: Int[Array, " rows"],
    rotated: int,
    base: float,
    interleaved: bool,
    scaling: RotaryScaling | None = None,
) -> Float[Array, "rows head head_width"]:
    """Rotary positions (Su et al. 2021) on the first ``rotated`` components of every head.

    Each pair turns by its frequency times the position (:func:`minitf.rotary.frequencies`). ``interleaved`` pairs
    neighbours (0,1), (2,3), ... as the paper and llama2.c do; otherwise component j pairs with j + rotated / 2, as
    GPT-NeoX and the published Llama weights do.
    """
    turning, still = rows[..., :rotated], rows[..., rotated:]
    position = positions.astype(jnp.promote_types(rows.dtype, jnp.float32))
    angle = position[:, None] * frequencies(rotated, base, scaling)
    cos, sin = (f(angle)[:, None, :] for f in (jnp.cos, jnp.sin))
    if scaling is not None:
        cos, sin = cos * scaling.attention_factor, sin * scaling.attention_factor
    cos, sin = cos.astype(rows.dtype), sin.astype(rows.dtype)
    if interleaved:
        first, second = turning[..., 0::2], turning[..., 1::2]
    else:
        first, second = jnp.split(turning, 2, axis=-1)
    turned = (first * cos - second * sin, second * cos + first * sin)
    joined = jnp.stack(turned, axis=-1).reshape(turning.shape) if interleaved else jnp.concatenate(turned, axis=-1)
    return jnp.concatenate([joined, still], axis=-1)


def center(rows: Float[Array, "rows width"], kind: NormKind) -> Float[Array, "rows width"]:
    """What a norm divides, in at least float32: the rows, less their mean in LayerNorm."""
    x = in_statistics_dtype(rows)
    # Means are kept, not made again in every pass that reads them: a GPU then has nothing to add up in those.
    return x - fenced(jnp.mean(x, axis=-1, keepdims=True)) if kind == "layer" else x


def norm_parts(
    rows: Float[Array, "rows width"], kind: NormKind, epsilon: float
) -> tuple[Float[Array, "rows width"], Float[Array, " rows"]]:
    """What a norm divides, and by what: :func:`center` and :func:`norm_scale`, whose slopes need one pass less."""
    if kind == "layer":
        return _layer_parts(in_statistics_dtype(rows), epsilon)
    centered = center(rows, kind)
    return centered, norm_scale(centered, kind, epsilon)


@partial(jax.custom_jvp, nondiff_argnums=(1,))
def _layer_parts(
    x: Float[Array, "rows width"], epsilon: float
) -> tuple[Float[Array, "rows width"], Float[Array, " rows"]]:
    centered = center(x, "layer")
    return centered, norm_scale(centered, "layer", epsilon)


@_layer_parts.defjvp
def _layer_slopes(epsilon: float, at: tuple[Array], moved: tuple[Array]) -> tuple[Any, Any]:
    centered, scale = _layer_parts(*at, epsilon)
    (x,) = moved
    # What is centered adds up to zero, so the scale does not move with the mean.
    slope = fenced(jnp.mean(centered * x, axis=-1) / scale)
    return (centered, scale), (center(x, "layer"), slope)


def norm_scale(centered: Float[Array, "rows width"], kind: NormKind, epsilon: float) -> Float[Array, " rows"]:
    """What a norm divides by: the l2 length, the standard deviation, or the root mean square.

    Epsilon enters as in the respective papers: inside the root for ``layer`` and ``rms``, nowhere for ``l2``
    (Tian et al. 2023 normalize without one), where a zero row has the scale 1 so that it stays zero.
    """
    if kind == "l2":
        square = jnp.sum(centered * centered, axis=-1)
        return fenced(jnp.sqrt(jnp.where(square == 0, 1.0, square)))
    return fenced(jnp.sqrt(jnp.mean(centered * centered, axis=-1) + epsilon))


def normalize(
    centered: Float[Array, "rows width"],
    scale: Float[Array, " rows"],
    gain: Float[Array, " width"] | None = None,
    offset: Float[Array, " width"] | None = None,
) -> Float[Array, "rows width"]:
    """Divide by a given scale, then apply gain and offset.

    The scale is an argument, not computed here, so that a walk can record it and an edit can freeze it: with
    the scale frozen, a norm is an affine map.
    """
    x = centered / scale[:, None]
    x = x if gain is None else x * gain
    return x if offset is None else x + offset


def fenced(x: Array) -> Array:
    """The same numbers, whoever else reads them.

    XLA would turn x / sqrt(y) into x * rsqrt(y) exactly when nobody else reads sqrt(y), and the logits would
    depend, in their last bit, on whether the walk is kept.
    """
    return jax.lax.optimization_barrier(x)


def activate(
    pre: Float[Array, "rows hidden"], kind: ActivationKind, gated: Float[Array, "rows hidden"] | None = None
) -> Float[Array, "rows hidden"]:
    """The feed-forward non-linearity; ``swiglu`` multiplies ``silu(pre)`` with the second branch ``gated``."""
    if kind == "relu":
        return jax.nn.relu(pre)
    if gated is not None:
        return jax.nn.silu(pre) * gated
    if kind == "gelu":
        return jax.nn.gelu(pre, approximate=False)
    # (1 + tanh(x)) / 2 is the logistic function of 2 x, which takes half as long.
    return pre * jax.nn.sigmoid(2 * (2 / math.pi) ** 0.5 * (pre + 0.044715 * pre**3))
