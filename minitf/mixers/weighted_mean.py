"""Means under weights that fade: the aggregate of AFT-simple and RWKV-4, without overflow."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def weighted_sums(
    k: Float[Array, "batch position channel"],
    v: Float[Array, "batch position channel"],
    fade: Float[Array, " channel"],
) -> tuple[Array, Array, Array]:
    """``sum_s exp(k_s - (t - s) fade) v_s`` and the same without v, for all t, over ``exp(peak)``; and peak.

    Every sum is kept relative to its own highest exponent (Milakov and Gimelshein 2018), so that none overflows.
    """

    def after(first: tuple[Array, ...], second: tuple[Array, ...]) -> tuple[Array, ...]:
        (top, bottom, peak, faded), (more_top, more_bottom, more_peak, more_faded) = first, second
        earlier = peak - more_faded
        highest = jnp.maximum(earlier, more_peak)
        a, b = jnp.exp(earlier - highest), jnp.exp(more_peak - highest)
        return a * top + b * more_top, a * bottom + b * more_bottom, highest, faded + more_faded

    fades = jnp.broadcast_to(fade, k.shape)
    top, bottom, peak, _ = jax.lax.associative_scan(after, (v, jnp.ones_like(v), k, fades), axis=1)
    return top, bottom, peak


def weighted_means(
    k: Float[Array, "batch position channel"],
    v: Float[Array, "batch position channel"],
    fade: Float[Array, " channel"],
    bonus: Float[Array, " channel"],
) -> Float[Array, "batch position channel"]:
    """Means of v: the present key weighs ``exp(k_t + bonus)``, those before ``exp(k_s - (t - 1 - s) fade)``."""
    top, bottom, peak = weighted_sums(k, v, fade)
    # The sums before each position, none before the first; then the present one with its bonus.
    before = lambda x, fill: jnp.pad(x[:, :-1], ((0, 0), (1, 0), (0, 0)), constant_values=fill)
    top, bottom, _ = with_term((before(top, 0.0), before(bottom, 0.0), before(peak, -jnp.inf)), k + bonus, v)
    return top / bottom


def with_term(
    sums: tuple[Array, Array, Array], exponent: Float[Array, "*axes"], v: Float[Array, "*axes"]
) -> tuple[Array, Array, Array]:
    """Sums as :func:`weighted_sums` has them, with ``exp(exponent) v`` and ``exp(exponent)`` added."""
    top, bottom, peak = sums
    highest = jnp.maximum(peak, exponent)
    before, now = jnp.exp(peak - highest), jnp.exp(exponent - highest)
    return before * top + now * v, before * bottom + now, highest
