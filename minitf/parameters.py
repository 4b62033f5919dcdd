"""Parameters: the weights of a model as a tree, by name, and its layers stacked or single.

What weights there are, and how they start, says :mod:`minitf.declaration`.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

# An array in parameters, a Declaration in a declaration, None where the model has no such weight.
Weight = Any


@struct.dataclass
class Norm:
    """Gain and offset of a norm, each ``[width]``; l2 has neither, RMSNorm no offset."""

    gain: Weight = None
    offset: Weight = None


@struct.dataclass
class AttentionParameters:
    """``query``, ``key``, ``value`` are ``[width, head, head_width]``, ``output`` ``[head, head_width, width]``.

    ``table`` is ``[head, query_width, key_width]``, the free attention logits Z of a table model, which has no
    other weights. Biases have the shape of what they are added to. ``query_gain`` and ``key_gain`` are
    ``[head_width]``, the gains of the norms of queries and keys.
    """

    query: Weight = None
    key: Weight = None
    value: Weight = None
    output: Weight = None
    query_bias: Weight = None
    key_bias: Weight = None
    value_bias: Weight = None
    output_bias: Weight = None
    query_gain: Weight = None
    key_gain: Weight = None
    table: Weight = None


@struct.dataclass
class FeedForwardParameters:
    """``into`` and ``gate`` are ``[width, hidden]``, ``out`` is ``[hidden, width]``.

    ``into`` feeds the activation; ``gate``, in SwiGLU alone, is the branch that multiplies it.
    """

    into: Weight = None
    gate: Weight = None
    out: Weight = None
    into_bias: Weight = None
    gate_bias: Weight = None
    out_bias: Weight = None


@struct.dataclass
class Layer:
    """One layer; in :class:`Parameters` every leaf has a leading ``layer`` axis.

    ``attention`` holds what the layer mixes positions with: of another mixer than softmax attention, its weights
    by name.
    """

    attention_norm: Norm = Norm()
    attention: Any = AttentionParameters()
    feed_forward_norm: Norm = Norm()
    feed_forward: FeedForwardParameters = FeedForwardParameters()


@struct.dataclass
class Transform:
    """A map ``[width, output_width]`` of the context vectors, and its norm, before the unembedding."""

    weight: Weight = None
    bias: Weight = None
    norm: Norm = Norm()


@struct.dataclass
class Parameters:
    """All weights of a model. ``unembedding`` is ``[width, vocabulary]``, or None when tied.

    ``token_type`` is ``[token_type, width]``; its first vector is added to every position. ``layers`` are stacked
    on a leading axis, or a tuple of single layers (:func:`split_layers`).
    """

    embedding: Weight = None
    position: Weight = None
    token_type: Weight = None
    embedding_norm: Norm = Norm()
    layers: Any = Layer()
    final_norm: Norm = Norm()
    unembedding_transform: Transform = Transform()
    unembedding: Weight = None
    unembedding_bias: Weight = None


def split_layers(parameters: Parameters, most: int | None = None) -> Parameters:
    """The same weights with ``layers`` a tuple of single layers, for :func:`minitf.walk` and decoding.

    A scan copies each layer's weights out of the stack in every pass. Where that counts (few rows, many weights:
    decoding, one short text through a large model) single layers are faster; the program grows with their number.

    Nothing changes where they are single already, or more than ``most``, where that is given.
    """
    if isinstance(parameters.layers, tuple):
        return parameters
    layers = len(jax.tree.leaves(parameters.layers)[0])
    if most is not None and layers > most:
        return parameters
    single = tuple(jax.tree.map(lambda x: x[number], parameters.layers) for number in range(layers))  # noqa: B023
    return dataclasses.replace(parameters, layers=single)


def stack_layers(parameters: Parameters) -> Parameters:
    """The same weights with the layers on one leading axis, which must be alike: what ``split_layers`` undoes."""
    if not isinstance(parameters.layers, tuple):
        return parameters
    return dataclasses.replace(
        parameters, layers=jax.tree.map(lambda *of_each: jnp.stack(of_each), *parameters.layers)
    )


def of_layers(parameters: Parameters, pick: Callable[[Layer], Weight | None]) -> Weight | None:
    """One weight of every layer on a leading axis; zeros where a layer lacks it, None where all do.

    The layers that have it must agree in its shape.
    """
    if not isinstance(parameters.layers, tuple):
        return pick(parameters.layers)
    found = [pick(layer) for layer in parameters.layers]
    present = [weight for weight in found if weight is not None]
    if not present:
        return None
    return jnp.stack([jnp.zeros_like(present[0]) if weight is None else weight for weight in found])


def output_map(layer: Layer) -> tuple[Weight | None, Weight | None]:
    """The map from heads back to the stream, and its bias, where the layer's mixer has them."""
    weights = layer.attention
    if isinstance(weights, dict):
        return weights.get("output"), weights.get("output_bias")
    return weights.output, weights.output_bias


def path_name(path: tuple[Any, ...]) -> str:
    """A weight's name from its place in the tree: ``layers.attention.query``."""
    return ".".join(
        str(getattr(entry, "name", getattr(entry, "key", getattr(entry, "idx", entry)))) for entry in path
    )


def named(parameters: Parameters) -> dict[str, Weight]:
    """The weights by name, flat: what a safetensors file holds."""
    return {path_name(path): value for path, value in jax.tree_util.tree_leaves_with_path(parameters)}
