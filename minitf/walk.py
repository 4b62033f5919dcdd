"""The walk: everything a forward pass computes, as one typed pytree; and edits, which have its shape.

A token starts at its embedding, every sub-layer adds one step, and where the walk ends decides the next token.
What a caller does not use of a walk is removed by XLA; what a caller wants to change goes in as an edit, a
walk whose leaves are :class:`Change` (``x -> keep * x + put``) or None.
"""

import dataclasses
import difflib
import html
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array

# An array in a walk, a Change in an edit, a shape in a description; None where there is none.
Leaf = Any


def leaf(axes: str) -> Leaf:
    """A field of a walk, absent by default, with its axes by name."""
    return struct.field(default=None, metadata={"axes": tuple(axes.split())})


@struct.dataclass
class LayerWalk:
    """One layer's part of the walk; in :class:`Walk` every leaf has a leading ``layer`` axis.

    Where layers mix by different means and a leaf's shape differs, it is a tuple with an entry for each layer,
    None where a layer has none. ``q``, ``k``, ``scores``, ``pattern`` are there where the mixer has such (of a
    state space model q and k are its C and B); ``head`` counts channels where the mixer weighs each by itself.

    The names are the field's. ``q`` and ``k`` are as the scores use them, positions applied; ``scores`` are
    -inf where a query may not look; ``*_step`` is what a sub-layer adds to the residual stream. Where a norm
    follows that addition, or there is no residual, the next station is not the last one plus the step:
    :func:`station_steps` says how the walk moved all the same.
    """

    resid_pre: Leaf = leaf("batch position width")
    attention_norm_scale: Leaf = leaf("batch position")
    q: Leaf = leaf("batch position head head_width")
    k: Leaf = leaf("batch position key_value_head head_width")
    v: Leaf = leaf("batch position key_value_head head_width")
    scores: Leaf = leaf("batch head query key")
    pattern: Leaf = leaf("batch head query key")
    z: Leaf = leaf("batch position head head_width")
    head_steps: Leaf = leaf("batch position head width")
    attention_step: Leaf = leaf("batch position width")
    resid_mid: Leaf = leaf("batch position width")
    feed_forward_norm_scale: Leaf = leaf("batch position")
    pre: Leaf = leaf("batch position hidden")
    gated: Leaf = leaf("batch position hidden")
    post: Leaf = leaf("batch position hidden")
    feed_forward_step: Leaf = leaf("batch position width")
    resid_post: Leaf = leaf("batch position width")


@struct.dataclass
class Walk:
    """The forward pass: the start, every layer's stations and steps, the end, and the logits."""

    token_embedding: Leaf = leaf("batch position width")
    position_embedding: Leaf = leaf("position width")
    start: Leaf = leaf("batch position width")
    layers: LayerWalk = LayerWalk()
    end: Leaf = leaf("batch position width")
    final_norm_scale: Leaf = leaf("batch position")
    context: Leaf = leaf("batch position width")
    logits: Leaf = leaf("batch position vocabulary")

    def __repr__(self) -> str:
        """The leaves that are there, with their axes and sizes."""
        rows = [("leaf", "axes and sizes"), *_rows(self)]
        wide = max(len(name) for name, _ in rows)
        return "\n".join(f"{name:{wide}}  {what}" for name, what in rows)

    def _repr_html_(self) -> str:
        """The same as a table, for notebooks."""
        rows = (f"<tr><td><code>{name}</code></td><td>{html.escape(what)}</td></tr>" for name, what in _rows(self))
        return f"<table><tr><th>leaf</th><th>axes and sizes</th></tr>{''.join(rows)}</table>"


@struct.dataclass
class Change:
    """``x -> keep * x + put`` on one leaf.

    ``keep`` and ``put`` are numbers, or arrays that broadcast against the leaf; in :class:`LayerWalk` their first
    axis is the layer. Where ``keep`` is None, the leaf is ``put``, and what only it came from is not computed.
    """

    keep: Leaf
    put: Leaf


# An edit is a walk of changes. The alias is for readers: a typo in a leaf's name is an error either way.
Edit = Walk


def at_layer(tree: Any, number: int) -> Any:
    """One layer's part of a layers' tree, whose leaves have a layer axis, or, where layers differ, are tuples."""

    def part(x: Any) -> Any:
        return x[number] if isinstance(x, tuple) else jax.tree.map(lambda y: y[number], x)

    return jax.tree.map(part, tree, is_leaf=lambda x: isinstance(x, tuple | Change))


def by_layer(layers: Sequence[LayerWalk]) -> LayerWalk:
    """The layers' walks as one: with a layer axis, or, where they differ in a leaf's shape, a tuple of theirs."""

    def joined(name: str) -> Leaf:
        values = [getattr(layer, name) for layer in layers]
        if all(value is None for value in values):
            return None
        if any(value is None or jnp.shape(value) != jnp.shape(values[0]) for value in values):
            return tuple(values)
        # One layer after another into the whole, so that no more than one is held twice.
        whole = jnp.zeros((len(values), *jnp.shape(values[0])), jnp.asarray(values[0]).dtype)
        for number, value in enumerate(values):
            whole = whole.at[number].set(value)
        return whole

    return LayerWalk(**{field.name: joined(field.name) for field in dataclasses.fields(LayerWalk)})


def with_as_many_heads(value: Leaf, axis: int) -> Array:
    """A leaf of layers that differ in their heads, with zeros after the heads of those that have fewer (or none).

    ``axis`` is that of the heads in one layer's leaf; a leaf of equal layers is returned as it is.
    """
    if not isinstance(value, tuple):
        return value
    return stacked(value, (axis,), 0.0)


def stacked(layers: Sequence[Array | None], axes: Sequence[int], fill: float) -> Array:
    """What each layer has as one array; on these axes, ``fill`` after what those with less (or none) have."""
    present = [x for x in layers if x is not None]
    most = [max(x.shape[axis] for x in present) if axis in axes else n for axis, n in enumerate(present[0].shape)]
    if all(x is not None and all(x.shape[axis] == most[axis] for axis in axes) for x in layers):
        return jnp.stack(present)
    dtype = jnp.result_type(present[0].dtype, fill)

    def padded(x: Array | None) -> Array:
        if x is None:
            return jnp.full(most, fill, dtype)
        rest = [(0, most[axis] - n if axis in axes else 0) for axis, n in enumerate(x.shape)]
        return jnp.pad(x.astype(dtype), rest, constant_values=fill)

    return jnp.stack([padded(x) for x in layers])


def leaf_axes() -> dict[str, tuple[str, ...]]:
    """Every leaf's name and axes: ``{"start": ("batch", "position", "width"), "layers.q": ("layer", ...)}``."""
    axes: dict[str, tuple[str, ...]] = {}
    for outer in dataclasses.fields(Walk):
        if outer.name != "layers":
            axes[outer.name] = outer.metadata["axes"]
            continue
        for inner in dataclasses.fields(LayerWalk):
            axes[f"layers.{inner.name}"] = ("layer", *inner.metadata["axes"])
    return axes


def leaves(walk: Walk) -> Iterator[tuple[str, Leaf]]:
    """Name and value of every leaf that is there, in the order of the forward pass."""
    for name in leaf_axes():
        value = get(walk, name)
        if value is not None:
            yield name, value


def get(walk: Walk, name: str) -> Leaf:
    """The leaf of that name, such as ``"logits"`` or ``"layers.pattern"``."""
    if name not in leaf_axes():
        near = difflib.get_close_matches(f"layers.{name.removeprefix('layers.')}", leaf_axes(), 1)
        near = difflib.get_close_matches(name, leaf_axes(), 1, cutoff=0.8) or near
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"a walk has no leaf {name!r}; it has {', '.join(leaf_axes())}{hint}")
    return getattr(walk.layers, name[7:]) if name.startswith("layers.") else getattr(walk, name)


def put(walk: Walk, name: str, value: Leaf) -> Walk:
    """The same walk (or edit) with one leaf replaced."""
    get(walk, name)
    if name.startswith("layers."):
        return dataclasses.replace(walk, layers=dataclasses.replace(walk.layers, **{name[7:]: value}))
    return dataclasses.replace(walk, **{name: value})


def station_steps(walk: Walk) -> Array:
    """How the residual stream moved from station to station, ``[station, batch, position, width]``.

    Two moves a layer, attention's and the feed-forward's (zero where there is none). Without post-norms, and
    with a residual, these are the sub-layers' steps; with them they hold the norm's move too. Their sum is
    ``end - start`` in every architecture.
    """
    layers = walk.layers
    attention = layers.resid_mid - layers.resid_pre
    feed_forward = layers.resid_post - layers.resid_mid
    moves = jnp.stack([attention, feed_forward], axis=1)
    return moves.reshape(-1, *moves.shape[2:])


def _rows(walk: Walk) -> list[tuple[str, str]]:
    """Name and content of every leaf: ``layer 2, batch 3, ...``, or what an edit does to it."""

    def content(name: str, value: Leaf) -> str:
        if isinstance(value, Change):
            kept = "nothing" if value.keep is None else jnp.shape(value.keep)
            return f"keep {kept}, put {jnp.shape(value.put)}"
        if isinstance(value, tuple):
            axes = leaf_axes()[name][1:]
            each = ["none" if x is None else _sizes(axes, x) for x in value]
            return f"layer {len(value)}, each its own: {'; '.join(each)}"
        return _sizes(leaf_axes()[name], value)

    return [(name, content(name, value)) for name, value in leaves(walk)]


def _sizes(axes: tuple[str, ...], value: Leaf) -> str:
    if isinstance(value, Change):
        return f"put {jnp.shape(value.put)}"
    shape = jnp.shape(value)
    # Seeds or a sweep come before the leaf's own axes.
    axes = ("",) * (len(shape) - len(axes)) + axes if len(shape) >= len(axes) else ("",) * len(shape)
    sizes = ", ".join(f"{axis} {size}".strip() for axis, size in zip(axes, shape, strict=True))
    return f"{sizes}: {getattr(value, 'dtype', type(value).__name__)}"


@dataclasses.dataclass(frozen=True)
class LeafDescription:
    """What one leaf of a walk will be: known before anything runs."""

    name: str
    axes: tuple[str, ...]
    shape: tuple[int, ...]
    dtype: str
    bytes: int


def describe(forward: Callable[..., Walk], *arguments: Any, **keywords: Any) -> list[LeafDescription]:
    """Every leaf's name, axes, shape and bytes, from shapes alone: no array is made."""
    shapes = jax.eval_shape(forward, *arguments, **keywords)
    found = []
    for name, value in leaves(shapes):
        axes = leaf_axes()[name]
        each = [(name, axes, value)]
        if isinstance(value, tuple):
            each = [(f"{name}[{i}]", axes[1:], x) for i, x in enumerate(value) if x is not None]
        found += [LeafDescription(n, a, x.shape, x.dtype.name, x.size * x.dtype.itemsize) for n, a, x in each]
    return found
