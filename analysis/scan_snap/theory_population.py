"""Infinite-length training of minitf's own token-table model: gradient descent on the expected loss.

With the probabilities P(l|n) as counts the model's pattern is the paper's c_n (Lemma 2), and one step on the
mean over classes is the expectation of one batch-1 step, so a step is the theory's unit of time. Float64
under a local ``enable_x64``. Outputs that are never a label share one decoder column (exact from Y = 0).
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from minitf.parameters import AttentionParameters, Layer, Parameters
from minitf.tables import count_walk
from minitf.train.sequence_classes import SequenceClasses

Scalar = Array | float


@dataclasses.dataclass(frozen=True)
class Classes:
    """Sequence classes for the theory: P(l|n), each class's query, and M, the number of output tokens.

    Queries are numbered from 0 among themselves: they are rows of Z and never keys.
    """

    frequency: Float[np.ndarray, "class token"]
    query: Int[np.ndarray, " class"]
    vocabulary: int

    @property
    def common(self) -> Bool[np.ndarray, " token"]:
        """Which tokens occur in more than one class."""
        return (self.frequency > 0).sum(axis=0) > 1


def of_generator(data: SequenceClasses, vocabulary: int = 0) -> Classes:
    """The classes of the paper's generator, with its own vocabulary (0) or one of another size."""
    query = data.class_queries - data.contextual
    return Classes(data.probability, query, vocabulary or data.vocabulary)


@dataclasses.dataclass(frozen=True)
class PopulationRun:
    """A run's tables before each step: ``z`` [time, query, token], ``probability`` of the right token
    [time, class], and Z's negative gradient ``push`` [time, query, token]; time 0 is the start."""

    z: Float[np.ndarray, "time query token"]
    probability: Float[np.ndarray, "time class"]
    push: Float[np.ndarray, "time query token"]


def table_model(decoder: Array, table: Array) -> Parameters:
    """minitf parameters of Y [token, output] and Z [query, token]."""
    layer = Layer(attention=AttentionParameters(table=table[None, None]))
    return Parameters(layers=layer, unembedding=decoder)


def _losses(tables: tuple[Array, Array], frequency: Array, query: Array, vocabulary: Scalar) -> Array:
    """Cross-entropy of each class over all M outputs, the last column standing for the M - K never seen."""
    decoder, table = tables
    logits = count_walk(table_model(decoder, table), query, frequency).logits[:, 0]
    classes, outputs = logits.shape
    shared = jnp.log(jnp.ones(outputs).at[classes].set(vocabulary - classes))
    return jax.nn.logsumexp(logits + shared, axis=1) - jnp.diagonal(logits)


@functools.partial(jax.jit, static_argnames=("queries", "steps"))
def _descend(
    frequency: Array, query: Array, eta_y: Scalar, eta_z: Scalar, vocabulary: Scalar, *, queries: int, steps: int
) -> tuple[Array, Array, Array]:
    classes, tokens = frequency.shape

    def mean_loss(tables: tuple[Array, Array]) -> tuple[Array, Array]:
        losses = _losses(tables, frequency, query, vocabulary)
        return jnp.mean(losses), losses

    def step(tables: tuple[Array, Array], _: None) -> tuple[tuple[Array, Array], tuple]:
        (of_decoder, of_table), losses = jax.grad(mean_loss, has_aux=True)(tables)
        decoder, table = tables
        # The shared column's gradient is the sum over the M - K columns it stands for.
        of_decoder = of_decoder.at[:, classes].divide(vocabulary - classes)
        moved = (decoder - eta_y * of_decoder, table - eta_z * of_table)
        return moved, (table, jnp.exp(-losses), -of_table)

    start = (jnp.zeros((tokens, classes + 1)), jnp.zeros((queries, tokens)))
    return jax.lax.scan(step, start, None, length=steps)[1]


def population_run(classes: Classes, eta_y: float, eta_z: float, steps: int) -> PopulationRun:
    """Train Y (at ``eta_y``) and Z (at ``eta_z``) from zero by plain gradient descent on the expected loss.

    Raises ValueError when the vocabulary has no room for an output that is never a label.
    """
    if classes.vocabulary <= len(classes.query):
        raise ValueError(f"vocabulary is {classes.vocabulary} for {len(classes.query)} classes; it must be larger")
    with jax.enable_x64(True):
        z, probability, push = _descend(
            jnp.asarray(classes.frequency),
            jnp.asarray(classes.query),
            eta_y,
            eta_z,
            float(classes.vocabulary),
            queries=int(classes.query.max()) + 1,
            steps=steps,
        )
        return PopulationRun(np.asarray(z), np.asarray(probability), np.asarray(push))


def distinct_tokens(classes: Classes, n: int) -> Int[np.ndarray, " distinct"]:
    """The distinct tokens of class n, weakest first."""
    own = np.flatnonzero((classes.frequency[n] > 0) & ~classes.common)
    return own[np.argsort(classes.frequency[n, own], kind="stable")]


def common_tokens(classes: Classes, n: int) -> Int[np.ndarray, " common"]:
    """The common tokens that class n uses."""
    return np.flatnonzero((classes.frequency[n] > 0) & classes.common)
