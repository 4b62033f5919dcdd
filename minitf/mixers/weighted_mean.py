"""Means under weights that fade: the aggregate of AFT-simple and RWKV-4, without overflow.

Sums are kept as ``(top, bottom, peak)``: ``sum of exp(k) v`` and the same without v, over ``exp(peak)``, so that
none overflows (Milakov and Gimelshein 2018). No ratio depends on the peaks, and no gradient passes through them.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from minitf.filter import in_statistics_dtype
from minitf.mixers.contract import from_short_chunks, in_short_chunks

EMPTY = (0.0, 0.0, -jnp.inf)  # the sums over nothing
Sums = tuple[Array, Array, Array]


def weighted_sums(
    k: Float[Array, "batch position channel"],
    v: Float[Array, "batch position channel"],
    fade: Float[Array, " channel"],
) -> Sums:
    """Sums over s <= t with ``exp(k_s - (t - s) fade)``, for all t.

    As many blocks as each has positions: all blocks at once, position by position, then what the blocks before
    each add. So few steps follow one another, and they are two small programs.
    """
    k, v, fade = in_statistics_dtype(k), in_statistics_dtype(v), in_statistics_dtype(fade)
    keys, values = in_short_chunks(k, -jnp.inf), in_short_chunks(v)
    size = keys.shape[0]

    def add(sums: Sums, now: tuple[Array, Array]) -> tuple[Sums, Sums]:
        after = with_term(faded(sums, fade), *now)
        return after, after

    def join(sums: Sums, block: Sums) -> tuple[Sums, Sums]:
        return together(faded(sums, size * fade), block), sums

    _, inside = jax.lax.scan(add, nothing(values[0]), (keys, values))
    ends: Sums = jax.tree.map(lambda x: x[-1], inside)
    _, before = jax.lax.scan(join, nothing(values[0, 0]), ends)
    since = jnp.arange(1, size + 1)[:, None, None, None] * fade
    sums = together(faded(before, since), inside)
    # Computed once, not anew wherever they are used.
    return jax.lax.optimization_barrier(jax.tree.map(lambda x: from_short_chunks(x, k.shape[1]), sums))


def weighted_means(
    k: Float[Array, "batch position channel"],
    v: Float[Array, "batch position channel"],
    fade: Float[Array, " channel"],
    bonus: Float[Array, " channel"],
) -> Float[Array, "batch position channel"]:
    """Means of v: the present key weighs ``exp(k_t + bonus)``, those before ``exp(k_s - (t - 1 - s) fade)``."""
    # The sums before each position, none before the first; then the present one with its bonus.
    top, bottom, peak = (
        jnp.pad(x[:, :-1], ((0, 0), (1, 0), (0, 0)), constant_values=fill)
        for x, fill in zip(weighted_sums(k, v, fade), EMPTY, strict=True)
    )
    top, bottom, _ = with_term((top, bottom, peak), k + bonus, v)
    return (top / bottom).astype(v.dtype)


def nothing(like: Float[Array, "*axes"]) -> Sums:
    """The sums over nothing, each of that shape, in at least float32."""
    top, bottom, peak = (jnp.full_like(in_statistics_dtype(like), fill) for fill in EMPTY)
    return top, bottom, peak


def faded(sums: Sums, fade: Any) -> Sums:
    """The same sums, each term ``exp(-fade)`` of what it was."""
    top, bottom, peak = sums
    return top, bottom, peak - fade


def with_term(sums: Sums, exponent: Float[Array, "*axes"], v: Float[Array, "*axes"]) -> Sums:
    """The sums with ``exp(exponent) v`` and ``exp(exponent)`` added."""
    return together(sums, (v, jnp.ones_like(v), exponent))


def together(one: Sums, other: Sums) -> Sums:
    """The sums over both."""
    (top, bottom, peak), (more_top, more_bottom, more_peak) = one, other
    highest = jax.lax.stop_gradient(jnp.maximum(peak, more_peak))
    a, b = jnp.exp(peak - highest), jnp.exp(more_peak - highest)
    return a * top + b * more_top, a * bottom + b * more_bottom, highest
