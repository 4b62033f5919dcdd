"""The forward pass, which returns the walk."""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from minitf import aggregate, filter
from minitf.config import ModelConfig
from minitf.layer import (
    Cache,
    Past,
    Places,
    Stream,
    apply_norm,
    as_rows,
    one_layer,
    places_after,
    places_from_start,
)
from minitf.parameters import Layer, Parameters
from minitf.walk import Edit, LayerWalk, Walk, apply, leaves, put


def walk(
    parameters: Parameters,
    tokens: Int[Array, "batch position"],
    config: ModelConfig,
    *,
    edit: Edit | None = None,
    valid: Bool[Array, "batch position"] | None = None,
    cache: Cache | None = None,
    association: bool = True,
    unroll: int | bool = 1,
) -> Walk:
    """Run the model and return everything it computed.

    Under ``jit`` what the caller drops is not computed: ``walk(...).logits`` compiles to a plain forward.

    Args:
        parameters: as ``initialize(config, key)`` makes them; their dtype is the dtype of the computation. Their
            layers are scanned, or, after :func:`minitf.parameters.split_layers`, run one by one.
        tokens: ids below ``config.vocabulary``. Under ``jit`` nobody can look at them, and XLA clamps ids beyond
            it: check data before.
        edit: changes to any leaves, in the order in which the leaves are computed.
        valid: False marks padding, which no query may see.
        cache: keys and values of the positions before; the tokens are then the ones that follow those (see
            :mod:`minitf.decode`), and ``layers.k``, ``layers.v`` of the walk hold the cache with theirs in it.
        association: False leaves scores and patterns out of the walk, so that a kernel that never stores them can
            run where there is one: cuDNN's, on a GPU in half precision. Elsewhere the numbers are the same; what
            is not read is not stored in any case.
        unroll: layers per iteration of the scan; ``True`` unrolls all of them, so that XLA can also drop the
            layers after the last one that is used.

    Raises:
        ValueError: the sequence is longer than ``config.length``, an id is outside the vocabulary (where they can
            be looked at), or an edit does not fit the model.
    """
    length = tokens.shape[1]
    if length > config.length:
        raise ValueError(f"{length} tokens are more than the model's length of {config.length}")
    _check_tokens(tokens, config)
    if cache is not None and (valid is not None or not config.causal):
        raise ValueError("a cache is for causal models and says how long its sequences are: leave valid out")
    edit = fit_edit(edit or Edit(), config, association)
    return _walk(parameters, tokens, edit, valid, cache, config=config, association=association, unroll=unroll)


# Called outside of any jit, it is compiled once, and not its scan anew in every call; inside, it is as if written
# there.
@partial(jax.jit, static_argnames=("config", "association", "unroll"), inline=True)
def _walk(
    parameters: Parameters,
    tokens: Int[Array, "batch position"],
    edit: Edit,
    valid: Bool[Array, "batch position"] | None,
    cache: Cache | None,
    *,
    config: ModelConfig,
    association: bool,
    unroll: int | bool,
) -> Walk:
    length = tokens.shape[1]
    if cache is None:
        places = places_from_start(length, config, valid, association)
    else:
        places = places_after(cache, length, config, association)

    token_embedding, position_embedding, start = _start(parameters, tokens, config, edit, places)

    past = None if cache is None else (cache.k, cache.v)
    end, layers = run_layers(parameters.layers, start, config, edit.layers, places, past, unroll)
    walked = finish(parameters, start, layers, end, config, edit)
    return dataclasses.replace(walked, token_embedding=token_embedding, position_embedding=position_embedding)


def _check_tokens(tokens: Int[Array, "batch position"], config: ModelConfig) -> None:
    """Refuse tokens outside the vocabulary, where they can be looked at: not while tracing."""
    if isinstance(tokens, jax.core.Tracer) or not tokens.size or not getattr(tokens, "is_fully_addressable", True):
        return
    seen = np.asarray(tokens)  # numpy, since under a trace jnp would trace what is known
    wrong = seen[(seen < 0) | (seen >= config.vocabulary)]
    if wrong.size:
        raise ValueError(f"there is no token {wrong[0]}; the vocabulary is 0 to {config.vocabulary - 1}")


@partial(jax.jit, static_argnames=("config", "unroll"), inline=True)
def run_layers(
    weights: Layer | tuple[Layer, ...],
    start: Stream,
    config: ModelConfig,
    edit: LayerWalk,
    places: Places,
    past: Past = None,
    unroll: int | bool = 1,
) -> tuple[Stream, LayerWalk]:
    """As many layers as the weights have, one after another: where they end, and their walk."""

    if isinstance(weights, tuple):
        return _run_split(weights, start, config, edit, places, past)

    def layer(stream: Stream, inputs: tuple[Layer, LayerWalk, Past]) -> tuple[Stream, LayerWalk]:
        passed = one_layer(stream, inputs[0], config, inputs[1], places, inputs[2])
        return passed.resid_post, passed

    return jax.lax.scan(layer, start, (weights, edit, past), length=config.layers, unroll=unroll)


def _run_split(
    weights: tuple[Layer, ...], stream: Stream, config: ModelConfig, edit: LayerWalk, places: Places, past: Past
) -> tuple[Stream, LayerWalk]:
    walks = []
    for number, layer in enumerate(weights):
        mine, before = jax.tree.map(lambda x: x[number], (edit, past))  # noqa: B023 (used at once)
        walks.append(one_layer(stream, layer, config, mine, places, before))
        stream = walks[-1].resid_post
    return stream, jax.tree.map(lambda *leaves: jnp.stack(leaves), *walks)


@partial(jax.jit, static_argnames=("config",), inline=True)
def finish(
    parameters: Parameters, start: Stream, layers: LayerWalk, end: Stream, config: ModelConfig, edit: Edit
) -> Walk:
    """The walk from its end on: the context vectors and the logits."""
    end = apply(edit.end, end)
    scale, context = None, end
    if config.pre_norm:
        scale, context = apply_norm(end, parameters.final_norm, config, edit.final_norm_scale)
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
        rows = filter.linear(as_rows(stream), transform.weight, transform.bias)
        rows = filter.activate(rows, config.feed_forward)  # type: ignore[arg-type]
        _, stream = apply_norm(rows.reshape(stream.shape), transform.norm, config, None)
    logits = filter.unembed(as_rows(stream), table, parameters.unembedding_bias)
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
        _, start = apply_norm(start, parameters.embedding_norm, config, None)
    return token_embedding, position_embedding, apply(edit.start, start)


def fit_edit(edit: Edit, config: ModelConfig, association: bool = True) -> Edit:
    """The edit with an entry for every layer; refused where the model lacks a leaf or has other layers."""
    absent = _absent_leaves(config)
    if not association:
        absent |= {"layers.scores", "layers.pattern"}
    for name, change in list(leaves(edit)):
        if name in absent:
            raise ValueError(f"this model's walk has no {name!r}, so an edit of it would do nothing")
        if not name.startswith("layers."):
            continue
        edit = put(edit, name, jax.tree.map(lambda part, name=name: _by_layer(part, name, config), change))
    return edit


def _by_layer(part: Any, name: str, config: ModelConfig) -> Any:
    """A part of a change with an entry for every layer; a number is the same for all."""
    sizes = jnp.shape(part)
    if sizes and sizes[0] != config.layers:
        raise ValueError(
            f"the edit of {name!r} has {sizes[0]} layers on its first axis; the model has {config.layers}"
        )
    return part if sizes else jnp.full(config.layers, part)


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
