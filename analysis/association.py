"""What is the association for? Replace it, head by head or in a share of all heads, and see what is lost.

Every replacement is a pattern made beforehand, from the intact walk or from data, and goes in as an edit: values
are mixed under it whatever the text now says. So a model keeps everything but the association, and the loss says
what the association's dependence on the data was worth (Hassid et al. 2022, PAPA; Tay et al. 2021).
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Bool, Float, Int, Key

from minitf import aggregate
from minitf.analysis.patching import Metric, Progress, patch
from minitf.config import ModelConfig
from minitf.model import walk
from minitf.parameters import Parameters
from minitf.walk import Change, Walk, put

Pattern = Float[Array, "layer batch head query key"]
Mask = Bool[Array, "layer head"]

FRACTIONS = (0.0, 0.25, 0.5, 0.75, 1.0)
# What replacements are made of, and what they are compared with.
READ = ("layers.resid_pre", "layers.scores", "layers.pattern", "logits")


@struct.dataclass
class Quality:
    """How well a model predicts, each a mean over sequences and positions.

    ``loss`` in nats a token; ``accuracy`` of the most likely token; ``divergence`` in nats, of the intact model's
    prediction from this one's.
    """

    loss: Any
    accuracy: Any
    divergence: Any


def uniform(intact: Walk, data: Walk, config: ModelConfig, key: Key[Array, ""]) -> Pattern:
    """Every key in sight counts the same."""
    return _normalized(jnp.ones_like(intact.layers.pattern), config)


def mean(intact: Walk, data: Walk, config: ModelConfig, key: Key[Array, ""]) -> Pattern:
    """The head's mean over ``data``, place by place."""
    return jnp.broadcast_to(_mean(data.layers.pattern), intact.layers.pattern.shape)


def by_lag(intact: Walk, data: Walk, config: ModelConfig, key: Key[Array, ""]) -> Pattern:
    """The mean over ``data`` as a function of the distance alone (Toeplitz), rows made to sum to one again."""
    average = _mean(data.layers.pattern)
    length = average.shape[-1]
    lag = np.arange(length)[:, None] - np.arange(length)[None, :] + length - 1
    counts = np.bincount(lag.reshape(-1), minlength=2 * length - 1)
    totals = jnp.zeros((*average.shape[:-2], 2 * length - 1), average.dtype).at[..., lag].add(average)
    constant = (totals / counts)[..., lag]
    return jnp.broadcast_to(_normalized(constant, config), intact.layers.pattern.shape)


def identity(intact: Walk, data: Walk, config: ModelConfig, key: Key[Array, ""]) -> Pattern:
    """Every position sees itself alone: nothing is mixed."""
    pattern = intact.layers.pattern
    return jnp.broadcast_to(jnp.eye(pattern.shape[-1], dtype=pattern.dtype), pattern.shape)


def shuffled(intact: Walk, data: Walk, config: ModelConfig, key: Key[Array, ""]) -> Pattern:
    """Each row's weights given to other keys in sight, drawn by head and query: sizes stay, places do not."""
    pattern = intact.layers.pattern
    layers, _, heads, length, _ = pattern.shape
    noise = jax.random.uniform(key, (layers, 1, heads, length, length))
    # What is not in sight comes last and in order, so it keeps its place.
    order = jnp.argsort(jnp.where(_seen(length, config), noise, jnp.inf), axis=-1)
    return jnp.take_along_axis(pattern, jnp.broadcast_to(order, pattern.shape), axis=-1)


def random(intact: Walk, data: Walk, config: ModelConfig, key: Key[Array, ""]) -> Pattern:
    """Softmax of standard normal scores, fixed for each head: the random Synthesizer's."""
    pattern = intact.layers.pattern
    layers, _, heads, length, _ = pattern.shape
    scores = jax.random.normal(key, (layers, 1, heads, length, length), pattern.dtype)
    fixed = aggregate.associate(jnp.where(_seen(length, config), scores, -jnp.inf))
    return jnp.broadcast_to(fixed, pattern.shape)


def top_k(count: int) -> Callable[[Walk, Walk, ModelConfig, Array], Pattern]:
    """The ``count`` largest weights of each row, made to sum to one."""

    def replacement(intact: Walk, data: Walk, config: ModelConfig, key: Key[Array, ""]) -> Pattern:
        pattern = intact.layers.pattern
        least = jax.lax.top_k(pattern, min(count, pattern.shape[-1]))[0][..., -1:]
        return _normalized(jnp.where(pattern >= least, pattern, 0.0), config)

    return replacement


def low_rank(rank: int) -> Callable[[Walk, Walk, ModelConfig, Array], Pattern]:
    """The closest matrix of that rank; what is then negative or out of sight is cut off, the rest sums to one."""

    def replacement(intact: Walk, data: Walk, config: ModelConfig, key: Key[Array, ""]) -> Pattern:
        left, sizes, right = jnp.linalg.svd(intact.layers.pattern, full_matrices=False)
        close = (left[..., :rank] * sizes[..., None, :rank]) @ right[..., :rank, :]
        return _normalized(jnp.maximum(close, 0.0), config)

    return replacement


def positions_only(intact: Walk, data: Walk, config: ModelConfig, key: Key[Array, ""]) -> Pattern:
    """Softmax of the mean score over ``data``: the part of the scores that the places explain."""
    average = aggregate.associate(_mean(data.layers.scores))
    return jnp.broadcast_to(average, intact.layers.pattern.shape)


def contents_only(intact: Walk, data: Walk, config: ModelConfig, key: Key[Array, ""]) -> Pattern:
    """Softmax of the scores less their mean over ``data``: the part that the places do not explain."""
    average = _mean(data.layers.scores)
    # Where nothing is seen both are minus infinity, and their difference would be no number.
    less = jnp.where(jnp.isfinite(average), intact.layers.scores - average, -jnp.inf)
    return aggregate.associate(less)


REPLACEMENTS: dict[str, Callable[[Walk, Walk, ModelConfig, Array], Pattern]] = {
    "uniform": uniform,
    "mean over data": mean,
    "mean per lag": by_lag,
    "identity": identity,
    "rows shuffled": shuffled,
    "random": random,
    "top 1": top_k(1),
    "top 4": top_k(4),
    "rank 1": low_rank(1),
    "rank 4": low_rank(4),
    "positions only": positions_only,
    "contents only": contents_only,
}


def quality(
    logits: Float[Array, "batch position vocabulary"],
    tokens: Int[Array, "batch position"],
    intact: Float[Array, "batch position vocabulary"],
) -> Quality:
    """Of the predictions at all positions but the last; ``intact`` are the logits that they are compared with."""
    says, said = (jax.nn.log_softmax(x[:, :-1].astype(jnp.float32)) for x in (logits, intact))
    target = tokens[:, 1:, None]
    return Quality(
        loss=-jnp.mean(jnp.take_along_axis(says, target, axis=-1)),
        accuracy=jnp.mean(jnp.argmax(says, axis=-1) == target[..., 0]),
        divergence=jnp.mean(jnp.sum(jnp.exp(said) * (said - says), axis=-1)),
    )


def metric(tokens: Int[Array, "batch position"], intact: Float[Array, "batch position vocabulary"]) -> Metric:
    """The quality as three numbers of logits, for what follows; made once, it is compiled once."""

    def three(logits: Array) -> Array:
        # Not to be worked out while compiling, as constants would be.
        found = quality(logits, tokens, jax.lax.optimization_barrier(intact))
        return jnp.stack([found.loss, found.accuracy, found.divergence])

    return three


def as_quality(numbers: Float[Array, "*places three"]) -> Quality:
    """What :func:`metric` gave, by name."""
    return Quality(*jnp.moveaxis(numbers, -1, 0))


def by_head(
    parameters: Parameters,
    intact: Walk,
    replacement: Pattern,
    metric: Metric,
    config: ModelConfig,
    *,
    memory: int | None = None,
    progress: Progress = iter,
) -> Float[Array, "layer head *_"]:
    """Each head's association replaced alone: the metric of the logits, ``[layer, head, ...]``.

    A run starts at its head's layer, and the heads of a layer run together (:mod:`minitf.analysis.patching`).

    Args:
        intact: reads its ``layers.resid_pre``.
        replacement: of one of the functions above.
        metric: of logits, such as :func:`metric`'s.
        memory, progress: as :func:`minitf.analysis.patching.patch`.

    Raises:
        ValueError: as ``patch``.
    """
    source = put(Walk(), "layers.pattern", replacement)
    places = ("layers.pattern", ("head",))
    return patch(parameters, intact, source, metric, config, places, memory=memory, progress=progress)


def in_order(order: Int[np.ndarray, " place"], fraction: float, layers: int) -> Mask:
    """The first heads of an order (numbers ``layer * heads + head``), that share of all."""
    chosen = np.zeros(len(order), bool)
    chosen[order[: round(fraction * len(order))]] = True
    return jnp.asarray(chosen.reshape(layers, -1))


def every_share(orders: Mapping[str, Int[np.ndarray, " place"]], layers: int) -> Bool[Array, "mask _ _"]:
    """Masks of every share of the heads in :data:`FRACTIONS`, order by order, for :func:`with_heads_replaced`."""
    return jnp.stack([in_order(order, share, layers) for order in orders.values() for share in FRACTIONS])


def with_heads_replaced(
    parameters: Parameters,
    tokens: Int[Array, "batch position"],
    replacement: Pattern,
    masks: Bool[Array, "mask _ _"],
    metric: Metric,
    config: ModelConfig,
) -> Array:
    """The heads of each mask replaced together: the metric of the logits, ``[mask, ...]``, in one program.

    Raises ValueError for masks that are not of this model's heads.
    """
    if masks.shape[1:] != (config.layers, config.heads):
        raise ValueError(
            f"the masks are of {masks.shape[1:]} layers and heads; the model has {(config.layers, config.heads)}"
        )
    return _masked(parameters, tokens, replacement, masks, metric=metric, config=config)


@partial(jax.jit, static_argnames=("metric", "config"))
def _masked(
    parameters: Parameters,
    tokens: Array,
    replacement: Pattern,
    masks: Array,
    *,
    metric: Metric,
    config: ModelConfig,
) -> Array:
    def one(mask: Array) -> Array:
        here = mask[:, None, :, None, None].astype(replacement.dtype)
        edit = put(Walk(), "layers.pattern", Change(keep=1 - here, put=here * replacement))
        return metric(walk(parameters, tokens, config, edit=edit).logits)

    return jax.lax.map(one, masks)


def orders(
    importance: Float[np.ndarray, "layer head"], seeds: Sequence[int]
) -> dict[str, Int[np.ndarray, " place"]]:
    """In which order to replace heads: the least important first, the most important first, and at random."""
    ranked = np.argsort(np.asarray(importance).reshape(-1), kind="stable")
    found = {"least important first": ranked, "most important first": ranked[::-1]}
    for seed in seeds:
        found[f"random order {seed}"] = np.random.default_rng(seed).permutation(len(ranked))
    return found


def _seen(length: int, config: ModelConfig) -> Bool[Array, "query key"]:
    return aggregate.allowed_pairs(length, config.causal, config.attend_self)


def _normalized(weights: Float[Array, "*axes query key"], config: ModelConfig) -> Float[Array, "*axes query key"]:
    """What is in sight, made to sum to one; rows of nothing stay so."""
    weights = jnp.where(_seen(weights.shape[-1], config), weights, 0.0)
    total = jnp.sum(weights, axis=-1, keepdims=True)
    return weights / jnp.where(total == 0, 1.0, total)


def _mean(leaf: Float[Array, "layer batch head query key"]) -> Float[Array, "layer 1 head query key"]:
    return jnp.mean(leaf, axis=1, keepdims=True)
