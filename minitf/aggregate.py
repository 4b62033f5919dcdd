"""Aggregates: mixing positions (or branches) under an association.

``u[query] = sum over keys of A[query, key] * v[key]``. Softmax attention computes its association from the
data; the residual addition is the aggregate over branches with all weights one.
"""

from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from minitf.filter import in_statistics_dtype


def score(
    q: Float[Array, "batch query head head_width"],
    k: Float[Array, "batch key key_value_head head_width"],
    scale: float,
) -> Float[Array, "batch head query key"]:
    """``scale * q . k`` for every pair of positions.

    With grouped keys (Ainslie et al. 2023) head i reads key head ``i // (head / key_value_head)``.
    """
    batch, query, heads, width = q.shape
    key, groups = k.shape[1], k.shape[2]
    # Scaling q, not the scores: fewer products, and no multiplication that XLA could contract into what follows.
    grouped = (q * scale).reshape(batch, query, groups, heads // groups, width)
    return jnp.einsum("bqghc,bkgc->bghqk", grouped, k).reshape(batch, heads, query, key)


def allowed_pairs(length: int, causal: bool, attend_self: bool) -> Bool[Array, "query key"]:
    """Which keys a query may see: all, or only the past, with or without its own position."""
    query, key = jnp.arange(length)[:, None], jnp.arange(length)[None, :]
    allowed = (key <= query) if causal else jnp.ones((length, length), bool)
    return allowed if attend_self else allowed & (key != query)


def alibi_bias(
    heads: int, positions: Int[Array, "*batch query"], keys: int
) -> Float[Array, "*batch head query key"]:
    """Press et al. 2022: minus slope times distance, the slopes a geometric sequence over the heads.

    ``positions`` are the queries'; the keys stand at 0 to ``keys`` - 1.

    For a number of heads that is no power of two, the published rule fills up with every second slope of the
    next power of two.
    """

    def slopes(count: int) -> list[float]:
        return [2.0 ** (-8.0 * (i + 1) / count) for i in range(count)]

    power = 2 ** int(np.floor(np.log2(heads)))
    slope = np.array(slopes(power) + slopes(2 * power)[0::2][: heads - power])
    distance = jnp.abs(positions[..., :, None] - jnp.arange(keys))
    return jnp.asarray(-slope)[:, None, None] * distance[..., None, :, :]


def associate(
    scores: Float[Array, "*batch query key"],
    multiplicity: Float[Array, "*#batch #query key"] | None = None,
) -> Float[Array, "*batch query key"]:
    """Softmax over keys: the association of an attention head; a score of -inf forbids a pair.

    ``multiplicity`` counts how often each key occurs: n equal keys are one key of multiplicity n (any
    non-negative real, so a probability stands for infinitely many). A query that may see no key gets a row of
    zeros, not NaN.
    """
    weight, total = _weighed(scores, multiplicity)
    return (weight / total).astype(scores.dtype)


def _weighed(
    scores: Float[Array, "*batch query key"], multiplicity: Float[Array, "*#batch #query key"] | None = None
) -> tuple[Float[Array, "*batch query key"], Float[Array, "*batch query 1"]]:
    """Exponentials, and what divides them; 1 where there are none."""
    s = in_statistics_dtype(scores)
    if multiplicity is not None:
        s = jnp.where(multiplicity > 0, s, -jnp.inf)
    peak = jax.lax.stop_gradient(jnp.max(s, axis=-1, keepdims=True))
    weight = jnp.exp(s - jnp.where(jnp.isfinite(peak), peak, 0.0))
    if multiplicity is not None:
        weight = weight * multiplicity
    total = jnp.sum(weight, axis=-1, keepdims=True)
    return weight, jnp.where(total == 0, 1.0, total)


def combine(
    pattern: Float[Array, "batch head query key"],
    v: Float[Array, "batch key key_value_head head_width"],
) -> Float[Array, "batch query head head_width"]:
    """``z[query] = sum over keys of pattern[query, key] * v[key]``, per head, with grouped values."""
    batch, heads, query, key = pattern.shape
    groups, width = v.shape[2], v.shape[3]
    grouped = pattern.reshape(batch, groups, heads // groups, query, key)
    return jnp.einsum("bghqk,bkgc->bqghc", grouped, v).reshape(batch, query, heads, width)


def combine_scored(
    scores: Float[Array, "batch head query key"],
    v: Float[Array, "batch key key_value_head head_width"],
) -> Float[Array, "batch query head head_width"]:
    """``combine(associate(scores), v)`` up to rounding, where nobody reads the association.

    Dividing the mixture, not the weights: there are fewer of its numbers, and its slope needs no sum over keys
    (Dao et al. 2022, section 3.1 and appendix B.2).
    """
    weight, total = _weighed(scores)
    mixture = combine(weight.astype(scores.dtype), v)
    return (mixture / jnp.moveaxis(total, 1, 2)).astype(scores.dtype)


def attend(
    q: Float[Array, "batch query head head_width"],
    k: Float[Array, "batch key key_value_head head_width"],
    v: Float[Array, "batch key key_value_head head_width"],
    scale: float,
    causal: bool,
    implementation: Literal["cudnn", "xla"] = "cudnn",
) -> Float[Array, "batch query head head_width"]:
    """Score, associate and combine in one kernel that never stores the association (Dao et al. 2022)."""
    return jax.nn.dot_product_attention(q, k, v, scale=scale, is_causal=causal, implementation=implementation)


def add(*branches: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """The residual addition: an aggregate over branches with every weight one."""
    total = branches[0]
    for branch in branches[1:]:
        total = total + branch
    return total
