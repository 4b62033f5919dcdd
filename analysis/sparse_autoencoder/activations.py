"""What makes latents sparse: the largest alone, or what is above a threshold, with slopes for the threshold.

A step has no slope. Rajamanoharan et al. 2024 give the threshold one all the same, a straight-through estimate:
the slope of the expected loss, from the pre-activations that lie within a kernel around the threshold.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

Latents = Float[Array, "row latent"]


def keep_largest(values: Latents, k: int) -> Latents:
    """The k largest of each row, zero elsewhere; of equal ones the first."""
    kept, places = jax.lax.top_k(values, k)
    return jnp.put_along_axis(jnp.zeros_like(values), places, kept, axis=-1, inplace=False)


def jump_relu(pre: Latents, threshold: Float[Array, " latent"], bandwidth: float) -> Latents:
    """``z 1[z > theta]``, with the slope ``-theta / epsilon K((z - theta) / epsilon)`` for theta."""
    slope = -(threshold / bandwidth) * rectangle((pre - threshold) / bandwidth)
    return pre * (pre > threshold) + _sloped(slope, threshold)


def above(pre: Latents, threshold: Float[Array, " latent"], bandwidth: float) -> Latents:
    """``1[z > theta]``, with the slope ``-1 / epsilon K((z - theta) / epsilon)`` for theta, and none for z."""
    slope = -(1 / bandwidth) * rectangle((pre - threshold) / bandwidth)
    return (pre > threshold).astype(pre.dtype) + _sloped(slope, threshold)


def rectangle(x: Array) -> Array:
    """The kernel K: 1 within half of 0, else 0."""
    return (jnp.abs(x) < 0.5).astype(x.dtype)


def _sloped(slope: Array, threshold: Array) -> Array:
    """Zero, with a given slope for the threshold and none for anything else."""
    return jax.lax.stop_gradient(slope) * (threshold - jax.lax.stop_gradient(threshold))
