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
from jaxtyping import Array, Float, Int, Key

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
    """A batch by query, the one with most sequences first.

    ``order`` [query] are the queries so ordered. A slot holds a sequence of one query or nothing: ``counts``
    [slot, common + own] over its query's tokens, ``labels`` [slot], ``weights`` [slot], zero for nothing.
    """

    order: Any
    counts: Any
    labels: Any
    weights: Any


@dataclasses.dataclass(frozen=True)
class Layout:
    """How many slots the queries have, [query], most first; equal ones are multiplied together."""

    slots: tuple[int, ...]

    @property
    def tiers(self) -> list[tuple[int, int]]:
        """Number of queries and slots of each, for each number of slots."""
        return [(self.slots.count(n), n) for n in sorted(set(self.slots), reverse=True)]

    @property
    def starts(self) -> np.ndarray:
        """The first slot of each query in the order, and the number of all."""
        return np.concatenate([[0], np.cumsum(self.slots)])


def trim(parameters: Parameters, data: SequenceClasses) -> Parameters:
    """What training moves: ``table`` [1, 1, query, vocabulary], ``unembedding`` [contextual, vocabulary]."""
    table = parameters.layers.attention.table[:, :, data.contextual : data.contextual + data.queries]
    return _with(parameters, table, parameters.unembedding[: data.contextual])


def place(trimmed: Parameters, full: Parameters, data: SequenceClasses) -> Parameters:
    """The full parameters with those rows in them. Leading axes of runs are allowed on both."""
    queries = slice(data.contextual, data.contextual + data.queries)
    table = full.layers.attention.table.at[..., queries, :].set(trimmed.layers.attention.table)
    return _with(full, table, full.unembedding.at[..., : data.contextual, :].set(trimmed.unembedding))


def _with(parameters: Parameters, table: Array, unembedding: Array) -> Parameters:
    attention = dataclasses.replace(parameters.layers.attention, table=table)
    layers = dataclasses.replace(parameters.layers, attention=attention)
    return dataclasses.replace(parameters, layers=layers, unembedding=unembedding)


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


def roomy(data: SequenceClasses, batch: int) -> Layout:
    """Slots that always suffice."""
    return Layout((batch,) * data.queries)


def usual(data: SequenceClasses, batch: int) -> Layout:
    """Slots that a batch overflows with a probability of about ``OVERFLOW`` at most (simulated, a union bound).

    Neighbours in the order have equal numbers, so that there are fewer and larger products.
    """
    draws = np.random.default_rng(0).multinomial(batch, np.full(data.queries, 1 / data.queries), size=20_000)
    most_first = np.sort(draws, axis=1)[:, ::-1]
    needed = np.quantile(most_first, 1 - OVERFLOW / data.queries, axis=0, method="higher").astype(int)
    return Layout(tuple(int(needed[i - i % 2]) for i in range(data.queries)))


def make_loss(data: SequenceClasses, batch: int, layout: Layout | None = None) -> Any:
    """The loss of trimmed parameters on a :class:`ClassBatch`: mean cross-entropy, nats.

    Its gradient is computed with its value, so that a batch that overflows ``layout`` takes another branch of
    the program as a whole.
    """
    layout, always = layout or usual(data, batch), roomy(data, batch)

    def value_and_gradient(
        layout: Layout, parameters: Parameters, drawn: ClassBatch, order: Array
    ) -> tuple[Array, Parameters]:
        placed = into_slots(data, drawn, order, layout)
        return jax.value_and_grad(lambda p: slotted_loss(data, p, placed, layout))(parameters)

    def both(parameters: Parameters, drawn: ClassBatch) -> tuple[Array, Parameters]:
        query = drawn.classes // data.next_per_query
        sequences = jnp.sum(query[:, None] == jnp.arange(data.queries), axis=0)
        order = jnp.argsort(-sequences)
        if layout == always:
            return value_and_gradient(always, parameters, drawn, order)
        return jax.lax.cond(
            jnp.all(sequences[order] <= jnp.array(layout.slots)),
            lambda p: value_and_gradient(layout, p, drawn, order),
            lambda p: value_and_gradient(always, p, drawn, order),
            parameters,
        )

    @jax.custom_vjp
    def loss(parameters: Parameters, drawn: ClassBatch) -> Array:
        return both(parameters, drawn)[0]

    loss.defvjp(both, lambda gradient, seed: (jax.tree.map(lambda g: seed * g, gradient), None))
    return loss


def into_slots(data: SequenceClasses, drawn: ClassBatch, order: Int[Array, " query"], layout: Layout) -> Slots:
    """Sequences in the slots of their queries. Nothing is one token of weight zero, so that it is finite."""
    classes, starts = drawn.classes, layout.starts
    query, member = classes // data.next_per_query, classes % data.next_per_query
    chosen = query[:, None] == order
    before = jnp.cumsum(chosen, axis=0) - 1
    slot_of = jnp.sum(jnp.where(chosen, before + starts[:-1], 0), axis=1)
    is_here = slot_of[None, :] == jnp.arange(starts[-1])[:, None]
    filled, row = jnp.any(is_here, axis=1), jnp.argmax(is_here, axis=1)

    common, own = drawn.counts[:, : data.common], drawn.counts[:, data.common :]
    blocks = jax.nn.one_hot(member, data.next_per_query)[:, :, None] * own[:, None, :]
    counts = jnp.concatenate([common, blocks.reshape(len(classes), -1)], axis=1)
    return Slots(
        order=order,
        counts=jnp.where(filled[:, None], counts[row], jnp.eye(1, counts.shape[1])),
        labels=jnp.asarray(data.class_labels)[classes[row]],
        weights=filled.astype(jnp.float32) / len(classes),
    )


def slotted_loss(data: SequenceClasses, parameters: Parameters, batch: Slots, layout: Layout) -> Float[Array, ""]:
    """Sum over the slots of weight times cross-entropy."""
    table, decoder = parameters.layers.attention.table[0, 0], parameters.unembedding
    queries, common, own = data.queries, data.common, data.next_per_query * data.distinct
    common_tokens = np.broadcast_to(np.arange(common), (queries, common))
    own_tokens = common + np.arange(queries * own).reshape(queries, own)
    tokens = np.concatenate([common_tokens, own_tokens], axis=1)
    common_table, own_table = jax.lax.split(decoder, (common, queries * own))

    z = _ordered(table[np.arange(queries)[:, None], tokens], batch.order)
    scores = jnp.repeat(z, np.array(layout.slots), axis=0, total_repeat_length=layout.starts[-1])
    pattern = aggregate.associate(scores[:, None], batch.counts[:, None])[:, 0]
    context = filter.normalize(pattern, filter.norm_scale(pattern, "l2", 0.0))
    of_common, of_own = jax.lax.split(context, (common, own), axis=1)

    tables = _ordered(own_table.reshape(queries, own, -1), batch.order)
    shares = zip(
        layout.tiers,
        jax.lax.split(of_own, [n * slots for n, slots in layout.tiers]),
        jax.lax.split(tables, [n for n, _ in layout.tiers]),
        strict=True,
    )
    from_own = [
        jnp.einsum("qsl,qlv->qsv", rows.reshape(n, slots, own), of_tier).reshape(n * slots, -1)
        for (n, slots), rows, of_tier in shares
    ]
    logits = filter.unembed(of_common, common_table) + jnp.concatenate(from_own)
    each = optax.softmax_cross_entropy_with_integer_labels(logits, batch.labels)
    return jnp.sum(batch.weights * each)


def _ordered(x: Array, order: Int[Array, " query"]) -> Array:
    """The entries of the first axis in another order; saying that none is taken twice spares the gradient work."""
    return x.at[order].get(unique_indices=True, mode="promise_in_bounds")
