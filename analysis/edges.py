"""A run with other values on some edges: chosen receivers read another step of a sender, all else reads its own.

A sender is a step of the walk; a receiver is an input: of a head's queries, keys or values, of a feed-forward, or
of the end. Every input is the sum of the start and the steps before it, so to change the sender's value on the
edges to some receivers is to let those read ``stream + difference`` where all others read ``stream``
(Goldowsky-Dill et al. 2023). What receivers make of it goes on as usual, also to other receivers: the edges to all
receivers together are the change of the sender itself.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from minitf.config import ModelConfig
from minitf.parameters import Parameters
from minitf.resume import end_from, layer_walk
from minitf.walk import Change, LayerWalk, Leaf, Walk, get, leaf, leaf_axes

Stream = Float[Array, "batch position width"]
Half = Literal["attention", "feed_forward"]


@struct.dataclass
class Receivers:
    """Which inputs read the sender's change: True where they do, None where none of the kind does.

    Masks broadcast against what reads; but for ``layer``, an axis on which all places are meant alike is 1 long.
    Heads are counted as the queries' are, also for the keys and values of grouped heads.
    """

    q: Leaf = leaf("layer batch position head head_width")
    k: Leaf = leaf("layer batch position head head_width")
    v: Leaf = leaf("layer batch position head head_width")
    feed_forward: Leaf = leaf("layer batch position width")
    end: Leaf = leaf("batch position width")


def to_heads(shapes: Walk, inputs: str = "qkv", **index: Any) -> Receivers:
    """Inputs of heads: ``to_heads(base, "q", layer=9, head=[6, 9])``; all three inputs are the head as a whole.

    Args:
        shapes: a walk of the run, or its shapes.
        inputs: some of the letters q, k and v.
        **index: an index, slice, list or mask on the axes ``layer``, ``position`` (where the query, key or value
            stands), ``head``, ``batch``; what is not named is meant whole.

    Raises:
        ValueError: another letter, or a place that is not there.
    """
    if not inputs or set(inputs) - set("qkv"):
        raise ValueError(f"a head has the inputs q, k and v; {inputs!r} does not choose among them")
    return Receivers(**dict.fromkeys(inputs, _mask(shapes, "layers.q", index)))


def to_feed_forwards(shapes: Walk, **index: Any) -> Receivers:
    """Inputs of feed-forwards, at places on ``layer``, ``position``, ``batch``; otherwise as :func:`to_heads`."""
    return Receivers(feed_forward=_mask(shapes, "layers.feed_forward_step", index))


def to_end(shapes: Walk, **index: Any) -> Receivers:
    """The end, from which the logits are read, at places on ``position``, ``batch``; as :func:`to_heads`."""
    return Receivers(end=_mask(shapes, "end", index))


def join(*receivers: Receivers) -> Receivers:
    """All of the receivers together."""

    def either(first: Leaf, second: Leaf) -> Leaf:
        if first is None or second is None:
            return second if first is None else first
        return first | second

    two = lambda a, b: jax.tree.map(either, a, b, is_leaf=lambda x: x is None)
    return functools.reduce(two, receivers, Receivers())


def end_along(
    parameters: Parameters,
    base: Walk,
    difference: Stream,
    layer: int | Int[Array, ""],
    receivers: Receivers,
    config: ModelConfig,
    *,
    written_by: Half = "attention",
    through_feed_forwards: bool = False,
    valid: Bool[Array, "batch position"] | None = None,
) -> Stream:
    """The end of the base run in which the receivers read ``difference`` on top of the stream.

    Layers before the first receiver that can see the sender do not run: they are as in ``base``. So is the end, to
    the bit, where no receiver can.

    Args:
        base: an unedited walk; reads ``layers.resid_pre`` and ``end``.
        difference: the step as it is to be, less the step as it is; any vectors will do.
        layer: whose ``written_by`` half writes the step; may be traced. The start is feed-forward -1's.
        through_feed_forwards: False holds all that lies between sender and receiver as it is, so that only the
            direct edge counts. True recomputes feed-forwards on the way, so that receivers also read what those
            make of the difference, and only heads are held (Wang et al. 2022).
        valid: as the walk was made with.

    Raises:
        ValueError: the model's inputs are not sums of steps, or receivers and walk do not fit.
    """
    check(receivers, base, config)
    least = 0 if written_by == "attention" else -1
    if isinstance(layer, int) and not least <= layer < config.layers:
        raise ValueError(
            f"no {written_by} {layer} writes a step; this model has layers {least} to {config.layers - 1}"
        )
    receivers = jax.tree.map(jnp.asarray, receivers)
    difference = difference.astype(base.end.dtype)
    # What attention writes, the feed-forward of its layer reads, unless that reads the layer's start.
    within = written_by == "attention" and not config.parallel and config.feed_forward != "none"
    sees = _seeing(receivers, layer, within, config.layers)
    first = jnp.where(jnp.any(sees), jnp.argmax(sees), config.layers)
    stop = jnp.where(jnp.any(sees), config.layers - jnp.argmax(sees[::-1]), config.layers)
    if through_feed_forwards and receivers.end is not None:
        stop = jnp.asarray(config.layers)

    def one(number: Array, stream: Stream, carried: Stream, to: Receivers) -> tuple[Stream, Stream]:
        written = jnp.where(within & (number == layer), difference, 0.0)
        return _layer(parameters, config, number, stream, carried, written, to, through_feed_forwards, valid)

    carried = jnp.where(within & (first == layer), 0.0, difference)
    if through_feed_forwards:
        before = lambda number, carried: one(number, base.layers.resid_pre[number], carried, Receivers())[1]
        begin, carried = (layer, jnp.zeros_like(difference)) if within else (layer + 1, difference)
        carried = jax.lax.fori_loop(jnp.asarray(begin, first.dtype), first, before, carried)
    pre = base.layers.resid_pre[jnp.minimum(first, config.layers - 1)]
    stream = jnp.where(first < config.layers, pre, base.end)
    stream, carried = jax.lax.fori_loop(
        first, stop, lambda number, passed: one(number, passed[0], passed[1], receivers), (stream, carried)
    )
    end = end_from(parameters, stream, config, stop, valid=valid)
    return end if receivers.end is None else end + jnp.where(receivers.end, carried, 0.0)


def check(receivers: Receivers, base: Walk, config: ModelConfig) -> None:
    """Raises ValueError, with the reason, for what :func:`end_along` cannot run."""
    if config.post_norm:
        raise ValueError(
            "edges need norm_placement='pre' (or norm='none'): with post-norms, every later norm rescales a step, "
            "and what a receiver reads is not the sum of the steps before it"
        )
    if not config.residual:
        raise ValueError("edges need residual=True: without it no step reaches beyond the next sub-layer")
    if config.attention == "table":
        raise ValueError("edges need attention='query_key'; the heads of free tables share their keys and values")
    for name in ("layers.resid_pre", "end"):
        if get(base, name) is None:
            raise ValueError(f"the base walk holds no {name!r}, from which the changed runs start")
    layers, *places, width = base.layers.resid_pre.shape
    if layers != config.layers:
        raise ValueError(f"the base walk has {layers} layers; the model has {config.layers}")
    if not jax.tree.leaves(receivers):
        raise ValueError("there are no receivers, so no edge to change")
    if receivers.feed_forward is not None and config.feed_forward == "none":
        raise ValueError("this model has no feed-forward to receive anything")
    head = (layers, *places, config.heads, config.head_size)
    full = {"feed_forward": (layers, *places, width), "end": (*places, width)}
    for name, mask in ((f.name, getattr(receivers, f.name)) for f in dataclasses.fields(receivers)):
        sizes = full.get(name, head)
        if mask is not None and (
            mask.ndim != len(sizes)
            or any(n not in (1, m) for n, m in zip(mask.shape, sizes, strict=True))
            or (name != "end" and mask.shape[0] != layers)
        ):
            raise ValueError(
                f"the receivers' {name} is of shape {mask.shape} and must broadcast to {sizes} (with all layers); "
                "make receivers from the base walk, or its shapes"
            )


def _seeing(receivers: Receivers, layer: int | Int[Array, ""], within: bool, layers: int) -> Bool[Array, " layer"]:
    """The layers with a receiver that the step reaches."""

    def any_of(*masks: Array | None) -> Array:
        found = [jnp.any(mask, axis=tuple(range(1, mask.ndim))) for mask in masks if mask is not None]
        return functools.reduce(jnp.logical_or, found, jnp.zeros(layers, bool))

    numbers = jnp.arange(layers)
    heads = any_of(receivers.q, receivers.k, receivers.v) & (numbers > layer)
    return heads | (any_of(receivers.feed_forward) & ((numbers > layer) | (within & (numbers == layer))))


def _layer(
    parameters: Parameters,
    config: ModelConfig,
    number: Int[Array, ""],
    stream: Stream,
    carried: Stream,
    written: Stream,
    receivers: Receivers,
    through_feed_forwards: bool,
    valid: Array | None,
) -> tuple[Stream, Stream]:
    """Over one layer: the stream, and what receivers read on top of it; attention's step adds ``written``."""
    here = jax.tree.map(lambda mask: mask[number], dataclasses.replace(receivers, end=None))
    single, alone = _single_layer(parameters, config, number)
    run: Callable[..., LayerWalk] = functools.partial(layer_walk, single, layer=0, valid=valid)
    edit = LayerWalk()
    if jax.tree.leaves((here.q, here.k, here.v)):
        read = run(stream + carried, config=alone)
        edit = LayerWalk(**{name: _replaced(getattr(here, name), getattr(read, name)) for name in "qkv"})
    mid, mid_carried = run(stream, config=alone, edit=edit).resid_mid, carried + written
    if config.feed_forward == "none":
        return mid, mid_carried

    # In parallel layers it reads what the layer is given: so a feed-forward runs by itself, on any stream.
    step_of = lambda given: run(given, config=dataclasses.replace(alone, parallel=True)).feed_forward_step
    given, more = (stream, carried) if config.parallel else (mid, mid_carried)
    step = step_of(given if here.feed_forward is None else given + jnp.where(here.feed_forward, more, 0.0))
    if through_feed_forwards:
        mid_carried = mid_carried + (step_of(given + more) - step)
    return mid + step, mid_carried


def _single_layer(
    parameters: Parameters, config: ModelConfig, number: Int[Array, ""]
) -> tuple[Parameters, ModelConfig]:
    """The model of that layer alone, where every head has keys and values of its own, to be changed alone."""
    layer = jax.tree.map(lambda x: x[number], parameters.layers)
    times = config.heads // config.groups
    own = lambda weight: None if weight is None else jnp.repeat(weight, times, axis=-2)
    shared = ("key", "value", "key_bias", "value_bias")
    attention = dataclasses.replace(layer.attention, **{n: own(getattr(layer.attention, n)) for n in shared})
    layer = jax.tree.map(lambda x: x[None], dataclasses.replace(layer, attention=attention))
    alone = dataclasses.replace(config, layers=1, key_value_heads=config.heads)
    return dataclasses.replace(parameters, layers=layer), alone


def _replaced(mask: Array | None, value: Array) -> Change | None:
    if mask is None:
        return None
    return Change(keep=jnp.where(mask, 0.0, 1.0).astype(value.dtype), put=jnp.where(mask, value, -0.0))


def _mask(shapes: Walk, name: str, index: dict[str, Any]) -> Bool[np.ndarray, "..."]:
    like, axes = get(shapes, name), leaf_axes()[name]
    if like is None:
        raise ValueError(f"this walk has no {name!r}, so nothing is read there")
    if isinstance(like, tuple):
        raise ValueError(f"the layers differ in {name!r}; paths are of softmax attention in layers that are alike")
    allowed = [axis for axis in axes if axis not in ("width", "head_width")]
    mask = np.ones([like.shape[0] if axis == "layer" else 1 for axis in axes], bool)
    for axis, chosen in index.items():
        if axis not in allowed:
            raise ValueError(f"receivers have no axis {axis!r}; choose from {allowed}")
        number = axes.index(axis)
        here = np.zeros(like.shape[number], bool)
        try:
            here[np.asarray(chosen) if not isinstance(chosen, slice) else chosen] = True
        except IndexError:
            raise ValueError(f"{axis}={chosen} is outside {name!r}, which has {here.size} on that axis") from None
        mask = mask & np.expand_dims(here, [i for i in range(len(axes)) if i != number])
    return mask
