"""Activation patching: which part of one walk, put into another, brings back the first one's answer?

The corrupted walk runs once for every place, with one activation replaced by its clean value (Meng et al. 2022;
Wang et al. 2022). Each run starts at its own layer, from the corrupted walk's ``resid_pre`` there, and the places
of a layer run together. :mod:`minitf.analysis.attribution_patching` estimates the same from one gradient.
"""

import math
from collections.abc import Callable, Iterable, Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from minitf.analysis.lens import read
from minitf.config import ModelConfig
from minitf.parameters import Parameters
from minitf.resume import BEFORE_KEYS, end_from, ends_at_some, last_layer_at, layer_walk
from minitf.walk import Change, LayerWalk, Walk, get, leaf_axes, leaves, put, stacked

# From logits [batch, position, vocabulary] to a number, or to one for each sequence.
Metric = Callable[[Array], Array]
Progress = Callable[[Iterable[int]], Iterable[int]]
# Of all layers together, or, where they differ, each layer's own.
ByLayer = Array | tuple[Array | None, ...]

HEADS = ("layers.z", ("head",))
HEADS_BY_POSITION = ("layers.z", ("position", "head"))
STARTS_BY_POSITION = ("layers.resid_pre", ("position",))
ATTENTION_BY_POSITION = ("layers.attention_step", ("position",))
FEED_FORWARD_BY_POSITION = ("layers.feed_forward_step", ("position",))


def patch(
    parameters: Parameters,
    corrupt: Walk,
    clean: Walk,
    metric: Metric,
    config: ModelConfig,
    places: tuple[str, tuple[str, ...]] = HEADS,
    *,
    at: Sequence[int] | None = None,
    valid: Bool[Array, "batch position"] | None = None,
    memory: int | None = None,
    progress: Progress = iter,
) -> Float[Array, "layer ..."]:
    """The metric of the corrupted walk with one place patched at a time, ``[layer, *places, *metric]``.

    Where layers differ in the leaf, those with fewer places (or none) have NaN after them.

    Args:
        corrupt: reads its ``layers.resid_pre`` alone; other leaves may be dropped.
        clean: reads the patched leaf alone.
        metric: of logits; a function defined once, since every new one is compiled anew.
        places: the leaf to patch, and which of its axes to go over one place at a time, in the leaf's
            order; on its other axes all is patched. The constants above are examples.
        at: the positions whose logits the metric gets, all by default; fewer save time in large vocabularies.
        valid: as the walks were made with.
        memory: bytes that the runs of one batch may take together; sets how many run at once. By default 64 MiB
            on a CPU, whose caches hold no more, and 1 GiB elsewhere.
        progress: wraps the numbers of the layers, such as ``rich.progress.track``.

    Raises:
        ValueError: a leaf, axis or position that does not exist, walks that do not fit each other.
    """
    name, over = places
    stream, values = get(corrupt, "layers.resid_pre"), _layer_leaf(clean, name)
    _check_places(name, over, stream, values, config)
    length = stream.shape[2]
    fixed = fixed_positions(at, length)
    size = bytes_per_run(config, stream.shape[1], length, fixed, stream.dtype.itemsize)
    # Of stacked layers one program serves for all; of single ones each has its own.
    single = isinstance(parameters.layers, tuple)
    # In the last layer, positions that nobody reads need no steps, unless they are read as keys and values.
    ends = fixed is not None and name.removeprefix("layers.") not in BEFORE_KEYS and ends_at_some(config)

    def of_layer(number: int, shape: tuple[int, ...] | None) -> Array | None:
        if shape is None:
            return None
        return (_patched_known_layer if single else _patched_layer)(
            parameters,
            stream,
            values,
            valid,
            layer=number if single else jnp.int32(number),
            metric=metric,
            config=config,
            name=name,
            over=over,
            at=fixed,
            together=runs_together(math.prod(place_shape(name, over, shape)), size, memory),
            ends=ends and number == config.layers - 1,
        )

    shapes = _shapes(values)
    found = [of_layer(number, shapes[number]) for number in progress(range(config.layers))]
    return stacked(found, range(len(over)), jnp.nan)


def runs_together(count: int, size: int, memory: int | None) -> int:
    """How many of ``count`` runs of ``size`` bytes make one batch of at most ``memory``, all about equal."""
    if memory is None:
        # What a CPU's caches do not hold is slower there; elsewhere larger batches are faster.
        memory = 2**26 if jax.default_backend() == "cpu" else 2**30
    batches = math.ceil(count / max(1, min(count, memory // size)))
    return math.ceil(count / batches)


def bytes_per_run(
    config: ModelConfig, batch: int, length: int, at: Sequence[int] | None, itemsize: int = 4
) -> int:
    """About how many bytes one patched run has in use at its peak: inside a layer, or at the logits."""
    rows = batch * length
    read_rows = rows if at is None else batch * len(at)
    hidden = 0 if config.feed_forward == "none" else 3 * config.hidden_size
    association = 3 * config.heads * length
    layer = rows * (6 * config.width + hidden + association + 4 * config.heads * config.head_size)
    return itemsize * max(layer, rows * config.width + 2 * read_rows * config.vocabulary)


def normalized(
    patched: Float[Array, "*places"], clean: Float[Array, "*#metric"], corrupt: Float[Array, "*#metric"]
) -> Float[Array, "*places"]:
    """``(patched - corrupt) / (clean - corrupt)``: 0 where the patch did nothing, 1 where it brought all back.

    Raises ValueError where clean and corrupt agree, so that nothing is there to bring back.
    """
    distance = clean - corrupt
    if not isinstance(distance, jax.core.Tracer) and not jnp.all(distance != 0):
        raise ValueError(
            "the clean and the corrupted run have the same metric; choose inputs on which they differ"
        )
    return (patched - corrupt) / distance


def _patched(
    parameters: Parameters,
    streams: Array,
    values: ByLayer,
    valid: Array | None,
    *,
    layer: int | Array,
    metric: Metric,
    config: ModelConfig,
    name: str,
    over: tuple[str, ...],
    at: tuple[int, ...] | None,
    together: int,
    ends: bool,
) -> Array:
    """The metric for every place of one layer; ``together`` places run as one batch.

    ``ends`` says that it is the last layer and need only be run where the logits are read.
    """
    stream, value = streams[layer], values[layer]
    assert value is not None  # only layers that have the leaf are patched
    batch, length, width = stream.shape
    shape = place_shape(name, over, value.shape)
    count = math.prod(shape)
    numbers = jnp.minimum(jnp.arange(math.ceil(count / together) * together), count - 1).reshape(-1, together)

    # What comes before the patch is the same for all places, and is taken from here.
    unedited = layer_walk(parameters, stream, config, layer, valid=valid)

    def patched(number: Array) -> Array:
        edit = _replaced(name, over, value, unedited, number)
        if not ends:
            return layer_walk(parameters, stream, config, layer, edit=edit, valid=valid).resid_post
        edit = _at_positions(edit, at or ())
        return last_layer_at(parameters, stream, config, at or (), edit=edit, valid=valid).resid_post

    def some(chosen: Array) -> Array:
        # From here on, the runs are sequences of one larger batch.
        end = jax.vmap(patched)(chosen).reshape(-1, *(length if not ends else len(at or ()), width))
        if not ends:
            everyone = None if valid is None else jnp.tile(valid, (together, 1))
            end = end_from(parameters, end, config, layer + 1, valid=everyone, at=at)
        logits = read(parameters, end, config)
        measured = jax.vmap(metric)(logits.reshape(together, batch, *logits.shape[1:]))
        if not hasattr(measured, "shape"):
            raise ValueError(
                f"the metric gives a {type(measured).__name__}; it must give one array (of several numbers, "
                "jnp.stack makes one)"
            )
        return measured

    found = jax.lax.map(some, numbers)
    return found.reshape(-1, *found.shape[2:])[:count].reshape(*shape, *found.shape[2:])


_STATIC = ("metric", "config", "name", "over", "at", "together", "ends")
_patched_layer = jax.jit(_patched, static_argnames=_STATIC)
_patched_known_layer = jax.jit(_patched, static_argnames=(*_STATIC, "layer"))


def _replaced(name: str, over: tuple[str, ...], value: Array, unedited: LayerWalk, number: Array) -> LayerWalk:
    """The edit of one layer that puts the place of that number at its clean value, and all else as it was."""
    here = at_place(name, over, value.shape, number)
    was = Walk(layers=unedited)
    edit = put(Walk(), name, Change(keep=None, put=jnp.where(here, value, get(was, name))))
    names = list(leaf_axes())
    if names.index(name) > names.index("layers.resid_mid"):
        edit = put(edit, "layers.resid_mid", Change(keep=None, put=unedited.resid_mid))
    return edit.layers


def _at_positions(edit: LayerWalk, at: tuple[int, ...]) -> LayerWalk:
    """The edit at these positions (for scores and patterns, at these queries)."""
    some = Walk()
    for name, change in leaves(Walk(layers=edit)):
        axes = leaf_axes()[name][1:]
        axis = axes.index("position" if "position" in axes else "query")
        part = lambda x, axis=axis: x if x.shape[axis] == 1 else jnp.take(x, jnp.asarray(at), axis=axis)
        some = put(some, name, jax.tree.map(part, change))
    return some.layers


def at_place(name: str, over: tuple[str, ...], shape: tuple[int, ...], number: Array) -> Bool[Array, "..."]:
    """True at the place of that number among those gone over; broadcasts to ``shape``, which has no layer."""
    sizes = dict(zip([axis for axis in leaf_axes()[name] if axis != "layer"], shape, strict=True))
    index = jnp.unravel_index(number, tuple(size for axis, size in sizes.items() if axis in over))
    here = jnp.ones((1,) * len(shape), bool)
    for axis, place in zip([axis for axis in sizes if axis in over], index, strict=True):
        along = [size if a == axis else 1 for a, size in sizes.items()]
        here = here & (jnp.arange(sizes[axis]) == place).reshape(along)
    return here


def place_shape(name: str, over: tuple[str, ...], shape: tuple[int, ...]) -> tuple[int, ...]:
    """How many places there are on each axis gone over, of one layer's leaf of this shape."""
    return tuple(size for axis, size in zip(leaf_axes()[name][1:], shape, strict=True) if axis in over)


def fixed_positions(at: Sequence[int] | None, length: int) -> tuple[int, ...] | None:
    """The positions as a program's argument. Raises ValueError for one that the walk does not have."""
    if at is not None and not len(at):
        raise ValueError("at=[] leaves the metric no logits; give a position, or None for all")
    if at is not None and not all(-length <= i < length for i in at):
        raise ValueError(f"at={list(at)} leaves the {length} positions of the walk")
    return None if at is None else tuple(int(i) for i in at)


def _layer_leaf(clean: Walk, name: str) -> ByLayer:
    value = get(clean, name)
    if not name.startswith("layers."):
        raise ValueError(f"{name!r} is not in the layers; patch one of a layer's leaves, such as 'layers.z'")
    if value is None:
        raise ValueError(f"the clean walk holds no {name!r} to patch with")
    return value


def _shapes(values: ByLayer) -> list[tuple[int, ...] | None]:
    """Of each layer's leaf."""
    if isinstance(values, tuple):
        return [None if value is None else value.shape for value in values]
    return [values.shape[1:]] * len(values)


def _check_places(
    name: str, over: tuple[str, ...], stream: Array | None, values: ByLayer, config: ModelConfig
) -> None:
    if stream is None:
        raise ValueError("the corrupted walk holds no 'layers.resid_pre', from which the patched runs start")
    axes = leaf_axes()[name][1:]
    allowed = [axis for axis in axes if axis != "batch"]
    if len(set(over)) < len(over):
        raise ValueError(f"{name!r} is patched place by place over {over}, in which an axis comes twice")
    for axis in over:
        if axis not in allowed:
            raise ValueError(f"{name!r} cannot be patched place by place over {axis!r}; choose from {allowed}")
    if len(values) != config.layers or stream.shape[0] != config.layers:
        raise ValueError(
            f"the walks have {stream.shape[0]} and {len(values)} layers; the model has {config.layers}"
        )
    needed = {"batch": stream.shape[1], "position": stream.shape[2], "query": stream.shape[2]}
    for shape in filter(None, set(_shapes(values))):
        for axis, size in zip(axes, shape, strict=True):
            if size != needed.get(axis, size):
                raise ValueError(f"the clean walk has {size} on its {axis} axis, the corrupted one {needed[axis]}")
