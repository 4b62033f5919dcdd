"""The forward pass, which returns the walk."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from minitf import aggregate, filter
from minitf.config import ModelConfig
from minitf.parameters import FeedForwardParameters, Layer, Norm, Parameters
from minitf.walk import Change, Edit, LayerWalk, Walk, apply, leaves, put

Stream = Float[Array, "batch position width"]
Past = tuple[Array, Array] | None


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
    may not meet; ``goes_on`` says whether positions came before, in a cache.
    """

    query: Any
    forbidden: Any
    goes_on: bool = struct.field(pytree_node=False)


def _places(length: int, config: ModelConfig, valid: Bool[Array, "batch position"] | None) -> Places:
    forbidden = ~aggregate.allowed_pairs(length, config.causal, config.attend_self)[None, None]
    if valid is not None:
        forbidden = forbidden | ~valid[:, None, None, :]
    return Places(jnp.arange(length)[None], forbidden, goes_on=False)


def _places_after(cache: Cache, length: int, config: ModelConfig) -> Places:
    query = cache.filled[:, None] + jnp.arange(length)
    key = jnp.arange(cache.k.shape[2])
    forbidden = (key > query[..., None]) if config.attend_self else (key >= query[..., None])
    return Places(query, forbidden[:, None], goes_on=True)


def walk(
    parameters: Parameters,
    tokens: Int[Array, "batch position"],
    config: ModelConfig,
    *,
    edit: Edit | None = None,
    valid: Bool[Array, "batch position"] | None = None,
    cache: Cache | None = None,
    unroll: int | bool = 1,
) -> Walk:
    """Run the model and return everything it computed.

    Under ``jit`` what the caller drops is not computed: ``walk(...).logits`` compiles to a plain forward.

    Args:
        parameters: as ``initialize(config, key)`` makes them; their dtype is the dtype of the computation.
        tokens: ids below ``config.vocabulary``; ids beyond it are clamped by XLA, so check data before.
        edit: changes to any leaves, in the order in which the leaves are computed.
        valid: False marks padding, which no query may see.
        cache: keys and values of the positions before; the tokens are then the ones that follow those (see
            :mod:`minitf.decode`), and ``layers.k``, ``layers.v`` of the walk hold the cache with theirs in it.
        unroll: layers per iteration of the scan; ``True`` unrolls all of them, so that XLA can also drop the
            layers after the last one that is used.

    Raises:
        ValueError: the sequence is longer than ``config.length``, or an edit does not fit the model.
    """
    length = tokens.shape[1]
    if length > config.length:
        raise ValueError(f"{length} tokens are more than the model's length of {config.length}")
    if cache is not None and (valid is not None or not config.causal):
        raise ValueError("a cache is for causal models and says how long its sequences are: leave valid out")
    edit = _fit_edit(edit or Edit(), config)
    places = _places(length, config, valid) if cache is None else _places_after(cache, length, config)

    token_embedding, position_embedding, start = _start(parameters, tokens, config, edit, places)

    past = None if cache is None else (cache.k, cache.v)
    end, layers = run_layers(parameters.layers, start, config, edit.layers, places, past, unroll)
    walked = finish(parameters, start, layers, end, config, edit)
    return dataclasses.replace(walked, token_embedding=token_embedding, position_embedding=position_embedding)


def run_layers(
    weights: Layer,
    start: Stream,
    config: ModelConfig,
    edit: LayerWalk,
    places: Places,
    past: Past = None,
    unroll: int | bool = 1,
) -> tuple[Stream, LayerWalk]:
    """As many layers as the weights have, one after another: where they end, and their walk."""

    def layer(stream: Stream, inputs: tuple[Layer, LayerWalk, Past]) -> tuple[Stream, LayerWalk]:
        passed = _layer(stream, inputs[0], config, inputs[1], places, inputs[2])
        return passed.resid_post, passed

    return jax.lax.scan(layer, start, (weights, edit, past), length=config.layers, unroll=unroll)


def finish(
    parameters: Parameters, start: Stream, layers: LayerWalk, end: Stream, config: ModelConfig, edit: Edit
) -> Walk:
    """The walk from its end on: the context vectors and the logits."""
    end = apply(edit.end, end)
    scale, context = None, end
    if config.pre_norm:
        scale, context = _norm(end, parameters.final_norm, config, edit.final_norm_scale)
    context = apply(edit.context, context)
    return Walk(
        start=start,
        layers=layers,
        end=end,
        final_norm_scale=scale,
        context=context,
        logits=apply(edit.logits, unembed(parameters, context, config)),
    )


def unembed(
    parameters: Parameters, stream: Stream, config: ModelConfig
) -> Float[Array, "batch position vocabulary"]:
    """Logits of context vectors."""
    table = parameters.embedding.T if config.tied else parameters.unembedding
    batch, position, _ = stream.shape
    if config.unembedding_transform:
        transform = parameters.unembedding_transform
        rows = filter.linear(_rows(stream), transform.weight, transform.bias)
        rows = filter.activate(rows, config.feed_forward)  # type: ignore[arg-type]
        _, stream = _norm(rows.reshape(stream.shape), transform.norm, config, None)
    logits = filter.unembed(_rows(stream), table, parameters.unembedding_bias)
    return logits.reshape(batch, position, config.vocabulary)


def _start(
    parameters: Parameters, tokens: Int[Array, "batch position"], config: ModelConfig, edit: Edit, places: Places
) -> tuple[Stream, Array | None, Stream]:
    """The token vectors, the position vectors, and their sum, where the walk starts."""
    batch, length = tokens.shape
    if config.embedding == "one_hot":
        vectors = jax.nn.one_hot(tokens.reshape(-1), config.width, dtype=parameters.unembedding.dtype)
    else:
        vectors = filter.embed(tokens.reshape(-1), parameters.embedding, config.embedding_scale)
    token_embedding = apply(edit.token_embedding, vectors.reshape(batch, length, config.width))
    position_embedding = None
    start = token_embedding
    if config.position in ("learned", "sinusoidal"):
        table = (
            parameters.position
            if config.position == "learned"
            else jnp.asarray(filter.sinusoidal_positions(config.length, config.width), start.dtype)
        )
        # Slices, not rows by number, where all begin at the first position: that is what a plain forward does.
        table = table[places.query] if places.goes_on else table[:length]
        if config.token_types:
            table = table + parameters.token_type[0]
        position_embedding = apply(edit.position_embedding, table)
        start = aggregate.add(token_embedding, jnp.broadcast_to(position_embedding, start.shape))
    if config.embedding_norm:
        _, start = _norm(start, parameters.embedding_norm, config, None)
    return token_embedding, position_embedding, apply(edit.start, start)


def _layer(
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
        attention_norm_scale, resid_mid = _norm(
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
        scale, stream = _norm(resid_pre, weights.attention_norm, config, edit.attention_norm_scale)
    q, k, v = _query_key_value(stream, weights, config, places)
    q, k, v = apply(edit.q, q), apply(edit.k, k), apply(edit.v, v)
    if past is not None:
        sequence = jnp.arange(batch)[:, None]
        k, v = (kept.at[sequence, places.query].set(new) for kept, new in zip(past, (k, v), strict=True))
    scores = aggregate.score(q, k, 1.0 if config.attention == "table" else config.head_size**-0.5)
    if config.position == "alibi":
        scores = scores + aggregate.alibi_bias(config.heads, places.query, k.shape[1]).astype(scores.dtype)
    scores = jnp.where(places.forbidden, -jnp.inf, apply(edit.scores, scores))
    pattern = apply(edit.pattern, aggregate.associate(scores))
    z = apply(edit.z, aggregate.combine(pattern, v))

    attention = weights.attention
    if config.attention == "table":
        head_steps, step = z, jnp.sum(z, axis=2)
    else:
        # The heads' steps are for the reader of the walk; their sum is one product of all heads at once.
        head_steps = jnp.einsum("bphc,hcw->bphw", z, attention.output)
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


def _query_key_value(
    stream: Stream, weights: Layer, config: ModelConfig, places: Places
) -> tuple[Array, Array, Array]:
    """What the scores compare and what the association mixes, each ``[batch, position, head, head_width]``."""
    batch, length, _ = stream.shape
    rows, attention = _rows(stream), weights.attention

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
        scale, stream = _norm(source, weights.feed_forward_norm, config, edit.feed_forward_norm_scale)
    w: FeedForwardParameters = weights.feed_forward

    def positions(rows: Float[Array, "rows any"]) -> Float[Array, "batch position any"]:
        return rows.reshape(batch, length, -1)

    rows = _rows(stream)
    pre = apply(edit.pre, positions(filter.linear(rows, w.into, w.into_bias)))
    gated = None
    if w.gate is not None:
        gated = apply(edit.gated, positions(filter.linear(rows, w.gate, w.gate_bias)))
    post = filter.activate(_rows(pre), config.feed_forward, None if gated is None else _rows(gated))  # type: ignore[arg-type]
    post = apply(edit.post, positions(post))
    step = apply(edit.feed_forward_step, positions(filter.linear(_rows(post), w.out, w.out_bias)))

    resid_post = _residual(passed.resid_mid, step) if config.residual else step
    if config.post_norm:
        scale, resid_post = _norm(resid_post, weights.feed_forward_norm, config, edit.feed_forward_norm_scale)
    return dataclasses.replace(
        passed,
        feed_forward_norm_scale=scale,
        pre=pre,
        gated=gated,
        post=post,
        feed_forward_step=step,
        resid_post=apply(edit.resid_post, resid_post),
    )


def _norm(
    stream: Stream, weights: Norm, config: ModelConfig, change: Change | None
) -> tuple[Float[Array, "batch position"], Stream]:
    """The norm's scale, edited, and the stream divided by it."""
    centered = filter.center(_rows(stream), config.norm)
    scale = filter.norm_scale(centered, config.norm, config.norm_epsilon).reshape(stream.shape[:2])
    scale = apply(change, scale)
    out = filter.normalize(centered, scale.reshape(-1), weights.gain, weights.offset)
    return scale, out.astype(stream.dtype).reshape(stream.shape)


def _residual(stream: Stream, step: Stream) -> Stream:
    """The residual addition, on rows: what follows reads rows, and XLA then shares the sum with it."""
    return aggregate.add(_rows(stream), _rows(step)).reshape(stream.shape)


def _rows(stream: Float[Array, "batch position any"]) -> Float[Array, "rows any"]:
    return stream.reshape(-1, stream.shape[-1])


def _fit_edit(edit: Edit, config: ModelConfig) -> Edit:
    """The edit with an entry for every layer; refused where the model lacks a leaf or has other layers."""
    absent = _absent_leaves(config)
    for name, change in list(leaves(edit)):
        if name in absent:
            raise ValueError(f"this model's walk has no {name!r}, so an edit of it would do nothing")
        if not name.startswith("layers."):
            continue
        parts = []
        for part in (change.keep, change.put):
            sizes = jnp.shape(part)
            if sizes and sizes[0] != config.layers:
                raise ValueError(
                    f"the edit of {name!r} has {sizes[0]} layers on its first axis; the model has {config.layers}"
                )
            parts.append(part if sizes else jnp.full(config.layers, part))
        edit = put(edit, name, Change(*parts))
    return edit


def _absent_leaves(config: ModelConfig) -> set[str]:
    """Leaves that a model of this configuration does not compute."""
    c = config
    has: dict[str, bool] = {
        "position_embedding": c.position in ("learned", "sinusoidal"),
        "final_norm_scale": c.pre_norm,
        "layers.attention_norm_scale": c.norm != "none",
        "layers.gated": c.feed_forward == "swiglu",
    }
    feed = c.feed_forward != "none"
    for name in ("pre", "gated", "post", "feed_forward_step"):
        has[f"layers.{name}"] = feed and has.get(f"layers.{name}", True)
    has["layers.feed_forward_norm_scale"] = feed and c.norm != "none"
    return {name for name, there in has.items() if not there}
