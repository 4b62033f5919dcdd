"""The loss of targets among logits, as sums, whole or a few positions at a time."""

import dataclasses
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
    swept: dict[str, Any] = {
        name: number for name, number in numbers.items() if not isinstance(number, int | float)
    }
    known = dataclasses.replace(settings, **{name: 0.0 for name in swept})  # type: ignore[arg-type]
    weights = unembedding_of(parameters, config)
    # Whoever reads the loss alone, as training does, pays for nothing else.
    loss = _loss_of_chunks(weights, *parts, swept, config, known)
    found = _sums_of_chunks(*jax.lax.stop_gradient((weights, *parts, swept)), config, known)
    return dataclasses.replace(found, loss=loss, count=jnp.sum(targets != NO_TARGET, dtype=jnp.float32))


def chunks_of(batch: int, length: int, rows: int) -> tuple[int, int]:
    """How many chunks, and of how many positions each, of ``rows`` rows at most, about the same in all.

    They are of positions, not of sequences, which may lie on several devices.
    """
    chunks = -(-length // min(max(rows // batch, 1), length))
    return chunks, -(-length // chunks)


def _sums_of_chunks(
    parameters: Parameters,
    context: Float[Array, "chunk batch position width"],
    targets: Int[Array, "chunk batch position"],
    swept: dict[str, Any],
    config: ModelConfig,
    settings: ObjectiveSettings,
) -> Sums:
    """The sums over all chunks, one after another."""

    def add(total: Sums, chunk: tuple[Array, Array]) -> tuple[Sums, None]:
        return jax.tree.map(jnp.add, total, _sums_of_chunk(parameters, *chunk, swept, config, settings)), None

    return jax.lax.scan(add, Sums(*(jnp.zeros((), jnp.float32),) * 4), (context, targets))[0]


def _sums_of_chunk(
    parameters: Parameters,
    context: Float[Array, "batch position width"],
    targets: Int[Array, "batch position"],
    swept: dict[str, Any],
    config: ModelConfig,
    settings: ObjectiveSettings,
) -> Sums:
    logits = unembed(parameters, context, config)
    return cross_entropy(logits, targets, dataclasses.replace(settings, **swept))


@partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _loss_of_chunks(
    parameters: Parameters,
    context: Float[Array, "chunk batch position width"],
    targets: Int[Array, "chunk batch position"],
    swept: dict[str, Any],
    config: ModelConfig,
    settings: ObjectiveSettings,
) -> Float[Array, ""]:
    """The loss alone, with its slopes made on the way forth, where they are asked for.

    It is one number, so the slope of a logit is known as soon as the logit is, and no logits need be made again on
    the way back (Hsu et al. 2024, arXiv:2410.10989, section 3.2). Swept numbers have no slope here.
    """
    return _sums_of_chunks(parameters, context, targets, swept, config, settings).loss


def _forth(
    parameters: Parameters, context: Array, targets: Array, swept: Any, config: ModelConfig, settings: Any
) -> tuple[Array, tuple[Parameters, Array, Any]]:
    def loss(parameters: Parameters, context: Array, targets: Array) -> Array:
        return _sums_of_chunk(parameters, context, targets, swept, config, settings).loss

    def add(carry: tuple[Array, Parameters], chunk: tuple[Array, Array]) -> tuple[tuple[Array, Parameters], Array]:
        some, (of_parameters, of_context) = jax.value_and_grad(loss, argnums=(0, 1))(parameters, *chunk)
        return jax.tree.map(jnp.add, carry, (some, of_parameters)), of_context

    # Slopes add up in float32, whatever the weights are.
    none = jax.tree.map(lambda x: jnp.zeros_like(x, dtype=jnp.promote_types(x.dtype, jnp.float32)), parameters)
    (found, of_parameters), of_context = jax.lax.scan(add, (jnp.zeros((), jnp.float32), none), (context, targets))
    of_parameters = jax.tree.map(lambda slope, x: slope.astype(x.dtype), of_parameters, parameters)
    return found, (of_parameters, of_context, swept)


def _back(
    config: ModelConfig, settings: ObjectiveSettings, kept: tuple[Parameters, Array, Any], slope: Array
) -> tuple[Parameters, Array, None, Any]:
    of_parameters, of_context, swept = kept
    times = lambda x: (x * slope).astype(x.dtype)
    return jax.tree.map(times, of_parameters), times(of_context), None, jax.tree.map(jnp.zeros_like, swept)


_loss_of_chunks.defvjp(_forth, _back)


def rows_of_chunk(config: ModelConfig, settings: ObjectiveSettings, kind: str | None = None) -> int:
    """Rows of one chunk, at most: of logits in 64 MiB of float32 on a CPU, in a GiB elsewhere, unless it is set.

    ``kind`` of device is that of this process, unless it is said.
    """
    numbers = 2**24 if (kind or jax.default_backend()) == "cpu" else 2**28
    return settings.chunk or max(numbers // config.vocabulary, 1)
