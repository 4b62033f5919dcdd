"""Steering: a direction for a concept, read from contrasting texts, and added to the walk in any dose.

Two directions: the contrastive mean difference (Rimsky et al. 2024, CAA) and the principal-component reading
vector (Zou et al. 2023, RepE). Every effect is to be compared with that of random directions of the same length.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int, Key

from minitf.config import ModelConfig
from minitf.edits import steer
from minitf.filter import in_statistics_dtype
from minitf.model import walk
from minitf.parameters import Parameters
from minitf.resume import walk_from
from minitf.walk import Leaf, Walk, get, leaf, leaf_axes

# From logits [batch, position, vocabulary] to a number, or to one for each sequence.
Metric = Callable[[Array], Array]


@struct.dataclass
class Reading:
    """A unit ``direction``, the ``center`` of the states it was read from, and how well it tells them apart.

    ``agreement`` is the share of pairs whose positive member lies further along the direction: at least 1/2,
    unless members of some pairs lie equally far.
    """

    direction: Leaf = leaf("width")
    center: Leaf = leaf("width")
    agreement: Leaf = leaf("")

    def score(self, states: Float[Array, "*places width"]) -> Float[Array, "*places"]:
        """How far states lie along the direction, from the center."""
        return (in_statistics_dtype(states) - self.center) @ self.direction


def last_states(
    passed: Walk, valid: Bool[Array, "batch position"] | None = None, name: str = "layers.resid_post"
) -> Float[Array, "layer batch width"]:
    """A leaf at each sequence's last (valid) position: what directions are read from, layer by layer."""
    values = get(passed, name)
    if values is None or leaf_axes()[name] != ("layer", "batch", "position", "width"):
        raise ValueError(f"states are read from a leaf of the residual stream that the walk holds, not {name!r}")
    if valid is None:
        return values[:, :, -1]
    last = valid.shape[1] - 1 - jnp.argmax(valid[:, ::-1], axis=1)
    return jnp.take_along_axis(values, last[None, :, None, None], axis=2)[:, :, 0]


def mean_difference(
    positive: Float[Array, "examples width"], negative: Float[Array, "others width"]
) -> Float[Array, " width"]:
    """The mean of the positive states less that of the negative ones, at its natural length.

    The examples need not be paired. Raises ValueError where there are none.
    """
    if not len(positive) or not len(negative):
        raise ValueError(
            f"a mean difference needs examples of both kinds, not {len(positive)} and {len(negative)}"
        )
    mean = lambda x: jnp.mean(in_statistics_dtype(x), axis=0)
    return mean(positive) - mean(negative)


def reading_vector(
    positive: Float[Array, "pair width"], negative: Float[Array, "other_pair width"], key: Key[Array, ""]
) -> Reading:
    """The first principal component of the differences within pairs, each taken in a random order.

    The order must be random: if all differences were positive less negative, the concept would be their mean, and
    centering would remove it. Half of the pairs are turned around, so that no part of it is left in the mean. The
    sign is the one for which more positive members lie further along (Zou et al. 2023).

    Raises:
        ValueError: the states are not paired, or fewer than two pairs.
    """
    if positive.shape != negative.shape:
        raise ValueError(
            f"pairs need as many positive as negative states, not {positive.shape} and {negative.shape}"
        )
    pairs = len(positive)
    if pairs < 2:
        raise ValueError(f"a principal component needs at least 2 pairs, not {pairs}")
    positive, negative = in_statistics_dtype(positive), in_statistics_dtype(negative)
    order = jax.random.permutation(key, jnp.where(jnp.arange(pairs) % 2 == 0, 1.0, -1.0))
    differences = order[:, None] * (positive - negative)
    centered = differences - jnp.mean(differences, axis=0)
    component = jnp.linalg.svd(centered, full_matrices=False)[2][0]
    along = (positive - negative) @ component
    further, less_far = jnp.mean(along > 0), jnp.mean(along < 0)
    return Reading(
        direction=jnp.where(further >= less_far, component, -component),
        center=jnp.mean(jnp.concatenate([positive, negative]), axis=0),
        agreement=jnp.maximum(further, less_far),
    )


def random_directions(
    key: Key[Array, ""], vector: Float[Array, " width"], count: int
) -> Float[Array, "{count} width"]:
    """Directions drawn uniformly, as long as the vector: the control for every steering effect."""
    drawn = jax.random.normal(key, (count, vector.shape[0]), in_statistics_dtype(vector).dtype)
    drawn = drawn / jnp.linalg.norm(drawn, axis=-1, keepdims=True)
    return (drawn * jnp.linalg.norm(in_statistics_dtype(vector))).astype(vector.dtype)


def dose_response(
    parameters: Parameters,
    tokens: Int[Array, "batch position"],
    vectors: Float[Array, "vector width"],
    coefficients: Float[Array, " dose"],
    metric: Metric,
    config: ModelConfig,
    layer: int,
    *,
    name: str = "layers.resid_post",
    position: Any = None,
    valid: Bool[Array, "batch position"] | None = None,
) -> Float[Array, "vector dose *metric"]:
    """The metric of the logits for every vector in every dose; the layers before the edit run once.

    Give the concept's vector with :func:`random_directions` of it, and a coefficient 0 for the unsteered model.
    Raises ValueError as :func:`minitf.edits.steer`.
    """
    if not 0 <= layer < config.layers:
        raise ValueError(f"there is no layer {layer} to steer; this model has layers 0 to {config.layers - 1}")
    stream = walk(parameters, tokens, config, valid=valid, unroll=True).layers.resid_pre[layer]
    shapes = jax.eval_shape(lambda p, s: walk_from(p, s, config, layer, valid=valid), parameters, stream)

    def steered(vector: Array, coefficient: Array) -> Array:
        edit = steer(shapes, vector, layer=0, coefficient=coefficient, name=name, position=position)
        return metric(walk_from(parameters, stream, config, layer, edit=edit, valid=valid).logits)

    # One vmap over all pairs, not one inside another: XLA's products on a CPU refuse arrays of many axes.
    pairs = len(vectors), len(coefficients)
    found = jax.vmap(steered)(jnp.repeat(vectors, pairs[1], axis=0), jnp.tile(coefficients, pairs[0]))
    return jax.tree.map(lambda values: values.reshape(*pairs, *values.shape[1:]), found)
