"""One layer of the walk: an aggregate over positions and a filter, each adding its step."""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from minitf import aggregate, filter
from minitf.changes import apply
from minitf.config import ModelConfig
from minitf.mixers.contract import Mixer
from minitf.mixers.softmax import Softmax
from minitf.parameters import FeedForwardParameters, Layer, Norm, output_map
from minitf.places import Places
from minitf.walk import Change, LayerWalk

Stream = Float[Array, "batch position width"]


def mixer_of(config: ModelConfig) -> Mixer:
    """What mixes the positions in a model whose layers are alike; softmax attention, unless it says otherwise."""
    return Softmax() if config.mixer is None else config.mixer


# Compiled once where it is called outside of any jit; inside, it is as if written there.
@partial(jax.jit, static_argnames=("config",), inline=True)
def one_layer(
    stream: Stream,
    weights: Layer,
    config: ModelConfig,
    edit: LayerWalk,
    places: Places,
    past: Any = None,
) -> tuple[LayerWalk, Any]:
    """One layer: an aggregate over positions and a filter, each adding its step; and what it hands on."""
    resid_pre = apply(edit.resid_pre, stream)
    attended, state = _mixed(resid_pre, weights, config, edit, places, past)
    attention_norm_scale = attended.attention_norm_scale
    resid_mid = attended.attention_step
    if config.residual:
        resid_mid = _residual(resid_pre, attended.attention_step)
    if config.post_norm:
        attention_norm_scale, resid_mid = apply_norm(
            resid_mid, weights.attention_norm, config, edit.attention_norm_scale
        )
    attended = dataclasses.replace(
        attended,
        resid_pre=resid_pre,
        attention_norm_scale=attention_norm_scale,
        resid_mid=apply(edit.resid_mid, resid_mid),
    )
    if config.feed_forward == "none":
        passed = dataclasses.replace(attended, resid_post=apply(edit.resid_post, attended.resid_mid))
    else:
        passed = _feed_forward(attended, weights, config, edit)
    return passed, state


def _mixed(
    resid_pre: Stream, weights: Layer, config: ModelConfig, edit: LayerWalk, places: Places, past: Any
) -> tuple[LayerWalk, Any]:
    """Filters to values and what associates them; the aggregate; the filter back."""
    batch, length, _ = resid_pre.shape
    scale, stream = None, resid_pre
    if config.pre_norm:
        scale, stream = apply_norm(resid_pre, weights.attention_norm, config, edit.attention_norm_scale)
    mixer = mixer_of(config)
    # Among layers that differ, a leaf may be edited which this one does not have.
    lacks = {name: None for name in ("q", "k", "scores", "pattern") if name not in mixer.leaves}
    edit = dataclasses.replace(edit, **lacks)
    mixed = mixer.mix(weights.attention, stream, config, edit, places, past)
    output, bias = output_map(weights)
    if output is None:
        head_steps, step = mixed.out, jnp.sum(mixed.out, axis=2)
    else:
        # The heads' steps are for the reader of the walk; their sum is one product of all heads at once.
        head_steps = _head_steps(mixed.out, output)
        step = filter.linear(
            mixed.out.reshape(batch * length, -1), output.reshape(-1, config.width), bias
        ).reshape(batch, length, config.width)
    if edit.head_steps is not None:
        # The whole moves by as much as the parts do: a neutral edit stays exact to the bit.
        before, head_steps = head_steps, apply(edit.head_steps, head_steps)
        step = step - jnp.sum(before - head_steps, axis=2)
    walked = LayerWalk(
        attention_norm_scale=scale,
        q=mixed.q,
        k=mixed.k,
        v=mixed.v,
        scores=mixed.scores,
        pattern=mixed.pattern,
        z=mixed.z,
        head_steps=head_steps,
        attention_step=apply(edit.attention_step, step),
    )
    return walked, mixed.state


def _head_steps(
    z: Float[Array, "batch position head head_width"], output: Float[Array, "head head_width width"]
) -> Float[Array, "batch position head width"]:
    """Each head through its own part of the output map; heads outermost in the product, where it is faster."""
    rows = z.reshape(-1, *z.shape[2:])
    steps = jnp.moveaxis(jnp.einsum("rhc,hcw->hrw", rows, output), 0, 1)
    return steps.reshape(*z.shape[:3], output.shape[-1])


def _feed_forward(passed: LayerWalk, weights: Layer, config: ModelConfig, edit: LayerWalk) -> LayerWalk:
    """The position-wise half of a layer, from ``resid_mid`` (or, in parallel layers, from the layer's start)."""
    source = passed.resid_pre if config.parallel else passed.resid_mid
    batch, length, _ = source.shape
    scale, stream = None, source
    if config.pre_norm:
        scale, stream = apply_norm(source, weights.feed_forward_norm, config, edit.feed_forward_norm_scale)
    w: FeedForwardParameters = weights.feed_forward

    def positions(rows: Float[Array, "rows any"]) -> Float[Array, "batch position any"]:
        return rows.reshape(batch, length, -1)

    rows = as_rows(stream)
    pre = apply(edit.pre, positions(filter.linear(rows, w.into, w.into_bias)))
    gated = None
    if w.gate is not None:
        gated = apply(edit.gated, positions(filter.linear(rows, w.gate, w.gate_bias)))
    post = filter.activate(as_rows(pre), config.feed_forward, None if gated is None else as_rows(gated))  # type: ignore[arg-type]
    post = apply(edit.post, positions(post))
    step = apply(edit.feed_forward_step, positions(filter.linear(as_rows(post), w.out, w.out_bias)))

    resid_post = _residual(passed.resid_mid, step) if config.residual else step
    if config.post_norm:
        scale, resid_post = apply_norm(resid_post, weights.feed_forward_norm, config, edit.feed_forward_norm_scale)
    return dataclasses.replace(
        passed,
        feed_forward_norm_scale=scale,
        pre=pre,
        gated=gated,
        post=post,
        feed_forward_step=step,
        resid_post=apply(edit.resid_post, resid_post),
    )


def apply_norm(
    stream: Stream, weights: Norm, config: ModelConfig, change: Change | None
) -> tuple[Float[Array, "batch position"], Stream]:
    """The norm's scale, edited, and the stream divided by it."""
    centered, scale = filter.norm_parts(as_rows(stream), config.norm, config.norm_epsilon)
    scale = apply(change, scale.reshape(stream.shape[:2]))
    out = filter.normalize(centered, scale.reshape(-1), weights.gain, weights.offset)
    return scale, out.astype(stream.dtype).reshape(stream.shape)


def _residual(stream: Stream, step: Stream) -> Stream:
    """The residual addition, on rows: what follows reads rows, and XLA then shares the sum with it."""
    return aggregate.add(as_rows(stream), as_rows(step)).reshape(stream.shape)


def as_rows(stream: Float[Array, "batch position any"]) -> Float[Array, "rows any"]:
    """Batch and position as one axis, which is what filters see."""
    return stream.reshape(-1, stream.shape[-1])
