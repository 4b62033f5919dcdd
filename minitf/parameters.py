"""Parameters: declared once, by named axes and an initializer; made, counted and described from that.

``declare(config)`` is a tree of declarations with the shape of the parameters. Initialization, counting,
checkpoints and sharding read it, so that a weight is described in one place only.
"""

import dataclasses
import math
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Key

from minitf.config import ModelConfig

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
    """One layer; in :class:`Parameters` every leaf has a leading ``layer`` axis."""

    attention_norm: Norm = Norm()
    attention: AttentionParameters = AttentionParameters()
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


Distribution = Literal["zeros", "ones", "normal", "uniform"]


@dataclasses.dataclass(frozen=True)
class Declaration:
    """One weight: its axes by name and size, and how it starts (``scale`` is a deviation or a bound)."""

    axes: tuple[tuple[str, int], ...]
    distribution: Distribution
    scale: float = 0.0

    @property
    def shape(self) -> tuple[int, ...]:
        """Sizes of the axes, in order."""
        return tuple(size for _, size in self.axes)

    def draw(self, key: Key[Array, ""], dtype: Any) -> Array:
        """A fresh value of this weight."""
        if self.distribution == "normal":
            return self.scale * jax.random.normal(key, self.shape, dtype)
        if self.distribution == "uniform":
            return jax.random.uniform(key, self.shape, dtype, -self.scale, self.scale)
        return jnp.full(self.shape, float(self.distribution == "ones"), dtype)


def declare(config: ModelConfig) -> Parameters:
    """The declaration of every weight of a model, in the shape of its :class:`Parameters`."""
    c = config
    size = {
        "layer": c.layers,
        "vocabulary": c.vocabulary,
        "position": c.length,
        "token_type": c.token_types,
        "width": c.width,
        "output_width": c.width,
        "query_width": c.width,
        "key_width": c.width,
        "head": c.heads,
        "key_value_head": c.groups,
        "head_width": c.head_size,
        "hidden": c.hidden_size,
    }

    def axes(names: str) -> tuple[tuple[str, int], ...]:
        return tuple((name, size[name]) for name in names.split())

    def matrix(names: str, inputs: str, output: bool = False) -> Declaration:
        if c.initializer == "zeros":
            return Declaration(axes(names), "zeros")
        if c.initializer == "fan_in":
            fan_in = math.prod(size[name] for name in inputs.split())
            return Declaration(axes(names), "uniform", 1.0 / math.sqrt(fan_in))
        return Declaration(axes(names), "normal", 0.02 / math.sqrt(2 * c.layers) if output else 0.02)

    def bias(names: str, present: bool = c.biases) -> Declaration | None:
        return Declaration(axes(names), "zeros") if present else None

    def norm(names: str, present: bool) -> Norm:
        if not present or c.norm in ("none", "l2"):
            return Norm()
        offset = Declaration(axes(names), "zeros") if c.norm == "layer" else None
        return Norm(gain=Declaration(axes(names), "ones"), offset=offset)

    def gain(names: str, present: bool) -> Declaration | None:
        return Declaration(axes(names), "ones") if present else None

    inner_biases = c.biases or c.query_key_value_biases
    if c.attention == "table":
        attention = AttentionParameters(table=matrix("layer head query_width key_width", "key_width"))
    else:
        attention = AttentionParameters(
            query=matrix("layer width head head_width", "width"),
            key=matrix("layer width key_value_head head_width", "width"),
            value=matrix("layer width key_value_head head_width", "width"),
            output=matrix("layer head head_width width", "head head_width", output=True),
            query_bias=bias("layer head head_width", inner_biases),
            key_bias=bias("layer key_value_head head_width", inner_biases),
            value_bias=bias("layer key_value_head head_width", inner_biases),
            output_bias=bias("layer width"),
            query_gain=gain("layer head_width", c.query_key_norm),
            key_gain=gain("layer head_width", c.query_key_norm),
        )
    feed_forward = FeedForwardParameters()
    if c.feed_forward != "none":
        gated = c.feed_forward == "swiglu"
        feed_forward = FeedForwardParameters(
            into=matrix("layer width hidden", "width"),
            gate=matrix("layer width hidden", "width") if gated else None,
            out=matrix("layer hidden width", "hidden", output=True),
            into_bias=bias("layer hidden"),
            gate_bias=bias("layer hidden", c.biases and gated),
            out_bias=bias("layer width"),
        )
    return Parameters(
        embedding=matrix("vocabulary width", "width") if c.embedding == "learned" else None,
        position=matrix("position width", "width") if c.position == "learned" else None,
        token_type=matrix("token_type width", "width") if c.token_types else None,
        embedding_norm=norm("width", c.embedding_norm),
        layers=Layer(
            attention_norm=norm("layer width", True),
            attention=attention,
            feed_forward_norm=norm("layer width", c.feed_forward != "none"),
            feed_forward=feed_forward,
        ),
        final_norm=norm("width", c.pre_norm),
        unembedding_transform=Transform(
            weight=matrix("width output_width", "width"),
            bias=bias("output_width"),
            norm=norm("output_width", True),
        )
        if c.unembedding_transform
        else Transform(),
        unembedding=None if c.tied else matrix("width vocabulary", "width"),
        unembedding_bias=bias("vocabulary", c.unembedding_bias),
    )


def _is_declaration(x: Any) -> bool:
    return isinstance(x, Declaration)


def initialize(config: ModelConfig, key: Key[Array, ""], dtype: Any = jnp.float32) -> Parameters:
    """Fresh parameters. Each weight draws from ``fold_in(key, its number)``, so none depends on another."""
    declarations, tree = jax.tree.flatten(declare(config), is_leaf=_is_declaration)
    return jax.tree.unflatten(
        tree, [d.draw(jax.random.fold_in(key, i), dtype) for i, d in enumerate(declarations)]
    )


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


def count(config: ModelConfig) -> int:
    """Number of parameters."""
    return sum(math.prod(d.shape) for d in jax.tree.leaves(declare(config), is_leaf=_is_declaration))


def path_name(path: tuple[Any, ...]) -> str:
    """A weight's name from its place in the tree: ``layers.attention.query``."""
    return ".".join(str(getattr(entry, "name", entry)) for entry in path)


def named(parameters: Parameters) -> dict[str, Weight]:
    """The weights by name, flat: what a safetensors file holds."""
    return {path_name(path): value for path, value in jax.tree_util.tree_leaves_with_path(parameters)}
