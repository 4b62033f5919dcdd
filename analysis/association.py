"""What is the association for? Replace it, head by head or in a share of all heads, and see what is lost.

Every replacement is a pattern made beforehand, from the intact walk or from data, and goes in as an edit: values
are mixed under it whatever the text now says. So a model keeps everything but the association, and the loss says
what the association's dependence on the data was worth (Hassid et al. 2022, PAPA; Tay et al. 2021).
"""

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key

from minitf import aggregate
from minitf.analysis.patching import Metric, Progress, patch
from minitf.analysis.patterns import pairs_in_sight
from minitf.config import ModelConfig
from minitf.model import walk
from minitf.parameters import Parameters
from minitf.record import record
from minitf.walk import Change, Walk, put, with_as_many_heads

Pattern = Float[Array, "layer batch head query key"]
Mask = Bool[Array, "layer head"]
Replacement = Callable[[Walk, Walk, ModelConfig, Array], Pattern]

FRACTIONS = (0.0, 0.25, 0.5, 0.75, 1.0)
MOST_HEAVIER = 10.0  # times: a row of which less is left is not made as heavy as it was
# What replacements are made of, and what they are compared with.
READ = ("layers.resid_pre", "layers.scores", "layers.pattern", "logits")


def check(shapes: Walk) -> None:
    """Refuse a walk, or its shapes, that has no association. Raises ValueError."""
    if shapes.layers.pattern is None:
        raise ValueError("no layer of this model mixes by an association, so there is none to replace")


def kept(walk: Walk) -> Walk:
    """Of a walk, what replacements are made of; where layers differ, zeros after the heads of those with fewer.

    A head is what has an association of its own: of some mixers, a channel. Scores are there where every layer's
    association is made of scores.

    Raises:
        ValueError: no layer has an association.
    """
    check(walk)
    some = record(walk, lambda name: name in READ)
    pattern, scores = some.layers.pattern, some.layers.scores
    if isinstance(scores, tuple) and any(
        score is None and one is not None for score, one in zip(scores, pattern, strict=True)
    ):
        scores = None
    some = put(some, "layers.scores", None if scores is None else with_as_many_heads(scores, 1))
    return put(some, "layers.pattern", with_as_many_heads(pattern, 1))


def possible(intact: Walk) -> dict[str, Replacement]:
    """The replacements of which what they are made of is there; those of scores need scores."""
    return {
        name: replace
        for name, replace in REPLACEMENTS.items()
        if intact.layers.scores is not None or name not in OF_SCORES
    }


def uniform(intact: Walk, data: Walk, config: ModelConfig, key: Key[Array, ""]) -> Pattern:
    """Every key in sight counts the same; together as much as keys do on average over ``data``."""
    pattern = intact.layers.pattern
    seen = pairs_in_sight(pattern.shape[-1], config)
    share = seen / jnp.maximum(jnp.sum(seen, axis=-1, keepdims=True), 1)
    return jnp.broadcast_to(share.astype(pattern.dtype) * _total(data), pattern.shape)


def mean(intact: Walk, data: Walk, config: ModelConfig, key: Key[Array, ""]) -> Pattern:
    """The head's mean over ``data``, place by place."""
    return jnp.broadcast_to(_mean(data.layers.pattern), intact.layers.pattern.shape)


def by_lag(intact: Walk, data: Walk, config: ModelConfig, key: Key[Array, ""]) -> Pattern:
    """The mean over ``data`` as a function of the distance alone (Toeplitz), rows as heavy as the mean's."""
    average = _mean(data.layers.pattern)
    length = average.shape[-1]
    lag = np.arange(length)[:, None] - np.arange(length)[None, :] + length - 1
    counts = np.bincount(lag.reshape(-1), minlength=2 * length - 1)
    totals = jnp.zeros((*average.shape[:-2], 2 * length - 1), average.dtype).at[..., lag].add(average)
    constant = (totals / counts)[..., lag]
    return jnp.broadcast_to(_as_heavy(constant, average, config), intact.layers.pattern.shape)


def identity(intact: Walk, data: Walk, config: ModelConfig, key: Key[Array, ""]) -> Pattern:
    """Every position sees itself alone, as much as it sees of all on average over ``data``: nothing is mixed."""
    pattern = intact.layers.pattern
    return jnp.broadcast_to(jnp.eye(pattern.shape[-1], dtype=pattern.dtype) * _total(data), pattern.shape)


def shuffled(intact: Walk, data: Walk, config: ModelConfig, key: Key[Array, ""]) -> Pattern:
    """Each row's weights given to other keys in sight, drawn by head and query: sizes stay, places do not."""
    pattern = intact.layers.pattern
    layers, _, heads, length, _ = pattern.shape
    noise = jax.random.uniform(key, (layers, 1, heads, length, length))
    # What is not in sight comes last and in order; what is in sight, at random, and as it stands.
    seen = pairs_in_sight(length, config)
    order = jnp.argsort(jnp.where(seen, noise, jnp.inf), axis=-1)
    places = jnp.argsort(jnp.argsort(jnp.where(seen, jnp.arange(length), jnp.inf), axis=-1), axis=-1)
    mixed = jnp.take_along_axis(pattern, jnp.broadcast_to(order, pattern.shape), axis=-1)
    return jnp.take_along_axis(mixed, jnp.broadcast_to(places, pattern.shape), axis=-1)


def random(intact: Walk, data: Walk, config: ModelConfig, key: Key[Array, ""]) -> Pattern:
    """Softmax of standard normal scores, fixed for each head: the random Synthesizer's. Rows sum as on average."""
    pattern = intact.layers.pattern
    layers, _, heads, length, _ = pattern.shape
    scores = jax.random.normal(key, (layers, 1, heads, length, length), pattern.dtype)
    fixed = aggregate.associate(jnp.where(pairs_in_sight(length, config), scores, -jnp.inf))
    return jnp.broadcast_to(fixed * _total(data), pattern.shape)


def top_k(count: int) -> Replacement:
    """The ``count`` largest weights of each row, of equal ones the latest, made as heavy as the row."""

    def replacement(intact: Walk, data: Walk, config: ModelConfig, key: Key[Array, ""]) -> Pattern:
        pattern = intact.layers.pattern
        keys = pattern.shape[-1]
        first = jax.lax.top_k(jnp.abs(pattern)[..., ::-1], min(count, keys))[1]
        chosen = jnp.any(jax.nn.one_hot(keys - 1 - first, keys, dtype=bool), axis=-2)
        return _as_heavy(jnp.where(chosen, pattern, 0.0), pattern, config)

    return replacement


def low_rank(rank: int) -> Replacement:
    """The closest matrix of that rank; what is then out of sight, or negative in a head that never is, is cut off,
    and the rest made as heavy as the rows were, but no more than ten times heavier: of some rows nearly nothing is
    left, and what is are rounding errors.
    """

    def replacement(intact: Walk, data: Walk, config: ModelConfig, key: Key[Array, ""]) -> Pattern:
        pattern = intact.layers.pattern
        left, sizes, right = jnp.linalg.svd(pattern, full_matrices=False)
        close = (left[..., :rank] * sizes[..., None, :rank]) @ right[..., :rank, :]
        signed = jnp.any(pattern < 0, axis=(1, 3, 4), keepdims=True)
        return _as_heavy(jnp.where(signed, close, jnp.maximum(close, 0.0)), pattern, config, MOST_HEAVIER)

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


REPLACEMENTS: dict[str, Replacement] = {
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
OF_SCORES = ("positions only", "contents only")


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

    Where layers differ, NaN follows the heads of those with fewer. A run starts at its head's layer, and the heads
    of a layer run together (:mod:`minitf.analysis.patching`).

    Args:
        intact: reads its ``layers.resid_pre``.
        replacement: of one of the functions above.
        metric: of logits, such as those of :mod:`minitf.analysis.prediction_quality`.
        memory, progress: as :func:`minitf.analysis.patching.patch`.

    Raises:
        ValueError: as ``patch``.
    """
    own = _own_heads(replacement, _heads(parameters, replacement, config))
    source = put(Walk(), "layers.pattern", own)
    places = ("layers.pattern", ("head",))
    return patch(parameters, intact, source, metric, config, places, memory=memory, progress=progress)


def in_order(order: Int[np.ndarray, " place"], fraction: float, shape: tuple[int, int]) -> Mask:
    """The first heads of an order (numbers ``layer * heads + head``), that share of all that are in it.

    ``shape`` is how many layers and heads a mask has.
    """
    chosen = np.zeros(math.prod(shape), bool)
    chosen[order[: replaced(fraction, len(order))]] = True
    return jnp.asarray(chosen.reshape(shape))


def replaced(fraction: float, heads: int) -> int:
    """How many of so many heads come nearest to a share of them; a half counts as one."""
    return math.floor(fraction * heads + 0.5)


def every_share(
    orders: Mapping[str, Int[np.ndarray, " place"]], shape: tuple[int, int]
) -> Bool[Array, "mask _ _"]:
    """Masks of every share of the heads in :data:`FRACTIONS`, order by order, for :func:`with_heads_replaced`."""
    return jnp.stack([in_order(order, share, shape) for order in orders.values() for share in FRACTIONS])


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
    expected = (replacement.shape[0], replacement.shape[2])
    if masks.shape[1:] != expected:
        raise ValueError(f"the masks are of {masks.shape[1:]} layers and heads; the replacement has {expected}")
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
    heads = _heads(parameters, replacement, config)

    def one(mask: Array) -> Array:
        here = mask[:, None, :, None, None].astype(replacement.dtype)
        change = _own_heads(Change(keep=1 - here, put=here * replacement), heads)
        return metric(walk(parameters, tokens, config, edit=put(Walk(), "layers.pattern", change)).logits)

    return jax.lax.map(one, masks)


def _heads(parameters: Parameters, pattern: Pattern, config: ModelConfig) -> tuple[int, ...] | None:
    """How many heads' associations each layer has, where layers differ; None where they do not."""
    if not isinstance(config.mixer, tuple):
        return None
    tokens = jax.ShapeDtypeStruct((pattern.shape[1], pattern.shape[-1]), jnp.int32)
    like = jax.eval_shape(lambda p, t: walk(p, t, config).layers.pattern, parameters, tokens)
    return tuple(0 if x is None else x.shape[1] for x in like) if isinstance(like, tuple) else None


def _own_heads(whole: Any, heads: tuple[int, ...] | None) -> Any:
    """A pattern, or a change of it, for as many heads in every layer, as the model's walk has it: each its own."""
    if heads is None:
        return whole
    own = lambda number, count: jax.tree.map(lambda x: x[number, :, :count], whole)
    return tuple(own(number, count) if count else None for number, count in enumerate(heads))


def orders(
    importance: Float[np.ndarray, "layer head"], seeds: Sequence[int]
) -> dict[str, Int[np.ndarray, " place"]]:
    """In which order to replace heads: the least important first, the most important first, and at random.

    Heads that a layer does not have, whose importance is NaN, are in none.
    """
    flat = np.asarray(importance).reshape(-1)
    ranked = np.argsort(flat, kind="stable")
    ranked = ranked[~np.isnan(flat[ranked])]
    found = {"least important first": ranked, "most important first": ranked[::-1]}
    for seed in seeds:
        found[f"random order {seed}"] = np.random.default_rng(seed).permutation(np.sort(ranked))
    return found


def _as_heavy(
    weights: Float[Array, "layer batch head query key"],
    rows: Float[Array, "layer batch head query key"],
    config: ModelConfig,
    most: float = jnp.inf,
) -> Float[Array, "layer batch head query key"]:
    """What is in sight, its sizes adding up to what they do in ``rows``: to one, where those are probabilities.

    Nothing is made more than ``most`` times as large.
    """
    weights = jnp.where(pairs_in_sight(weights.shape[-1], config), weights, 0.0)
    size, aim = (jnp.sum(jnp.abs(x), axis=-1, keepdims=True) for x in (weights, rows))
    return weights * jnp.minimum(aim / jnp.where(size == 0, 1.0, size), most)


def _total(data: Walk) -> Float[Array, "layer 1 head query 1"]:
    """What a row's weights add up to, on average: one, where they are probabilities."""
    return jnp.sum(_mean(data.layers.pattern), axis=-1, keepdims=True)


def _mean(leaf: Float[Array, "layer batch head query key"]) -> Float[Array, "layer 1 head query key"]:
    return jnp.mean(leaf, axis=1, keepdims=True)
