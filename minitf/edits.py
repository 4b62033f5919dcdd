"""Edits that read like what they do. All are :func:`minitf.change` with other numbers.

Everywhere ``shapes`` is a walk of the run to be edited, or its shapes (``jax.eval_shape``), ``name`` a leaf such
as ``"layers.z"``, and ``**index`` the places on the leaf's named axes (``layer=1, head=[0, 3]``); axes that are
not named are meant whole. What cannot be is a ValueError, as in ``change``. Edits of different leaves, or two
after another, are joined by ``minitf.compose``.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from minitf.changes import change, compose, layers_on
from minitf.walk import Edit, Walk, get, leaf_axes, put


def ablate(shapes: Walk, name: str, **index: Any) -> Edit:
    """Zero there: zero ablation, a head knock-out, a step that is not taken."""
    return change(shapes, name, keep=0.0, put=0.0, **index)


def scale(shapes: Walk, name: str, factor: float | Float[Array, ""], **index: Any) -> Edit:
    """The leaf times ``factor`` there."""
    return change(shapes, name, keep=factor, **index)


def set_to(shapes: Walk, name: str, value: Any, **index: Any) -> Edit:
    """``value`` there, a number or an array that broadcasts to the chosen part: any association, any scale."""
    return change(shapes, name, keep=0.0, put=value, **index)


def patch(shapes: Walk, name: str, source: Walk, **index: Any) -> Edit:
    """What ``source`` has there: activation patching."""
    return _by_layer(shapes, name, index, lambda index: set_to(shapes, name, _part(source, name, index), **index))


def mean_ablate(shapes: Walk, name: str, data: Walk, **index: Any) -> Edit:
    """The mean there over the batch of ``data``, a walk of many inputs of the same length.

    The mean is position by position: what a place holds on average, whatever the input.
    """
    axes = leaf_axes()[name] if get(data, name) is not None else ()
    if "batch" not in axes:
        raise ValueError(f"{name!r} has no batch to take a mean over")
    if "batch" in index:
        raise ValueError("a mean over the batch is put into the whole batch; leave batch out")

    def mean(index: dict[str, Any]) -> Edit:
        batch = [axis for axis in axes if not _is_single(index.get(axis, slice(None)))].index("batch")
        return set_to(shapes, name, jnp.mean(_part(data, name, index), axis=batch, keepdims=True), **index)

    return _by_layer(shapes, name, index, mean)


def resample(shapes: Walk, name: str, data: Walk, key: Key[Array, ""], **index: Any) -> Edit:
    """What another sequence of ``data`` has there: for each its own, drawn at random, and never itself.

    The sequences are led around one random circle, so each is also given away once.

    Raises:
        ValueError: as ``patch``; the leaf has no batch, or ``data`` has one sequence only.
    """
    axes = leaf_axes()[name] if get(data, name) is not None else ()
    if "batch" not in axes or "batch" in index:
        raise ValueError(
            f"{name!r} is resampled over its whole batch; it has the axes {', '.join(axes) or 'none'}"
        )
    value = get(data, name)
    # Each layer's own, where they differ, has no layer axis.
    batch = axes.index("batch") - isinstance(value, tuple)
    sequences = jax.tree.leaves(value)[0].shape[batch]
    if sequences < 2:
        raise ValueError(f"there is {sequences} sequence; another one is drawn from at least 2")
    order = around_a_circle(key, sequences)
    drawn = jax.tree.map(lambda x: jnp.take(x, order, axis=batch), value)
    return patch(shapes, name, put(data, name, drawn), **index)


def around_a_circle(key: Key[Array, ""], count: int) -> Int[Array, " count"]:
    """A random order of ``count`` things, in which none keeps its place: each is given the next on one circle."""
    circle = jax.random.permutation(key, count)
    return jnp.zeros_like(circle).at[circle].set(jnp.roll(circle, 1))


def freeze_association(shapes: Walk, source: Walk, **index: Any) -> Edit:
    """The association of ``source``: which positions are mixed no longer depends on the data."""
    return patch(shapes, "layers.pattern", source, **index)


def steer(
    shapes: Walk,
    vector: Float[Array, " width"],
    *,
    layer: int,
    coefficient: Any = 1.0,
    name: str = "layers.resid_post",
    position: Any = None,
) -> Edit:
    """``coefficient * vector`` added at one layer, for every sequence; the coefficient may be traced.

    Without ``position`` it is added everywhere, in runs of any length and while decoding; with one (an index,
    slice, list or mask) the edit is of the length of ``shapes``.

    Raises:
        ValueError: the leaf is no point or step of a layer's residual stream, or vector or places do not fit.
    """
    like = get(shapes, name)
    if like is None or leaf_axes()[name] != ("layer", "batch", "position", "width"):
        raise ValueError(f"steering adds to a layer's point or step, such as 'layers.resid_post', not to {name!r}")
    layers, _, length, width = like.shape
    if jnp.shape(vector) != (width,):
        raise ValueError(f"the vector has the shape {jnp.shape(vector)}; it must be ({width},)")
    # The same for every sequence (and every position), so the edit has one.
    sizes = (layers, 1, 1 if position is None else length, width)
    one = put(Walk(), name, jax.ShapeDtypeStruct(sizes, like.dtype))
    where = slice(None) if position is None else position
    return change(one, name, put=coefficient * jnp.asarray(vector), layer=layer, position=where)


def _is_single(chosen: Any) -> bool:
    return not isinstance(chosen, slice) and jnp.ndim(chosen) == 0


def _by_layer(shapes: Walk, name: str, index: dict[str, Any], make: Callable[[dict[str, Any]], Edit]) -> Edit:
    """The edit that ``make`` makes at these places; where layers differ, of each that has the leaf."""
    like, chosen = get(shapes, name), index.get("layer")
    if not isinstance(like, tuple) or (chosen is not None and _is_single(chosen)):
        return make(index)
    numbers = [number for number, x in enumerate(like) if x is not None]
    if chosen is not None:
        numbers = layers_on(name, len(like), chosen).tolist()
    return functools.reduce(compose, [make({**index, "layer": number}) for number in numbers], Edit())


def _part(walk: Walk, name: str, index: dict[str, Any]) -> Array:
    """The chosen part of a leaf; axes with a single index are gone."""
    leaf, axes = get(walk, name), leaf_axes()[name]
    if isinstance(leaf, tuple):
        if "layer" not in index or not _is_single(index["layer"]):
            raise ValueError(
                f"the layers to read from differ in {name!r}, and those to be edited do not: choose one"
            )
        leaf, axes = leaf[int(layers_on(name, len(leaf), index["layer"]))], axes[1:]
    if leaf is None:
        raise ValueError(f"the walk to read from has no {name!r}")
    # One axis after another, so that several lists choose every combination.
    for axis in reversed(range(leaf.ndim)):
        chosen = index.get(axes[axis])
        if chosen is not None:
            leaf = leaf[(slice(None),) * axis + (chosen if isinstance(chosen, slice) else jnp.asarray(chosen),)]
    return leaf
