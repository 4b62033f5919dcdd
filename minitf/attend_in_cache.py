"""Softmax attention that never stores its association: of few sequences at a time, made again on the way back.

Dao et al. 2022 (arXiv:2205.14135), for CPUs: what lies between scores and mixture stays in a core's cache. On the
way back the association is made of the scores and of each query's ``log sum exp`` alone, and its slope needs

    dA[t, s] = dz_t . v_s        dscores[t, s] = A[t, s] (dA[t, s] - z_t . dz_t)

(sections 3.1 and B.2). There is no forward-mode derivative.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from minitf.cores import cores, largest_divisor
from minitf.filter import in_statistics_dtype
from minitf.in_turn import in_turn

# Queries in one block, at least; and blocks at most, since each is compiled.
BLOCK, MOST_BLOCKS = 64, 8
# Of a block's scores, about, which one core keeps in its cache; each of several wants more, to share operations.
ONE_CORE_BYTES, SHARED_CORE_BYTES = 2**18, 2**20

Queries = Float[Array, "batch position head head_width"]
Keys = Float[Array, "batch position key_value_head head_width"]
# Inside, keys of all sequences side by side, and with each the heads that share it.
Rows = Float[Array, "pair share query head_width"]
Pairs = Float[Array, "pair share query key"]


@partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def attend_in_cache(q: Queries, k: Keys, v: Keys, scale: float, causal: bool) -> Queries:
    """:func:`minitf.aggregate.attend` on a CPU: values mixed under the softmax of ``scale * q . k``."""
    return _forth(q, k, v, scale, causal)[0]


def _forth(q: Array, k: Array, v: Array, scale: float, causal: bool) -> tuple[Array, tuple[Array, ...]]:
    groups = k.shape[2]

    def some(q: Queries, k: Keys, v: Keys) -> tuple[Queries, Float[Array, "batch position head 1"]]:
        q, k, v = _by_key(q * scale, groups), _by_key(k, groups)[:, 0], _by_key(v, groups)[:, 0]
        mixed, normalizers = [], []
        for here, seen in _blocks(q.shape[2], causal):
            scores = _scores(q[:, :, here], k[:, seen], here.start if causal else None)
            peak = jnp.max(scores, axis=-1, keepdims=True)
            weight = jnp.exp(scores - peak)
            total = jnp.sum(weight, axis=-1, keepdims=True)
            mixture = jnp.einsum("prqk,pkc->prqc", weight.astype(q.dtype), v[:, seen])
            mixed.append((mixture / total).astype(q.dtype))
            normalizers.append(peak + jnp.log(total))
        z, normalizer = (_by_position(jnp.concatenate(x, axis=2), groups) for x in (mixed, normalizers))
        return z, normalizer

    z, normalizer = _few_at_a_time(some, q, k, v)
    return z, (q, k, v, z, normalizer)


def _back(scale: float, causal: bool, kept: tuple[Array, ...], dz: Array) -> tuple[Array, Array, Array]:
    groups = kept[1].shape[2]

    def some(
        q: Queries, k: Keys, v: Keys, z: Queries, normalizer: Array, dz: Queries
    ) -> tuple[Queries, Keys, Keys]:
        inner = jnp.sum(in_statistics_dtype(z) * dz, axis=-1, keepdims=True)
        q, normalizer, dz, inner = (_by_key(x, groups) for x in (q * scale, normalizer, dz, inner))
        k, v = _by_key(k, groups)[:, 0], _by_key(v, groups)[:, 0]
        dq, dk, dv = [], jnp.zeros_like(k), jnp.zeros_like(v)
        for here, seen in _blocks(q.shape[2], causal):
            queries, moved = q[:, :, here], dz[:, :, here]
            scores = _scores(queries, k[:, seen], here.start if causal else None)
            pattern = jnp.exp(scores - normalizer[:, :, here])
            slope = pattern * (jnp.einsum("prqc,pkc->prqk", moved, v[:, seen]) - inner[:, :, here])
            slope, pattern = slope.astype(q.dtype), pattern.astype(q.dtype)
            dq.append(jnp.einsum("prqk,pkc->prqc", slope, k[:, seen]) * scale)
            dk = dk.at[:, seen].add(jnp.einsum("prqk,prqc->pkc", slope, queries))
            dv = dv.at[:, seen].add(jnp.einsum("prqk,prqc->pkc", pattern, moved))
        queries, keys, values = jnp.concatenate(dq, axis=2), dk[:, None], dv[:, None]
        return _by_position(queries, groups), _by_position(keys, groups), _by_position(values, groups)

    found: tuple[Array, Array, Array] = _few_at_a_time(some, *kept, dz)
    return found


attend_in_cache.defvjp(_forth, _back)


def _by_key(x: Float[Array, "batch position head any"], groups: int) -> Float[Array, "pair share position any"]:
    """Sequences and key heads as one axis, then the heads that share a key, then positions."""
    batch, length, heads, width = x.shape
    x = x.reshape(batch, length, groups, heads // groups, width)
    return x.transpose(0, 2, 3, 1, 4).reshape(batch * groups, heads // groups, length, width)


def _by_position(
    x: Float[Array, "pair share position any"], groups: int
) -> Float[Array, "batch position head any"]:
    """What :func:`_by_key` took apart."""
    pairs, share, length, width = x.shape
    x = x.reshape(pairs // groups, groups, share, length, width).transpose(0, 3, 1, 2, 4)
    return x.reshape(pairs // groups, length, groups * share, width)


def block_of(length: int) -> int:
    """How many queries are taken together."""
    return max(BLOCK, -(-length // MOST_BLOCKS))


def blocks(length: int, size: int) -> list[slice]:
    """Queries in blocks of ``size``, of which the last may be shorter."""
    return [slice(first, min(first + size, length)) for first in range(0, length, size)]


def _blocks(length: int, causal: bool) -> list[tuple[slice, slice]]:
    """Queries, and the keys that they see: those up to the block's end, or all."""
    return [(here, slice(0, here.stop if causal else length)) for here in blocks(length, block_of(length))]


def _scores(q: Rows, k: Float[Array, "pair key head_width"], first: int | None) -> Pairs:
    """At least in float32; of queries from the position ``first`` on, which see no later key, or of all."""
    scores = in_statistics_dtype(jnp.einsum("prqc,pkc->prqk", q, k))
    if first is None:
        return scores
    return jnp.where(first + jnp.arange(q.shape[2])[:, None] >= jnp.arange(k.shape[1]), scores, -jnp.inf)


def _few_at_a_time(function: Callable[..., Any], *arrays: Array) -> Any:
    """``function`` of a few sequences after another, whose scores fit in a core's cache."""
    batch, length, heads = arrays[0].shape[:3]
    one, most = heads * min(block_of(length), length) * length * 4, cores()
    most = ONE_CORE_BYTES if most == 1 else most * SHARED_CORE_BYTES
    return in_turn(lambda x: function(*x), arrays, largest_divisor(batch, most // one))
