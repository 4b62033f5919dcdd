"""How well predictions are, and how sure that is: loss, accuracy, and divergence from the intact model's."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Float, Int
from scipy import special

from minitf.analysis.patching import Metric
from minitf.train.batch import NO_TARGET


@struct.dataclass
class Quality:
    """How well a model predicts, each a mean over all targets.

    ``loss`` in nats a token; ``accuracy`` of the most likely token; ``divergence`` in nats, of the intact model's
    prediction from this one's.
    """

    loss: Any
    accuracy: Any
    divergence: Any


def next_tokens(tokens: Int[Array, "batch position"]) -> Int[Array, "batch position"]:
    """What a model that predicts the next token should answer at each position; -1 at the last."""
    return jnp.pad(tokens[:, 1:], ((0, 0), (0, 1)), constant_values=NO_TARGET)


def quality(
    logits: Float[Array, "batch position vocabulary"],
    targets: Int[Array, "batch position"],
    intact: Float[Array, "batch position vocabulary"],
) -> Quality:
    """Of the predictions where there is a target (not -1), compared with those of the logits ``intact``."""
    return jax.tree.map(jnp.mean, quality_by_window(logits, targets, intact))


def quality_by_window(
    logits: Float[Array, "batch position vocabulary"],
    targets: Int[Array, "batch position"],
    intact: Float[Array, "batch position vocabulary"],
) -> Quality:
    """What each window adds to the quality, ``[batch]``: sums over its targets, so scaled that their mean over
    windows is the mean over all targets.
    """
    says, said = (jax.nn.log_softmax(x.astype(jnp.float32)) for x in (logits, intact))
    counts = targets != NO_TARGET
    share = len(targets) / jnp.sum(counts)
    of_each = lambda x: jnp.sum(jnp.where(counts, x, 0.0), axis=-1) * share
    right = jnp.maximum(targets, 0)
    return Quality(
        loss=-of_each(jnp.take_along_axis(says, right[..., None], axis=-1)[..., 0]),
        accuracy=of_each(jnp.argmax(says, axis=-1) == right),
        divergence=of_each(jnp.sum(jnp.exp(said) * (said - says), axis=-1)),
    )


def metric(targets: Int[Array, "batch position"], intact: Float[Array, "batch position vocabulary"]) -> Metric:
    """The quality as three numbers of logits, for what follows; made once, it is compiled once."""
    of_each = metric_by_window(targets, intact)
    return lambda logits: jnp.mean(of_each(logits), axis=0)


def metric_by_window(
    targets: Int[Array, "batch position"], intact: Float[Array, "batch position vocabulary"]
) -> Metric:
    """The same of each window, ``[batch, three]``, as :func:`quality_by_window` has it."""

    def three(logits: Array) -> Array:
        # Not to be worked out while compiling, as constants would be.
        found = quality_by_window(logits, targets, jax.lax.optimization_barrier(intact))
        return jnp.stack([found.loss, found.accuracy, found.divergence], axis=-1)

    return three


def as_quality(numbers: Float[Array, "*places three"]) -> Quality:
    """What :func:`metric` or :func:`metric_by_window` gave, by name."""
    return Quality(*jnp.moveaxis(numbers, -1, 0))


def margin(
    growth: Float[np.ndarray, "*places window"], targets: Int[Array | np.ndarray, "window position"]
) -> Float[np.ndarray, "*places"]:
    """Half of the 95 % interval (Student's) of a mean over targets, from what each window adds to it.

    Windows count as drawn one apart from another, and by how many targets they have; of one, NaN.
    """
    counts = np.sum(np.asarray(targets) != NO_TARGET, axis=-1)
    many = len(counts)
    if many < 2:
        return np.full(growth.shape[:-1], np.nan)
    off = growth - growth.mean(axis=-1, keepdims=True) * (counts / counts.mean())
    error = np.sqrt(np.sum(off**2, axis=-1) / (many * (many - 1)))
    return np.asarray(special.stdtrit(many - 1, 0.975) * error)
