"""The loss of targets among logits, as sums, whole or a few positions at a time."""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float, Int

from minitf import ModelConfig, Parameters
from minitf.model import unembed, unembedding_of
from minitf.train.batch import NO_TARGET
from minitf.train.config import ObjectiveSettings


@struct.dataclass
class Sums:
    """Over the targets of a batch: ``loss`` in nats (of regression, squared errors), ``right`` answers, ``count``.

    ``loss`` is what is minimized, with its smoothing and penalties; ``plain`` is without them.
    """

    loss: Any
    plain: Any
    right: Any
    count: Any


def cross_entropy(
    logits: Float[Array, "batch position vocabulary"],
    targets: Int[Array, "batch position"],
    settings: ObjectiveSettings,
) -> Sums:
    """The sums over all targets, which are tokens or ``NO_TARGET``; in float32."""
    logits = logits.astype(jnp.float32)
    normalizer = jax.nn.logsumexp(logits, axis=-1)
    chosen = _chosen(logits, targets)
    plain = loss = normalizer - chosen
    if not _is_zero(settings.label_smoothing):
        share = settings.label_smoothing
        loss = (1 - share) * loss + share * (normalizer - jnp.mean(logits, axis=-1))
    if not _is_zero(settings.z_loss):
        loss = loss + settings.z_loss * normalizer**2
    right = jnp.argmax(logits, axis=-1) == targets
    counts = (targets != NO_TARGET).astype(jnp.float32)
    return Sums(*(jnp.sum(x * counts) for x in (loss, plain, right, counts)))


@jax.custom_vjp
def _chosen(
    logits: Float[Array, "batch position vocabulary"], targets: Int[Array, "batch position"]
) -> Float[Array, "batch position"]:
    """The targets' logits, picked by number; of no target, anything.

    The slope is by comparing, together with that of the rest of the loss: put where the targets are, it would be a
    pass of its own over all logits.
    """
    return jnp.take_along_axis(logits, jnp.maximum(targets, 0)[..., None], axis=-1)[..., 0]


def _chosen_forth(logits: Array, targets: Array) -> tuple[Array, tuple[Array, Array]]:
    return _chosen(logits, targets), (jnp.arange(logits.shape[-1]), targets)


def _chosen_back(kept: tuple[Array, Array], slope: Array) -> tuple[Array, None]:
    token, targets = kept
    return jnp.where(token == targets[..., None], slope[..., None], 0.0), None


_chosen.defvjp(_chosen_forth, _chosen_back)


def _is_zero(number: Any) -> bool:
    """Whether a setting is known to do nothing: in a sweep it is traced, and may be anything."""
    return isinstance(number, int | float) and number == 0


def in_chunks(
    parameters: Parameters,
    context: Float[Array, "batch position width"],
    targets: Int[Array, "batch position"],
    config: ModelConfig,
    settings: ObjectiveSettings,
) -> Sums:
    """Unembedding and loss of a few positions at a time, so that there are never all logits."""
    batch, length, width = context.shape
    rows = rows_of_chunk(config, settings)
    if rows >= batch * length:
        return cross_entropy(unembed(parameters, context, config), targets, settings)
    chunks, size = chunks_of(batch, length, rows)
    rest = ((0, 0), (0, chunks * size - length))
    targets = jnp.pad(targets, rest, constant_values=NO_TARGET)
    context = jnp.pad(context, (*rest, (0, 0)))
    parts = (
        jnp.moveaxis(context.reshape(batch, chunks, size, width), 1, 0),
        jnp.moveaxis(targets.reshape(batch, chunks, size), 1, 0),
    )
    # Numbers that are swept are traced: they go in as arguments.
    numbers = {name: getattr(settings, name) for name in ("label_smoothing", "z_loss")}
    swept = {name: number for name, number in numbers.items() if not isinstance(number, int | float)}

    def of_chunk(weights: Parameters, swept: dict[str, Any], context: Array, targets: Array) -> Sums:
        logits = unembed(weights, context, config)
        return cross_entropy(logits, targets, dataclasses.replace(settings, **swept))

    inputs = (unembedding_of(parameters, config), swept, *parts)
    # Whoever reads the loss alone, as training does, pays for nothing else.
    found = _total(of_chunk, *jax.lax.stop_gradient(inputs))
    count = jnp.sum(targets != NO_TARGET, dtype=jnp.float32)
    return dataclasses.replace(found, loss=_loss(of_chunk, *inputs), count=count)


def chunks_of(batch: int, length: int, rows: int) -> tuple[int, int]:
    """How many chunks, and of how many positions each, of ``rows`` rows at most, about the same in all.

    They are of positions, not of sequences, which may lie on several devices.
    """
    chunks = -(-length // min(max(rows // batch, 1), length))
    return chunks, -(-length // chunks)


OfChunk = Callable[[Parameters, dict[str, Any], Array, Array], Sums]


def _total(
    of_chunk: OfChunk,
    weights: Parameters,
    swept: dict[str, Any],
    context: Float[Array, "chunk batch position width"],
    targets: Int[Array, "chunk batch position"],
) -> Sums:
    """The sums over all chunks, one after another."""

    def add(total: Sums, chunk: tuple[Array, Array]) -> tuple[Sums, None]:
        return jax.tree.map(jnp.add, total, of_chunk(weights, swept, *chunk)), None

    return jax.lax.scan(add, Sums(*(jnp.zeros((), jnp.float32),) * 4), (context, targets))[0]


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _loss(of_chunk: OfChunk, *inputs: Any) -> Float[Array, ""]:
    """The loss alone, with its slopes made on the way forth, where they are asked for.

    It is one number, so the slope of a logit is known as soon as the logit is, and no logits need be made again on
    the way back (Hsu et al. 2024, arXiv:2410.10989, section 3.2). Swept numbers have no slope here.
    """
    return _total(of_chunk, *inputs).loss


def _forth(
    of_chunk: OfChunk, weights: Parameters, swept: dict[str, Any], context: Array, targets: Array
) -> tuple[Array, tuple[Parameters, Array]]:
    def add(carry: tuple[Array, Parameters], chunk: tuple[Array, Array]) -> tuple[tuple[Array, Parameters], Array]:
        loss = lambda weights, context: of_chunk(weights, swept, context, chunk[1]).loss
        some, (of_weights, of_context) = jax.value_and_grad(loss, argnums=(0, 1))(weights, chunk[0])
        return jax.tree.map(jnp.add, carry, (some, of_weights)), of_context

    # Slopes add up in float32, whatever the weights are.
    none = jax.tree.map(lambda x: jnp.zeros_like(x, dtype=jnp.promote_types(x.dtype, jnp.float32)), weights)
    (found, of_weights), of_context = jax.lax.scan(add, (jnp.zeros((), jnp.float32), none), (context, targets))
    return found, (jax.tree.map(lambda slope, x: slope.astype(x.dtype), of_weights, weights), of_context)


def _back(of_chunk: OfChunk, kept: tuple[Parameters, Array], slope: Array) -> tuple[Parameters, None, Array, None]:
    of_weights, of_context = jax.tree.map(lambda x: (x * slope).astype(x.dtype), kept)
    return of_weights, None, of_context, None


_loss.defvjp(_forth, _back)


def rows_of_chunk(config: ModelConfig, settings: ObjectiveSettings, kind: str | None = None) -> int:
    """Rows of one chunk, at most: of logits in 64 MiB of float32 on a CPU, in a GiB elsewhere, unless it is set.

    ``kind`` of device is that of this process, unless it is said.
    """
    numbers = 2**24 if (kind or jax.default_backend()) == "cpu" else 2**28
    return settings.chunk or max(numbers // config.vocabulary, 1)
