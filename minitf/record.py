"""What to keep of a walk. The rest is not computed where nothing needs it, and never stored."""

from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from minitf.changes import layers_on
from minitf.walk import Walk, get, leaf_axes, leaves, put


def record(
    walk: Walk, keep: str | Iterable[str] | Callable[[str], bool], *, layer: Any = None, position: Any = None
) -> Walk:
    """The walk with some leaves alone; the others are None.

    Use it on what a jitted function returns, or as ``record=`` of a generation::

        jax.jit(lambda tokens: record(walk(parameters, tokens, config), "layers.pattern", layer=[0, 2]))

    Args:
        walk: of any run; leading axes (seeds, a sweep) are left as they are.
        keep: names of leaves, or a function of a name. Leaves that this model does not have are left out when a
            function chooses, and an error when named.
        layer: which layers of the leaves that have layers: an index, a slice or a list; an index drops the axis.
        position: which positions (for scores and patterns, which queries), likewise.

    Raises:
        ValueError: a name is not a leaf, the model has no such leaf, nothing is kept, or an index is outside.
    """
    if callable(keep):
        names = [name for name, _ in leaves(walk) if keep(name)]
        if not names:
            raise ValueError(f"no leaf was chosen; this walk has {', '.join(name for name, _ in leaves(walk))}")
    else:
        names = [keep] if isinstance(keep, str) else list(keep)
    kept = Walk()
    for name in names:
        value = get(walk, name)
        if value is None:
            raise ValueError(f"this model's walk has no {name!r}, so it cannot be recorded")
        axes = leaf_axes()[name]
        if isinstance(value, tuple):
            value = _of_differing_layers(value, name, axes[1:], layer, position)
        else:
            value = _chosen(value, name, axes, {"layer": layer, "position": position, "query": position})
        kept = put(kept, name, value)
    return kept


def _chosen(value: jax.Array, name: str, axes: tuple[str, ...], places: dict[str, Any]) -> jax.Array:
    """The chosen places on all axes."""
    before = value.ndim - len(axes)
    # The last first: an index drops its axis, and what comes before it stays in its place.
    for axis in reversed(range(len(axes))):
        chosen = places.get(axes[axis])
        if chosen is not None:
            value = _taken(value, before + axis, chosen, name, axes[axis])
    return value


def _of_differing_layers(values: tuple, name: str, axes: tuple[str, ...], layer: Any, position: Any) -> Any:
    """The chosen layers' own values; of a single layer, the value itself. Layers are known also under a trace."""
    numbers = layers_on(name, len(values), slice(None) if layer is None else layer)
    places = {"position": position, "query": position}
    found = [
        None if values[number] is None else _chosen(values[number], name, axes, places)
        for number in np.atleast_1d(numbers)
    ]
    return tuple(found) if numbers.ndim else found[0]


def _taken(value: jax.Array, axis: int, chosen: Any, name: str, label: str) -> jax.Array:
    """The chosen places of an axis."""
    size = value.shape[axis]
    if not isinstance(chosen, slice):
        places = jnp.asarray(chosen)
        if not isinstance(places, jax.core.Tracer) and bool(jnp.any((places < -size) | (places >= size))):
            raise ValueError(f"{label}={chosen} is outside {name!r}, which has {size} on that axis")
        chosen = places
    return value[(*(slice(None),) * axis, chosen)]
