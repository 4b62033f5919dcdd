"""Sequence-class data (Tian et al. 2023, section 3 and the generator of its synthetic figures).

A class is a next token n. It fixes the last token (the query) m and a distribution P(l | n) of contextual
tokens, drawn independently. A token of one class alone is distinct; a token of several is common.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Float, Int, Key


@dataclass(frozen=True)
class SequenceClasses:
    """The shape of a data set; the defaults are the paper's Syn-Small (Fig. 4, 5).

    The vocabulary is, in order: the common tokens, each class's distinct tokens, the queries, the next tokens.
    Common tokens have weight 1, the distinct tokens of a class weights evenly spaced from 0.1 to 1, and
    P(l | n) is the normalized weight. ``length`` counts the contextual tokens and the query.

    Raises:
        ValueError: a number is too small for there to be anything to learn.
    """

    queries: int = 2
    next_per_query: int = 1
    common: int = 10
    distinct: int = 10
    length: int = 128

    def __post_init__(self) -> None:
        least = {"queries": 1, "next_per_query": 1, "common": 0, "distinct": 1, "length": 2}
        for name, smallest in least.items():
            if getattr(self, name) < smallest:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least {smallest}")
        if self.classes < 2:
            raise ValueError("there is one class only; two are needed for a next token to be predictable or not")

    @property
    def classes(self) -> int:
        """Number of next tokens, K in the paper."""
        return self.queries * self.next_per_query

    @property
    def contextual(self) -> int:
        """Number of contextual tokens: common and distinct ones, the first of the vocabulary."""
        return self.common + self.distinct * self.classes

    @property
    def vocabulary(self) -> int:
        """M in the paper: contextual tokens, queries, next tokens."""
        return self.contextual + self.queries + self.classes

    @property
    def support(self) -> Int[np.ndarray, "class support"]:
        """The tokens that each class can hold: the common ones, then its own, weakest first."""
        own = self.common + self.distinct * np.arange(self.classes)[:, None] + np.arange(self.distinct)
        shared = np.broadcast_to(np.arange(self.common), (self.classes, self.common))
        return np.concatenate([shared, own], axis=1)

    @property
    def weights(self) -> Float[np.ndarray, " support"]:
        """P(l | n) over a class's support; the same for every class."""
        weight = np.concatenate([np.ones(self.common), np.linspace(0.1, 1.0, self.distinct)])
        return weight / weight.sum()

    @property
    def probability(self) -> Float[np.ndarray, "class token"]:
        """P(l | n) over all contextual tokens."""
        table = np.zeros((self.classes, self.contextual))
        np.put_along_axis(table, self.support, np.broadcast_to(self.weights, self.support.shape), axis=1)
        return table

    @property
    def is_distinct(self) -> np.ndarray:
        """Whether a contextual token is distinct to a class, bool ``[class, token]``."""
        mask = np.zeros((self.classes, self.contextual), bool)
        np.put_along_axis(mask, self.support[:, self.common :], True, axis=1)
        return mask

    @property
    def class_queries(self) -> Int[np.ndarray, " class"]:
        """The query token of each class, m = psi(n)."""
        return self.contextual + np.arange(self.classes) // self.next_per_query

    @property
    def class_labels(self) -> Int[np.ndarray, " class"]:
        """The next token of each class."""
        return self.contextual + self.queries + np.arange(self.classes)


SYN_SMALL = SequenceClasses()


def syn_medium(queries: int) -> SequenceClasses:
    """A panel of the paper's Syn-Medium (Fig. 6, 11, 12): two next tokens for each of 1, 3, 5 or 10 queries."""
    return SequenceClasses(queries=queries, next_per_query=2)


@struct.dataclass
class CountBatch:
    """Sequences as counts: the model that reads them does not care about order.

    ``queries`` and ``labels`` are ``[batch]`` integers, ``counts`` is ``[batch, token]``, real, over the
    contextual tokens. (Under ``vmap`` leaves have more axes and may be placeholders, so they have no type here.)
    """

    queries: Any
    labels: Any
    counts: Any


def _draw(
    data: SequenceClasses, key: Key[Array, ""], batch: int
) -> tuple[Int[Array, " batch"], Float[Array, "batch position"], Float[np.ndarray, " edge"]]:
    """Classes, uniform numbers, and their edges: what exceeds n edges is the n-th token of its class's support."""
    class_key, token_key = jax.random.split(key)
    classes = jax.random.randint(class_key, (batch,), 0, data.classes)
    uniform = jax.random.uniform(token_key, (batch, data.length - 1), jnp.float32)
    # The last edge stays open: a rounded cumulative sum may end just below one.
    return classes, uniform, np.cumsum(data.weights)[:-1].astype(np.float32)


def sample_tokens(
    data: SequenceClasses, key: Key[Array, ""], batch: int
) -> tuple[Int[Array, "batch position"], Int[Array, " batch"]]:
    """Sequences as tokens, contextual ones first and the query last, and the next token of each."""
    classes, uniform, edges = _draw(data, key, batch)
    places = jnp.sum(uniform[..., None] >= edges, axis=-1)
    context = jnp.asarray(data.support)[classes[:, None], places]
    query = jnp.asarray(data.class_queries)[classes]
    return jnp.concatenate([context, query[:, None]], axis=1), jnp.asarray(data.class_labels)[classes]


def sample_support_counts(
    data: SequenceClasses, key: Key[Array, ""], batch: int
) -> tuple[Int[Array, " batch"], Float[Array, "batch support"]]:
    """The same sequences with the same key as classes and counts over each class's support."""
    classes, uniform, edges = _draw(data, key, batch)
    beyond = jnp.sum(uniform[:, None, :] >= edges[:, None], axis=-1, dtype=jnp.int32)
    at_least = jnp.pad(beyond, ((0, 0), (1, 1))).at[:, 0].set(data.length - 1)
    return classes, (at_least[:, :-1] - at_least[:, 1:]).astype(jnp.float32)


def sample_counts(data: SequenceClasses, key: Key[Array, ""], batch: int) -> CountBatch:
    """The same sequences as :func:`sample_tokens` with the same key, as counts."""
    classes, per_support = sample_support_counts(data, key, batch)
    common, own = per_support[:, : data.common], per_support[:, data.common :]
    # A class's own tokens go to its block of the vocabulary: an outer product with the one-hot class.
    blocks = jax.nn.one_hot(classes, data.classes, dtype=jnp.float32)[:, :, None] * own[:, None, :]
    return CountBatch(
        queries=jnp.asarray(data.class_queries)[classes],
        labels=jnp.asarray(data.class_labels)[classes],
        counts=jnp.concatenate([common, blocks.reshape(batch, -1)], axis=1),
    )


def population(data: SequenceClasses, dtype: jax.typing.DTypeLike = jnp.float32) -> CountBatch:
    """Every class once, infinitely long: counts are the probabilities P(l | n) (Lemma 2)."""
    return CountBatch(
        queries=jnp.asarray(data.class_queries),
        labels=jnp.asarray(data.class_labels),
        counts=jnp.asarray(data.probability, dtype),
    )
