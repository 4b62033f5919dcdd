"""Questions asked of attention patterns: how spread, how far, onto what, and how like a template.

Patterns are ``[..., query, key]``, as ``layers.pattern`` is with ``[layer, batch, head]`` before. Entropies are in
nats. Template scores follow Elhage et al. 2021 and Olsson et al. 2022.
"""

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int, Key

from minitf import aggregate
from minitf.config import ModelConfig
from minitf.filter import in_statistics_dtype
from minitf.layer import mixer_of
from minitf.mixers import Convolution, Mixer, Softmax
from minitf.walk import Leaf, leaf

Pattern = Float[Array, "*rest query key"]
PerQuery = Float[Array, "*rest query"]
Tokens = Int[Array, "batch position"]
Template = Bool[Array, "batch query key"]


@struct.dataclass
class AttentionStatistics:
    """Means over the queries of a batch, each ``[layer, head]``; the mass on the first key is the sink's."""

    entropy: Leaf = leaf("layer head")
    entropy_share: Leaf = leaf("layer head")
    distance: Leaf = leaf("layer head")
    first: Leaf = leaf("layer head")
    itself: Leaf = leaf("layer head")
    previous: Leaf = leaf("layer head")


def entropy(pattern: Pattern) -> PerQuery:
    """``-sum A log A`` of every query, between 0 and the log of the number of keys it may see."""
    a = in_statistics_dtype(pattern)
    return -jnp.sum(jnp.where(a > 0, a * jnp.log(jnp.where(a > 0, a, 1.0)), 0.0), axis=-1)


def entropy_share(pattern: Pattern, allowed: Bool[Array, "*#rest query key"]) -> PerQuery:
    """Entropy over the log of the number of allowed keys: 1 is uniform; 0 also where one key is allowed."""
    most = jnp.log(jnp.maximum(jnp.sum(allowed, axis=-1), 1).astype(jnp.float32))
    return jnp.where(most > 0, entropy(pattern) / jnp.where(most > 0, most, 1.0), 0.0)


def mean_distance(pattern: Pattern) -> PerQuery:
    """``sum A |query - key|``, in positions."""
    query, key = pattern.shape[-2:]
    distance = jnp.abs(jnp.arange(query)[:, None] - jnp.arange(key)[None, :])
    return jnp.sum(in_statistics_dtype(pattern) * distance, axis=-1)


def mass_on_first(pattern: Pattern) -> PerQuery:
    """The mass on position 0: what an attention sink draws."""
    return pattern[..., 0]


def mass_on_itself(pattern: Pattern) -> PerQuery:
    """The mass on the query's own position."""
    return jnp.diagonal(pattern, axis1=-2, axis2=-1)


def mass_on_previous(pattern: Pattern) -> PerQuery:
    """The mass on the position before; 0 for the first query, which has none."""
    below = jnp.diagonal(pattern, offset=-1, axis1=-2, axis2=-1)
    return jnp.concatenate([jnp.zeros_like(pattern[..., :1, 0]), below], axis=-1)


def statistics(
    pattern: Float[Array, "layer batch head query key"] | tuple,
    config: ModelConfig,
    valid: Bool[Array, "batch position"] | None = None,
) -> AttentionStatistics:
    """Every statistic, averaged over the batch's valid queries. ``config`` is of these layers: of one alone,
    ``config.layer(number)``.

    Raises ValueError for layers that differ in their heads: ask for each by itself.
    """
    if isinstance(pattern, tuple):
        raise ValueError(
            "the layers differ in their heads; ask for one at a time: statistics(pattern[layer][None], "
            "config.layer(layer))"
        )
    batch, _, query, _ = pattern.shape[1:]
    valid = jnp.ones((batch, query), bool) if valid is None else valid
    allowed = pairs_in_sight(query, config) & valid[None, :, None, None, :]
    weight = valid[None, :, None] / jnp.maximum(jnp.sum(valid), 1)
    mean = lambda x: jnp.sum(in_statistics_dtype(x) * weight, axis=(1, 3))
    return AttentionStatistics(
        entropy=mean(entropy(pattern)),
        entropy_share=mean(entropy_share(pattern, allowed)),
        distance=mean(mean_distance(pattern)),
        first=mean(mass_on_first(pattern)),
        itself=mean(mass_on_itself(pattern)),
        previous=mean(mass_on_previous(pattern)),
    )


def pairs_in_sight(length: int, config: ModelConfig) -> Bool[Array, "#layer 1 1 query key"]:
    """Which keys each query may see; a layer's window ends it, or its taps."""
    seen = aggregate.allowed_pairs(length, config.causal, config.attend_self)
    lag = jnp.arange(length)[:, None] - jnp.arange(length)
    mixers = [mixer_of(config.layer(number)) for number in range(config.layers)]
    windows = [_window(one) or length for one in mixers]
    each = jnp.array(windows[:1] if len(set(windows)) == 1 else windows)
    return (seen & (lag < each[:, None, None]))[:, None, None]


def _window(mixer: Mixer) -> int:
    """How many keys are in sight at most; 0 for all."""
    return mixer.window if isinstance(mixer, Softmax) else mixer.taps if isinstance(mixer, Convolution) else 0


def previous_token_template(tokens: Tokens) -> Template:
    """The position before each query."""
    length = tokens.shape[1]
    return jnp.broadcast_to(jnp.eye(length, k=-1, dtype=bool), (tokens.shape[0], length, length))


def duplicate_token_template(tokens: Tokens) -> Template:
    """Earlier positions with the query's own token."""
    equal = tokens[:, :, None] == tokens[:, None, :]
    return equal & jnp.tri(tokens.shape[1], k=-1, dtype=bool)


def induction_template(tokens: Tokens) -> Template:
    """The positions after earlier occurrences of the query's token: what came next the last times."""
    return jnp.pad(duplicate_token_template(tokens)[:, :, :-1], ((0, 0), (0, 0), (1, 0)))


def pattern_score(
    pattern: Float[Array, "*rest batch head query key"],
    template: Bool[Array, "#batch template_query template_key"],
) -> Float[Array, "*rest batch head"]:
    """The share of the attention that lies on a 0/1 template: ``sum(A * D) / sum(A)``, 0 where there is none.

    Raises ValueError where the template is of another size than the pattern.
    """
    if template.shape[-2:] != pattern.shape[-2:]:
        raise ValueError(
            f"a template of {template.shape[-2:]} query and key positions does not fit a pattern of "
            f"{pattern.shape[-2:]}"
        )
    a = in_statistics_dtype(pattern)
    total = jnp.sum(a, axis=(-2, -1))
    on = jnp.sum(jnp.where(template[:, None], a, 0.0), axis=(-2, -1))
    return on / jnp.where(total == 0, 1.0, total)


def repeated_tokens(
    key: Key[Array, ""], batch: int, period: int, vocabulary: int, beginning: int | None = None
) -> Tokens:
    """Rows ``r + r`` of ``period`` random ids said twice, after the ``beginning`` token where one is given.

    Raises ValueError for a period below 2 or ids that do not exist.
    """
    if period < 2:
        raise ValueError(f"a period of {period} repeats nothing to be induced; take at least 2")
    if beginning is not None and not 0 <= beginning < vocabulary:
        raise ValueError(f"the beginning token {beginning} is outside a vocabulary of {vocabulary}")
    others = vocabulary - (beginning is not None)
    if others < 1:
        raise ValueError(f"a vocabulary of {vocabulary} leaves no token to repeat")
    ids = jax.random.randint(key, (batch, period), 0, others, jnp.int32)
    if beginning is None:
        return jnp.concatenate([ids, ids], axis=1)
    ids = ids + (ids >= beginning)
    return jnp.concatenate([jnp.full((batch, 1), beginning, jnp.int32), ids, ids], axis=1)


def induction_score(
    pattern: Float[Array, "*rest query key"], period: int, beginning: bool = False
) -> Float[Array, "*rest"]:
    """The mean attention of the second copy's queries to what followed their token in the first copy.

    On tokens of :func:`repeated_tokens`, with ``beginning`` if they have one: the mean over queries i of the
    second copy of ``A[i, i - (period - 1)]`` (Olsson et al. 2022; also called prefix matching).

    Raises ValueError for a pattern of another length.
    """
    length = pattern.shape[-1]
    if length != 2 * period + beginning:
        raise ValueError(
            f"a pattern over {length} positions is not one of {2 * period + beginning}, which is two copies of "
            f"{period} tokens" + (" after a beginning token" if beginning else "")
        )
    ahead = jnp.diagonal(pattern, offset=1 - period, axis1=-2, axis2=-1)
    return jnp.mean(in_statistics_dtype(ahead[..., 1 + beginning :]), axis=-1)
