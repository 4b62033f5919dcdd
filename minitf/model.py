"""The forward pass, which returns the walk."""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from minitf import aggregate, filter
from minitf.changes import apply
from minitf.config import ModelConfig
from minitf.declaration import check_fit
from minitf.layer import Stream, apply_norm, as_rows, mixer_of, one_layer
from minitf.parameters import Layer, Parameters
from minitf.places import Cache, Places, places_after, places_from_start, together
from minitf.walk import Change, Edit, LayerWalk, Walk, at_layer, by_layer, leaves, put


def walk(
    parameters: Parameters,
    tokens: Int[Array, "batch position"],
    config: ModelConfig,
    *,
    edit: Edit | None = None,
    valid: Bool[Array, "batch position"] | None = None,
    association: bool = True,
    unroll: int | bool = 1,
    rematerialize: bool = False,
    sharding: Any = None,
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
        association: False leaves scores and patterns out of the walk, so that a kernel that never stores them can
            run where there is one: cuDNN's, on a GPU in half precision, and on one CPU
            :mod:`minitf.attend_in_cache`; they have no forward-mode derivative. Elsewhere values are mixed before
            they are divided. All are faster to train, and the same up to rounding.
        unroll: layers per iteration of the scan; ``True`` unrolls all of them, so that XLA can also drop the
            layers after the last one that is used.
        rematerialize: under ``grad``, keep only where each layer starts and compute the rest again on the way
            back: less memory, about a third more time.
        sharding: of the residual stream ``[batch, position, width]``, on several devices: divided as the batch is,
            weights come to where they are used, and not the stream to them. (Without it XLA decides.)

    Raises:
        ValueError: the sequence is longer than ``config.length``, an id is outside the vocabulary (where they can
            be looked at), or the parameters, an edit or ``valid`` do not fit the model or the tokens.
    """
    check_tokens(tokens, config)
    length = tokens.shape[1]
    if length > config.length:
        raise ValueError(f"{length} tokens are more than the model's length of {config.length}")
    if valid is not None and jnp.shape(valid) != tokens.shape:
        raise ValueError(f"valid has the shape {jnp.shape(valid)}; the tokens it is of have {tokens.shape}")
    edit = fit_edit(edit or Edit(), config, association)
    places = places_from_start(length, config, valid, association)
    return _walk(
        parameters,
        tokens,
        edit,
        places,
        config=config,
        unroll=unroll,
        rematerialize=rematerialize,
        sharding=sharding,
    )[0]


def walk_on(
    parameters: Parameters,
    tokens: Int[Array, "batch position"],
    cache: Cache,
    config: ModelConfig,
    *,
    edit: Edit | None = None,
    counts: Bool[Array, "batch position"] | None = None,
    unroll: int | bool = 1,
) -> tuple[Walk, Cache]:
    """The walk of the tokens that follow those in the cache, and the cache with them.

    Args:
        parameters, tokens, config, unroll: as :func:`walk`.
        cache: as :func:`minitf.decode.empty_cache` makes it. Positions beyond its last slot are lost: make room.
        edit: its position axis is that of these tokens. Of softmax attention, ``layers.k`` and ``layers.v`` have
            all slots: an edit of them with as many positions changes what is seen now, and not what the cache
            keeps; any other changes what these tokens add to it. A recurrent mixer's association is never made
            here, and cannot be edited.
        counts: False for tokens that only fill up shorter sequences, after their end; all count by default.

    Raises:
        ValueError: the model is not causal, or tokens, parameters or an edit do not fit it.
    """
    if not config.causal:
        raise ValueError("a cache is for causal models: in this one earlier positions see later ones")
    check_tokens(tokens, config)
    edit = fit_edit(edit or Edit(), config)
    places = places_after(cache, tokens.shape[1], config, counts=counts)
    walked, states = _walk(parameters, tokens, edit, places, cache.states, config=config, unroll=unroll)
    added = tokens.shape[1] if counts is None else jnp.sum(counts, axis=1, dtype=jnp.int32)
    return walked, dataclasses.replace(cache, states=states, filled=cache.filled + added)


# Called outside of any jit, it is compiled once, and not its scan anew in every call; inside, it is as if written
# there.
@partial(jax.jit, static_argnames=("config", "unroll", "rematerialize", "sharding"), inline=True)
def _walk(
    parameters: Parameters,
    tokens: Int[Array, "batch position"],
    edit: Edit,
    places: Places,
    states: Any = None,
    *,
    config: ModelConfig,
    unroll: int | bool,
    rematerialize: bool = False,
    sharding: Any = None,
) -> tuple[Walk, Any]:
    check_fit(parameters, config)
    token_embedding, position_embedding, start = _start(parameters, tokens, config, edit, places)
    end, layers, states = run_layers(
        parameters.layers, start, config, edit.layers, places, states, unroll, rematerialize, sharding
    )
    walked = finish(parameters, start, layers, end, config, edit)
    walked = dataclasses.replace(walked, token_embedding=token_embedding, position_embedding=position_embedding)
    return walked, states


def check_tokens(tokens: Any, config: ModelConfig, name: str = "tokens") -> None:
    """Refuse what are no tokens; and, where they can be looked at (not while tracing), ids that there are not.

    Raises ValueError, with ``name`` for what was given.
    """
    if not hasattr(tokens, "shape"):
        raise ValueError(f"{name}: a {type(tokens).__name__}; make it an array: jnp.array(...)")
    if len(tokens.shape) != 2 or 0 in tokens.shape or not jnp.issubdtype(tokens.dtype, jnp.integer):
        raise ValueError(
            f"{name}: {tokens.dtype} of the shape {tokens.shape}; whole numbers are needed, [batch, position], at "
            "least one"
        )
    if isinstance(tokens, jax.core.Tracer) or not getattr(tokens, "is_fully_addressable", True):
        return
    seen = np.asarray(tokens)  # numpy, since under a trace jnp would trace what is known
    wrong = seen[(seen < 0) | (seen >= config.vocabulary)]
    if wrong.size:
        raise ValueError(f"there is no token {wrong[0]}; the vocabulary is 0 to {config.vocabulary - 1}")


@partial(jax.jit, static_argnames=("config", "unroll", "rematerialize", "sharding"), inline=True)
def run_layers(
    weights: Layer | tuple[Layer, ...],
    start: Stream,
    config: ModelConfig,
    edit: LayerWalk,
    places: Places,
    states: Any = None,
    unroll: int | bool = 1,
    rematerialize: bool = False,
    sharding: Any = None,
) -> tuple[Stream, LayerWalk, Any]:
    """As many layers as the weights have, one after another: where they end, their walk, and their states."""

    if isinstance(weights, tuple):
        return _run_split(weights, start, config, edit, places, states, rematerialize, sharding)
    for name, change in leaves(Walk(layers=edit)):
        if isinstance(change, tuple):
            raise ValueError(
                f"the edit of {name!r} is of a model whose layers differ, and this model's are alike: make it "
                "from a walk of this model"
            )

    def layer(stream: Stream, inputs: tuple[Layer, LayerWalk, Any]) -> tuple[Stream, tuple[LayerWalk, Any]]:
        stream = _pinned(stream, sharding)
        passed, state = one_layer(stream, inputs[0], config, inputs[1], places, inputs[2])
        return _pinned(passed.resid_post, sharding), (passed, state)

    # In a loop the two passes share nothing anyway; unrolled, a barrier keeps XLA from sharing what was to be made
    # anew.
    body = jax.checkpoint(layer, prevent_cse=unroll is True or unroll != 1) if rematerialize else layer
    end, (walked, states) = jax.lax.scan(body, start, (weights, edit, states), length=config.layers, unroll=unroll)
    return end, walked, states


def _run_split(
    weights: tuple[Layer, ...],
    stream: Stream,
    config: ModelConfig,
    edit: LayerWalk,
    places: Places,
    states: Any,
    rematerialize: bool,
    sharding: Any,
) -> tuple[Stream, LayerWalk, Any]:
    hybrid = isinstance(config.mixer, tuple)
    walks, after = [], []
    for number, layer in enumerate(weights):
        before = states
        if states is not None:
            before = states[number] if hybrid else jax.tree.map(lambda x: x[number], states)  # noqa: B023
        one = partial(one_layer, config=config.layer(number))
        run = jax.checkpoint(one) if rematerialize else one
        passed, state = run(
            _pinned(stream, sharding), layer, edit=at_layer(edit, number), places=places, past=before
        )
        walks.append(passed)
        after.append(state)
        stream = _pinned(passed.resid_post, sharding)
    return stream, by_layer(walks), together(after, config)


def _pinned(stream: Stream, sharding: Any) -> Stream:
    """The stream, lying where it should."""
    return stream if sharding is None else jax.lax.with_sharding_constraint(stream, sharding)


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


def unembedding_of(parameters: Parameters, config: ModelConfig) -> Parameters:
    """Those parameters that :func:`unembed` reads, and no others."""
    read = ("embedding" if config.tied else "unembedding", "unembedding_bias", "unembedding_transform")
    return Parameters(**{name: getattr(parameters, name) for name in read})


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
    check_edit(edit)
    absent = _absent_leaves(config)
    if not association:
        absent |= {"layers.scores", "layers.pattern"}
    for name, change in list(leaves(edit)):
        if name in absent:
            raise ValueError(f"this model's walk has no {name!r}, so an edit of it would do nothing")
        if not name.startswith("layers."):
            continue
        if isinstance(change, tuple):
            if len(change) != config.layers:
                raise ValueError(f"the edit of {name!r} is of {len(change)} layers; the model has {config.layers}")
            continue
        edit = put(edit, name, jax.tree.map(lambda part, name=name: _by_layer(part, name, config), change))
    return edit


def check_edit(edit: Any) -> None:
    """Raises ValueError for what is no edit: a walk whose leaves are changes, or nothing."""
    how = (
        "minitf.change makes edits, and minitf.edits those that read like what they do: ablate, patch, set_to, ..."
    )
    if not isinstance(edit, Walk):
        raise ValueError(f"edit is a {type(edit).__name__}, and not a walk of changes: {how}")
    for name, leaf in leaves(edit):
        for one in leaf if isinstance(leaf, tuple) else (leaf,):
            if not isinstance(one, Change | None):
                raise ValueError(f"the edit of {name!r} is a {type(one).__name__}, and not a Change: {how}")


def _by_layer(part: Any, name: str, config: ModelConfig) -> Any:
    """A part of a change with an entry for every layer; a number is the same for all."""
    sizes = jnp.shape(part)
    if sizes and sizes[0] != config.layers:
        raise ValueError(
            f"the edit of {name!r} has {sizes[0]} layers on its first axis; the model has {config.layers}"
        )
    return part if sizes else jnp.full(config.layers, part)


def _absent_leaves(config: ModelConfig) -> set[str]:
    """Leaves that no layer of a model of this configuration computes."""
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
    mixers = c.mixer if isinstance(c.mixer, tuple) else (mixer_of(c),)
    mixed = frozenset().union(*(mixer.leaves for mixer in mixers))
    for name in ("q", "k", "scores", "pattern"):
        has[f"layers.{name}"] = name in mixed
    return {name for name, there in has.items() if not there}
