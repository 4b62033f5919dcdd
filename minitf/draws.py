"""Random weights, all drawn in one kernel where that is possible.

XLA compiles each random array by itself, about half a second each on a CPU: a small model of thirty weights would
take longer to begin than to train. The numbers are those of ``jax.random``, whose generator makes each one from a
key and the number of its place (``jax_threefry_partitionable``): the same, up to rounding, wherever they are made.
"""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.random import threefry2x32_p
from jaxtyping import Array, Float, Key

MOST_TOGETHER = 2**22  # numbers; of larger models the keys of all numbers would take too much memory
ONE = np.float32(1).view(np.uint32)
MANTISSA = 23


def uniforms(
    keys: Sequence[Key[Array, ""]], sizes: Sequence[int], dtype: Any
) -> list[Float[Array, " number"]] | None:
    """``jax.random.uniform(key, (size,))`` of each key, together; None where that cannot be.

    It can for float32 and JAX's usual generator, up to ``MOST_TOGETHER`` numbers.
    """
    usual = jax.config.jax_threefry_partitionable and all(  # type: ignore[attr-defined]
        str(jax.random.key_impl(key)) == "threefry2x32" for key in keys
    )
    if not usual or jnp.dtype(dtype) != jnp.float32 or not 0 < sum(sizes) <= MOST_TOGETHER:
        return None
    first, second = (
        jnp.concatenate(
            [jnp.broadcast_to(jax.random.key_data(key)[half], size) for key, size in zip(keys, sizes, strict=True)]
        )
        for half in (0, 1)
    )
    place = jnp.concatenate([jnp.arange(size, dtype=jnp.uint32) for size in sizes])
    bits = jnp.bitwise_xor(*threefry2x32_p.bind(first, second, jnp.zeros_like(place), place))
    # A number in [1, 2) has the random bits as its mantissa.
    numbers = jax.lax.bitcast_convert_type((bits >> (32 - MANTISSA)) | ONE, jnp.float32) - 1
    return jnp.split(numbers, np.cumsum(sizes)[:-1].tolist())


def between(uniform: Float[Array, "*axes"], low: float, high: float) -> Float[Array, "*axes"]:
    """Numbers of [0, 1) spread over [low, high), as ``jax.random.uniform`` does."""
    low, high = np.float32(low), np.float32(high)  # type: ignore[assignment]
    return jnp.maximum(low, uniform * (high - low) + low)


def normal(uniform: Float[Array, "*axes"]) -> Float[Array, "*axes"]:
    """Standard normal numbers from those of [0, 1), as ``jax.random.normal`` makes them."""
    above = float(np.nextafter(np.float32(-1), np.float32(0)))
    return np.float32(math.sqrt(2)) * jax.lax.erf_inv(between(uniform, above, 1.0))
