"""Syn-Medium's training with each batch grouped by query: the same numbers, several times sooner on a CPU.

A sequence holds common tokens and its query's own ones alone, so most of a [batch, token] product is with zeros.
Sequences of a query stand together here, in slots, and meet only the rows of Y that their tokens have. And only
what can move is trained: the rows of Z of the queries and the rows of Y of the contextual tokens.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct
from jaxtyping import Array, Float, Key
from scipy import stats

from minitf import aggregate, filter
from minitf.parameters import Parameters
from minitf.train.loop import Task
from minitf.train.sequence_classes import SequenceClasses, sample_support_counts

# How often a batch may have more sequences of one query than it has slots; it is then done with slots for all.
OVERFLOW = 1e-3


@struct.dataclass
class ClassBatch:
    """Sequences by class, ``classes`` [batch], and counts over the class's support, [batch, support]."""

    classes: Any
    counts: Any


@struct.dataclass
class Slots:
    """A batch by query: ``counts`` [query, slot, common + own], ``labels`` [query * slot], ``weights`` 1 or 0."""

    counts: Any
    labels: Any
    weights: Any


def trim(parameters: Parameters, data: SequenceClasses) -> Parameters:
    """The rows that training moves: ``table`` [1, 1, query, vocabulary], ``unembedding`` [contextual, vocabulary]."""
    table = parameters.layers.attention.table[:, :, data.contextual : data.contextual + data.queries]
    return _with(parameters, table, parameters.unembedding[: data.contextual])


def place(trimmed: Parameters, full: Parameters, data: SequenceClasses) -> Parameters:
    """The full parameters with those rows in them. Leading axes of runs are allowed on both."""
    queries = slice(data.contextual, data.contextual + data.queries)
    table = full.layers.attention.table.at[..., queries, :].set(trimmed.layers.attention.table)
    return _with(full, table, full.unembedding.at[..., : data.contextual, :].set(trimmed.unembedding))


def _with(parameters: Parameters, table: Array, unembedding: Array) -> Parameters:
    attention = parameters.layers.attention.replace(table=table)
    return parameters.replace(layers=parameters.layers.replace(attention=attention), unembedding=unembedding)


def grouped(plain: Task, data: SequenceClasses, batch: int) -> Task:
    """The task of ``synthetic.task(data, ...)`` on trimmed parameters and grouped batches."""
    nothing = jax.eval_shape(plain.initialize, jax.random.key(0))

    def record(trimmed: Parameters) -> Any:
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), nothing)
        return plain.record(place(trimmed, zeros, data))

    def draw(key: Key[Array, ""], step: Array) -> ClassBatch:
        classes, counts = sample_support_counts(data, key, batch)
        return ClassBatch(classes, counts)

    return dataclasses.replace(
        plain,
        initialize=lambda key: trim(plain.initialize(key), data),
        batch=draw,
        loss=make_loss(data, batch),
        record=record,
    )


def capacity(data: SequenceClasses, batch: int) -> int:
    """Slots per query that a batch overflows at most with probability ``OVERFLOW`` (a union bound)."""
    if data.queries == 1:
        return batch
    return min(batch, int(stats.binom.isf(OVERFLOW / data.queries, batch, 1 / data.queries)))


def make_loss(data: SequenceClasses, batch: int, slots: int | None = None) -> Any:
    """The loss of trimmed parameters on a :class:`ClassBatch`: mean cross-entropy, nats.

    Its gradient is computed with its value, so that a batch that overflows ``slots`` takes another branch of the
    program as a whole.
    """
    usual = capacity(data, batch) if slots is None else slots

    def value_and_gradient(slots: int, parameters: Parameters, drawn: ClassBatch) -> tuple[Array, Parameters]:
        placed = into_slots(data, drawn, slots)
        return jax.value_and_grad(lambda p: slotted_loss(data, p, placed))(parameters)

    def both(parameters: Parameters, drawn: ClassBatch) -> tuple[Array, Parameters]:
        if usual >= batch:
            return value_and_gradient(batch, parameters, drawn)
        query = drawn.classes // data.next_per_query
        most = jnp.max(jnp.sum(query[:, None] == jnp.arange(data.queries), axis=0))
        return jax.lax.cond(
            most <= usual,
            lambda p: value_and_gradient(usual, p, drawn),
            lambda p: value_and_gradient(batch, p, drawn),
            parameters,
        )

    @jax.custom_vjp
    def loss(parameters: Parameters, drawn: ClassBatch) -> Array:
        return both(parameters, drawn)[0]

    loss.defvjp(both, lambda gradient, seed: (jax.tree.map(lambda g: seed * g, gradient), None))
    return loss


def into_slots(data: SequenceClasses, drawn: ClassBatch, slots: int) -> Slots:
    """Sequences of a query in its slots, in order. An empty slot holds one token, so that it is finite, and no weight."""
    classes, queries = drawn.classes, data.queries
    query, member = classes // data.next_per_query, classes % data.next_per_query
    chosen = query[:, None] == jnp.arange(queries)
    before = jnp.sum(jnp.where(chosen, jnp.cumsum(chosen, axis=0) - 1, 0), axis=1)
    place_of = query * slots + before
    is_here = place_of[None, :] == jnp.arange(queries * slots)[:, None]
    filled, row = jnp.any(is_here, axis=1), jnp.argmax(is_here, axis=1)

    common, own = drawn.counts[:, : data.common], drawn.counts[:, data.common :]
    blocks = jax.nn.one_hot(member, data.next_per_query)[:, :, None] * own[:, None, :]
    counts = jnp.concatenate([common, blocks.reshape(len(classes), -1)], axis=1)
    counts = jnp.where(filled[:, None], counts[row], jnp.eye(1, counts.shape[1]))
    return Slots(
        counts=counts.reshape(queries, slots, -1),
        labels=jnp.asarray(data.class_labels)[classes[row]],
        weights=filled.astype(jnp.float32) / len(classes),
    )


def slotted_loss(data: SequenceClasses, parameters: Parameters, batch: Slots) -> Float[Array, ""]:
    """Sum of weight times cross-entropy over the slots."""
    table, decoder = parameters.layers.attention.table[0, 0], parameters.unembedding
    queries, slots, held = batch.counts.shape
    own, vocabulary = held - data.common, decoder.shape[1]
    common_tokens = np.broadcast_to(np.arange(data.common), (queries, data.common))
    own_tokens = data.common + np.arange(queries * own).reshape(queries, own)
    tokens = np.concatenate([common_tokens, own_tokens], axis=1)

    scores = table[np.arange(queries)[:, None], tokens][:, None, :]
    pattern = aggregate.associate(jnp.broadcast_to(scores, batch.counts.shape), batch.counts)
    rows = pattern.reshape(queries * slots, held)
    context = filter.normalize(rows, filter.norm_scale(rows, "l2", 0.0))
    from_common = filter.unembed(context[:, : data.common], decoder[: data.common])
    from_own = jnp.einsum(
        "qsl,qlv->qsv",
        context[:, data.common :].reshape(queries, slots, own),
        decoder[data.common :].reshape(queries, own, vocabulary),
    )
    logits = from_common + from_own.reshape(queries * slots, vocabulary)
    each = optax.softmax_cross_entropy_with_integer_labels(logits, batch.labels)
    return jnp.sum(batch.weights * each)
