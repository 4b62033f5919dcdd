"""The forward pass from a layer on: what an edit at that layer can change, without the layers before it."""

from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from minitf.changes import apply
from minitf.config import ModelConfig
from minitf.layer import Stream, mixer_of, one_layer
from minitf.mixers.softmax import Softmax
from minitf.model import finish, fit_edit, run_layers
from minitf.parameters import Layer, Parameters
from minitf.places import Places, places_from_start
from minitf.walk import Edit, LayerWalk, Walk

# Leaves of a layer that its keys and values come from, or are: what all positions read.
BEFORE_KEYS = ("resid_pre", "attention_norm_scale", "k", "v")


def walk_from(
    parameters: Parameters,
    stream: Float[Array, "batch position width"],
    config: ModelConfig,
    layer: int,
    *,
    edit: Edit | None = None,
    valid: Bool[Array, "batch position"] | None = None,
    unroll: int | bool = 1,
) -> Walk:
    """Run layers ``layer``.. from their start, and return the walk of those layers.

    From ``walk(...).layers.resid_pre[layer]`` it is the rest of that walk: ``start`` is the stream, and
    ``layers`` holds the layers that ran. Under ``jit`` what the caller drops is not computed.

    Args:
        parameters: of the whole model.
        layer: the first layer that runs; ``config.layers`` runs the end alone.
        edit: changes, sized by the layers that run (its layer 0 is ``layer``).
        valid, unroll: as :func:`minitf.walk`.

    Raises:
        ValueError: there is no such layer, or an edit does not fit the layers that run.
    """
    if not 0 <= layer <= config.layers:
        raise ValueError(
            f"the walk cannot go on from layer {layer}; this model has layers 0 to {config.layers - 1}"
        )
    _check_stream(stream, config)
    edit, layers = edit or Edit(), LayerWalk()
    if edit.token_embedding is not None or edit.position_embedding is not None:
        raise ValueError("a resumed walk has no embeddings to edit; edit its start")
    if layer < config.layers:
        rest = config.from_layer(layer)
        edit = fit_edit(edit, rest)
    elif jax.tree.leaves(edit.layers):
        raise ValueError("no layer is left to run, so none can be edited")
    start = end = apply(edit.start, stream)
    if layer < config.layers:
        split = isinstance(parameters.layers, tuple)
        weights = parameters.layers[layer:] if split else jax.tree.map(lambda x: x[layer:], parameters.layers)
        places = places_from_start(stream.shape[1], config, valid)
        end, layers, _ = run_layers(weights, start, rest, edit.layers, places, unroll=unroll)
    return finish(parameters, start, layers, end, config, edit)


def layer_walk(
    parameters: Parameters,
    stream: Float[Array, "batch position width"],
    config: ModelConfig,
    layer: int | Int[Array, ""],
    *,
    edit: LayerWalk | None = None,
    valid: Bool[Array, "batch position"] | None = None,
) -> LayerWalk:
    """Run one layer alone; its walk, and the edit, have no ``layer`` axis. A traced ``layer`` serves for sweeps.

    Raises ValueError for a layer that does not exist.
    """
    if isinstance(layer, int) and not 0 <= layer < config.layers:
        raise ValueError(f"there is no layer {layer}; this model has layers 0 to {config.layers - 1}")
    _check_stream(stream, config)
    places = places_from_start(stream.shape[1], config, valid)
    weights = _weights(parameters, layer)
    return one_layer(stream, weights, _config(config, layer), edit or LayerWalk(), places)[0]


def _weights(parameters: Parameters, layer: int | Int[Array, ""]) -> Layer:
    """One layer's; of single layers only a known number can be chosen."""
    if isinstance(parameters.layers, tuple):
        return parameters.layers[int(layer)]
    if not isinstance(layer, jax.Array):
        return jax.tree.map(lambda x: x[layer], parameters.layers)
    # A traced number is known to be of a layer: indexing with it would ask of every weight whether it is negative.
    of_layer = partial(
        jax.lax.dynamic_index_in_dim, index=layer, axis=0, keepdims=False, allow_negative_indices=False
    )
    return jax.tree.map(of_layer, parameters.layers)


def _config(config: ModelConfig, layer: int | Int[Array, ""]) -> ModelConfig:
    return config.layer(int(layer)) if isinstance(config.mixer, tuple) else config


def run_between(
    parameters: Parameters,
    stream: Float[Array, "batch position width"],
    config: ModelConfig,
    layer: int | Int[Array, ""],
    to: int,
    *,
    valid: Bool[Array, "batch position"] | None = None,
) -> Float[Array, "batch position width"]:
    """The start of layer ``to``, from the start of an earlier one; no more of the walk is kept.

    Takes one layer after another by its number, traced or not, as :func:`layer_walk` does.
    """

    def one(number: int | Int[Array, ""], stream: Stream) -> Stream:
        return layer_walk(parameters, stream, config, number, valid=valid).resid_post

    if isinstance(parameters.layers, tuple):
        for number in range(int(layer), to):
            stream = one(number, stream)
        return stream
    return jax.lax.fori_loop(layer, to, one, stream)


def end_from(
    parameters: Parameters,
    stream: Float[Array, "batch position width"],
    config: ModelConfig,
    layer: int | Int[Array, ""],
    *,
    valid: Bool[Array, "batch position"] | None = None,
    at: Sequence[int] | None = None,
) -> Float[Array, "batch place width"]:
    """The end of the walk from the start of ``layer`` on, unedited.

    ``layer`` may be traced: one program serves for every layer of a sweep, and runs only the layers that are left.
    It cannot be differentiated by reverse mode then; :func:`walk_from` can.

    Args:
        parameters, stream, config, layer, valid: as :func:`walk_from`.
        at: the positions to return, all by default. The last layer then reads keys and values of all positions,
            but takes its steps at these alone.

    Raises:
        ValueError: a stream that does not fit, or a position that it does not have.
    """
    _check_stream(stream, config)
    run = lambda to, stream: run_between(parameters, stream, config, layer, to, valid=valid)
    if at is None:
        return run(config.layers, stream)
    last = config.layers - 1
    if not ends_at_some(config):
        return run(config.layers, stream)[:, _positions(stream, at)]
    stream = run(last, stream)
    places = _positions(stream, at)
    take = lambda stream: stream[:, places]
    finish_at = lambda stream: last_layer_at(parameters, stream, config, at, valid=valid).resid_post
    if isinstance(layer, int):
        return take(stream) if layer > last else finish_at(stream)
    return jax.lax.cond(layer > last, take, finish_at, stream)


def ends_at_some(config: ModelConfig) -> bool:
    """Whether the last layer can be run at some positions alone, as :func:`last_layer_at` does."""
    return isinstance(mixer_of(config.layer(config.layers - 1)), Softmax)


def last_layer_at(
    parameters: Parameters,
    stream: Float[Array, "batch position width"],
    config: ModelConfig,
    at: Sequence[int],
    *,
    edit: LayerWalk | None = None,
    valid: Bool[Array, "batch position"] | None = None,
) -> LayerWalk:
    """The last layer's walk at some positions: a step of decoding whose cache holds all the others.

    ``k`` and ``v`` are of all positions; other leaves, and the edit, have those of ``at`` alone. Raises ValueError
    as :func:`end_from`, and for an edit of what keys and values come from.
    """
    places = _positions(stream, at)
    edit = edit or LayerWalk()
    for name in BEFORE_KEYS:
        if getattr(edit, name) is not None:
            raise ValueError(f"an edit of {name!r} changes what all positions read; run the whole layer")
    last = config.layer(config.layers - 1)
    if not ends_at_some(config):
        raise ValueError("only softmax attention takes some queries alone; run the whole layer")
    weights = _weights(parameters, config.layers - 1)
    whole = places_from_start(stream.shape[1], config, valid)
    read, _ = one_layer(stream, weights, last, LayerWalk(), whole)
    some = Places(jnp.asarray(places)[None], whole.forbidden[:, :, places], goes_on=True)
    return one_layer(stream[:, places], weights, last, edit, some, (read.k, read.v))[0]


def _positions(stream: Stream, at: Sequence[int]) -> Int[np.ndarray, " place"]:
    length = stream.shape[1]
    if not all(-length <= i < length for i in at):
        raise ValueError(f"at={list(at)} leaves the {length} positions of the stream")
    return np.arange(length)[np.asarray(at, int)]


def _check_stream(stream: Stream, config: ModelConfig) -> None:
    length, width = stream.shape[1:]
    if width != config.width:
        raise ValueError(f"the stream is {width} wide; this model's is {config.width}")
    if length > config.length:
        raise ValueError(f"{length} positions are more than the model's length of {config.length}")
