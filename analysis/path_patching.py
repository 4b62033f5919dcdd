"""Path patching: how much of a sender's effect reaches the metric through chosen receivers alone?

The base run is repeated for every sender, with its step of another run, the source, on the edges to the receivers
and nowhere else (Wang et al. 2022, section 3; Goldowsky-Dill et al. 2023): see :mod:`minitf.analysis.edges`. All
receivers together give activation patching of the sender. Wang et al. hold the receivers at values from a run in
which all other heads are frozen; where no receiver is behind another, that is the same.
"""

import functools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from minitf.analysis.edges import Half, Receivers, Stream, check, end_along
from minitf.analysis.given import stacked_attention
from minitf.analysis.lens import read
from minitf.analysis.patching import (
    Metric,
    Progress,
    at_place,
    bytes_per_run,
    fixed_positions,
    place_shape,
    runs_together,
)
from minitf.config import ModelConfig
from minitf.parameters import Parameters
from minitf.walk import LayerWalk, Walk, get, leaf_axes

HEADS = ("layers.z", ("head",))
HEADS_BY_POSITION = ("layers.z", ("position", "head"))
ATTENTION = ("layers.attention_step", ())
FEED_FORWARDS = ("layers.feed_forward_step", ())
NEURONS = ("layers.post", ("hidden",))
START = ("start", ())
START_BY_POSITION = ("start", ("position",))

# The half of a layer that writes what is sent; the start is what a layer before the first would have written.
_WRITTEN_BY: dict[str, Half] = {
    "start": "feed_forward",
    "layers.z": "attention",
    "layers.attention_step": "attention",
    "layers.post": "feed_forward",
    "layers.feed_forward_step": "feed_forward",
}


def patch(
    parameters: Parameters,
    base: Walk,
    source: Walk,
    metric: Metric,
    config: ModelConfig,
    receivers: Receivers,
    senders: tuple[str, tuple[str, ...]] = HEADS,
    *,
    through_feed_forwards: bool = False,
    at: Sequence[int] | None = None,
    valid: Bool[Array, "batch position"] | None = None,
    memory: int | None = None,
    progress: Progress = iter,
) -> Float[Array, "..."]:
    """The metric of the base run with one sender at a time as in the source, for the receivers alone.

    The result is ``[layer, *places, *metric]``, without ``layer`` where the start is sent. It is that of the base
    run for senders that no receiver can see; :func:`minitf.analysis.patching.normalized` makes it a share::

        queries = to_heads(base, "q", layer=9, head=[6, 9])
        through = patch(parameters, base, source, metric, config, queries)
        normalized(through, clean=metric(source.logits), corrupt=metric(base.logits))

    Args:
        base: an unedited walk; reads ``layers.resid_pre``, ``end`` and the senders' leaf.
        source: reads the senders' leaf alone.
        metric: of logits; a function defined once, since every new one is compiled anew.
        receivers: from ``to_heads``, ``to_feed_forwards``, ``to_end`` and ``join`` of
            :mod:`minitf.analysis.edges`.
        senders: the leaf that is sent, and which of its axes to go over one place at a time, in the leaf's order;
            on its other axes all is sent. The constants above are examples.
        through_feed_forwards: False counts the direct edge alone: all between sender and receiver is held. True
            lets feed-forwards between them answer too, and holds heads alone, as Wang et al. do.
        at: the positions whose logits the metric gets, all by default; fewer save time in large vocabularies.
        valid: as the walks were made with.
        memory: bytes that the runs of one batch may take together; sets how many run at once. As
            :func:`minitf.analysis.patching.patch` by default.
        progress: wraps the numbers of the layers, such as ``rich.progress.track``.

    Raises:
        ValueError: the model's inputs are not sums of steps, or senders, receivers and walks do not fit.
    """
    check(receivers, base, config)
    stacked_attention(parameters, "paths")
    name, over = senders
    shape = _sender_shape(name, over, base, source)
    stream, values = base.layers.resid_pre, get(base, name)
    length = stream.shape[2]
    fixed = fixed_positions(at, length)
    count = math.prod(shape)
    size = bytes_per_run(config, stream.shape[1], length, fixed, stream.dtype.itemsize)
    run = functools.partial(
        _patched,
        metric=metric,
        config=config,
        senders=(name, tuple(over)),
        shape=shape,
        together=runs_together(count, size, memory),
        through_feed_forwards=through_feed_forwards,
        at=fixed,
    )
    read_of_base = Walk(layers=LayerWalk(resid_pre=stream), end=base.end)
    difference = get(source, name) - values
    if not name.startswith("layers."):
        (only,) = progress(range(-1, 0))
        return run(parameters, read_of_base, difference, jnp.int32(only), receivers, valid)
    return jnp.stack(
        [
            run(parameters, read_of_base, difference[i], jnp.int32(i), receivers, valid)
            for i in progress(range(config.layers))
        ]
    )


@functools.partial(
    jax.jit,
    static_argnames=("metric", "config", "senders", "shape", "together", "through_feed_forwards", "at"),
)
def _patched(
    parameters: Parameters,
    base: Walk,
    difference: Array,
    layer: Array,
    receivers: Receivers,
    valid: Array | None,
    *,
    metric: Metric,
    config: ModelConfig,
    senders: tuple[str, tuple[str, ...]],
    shape: tuple[int, ...],
    together: int,
    through_feed_forwards: bool,
    at: tuple[int, ...] | None,
) -> Array:
    """The metric for every sender of one layer; ``together`` of them run as one batch."""
    name, over = senders
    count = math.prod(shape)
    numbers = jnp.minimum(jnp.arange(math.ceil(count / together) * together), count - 1)

    def one(number: Array) -> Array:
        sent = jnp.where(at_place(name, over, difference.shape, number), difference, 0.0)
        end = end_along(
            parameters,
            base,
            _as_step(parameters, name, sent, layer),
            layer,
            receivers,
            config,
            written_by=_WRITTEN_BY[name],
            through_feed_forwards=through_feed_forwards,
            valid=valid,
        )
        return metric(read(parameters, end if at is None else end[:, jnp.asarray(at)], config))

    found = jax.lax.map(one, numbers, batch_size=together)
    return found[:count].reshape(*shape, *found.shape[1:])


def _as_step(parameters: Parameters, name: str, difference: Array, layer: Array) -> Stream:
    """What a difference of the senders' leaf is in the residual stream."""
    if name == "layers.z":
        return jnp.einsum("bphc,hcw->bpw", difference, parameters.layers.attention.output[layer])
    if name == "layers.post":
        return difference @ parameters.layers.feed_forward.out[layer]
    return difference


def _sender_shape(name: str, over: tuple[str, ...], base: Walk, source: Walk) -> tuple[int, ...]:
    """How many senders there are on each axis gone over."""
    if name not in _WRITTEN_BY:
        raise ValueError(f"{name!r} cannot be sent; choose from {', '.join(_WRITTEN_BY)}")
    for kind, walk in (("base", base), ("source", source)):
        if get(walk, name) is None:
            raise ValueError(f"the {kind} walk holds no {name!r} to send")
    sizes, others = get(base, name).shape, get(source, name).shape
    if sizes != others:
        raise ValueError(f"{name!r} is of shape {others} in the source walk and of shape {sizes} in the base walk")
    allowed = [axis for axis in leaf_axes()[name] if axis not in ("layer", "batch")]
    for axis in over:
        if axis not in allowed:
            raise ValueError(f"{name!r} cannot be sent place by place over {axis!r}; choose from {allowed}")
    return place_shape(name, over, sizes[1:])
