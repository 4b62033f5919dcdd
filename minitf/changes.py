"""Changes of a walk's leaves, as data (``x -> keep * x + put``): made at named places, applied, joined.

Ablating, patching, steering and freezing attention are such, and a sweep over a thousand is one ``vmap``.
"""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from minitf.walk import Change, Edit, LayerWalk, Leaf, Walk, get, leaf_axes, put


def apply(change: Change | None, x: Array) -> Array:
    """The edited value of one leaf. Raises ValueError where the change does not fit the leaf's shape."""
    if change is None:
        return x
    for part in map(jnp.shape, jax.tree.leaves(change)):
        if not _broadcasts(part, x.shape):
            raise ValueError(f"a change of shape {part} does not fit a leaf of shape {x.shape}")
    if change.keep is None:
        return jnp.broadcast_to(jnp.asarray(change.put, x.dtype), x.shape)
    return jnp.asarray(change.keep, x.dtype) * x + jnp.asarray(change.put, x.dtype)


def fits(change: Change | None, x: Array) -> bool:
    """Whether a change can be applied to such a leaf."""
    return all(_broadcasts(jnp.shape(part), x.shape) for part in jax.tree.leaves(change))


def _broadcasts(part: tuple[int, ...], whole: tuple[int, ...]) -> bool:
    """Whether an array of the one shape broadcasts to the other."""
    return len(part) <= len(whole) and all(n in (1, m) for n, m in zip(part[::-1], whole[::-1], strict=False))


def change(shapes: Walk, name: str, *, keep: Any = 1.0, put: Any = -0.0, **index: Any) -> Edit:
    """An edit of one leaf, at some places on its named axes, everywhere on the others.

    Args:
        shapes: a walk of arrays or of shapes (``jax.eval_shape`` of the forward pass) to size the edit.
        name: the leaf, such as ``"layers.z"``.
        keep, put: scalars or arrays that broadcast to the chosen part of the leaf.
        **index: axis name = an index, slice, list or boolean mask on that axis, such as ``layer=2, head=[0, 3]``;
            several choose every combination. A traced index serves for sweeps and cannot be checked.

    ``change(shapes, "layers.pattern", layer=1, head=0, keep=0.0, put=uniform)`` replaces one head's
    association. The default ``put`` is minus zero, the one number that leaves every float's bits as they are.

    Raises:
        ValueError: the leaf or the axis does not exist, or the index lies outside it.
    """
    like = get(shapes, name)
    if like is None:
        raise ValueError(f"this model's walk has no {name!r}, so it cannot be edited")
    axes = leaf_axes()[name]
    for axis in index:
        if axis not in axes:
            raise ValueError(f"{name!r} has no axis {axis!r}; its axes are {', '.join(axes)}")
    if isinstance(like, tuple):
        return put_change(name, _change_by_layer(like, name, keep, put, index))
    # What is not known yet is no list of places: all are taken, and what the mask leaves out stays.
    masks = {axis: chosen for axis, chosen in index.items() if _is_traced_mask(chosen)}
    if masks:
        every = {axis: slice(None) if axis in masks else chosen for axis, chosen in index.items()}
        made = change(shapes, name, keep=keep, put=put, **every)
        return put_change(name, _masked(get(made, name), masks, name, axes, like.shape))
    spreads = any(np.ndim(x) > 0 for x in (keep, put))
    shape = tuple(
        size if spreads or axis in index or axis == "layer" else 1
        for axis, size in zip(axes, like.shape, strict=True)
    )
    places = [
        _places(name, axis, full, size, index.get(axis, slice(None)))
        for axis, full, size in zip(axes, like.shape, shape, strict=True)
    ]
    chosen = tuple(np.size(p) for p in places if np.ndim(p))
    for what, value in (("keep", keep), ("put", put)):
        given = np.shape(value)
        if not _broadcasts(given, chosen):
            raise ValueError(f"{what} has the shape {given}; the chosen part of {name!r} has {chosen}")
    return put_change(name, _placed(tuple(places), keep, put, shape, like.dtype))


def _is_traced_mask(chosen: Any) -> bool:
    return isinstance(chosen, jax.core.Tracer) and jnp.issubdtype(chosen.dtype, jnp.bool_)


def _masked(
    made: Change, masks: dict[str, Array], name: str, axes: tuple[str, ...], shape: tuple[int, ...]
) -> Change:
    """The change, where all of the masks say so. Raises ValueError for a mask of another size than its axis."""
    for axis, mask in masks.items():
        place = axes.index(axis)
        if mask.shape != (shape[place],):
            raise ValueError(
                f"the mask of {axis} has the shape {mask.shape}; {name!r} has {shape[place]} on that axis"
            )
        along = mask.reshape([-1 if i == place else 1 for i in range(len(axes))])
        made = Change(jnp.where(along, made.keep, 1), jnp.where(along, made.put, -0.0))
    return made


# One program, which serves for other places and numbers too; inside of a jit it is as if written there.
@partial(jax.jit, static_argnames=("shape", "dtype"), inline=True)
def _placed(places: tuple[Array, ...], keep: Any, put: Any, shape: tuple[int, ...], dtype: Any) -> Change:
    """The change of an array of this shape that is ``keep`` and ``put`` at these places on its axes."""
    where = jnp.ix_(*(jnp.atleast_1d(p) for p in places))
    # An axis with a single index is not part of what keep and put broadcast against.
    single = tuple(axis for axis, p in enumerate(places) if p.ndim == 0)
    chosen = [p.size for p in places if p.ndim]

    def filled(fill: float, value: Any) -> Array:
        value = jnp.expand_dims(jnp.broadcast_to(jnp.asarray(value, dtype), chosen), single)
        return jnp.full(shape, fill, dtype).at[where].set(value)

    return Change(keep=filled(1.0, keep), put=filled(-0.0, put))


def _change_by_layer(
    like: tuple[Leaf, ...], name: str, keep: Any, put: Any, index: dict[str, Any]
) -> tuple[Change | None, ...]:
    """A change of a leaf whose layers differ: one change, or None, for each layer."""
    rest = {axis: chosen for axis, chosen in index.items() if axis != "layer"}
    found: list[Change | None] = [None] * len(like)
    for number in np.atleast_1d(layers_on(name, len(like), index.get("layer", slice(None)))).tolist():
        if like[number] is None:
            raise ValueError(f"layer {number} of this model's walk has no {name!r}, so it cannot be edited")
        alone = jax.ShapeDtypeStruct((1, *like[number].shape), like[number].dtype)
        one = change(put_change(name, alone), name, keep=keep, put=put, layer=0, **rest)
        found[number] = jax.tree.map(lambda x: x[0], get(one, name))
    return tuple(found)


def layers_on(name: str, count: int, chosen: Any) -> np.ndarray:
    """The numbers of the chosen layers of a leaf in which layers differ.

    Raises ValueError for one that there is not, and for one that is traced: no array holds them all.
    """
    if any(isinstance(one, jax.core.Tracer) for one in jax.tree.leaves(chosen)):
        raise ValueError(
            f"the layers of this model differ in {name!r}: say which by a number, and not by one that is traced "
            "(in a sweep over layers, take them one after another)"
        )
    return np.asarray(_places(name, "layer", count, count, chosen))


def _places(name: str, axis: str, full: int, size: int, chosen: Any) -> Array | np.ndarray:
    """The chosen places on one axis of ``full`` places, of which the edit holds ``size``.

    Raises ValueError for one that there is not, where it can be looked at.
    """
    if isinstance(chosen, jax.core.Tracer):
        return jnp.asarray(chosen)
    if isinstance(chosen, bool):
        raise ValueError(f"{axis}={chosen} is no place; say which by a number, a slice, a list or a mask")
    try:
        # Of an empty list no type is known.
        given = chosen if isinstance(chosen, slice) else np.asarray(chosen, None if np.size(chosen) else int)
        places = np.arange(full)[given]
    except IndexError:
        raise ValueError(f"{axis}={chosen} is outside {name!r}, which has {full} on that axis") from None
    return np.asarray(places) if size == full else np.zeros(size, int)


def put_change(name: str, value: Leaf) -> Edit:
    """An edit with one change."""
    return put(Edit(), name, value)


def identity_edit(shapes: Walk) -> Edit:
    """The edit that changes every leaf to itself: in float16, float32 and float64 bit for bit.

    In bfloat16 XLA may keep more digits from one operation to the next than the type has; an edit rounds them.
    """
    leaves, tree = jax.tree.flatten(shapes)
    return jax.tree.unflatten(tree, _neutral(tuple((like.shape, jnp.dtype(like.dtype)) for like in leaves)))


@partial(jax.jit, static_argnames=("shapes",), inline=True)
def _neutral(shapes: tuple[tuple[tuple[int, ...], Any], ...]) -> list[Change]:
    return [Change(keep=jnp.ones(*like), put=jnp.full(like[0], -0.0, like[1])) for like in shapes]


def compose(first: Edit, second: Edit) -> Edit:
    """The edit that does ``first``, then ``second``, on every leaf."""

    def after_by_layer(a: Leaf, b: Leaf) -> Leaf:
        if isinstance(a, Change) and isinstance(b, Change):
            a, b = _of_one_rank(a, b)
        return after(a, b)

    def after(a: Leaf, b: Leaf) -> Leaf:
        if a is None or b is None:
            return b if a is None else a
        if isinstance(a, tuple) or isinstance(b, tuple):
            layers = len(a) if isinstance(a, tuple) else len(b)
            return tuple(map(after, _for_each(a, layers), _for_each(b, layers)))
        if b.keep is None:
            return b
        # Of what is not kept nothing is left, were it infinite.
        kept = jnp.where(jnp.asarray(b.keep) == 0, jnp.zeros_like(a.put), b.keep * a.put)
        return Change(keep=None if a.keep is None else b.keep * a.keep, put=kept + b.put)

    is_leaf = lambda x: x is None or isinstance(x, Change | tuple)
    layers = jax.tree.map(after_by_layer, first.layers, second.layers, is_leaf=is_leaf)
    rest = (dataclasses.replace(edit, layers=LayerWalk()) for edit in (first, second))
    return dataclasses.replace(jax.tree.map(after, *rest, is_leaf=is_leaf), layers=layers)


def _of_one_rank(*changes: Change) -> tuple[Change, ...]:
    """With as many axes in all arrays: the first stays the layers', the others belong to the leaf's last."""
    rank = max(jnp.ndim(part) for part in jax.tree.leaves(changes))

    def grown(part: Leaf) -> Leaf:
        sizes = jnp.shape(part)
        return jnp.reshape(part, (*sizes[:1], *(1,) * (rank - len(sizes)), *sizes[1:])) if sizes else part

    return jax.tree.map(grown, changes)


def _for_each(change: Leaf, layers: int) -> tuple[Leaf, ...]:
    """A change of all layers as one for each; a number is the same for all."""
    if isinstance(change, tuple):
        return change
    of = lambda number: jax.tree.map(lambda x: x[number] if jnp.ndim(x) else x, change)
    return tuple(of(number) for number in range(layers))
