"""What a sparse autoencoder keeps and loses: sparsity, variance, the model's loss; and its top examples."""

from collections.abc import Iterable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Float, Int

from minitf.analysis.sparse_autoencoder.autoencoder import (
    AutoencoderConfig,
    SparseAutoencoder,
    check_rows,
    decode,
    encode,
    reconstruct,
)
from minitf.analysis.sparse_autoencoder.place import Place, batch_rows, checked_batches
from minitf.analysis.stream import Progress, checked_tokens
from minitf.filter import in_statistics_dtype
from minitf.walk import Leaf, leaf


@struct.dataclass
class Metrics:
    """Over all rows of the data.

    ``l0`` is the mean number of active latents, ``explained_variance`` is
    ``1 - sum |x - x_hat|^2 / sum |x - mean x|^2``, ``density`` the share of rows on which a latent is active, and
    ``dead_share`` the share of latents that never are.
    """

    l0: Leaf = leaf("")
    explained_variance: Leaf = leaf("")
    dead_share: Leaf = leaf("")
    density: Leaf = leaf("latent")


@struct.dataclass
class TopExamples:
    """The rows on which a latent is most active, largest first; ``row`` is -1 where there are no more.

    Rows are numbered from the first of the data on: with tokens ``[batch, position]``, row r is position
    ``r % length`` of sequence ``r // length``.
    """

    activation: Leaf = leaf("latent rank")
    row: Leaf = leaf("latent rank")


@struct.dataclass
class LossRecovered:
    """Mean next-token losses in nats: of the model, with the leaf reconstructed, and with the leaf set to zero.

    ``share`` is ``(zero - reconstructed) / (zero - clean)``: 1 for a perfect reconstruction, 0 for none.
    """

    clean: Leaf = leaf("")
    reconstructed: Leaf = leaf("")
    zero: Leaf = leaf("")

    @property
    def share(self) -> float:
        """The share of the loss recovered."""
        return float((self.zero - self.reconstructed) / (self.zero - self.clean))


def measure(
    autoencoder: SparseAutoencoder,
    batches: Iterable[Any],
    config: AutoencoderConfig,
    *,
    source: Place | None = None,
    progress: Progress = iter,
) -> Metrics:
    """The metrics over all batches; one batch at a time is in memory.

    Args:
        batches: ``[row, width]`` vectors; with a ``source``, ``[batch, position]`` tokens.
        source: where in the walk of the tokens the vectors are.
        progress: wraps the batches, such as ``rich.progress.track``.

    Raises:
        ValueError: vectors of another width, tokens that the model cannot read, no batch, or rows that are not
            finite or all the same, so that they have no variance.
    """
    sums = [
        jax.tree.map(np.float64, _sums(autoencoder, jnp.asarray(batch), source, config=config))
        for batch in checked_batches(source, progress(batches))
    ]
    if not sums:
        raise ValueError("there is no batch to measure on")
    count, mean, spread, error, active = (np.stack(parts) for parts in zip(*sums, strict=True))
    rows = count.sum()
    middle = count @ mean / rows
    # Within the batches, and of their means around the mean of all.
    variance = spread.sum() + count @ np.square(mean - middle).sum(axis=1)
    if not np.isfinite(variance + error.sum()):
        raise ValueError("rows, or what is reconstructed of them, are not finite, so nothing can be measured")
    if not variance > 0:
        raise ValueError("all rows are the same, so there is no variance to explain")
    density = active.sum(axis=0) / rows
    return Metrics(
        l0=density.sum(),
        explained_variance=1 - error.sum() / variance,
        dead_share=np.mean(density == 0),
        density=density,
    )


def top_examples(
    autoencoder: SparseAutoencoder,
    batches: Iterable[Any],
    config: AutoencoderConfig,
    count: int,
    *,
    source: Place | None = None,
    progress: Progress = iter,
) -> TopExamples:
    """The ``count`` rows on which each latent is most active; of equal ones the earlier.

    Arguments as :func:`measure`. Raises ValueError for vectors of another width, no batch, or a count below 1.
    """
    if count < 1:
        raise ValueError(f"count is {count}; there must be at least 1 example")
    best = TopExamples(jnp.zeros((config.latents, count)), jnp.full((config.latents, count), -1, jnp.int32))
    first = 0
    for batch in checked_batches(source, progress(batches)):
        best, rows = _merged(best, autoencoder, jnp.asarray(batch), jnp.int32(first), source, config=config)
        first += int(rows)
    if not first:
        raise ValueError("there is no batch to look for examples in")
    return best


def loss_recovered(
    autoencoder: SparseAutoencoder, tokens: Int[Array, "batch position"], config: AutoencoderConfig, place: Place
) -> LossRecovered:
    """What the model's next-token loss says of the reconstruction, by an edit that puts it into the walk.

    Raises:
        ValueError: a model that does not predict the next token, tokens that it cannot read, sequences of one
            token, vectors of another width, losses that are not finite, or a place on which the loss does not
            depend.
    """
    if not place.config.causal:
        raise ValueError("the next token is predicted by causal models, and this model sees it")
    if tokens.shape[1] < 2:
        raise ValueError("a sequence of one token has no next token to predict; give at least 2")
    checked = jnp.asarray(checked_tokens(tokens, place.config))
    clean, reconstructed, zero = np.asarray(_next_token_losses(autoencoder, checked, place, config=config))
    if not np.isfinite([clean, reconstructed, zero]).all():
        raise ValueError(f"the losses {clean}, {reconstructed} and {zero} are not all finite")
    if clean == zero:
        raise ValueError(f"zeroing {place.name!r} leaves the loss as it is, so there is no loss to recover")
    return LossRecovered(clean, reconstructed, zero)


@partial(jax.jit, static_argnames="config")
def _sums(
    autoencoder: SparseAutoencoder, batch: Array, source: Place | None, *, config: AutoencoderConfig
) -> tuple[Array, Array, Array, Array, Array]:
    """Of one batch: how many rows, their mean, their squares around it, the squared errors, how often active."""
    rows = batch_rows(source, batch)
    check_rows(rows, config)
    rows = in_statistics_dtype(rows)
    latents = encode(autoencoder, rows, config)
    mean = jnp.mean(rows, axis=0)
    error = jnp.sum(jnp.square(rows - decode(autoencoder, latents)))
    spread = jnp.sum(jnp.square(rows - mean))
    return jnp.asarray(len(rows)), mean, spread, error, jnp.sum(latents > 0, axis=0)


@partial(jax.jit, static_argnames="config")
def _merged(
    best: TopExamples,
    autoencoder: SparseAutoencoder,
    batch: Array,
    first: Array,
    source: Place | None,
    *,
    config: AutoencoderConfig,
) -> tuple[TopExamples, Array]:
    """The best of those so far and of one batch, and how many rows that had."""
    rows = batch_rows(source, batch)
    check_rows(rows, config)
    latents = encode(autoencoder, rows, config).T
    numbers = jnp.broadcast_to(first + jnp.arange(len(rows)), latents.shape)
    values = jnp.concatenate([best.activation.astype(latents.dtype), latents], axis=1)
    numbers = jnp.concatenate([best.row, numbers], axis=1)
    # Of equal values the first are kept: a row without activity never takes the place of none.
    activation, places = jax.lax.top_k(values, best.row.shape[1])
    return TopExamples(activation, jnp.take_along_axis(numbers, places, axis=1)), jnp.asarray(len(rows))


@partial(jax.jit, static_argnames="config")
def _next_token_losses(
    autoencoder: SparseAutoencoder, tokens: Array, place: Place, *, config: AutoencoderConfig
) -> Float[Array, " loss"]:
    """The losses with the vectors as they are, reconstructed, and zero.

    All three are put in by the same edit of the same program, so that equal vectors give equal losses to the bit.
    """
    rows = place.rows(tokens)
    check_rows(rows, config)
    others = (reconstruct(autoencoder, rows, config).astype(rows.dtype), jnp.zeros_like(rows))

    def loss(vectors: Array) -> Array:
        logits = place.logits_with(tokens, vectors)[:, :-1]
        says = jax.nn.log_softmax(in_statistics_dtype(logits))
        return -jnp.mean(jnp.take_along_axis(says, tokens[:, 1:, None], axis=-1))

    return jax.lax.map(loss, jnp.stack([rows, *others]))
