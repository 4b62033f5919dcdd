"""One layer of the walk: an aggregate over positions and a filter, each adding its step."""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float

from minitf import aggregate, filter
from minitf.config import ModelConfig
from minitf.parameters import FeedForwardParameters, Layer, Norm
from minitf.walk import Change, LayerWalk, apply

Stream = Float[Array, "batch position width"]
Past = tuple[Array, Array] | None

# Queries in one block of a causal association, at least; and blocks at most, since each is compiled.
BLOCK, MOST_BLOCKS = 64, 8


@struct.dataclass
class Cache:
    """The positions already done: ``k``, ``v`` are ``[layer, batch, slot, key_value_head, head_width]``.

    Slot i holds position i; ``filled`` ``[batch]`` counts the positions of each sequence, and what later slots
    hold is not read.
    """

    k: Any
    v: Any
    filled: Any


@struct.dataclass
class Places:
    """Where the tokens stand.

    ``query`` ``[#batch, position]`` are their positions; ``forbidden`` ``[#batch, 1, query, key]`` the pairs that
    may not meet; ``goes_on`` says whether positions came before, in a cache; ``association`` whether the walk is
    to hold scores and patterns; ``padded`` whether some positions are padding.
    """

    query: Any
    forbidden: Any
    goes_on: bool = struct.field(pytree_node=False)
    association: bool = struct.field(pytree_node=False, default=True)
    padded: bool = struct.field(pytree_node=False, default=False)


def places_from_start(
    length: int, config: ModelConfig, valid: Bool[Array, "batch position"] | None, association: bool = True
) -> Places:
    """The places of a whole sequence; padding, where ``valid`` is False, meets no query."""
    forbidden = ~aggregate.allowed_pairs(length, config.causal, config.attend_self)[None, None]
    if valid is not None:
        forbidden = forbidden | ~valid[:, None, None, :]
    return Places(jnp.arange(length)[None], forbidden, False, association, padded=valid is not None)


def places_after(cache: Cache, length: int, config: ModelConfig, association: bool = True) -> Places:
    """The places of the ``length`` tokens that follow those in the cache."""
    query = cache.filled[:, None] + jnp.arange(length)
    key = jnp.arange(cache.k.shape[2])
    forbidden = (key > query[..., None]) if config.attend_self else (key >= query[..., None])
    return Places(query, forbidden[:, None], True, association)


# Compiled once where it is called outside of any jit; inside, it is as if written there.
@partial(jax.jit, static_argnames=("config",), inline=True)
def one_layer(
    stream: Stream,
    weights: Layer,
    config: ModelConfig,
    edit: LayerWalk,
    places: Places,
    past: Past = None,
) -> LayerWalk:
    """One layer: an aggregate over positions and a filter, each adding its step."""
    resid_pre = apply(edit.resid_pre, stream)
    attended = _attention(resid_pre, weights, config, edit, places, past)
    attention_norm_scale = attended.attention_norm_scale
    resid_mid = attended.attention_step
    if config.residual:
        resid_mid = _residual(resid_pre, attended.attention_step)
    if config.post_norm:
        attention_norm_scale, resid_mid = apply_norm(
            resid_mid, weights.attention_norm, config, edit.attention_norm_scale
        )
    attended = dataclasses.replace(
        attended,
        resid_pre=resid_pre,
        attention_norm_scale=attention_norm_scale,
        resid_mid=apply(edit.resid_mid, resid_mid),
    )
    if config.feed_forward == "none":
        return dataclasses.replace(attended, resid_post=apply(edit.resid_post, attended.resid_mid))
    return _feed_forward(attended, weights, config, edit)


def _attention(
    resid_pre: Stream,
    weights: Layer,
    config: ModelConfig,
    edit: LayerWalk,
    places: Places,
    past: Past,
) -> LayerWalk:
    """Filters to queries, keys and values; their association; the aggregate; the filter back."""
    batch, length, _ = resid_pre.shape
    scale, stream = None, resid_pre
    if config.pre_norm:
        scale, stream = apply_norm(resid_pre, weights.attention_norm, config, edit.attention_norm_scale)
    q, k, v = _query_key_value(stream, weights, config, places)
    q, k, v = apply(edit.q, q), apply(edit.k, k), apply(edit.v, v)
    if past is not None:
        sequence = jnp.arange(batch)[:, None]
        k, v = (kept.at[sequence, places.query].set(new) for kept, new in zip(past, (k, v), strict=True))
    scores, pattern, z = _associate(q, k, v, config, edit, places)
    z = apply(edit.z, z)

    attention = weights.attention
    if config.attention == "table":
        head_steps, step = z, jnp.sum(z, axis=2)
    else:
        # The heads' steps are for the reader of the walk; their sum is one product of all heads at once.
        head_steps = _head_steps(z, attention.output)
        step = filter.linear(
            z.reshape(batch * length, -1), attention.output.reshape(-1, config.width), attention.output_bias
        ).reshape(batch, length, config.width)
    if edit.head_steps is not None:
        # The whole moves by as much as the parts do: a neutral edit stays exact to the bit.
        before, head_steps = head_steps, apply(edit.head_steps, head_steps)
        step = step - jnp.sum(before - head_steps, axis=2)
    return LayerWalk(
        attention_norm_scale=scale,
        q=q,
        k=k,
        v=v,
        scores=scores,
        pattern=pattern,
        z=z,
        head_steps=head_steps,
        attention_step=apply(edit.attention_step, step),
    )


def _associate(
    q: Float[Array, "batch query head head_width"],
    k: Float[Array, "batch key key_value_head head_width"],
    v: Float[Array, "batch key key_value_head head_width"],
    config: ModelConfig,
    edit: LayerWalk,
    places: Places,
) -> tuple[Array | None, Array | None, Float[Array, "batch query head head_width"]]:
    """Scores, pattern (each None where the walk is not to hold them), and the values mixed under it.

    Where queries see the past alone, they are taken in blocks, each with the keys up to its end: what is forbidden
    anyway is then not computed, and nobody pays for putting the blocks together who does not read them.
    """
    length, keys = q.shape[1], k.shape[1]
    scale = 1.0 if config.attention == "table" else config.head_size**-0.5
    if not places.association and _has_kernel(q, config, places):
        return None, None, aggregate.attend(q, k, v, scale, config.causal)
    edited = edit.scores is not None or edit.pattern is not None
    size = length if edited or places.goes_on or not config.causal else max(BLOCK, -(-length // MOST_BLOCKS))
    scores, patterns, mixed = [], [], []
    for first in range(0, length, size):
        stop = min(first + size, length)
        here, seen = slice(first, stop), keys if size == length else stop
        some = aggregate.score(q[:, here], k[:, :seen], scale)
        if config.position == "alibi":
            some = some + aggregate.alibi_bias(config.heads, places.query[:, here], seen).astype(some.dtype)
        some = jnp.where(places.forbidden[:, :, here, :seen], -jnp.inf, apply(edit.scores, some))
        pattern = apply(edit.pattern, aggregate.associate(some))
        mixed.append(aggregate.combine(pattern, v[:, :seen]))
        rest = ((0, 0), (0, 0), (0, 0), (0, keys - seen))
        scores.append(jnp.pad(some, rest, constant_values=-jnp.inf))
        patterns.append(jnp.pad(pattern, rest))
    z = jnp.concatenate(mixed, axis=1)
    if not places.association:
        return None, None, z
    return jnp.concatenate(scores, axis=2), jnp.concatenate(patterns, axis=2), z


def _has_kernel(q: Float[Array, "batch query head head_width"], config: ModelConfig, places: Places) -> bool:
    """Whether cuDNN's fused attention computes this association: on a GPU, in half precision, nothing unusual."""
    usual = config.attention == "query_key" and config.position != "alibi" and config.attend_self
    fits = q.dtype in (jnp.bfloat16, jnp.float16) and q.shape[-1] % 8 == 0 and q.shape[-1] <= 128
    return usual and fits and not places.goes_on and not places.padded and jax.default_backend() == "gpu"


def _head_steps(
    z: Float[Array, "batch position head head_width"], output: Float[Array, "head head_width width"]
) -> Float[Array, "batch position head width"]:
    """Each head through its own part of the output map; heads outermost in the product, where it is faster."""
    rows = z.reshape(-1, *z.shape[2:])
    steps = jnp.moveaxis(jnp.einsum("rhc,hcw->hrw", rows, output), 0, 1)
    return steps.reshape(*z.shape[:3], output.shape[-1])


def _query_key_value(
    stream: Stream, weights: Layer, config: ModelConfig, places: Places
) -> tuple[Array, Array, Array]:
    """What the scores compare and what the association mixes, each ``[batch, position, head, head_width]``."""
    batch, length, _ = stream.shape
    rows, attention = as_rows(stream), weights.attention

    def heads(weight: Array, bias: Array | None) -> Float[Array, "rows head head_width"]:
        flat = filter.linear(rows, weight.reshape(weight.shape[0], -1), None if bias is None else bias.reshape(-1))
        return flat.reshape(rows.shape[0], *weight.shape[1:])

    if config.attention == "table":
        q = heads(jnp.moveaxis(attention.table, 0, 1), None)
        k = v = rows[:, None, :]
    else:
        q = heads(attention.query, attention.query_bias)
        k = heads(attention.key, attention.key_bias)
        v = heads(attention.value, attention.value_bias)
    if config.query_key_norm:
        q, k = (_head_norm(x, gain, config) for x, gain in ((q, attention.query_gain), (k, attention.key_gain)))
    if config.position == "rotary":
        positions = jnp.broadcast_to(places.query, (batch, length)).reshape(-1)
        q, k = (
            filter.rotate(
                x,
                positions,
                config.rotated_width,
                config.rotary_base,
                config.rotary_interleaved,
                config.rotary_scaling,
            )
            for x in (q, k)
        )
    q, k, v = (x.reshape(batch, length, *x.shape[1:]) for x in (q, k, v))
    return q, k, v


def _head_norm(
    x: Float[Array, "rows head head_width"], gain: Float[Array, " head_width"], config: ModelConfig
) -> Float[Array, "rows head head_width"]:
    """Root-mean-square norm of each head by itself; all heads share the gain."""
    centered = filter.center(x.reshape(-1, x.shape[-1]), "rms")
    scale = filter.norm_scale(centered, "rms", config.norm_epsilon)
    return filter.normalize(centered, scale, gain).astype(x.dtype).reshape(x.shape)


def _feed_forward(passed: LayerWalk, weights: Layer, config: ModelConfig, edit: LayerWalk) -> LayerWalk:
    """The position-wise half of a layer, from ``resid_mid`` (or, in parallel layers, from the layer's start)."""
    source = passed.resid_pre if config.parallel else passed.resid_mid
    batch, length, _ = source.shape
    scale, stream = None, source
    if config.pre_norm:
        scale, stream = apply_norm(source, weights.feed_forward_norm, config, edit.feed_forward_norm_scale)
    w: FeedForwardParameters = weights.feed_forward

    def positions(rows: Float[Array, "rows any"]) -> Float[Array, "batch position any"]:
        return rows.reshape(batch, length, -1)

    rows = as_rows(stream)
    pre = apply(edit.pre, positions(filter.linear(rows, w.into, w.into_bias)))
    gated = None
    if w.gate is not None:
        gated = apply(edit.gated, positions(filter.linear(rows, w.gate, w.gate_bias)))
    post = filter.activate(as_rows(pre), config.feed_forward, None if gated is None else as_rows(gated))  # type: ignore[arg-type]
    post = apply(edit.post, positions(post))
    step = apply(edit.feed_forward_step, positions(filter.linear(as_rows(post), w.out, w.out_bias)))

    resid_post = _residual(passed.resid_mid, step) if config.residual else step
    if config.post_norm:
        scale, resid_post = apply_norm(resid_post, weights.feed_forward_norm, config, edit.feed_forward_norm_scale)
    return dataclasses.replace(
        passed,
        feed_forward_norm_scale=scale,
        pre=pre,
        gated=gated,
        post=post,
        feed_forward_step=step,
        resid_post=apply(edit.resid_post, resid_post),
    )


def apply_norm(
    stream: Stream, weights: Norm, config: ModelConfig, change: Change | None
) -> tuple[Float[Array, "batch position"], Stream]:
    """The norm's scale, edited, and the stream divided by it."""
    centered = filter.center(as_rows(stream), config.norm)
    scale = filter.norm_scale(centered, config.norm, config.norm_epsilon).reshape(stream.shape[:2])
    scale = apply(change, scale)
    out = filter.normalize(centered, scale.reshape(-1), weights.gain, weights.offset)
    return scale, out.astype(stream.dtype).reshape(stream.shape)


def _residual(stream: Stream, step: Stream) -> Stream:
    """The residual addition, on rows: what follows reads rows, and XLA then shares the sum with it."""
    return aggregate.add(as_rows(stream), as_rows(step)).reshape(stream.shape)


def as_rows(stream: Float[Array, "batch position any"]) -> Float[Array, "rows any"]:
    """Batch and position as one axis, which is what filters see."""
    return stream.reshape(-1, stream.shape[-1])
