"""Direct logit attribution: a logit as a sum over the steps, heads and neurons that wrote to the residual stream.

With the final norm's scale frozen at the value it had, the final norm and the unembedding are an affine map, so
what each part of the end adds to a logit is its inner product with one direction. The bias part is what the map
adds by itself.
"""

import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float, Int

from minitf.analysis.given import check_targets
from minitf.analysis.lens import output_vectors
from minitf.config import ModelConfig
from minitf.filter import in_statistics_dtype
from minitf.parameters import Parameters, of_layers, output_map
from minitf.walk import Leaf, Walk, get, leaf, with_as_many_heads

Targets = Int[Array, "batch position"]
PerPlace = Float[Array, "batch position"]
PerLayer = Float[Array, "layer batch position"]


@struct.dataclass
class StepAttribution:
    """A logit (or a difference of two) in parts; ``total`` of them is the logit.

    ``start`` is the embedding's part, with the position vector; ``feed_forward`` is None in a model without.
    """

    start: Leaf = leaf("batch position")
    attention: Leaf = leaf("layer batch position")
    feed_forward: Leaf = leaf("layer batch position")
    bias: Leaf = leaf("batch position")

    @property
    def total(self) -> PerPlace:
        """The sum of all parts."""
        feed_forward = 0.0 if self.feed_forward is None else jnp.sum(self.feed_forward, axis=0)
        return self.start + jnp.sum(self.attention, axis=0) + feed_forward + self.bias


@struct.dataclass
class PartAttribution:
    """A sub-layer's attribution by its parts (heads, or neurons), and the rest, its output bias.

    ``parts`` summed over its last axis plus ``bias`` is the sub-layer's entry in :class:`StepAttribution`.
    """

    parts: Leaf = leaf("layer batch position part")
    bias: Leaf = leaf("layer batch position")


def by_step(
    parameters: Parameters, walk: Walk, config: ModelConfig, target: Targets, against: Targets | None = None
) -> StepAttribution:
    """The logit of ``target``, or the difference to the one of ``against``, by start and sub-layer.

    Each position's logits are of that position's own end, so every part is ``[batch, position]``. The sum is the
    logit of the walk, unless an edit moved a station between the steps, the context or the logits.

    Raises:
        ValueError: the end of this model's walk is not the sum of its steps under one norm.
    """
    toward, bias = direction(parameters, walk, config, target, against)
    steps = ["layers.attention_step", *(["layers.feed_forward_step"] if config.feed_forward != "none" else [])]
    _check_held(walk, *steps)
    layers = walk.layers
    return StepAttribution(
        start=_along(walk.start, toward),
        attention=_along(layers.attention_step, toward),
        feed_forward=None if layers.feed_forward_step is None else _along(layers.feed_forward_step, toward),
        bias=bias,
    )


def by_head(
    parameters: Parameters, walk: Walk, config: ModelConfig, target: Targets, against: Targets | None = None
) -> PartAttribution:
    """The attention's part by head, ``[layer, batch, position, head]``. Raises as :func:`by_step`.

    Among layers that differ, those with fewer heads have zeros after their own.
    """
    toward, _ = direction(parameters, walk, config, target, against)
    _check_held(walk, "layers.head_steps")
    steps = in_statistics_dtype(with_as_many_heads(walk.layers.head_steps, 2))
    parts = jnp.einsum("lbphw,bpw->lbph", steps, toward)
    return PartAttribution(
        parts, _bias_along(of_layers(parameters, lambda layer: output_map(layer)[1]), toward, config)
    )


def by_neuron(
    parameters: Parameters, walk: Walk, config: ModelConfig, target: Targets, against: Targets | None = None
) -> PartAttribution:
    """The feed-forward's part by neuron, ``[layer, batch, position, hidden]``: activation times output row.

    Raises ValueError as :func:`by_step`, and for a model without feed-forward.
    """
    if walk.layers.post is None:
        raise ValueError(
            "this walk has no neurons ('layers.post'): the model has no feed-forward, or it was dropped"
        )
    toward, _ = direction(parameters, walk, config, target, against)
    out: Array = of_layers(parameters, lambda layer: layer.feed_forward.out)  # type: ignore[assignment]
    bias = of_layers(parameters, lambda layer: layer.feed_forward.out_bias)
    rows = jnp.einsum("lhw,bpw->lbph", in_statistics_dtype(out), toward)
    parts = in_statistics_dtype(walk.layers.post) * rows
    return PartAttribution(parts, _bias_along(bias, toward, config))


def direction(
    parameters: Parameters, walk: Walk, config: ModelConfig, target: Targets, against: Targets | None = None
) -> tuple[Float[Array, "batch position width"], PerPlace]:
    """Where in the residual stream the logit grows, and its bias: ``logit = end . direction + bias``.

    The direction is the token's output vector times the final norm's gain, centered where the norm centers, over
    the norm's frozen scale: centering a point and then taking the product is the product with the centered vector.

    Raises:
        ValueError: a model with post-norms or without residual stream, or targets that do not fit.
    """
    _check(walk, config, target, against)
    table = output_vectors(parameters, config)
    vectors = in_statistics_dtype(table[:, target] if against is None else table[:, target] - table[:, against])
    output = jnp.moveaxis(vectors, 0, -1)
    bias = jnp.zeros(target.shape, output.dtype)
    if parameters.unembedding_bias is not None:
        bias = bias + parameters.unembedding_bias[target]
        bias = bias if against is None else bias - parameters.unembedding_bias[against]
    norm = parameters.final_norm
    if norm.offset is not None:
        bias = bias + output @ norm.offset
    if not config.pre_norm:
        return output, bias
    output = output if norm.gain is None else output * norm.gain
    if config.norm == "layer":
        output = output - jnp.mean(output, axis=-1, keepdims=True)
    return output / walk.final_norm_scale[..., None], bias


def chosen_logit(
    logits: Float[Array, "batch position vocabulary"], target: Targets, against: Targets | None = None
) -> PerPlace:
    """What the parts sum to: the target's logit, or its lead over ``against``."""
    logit = lambda token: jnp.take_along_axis(logits, token[..., None], axis=-1)[..., 0]
    return logit(target) if against is None else logit(target) - logit(against)


def _along(
    points: Float[Array, "*rest batch position width"], toward: Array
) -> Float[Array, "*rest batch position"]:
    return jnp.einsum("...w,...w->...", in_statistics_dtype(points), toward)


def _bias_along(bias: Array | None, toward: Array, config: ModelConfig) -> PerLayer:
    if bias is None:
        return jnp.zeros((config.layers, *toward.shape[:2]), toward.dtype)
    return jnp.einsum("lw,bpw->lbp", in_statistics_dtype(bias), toward)


def _check(walk: Walk, config: ModelConfig, target: Targets, against: Targets | None) -> None:
    if config.post_norm:
        raise ValueError(
            "direct logit attribution needs norm_placement='pre' (or norm='none'): with post-norms, every "
            "later norm rescales a step, and the end is not the sum of the steps"
        )
    if config.unembedding_transform:
        raise ValueError("direct logit attribution needs a linear read-out; this model's has an activation in it")
    if not config.residual:
        raise ValueError("direct logit attribution needs residual=True: without it the end is the last step alone")
    _check_held(walk, "start", *(["final_norm_scale"] if config.pre_norm else []))
    check_targets(target, walk.start, config)
    if against is not None:
        check_targets(against, walk.start, config, "against")


def _check_held(walk: Walk, *names: str) -> None:
    for name in names:
        if get(walk, name) is None:
            raise ValueError(f"direct logit attribution reads {name!r}, which this walk does not hold")
