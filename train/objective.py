"""What training minimizes: sums over targets, so that parts of a batch add up to the whole.

Dropout is an edit of the walk, and a real-valued input is one too: a mixture of token vectors in their place.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jaxtyping import Array, Float, Int, Key

from minitf import ModelConfig, Parameters, walk
from minitf.model import unembed
from minitf.train.batch import NO_TARGET, Batch
from minitf.train.config import Objective, ObjectiveSettings
from minitf.walk import Change, Edit, LayerWalk

# Numbers in the logits of one chunk, at most: 64 MiB of float32.
CHUNK_NUMBERS = 2**24


@struct.dataclass
class Sums:
    """Over the targets of a batch: ``loss`` in nats (of regression, squared errors), ``right`` answers, ``count``.

    ``loss`` is what is minimized, with its smoothing and penalties; ``plain`` is without them.
    """

    loss: Any
    plain: Any
    right: Any
    count: Any


def sums(
    parameters: Parameters,
    batch: Batch,
    config: ModelConfig,
    kind: Objective,
    settings: ObjectiveSettings,
    *,
    edit: Edit | None = None,
    unroll: int | bool = 1,
    rematerialize: bool = False,
    sharding: Any = None,
) -> Sums:
    """The objective on a batch, whose targets are those of ``kind``.

    Args:
        parameters: their dtype is that of the computation; losses are float32.
        batch: ``[batch, position]``.
        kind: ``next_token`` and ``masked_token`` count every target; ``classification`` has one for a sequence,
            the last, which the last position answers, or, where positions see all others, the mean of their
            logits; ``regression`` compares the first logit.
        settings: smoothing, z-loss, chunks.
        edit: of the walk, such as :func:`dropout`.
        unroll, rematerialize, sharding: as :func:`minitf.walk`.
    """
    edit = with_inputs(edit or Edit(), parameters, batch)
    walked = walk(
        parameters,
        batch.tokens,
        config,
        edit=edit,
        association=edit.layers.pattern is not None,
        unroll=unroll,
        rematerialize=rematerialize,
        sharding=sharding,
    )
    if kind == "regression":
        return _squared(walked.logits[..., 0], batch.targets)
    context, targets = walked.context, batch.targets
    if kind == "classification":
        targets = targets[:, -1:]
        if config.causal:
            context = context[:, -1:]
        else:
            logits = jnp.mean(walked.logits.astype(jnp.float32), axis=1, keepdims=True)
            return _cross_entropy(logits, targets, settings)
    return _in_chunks(parameters, context, targets, config, settings)


def _in_chunks(
    parameters: Parameters,
    context: Float[Array, "batch position width"],
    targets: Int[Array, "batch position"],
    config: ModelConfig,
    settings: ObjectiveSettings,
) -> Sums:
    """Unembedding and loss of a few positions at a time; their logits are made again on the way back."""
    batch, length, width = context.shape
    rows = settings.chunk or max(CHUNK_NUMBERS // config.vocabulary, 1)
    if rows >= batch * length:
        return _cross_entropy(unembed(parameters, context, config), targets, settings)
    # Chunks are of positions, not of sequences, which may lie on several devices.
    size = min(max(rows // batch, 1), length)
    chunks = -(-length // size)
    rest = ((0, 0), (0, chunks * size - length))
    targets = jnp.pad(targets, rest, constant_values=NO_TARGET)
    context = jnp.pad(context, (*rest, (0, 0)))

    @partial(jax.checkpoint, prevent_cse=False)
    def add(total: Sums, chunk: tuple[Array, Array]) -> tuple[Sums, None]:
        some = _cross_entropy(unembed(parameters, chunk[0], config), chunk[1], settings)
        return jax.tree.map(jnp.add, total, some), None

    parts = (
        jnp.moveaxis(context.reshape(batch, chunks, size, width), 1, 0),
        jnp.moveaxis(targets.reshape(batch, chunks, size), 1, 0),
    )
    return jax.lax.scan(add, Sums(*(jnp.zeros((), jnp.float32),) * 4), parts)[0]


def _cross_entropy(
    logits: Float[Array, "batch position vocabulary"],
    targets: Int[Array, "batch position"],
    settings: ObjectiveSettings,
) -> Sums:
    logits = logits.astype(jnp.float32)
    counts = (targets != NO_TARGET).astype(jnp.float32)
    normalizer = jax.nn.logsumexp(logits, axis=-1)
    chosen = jnp.take_along_axis(logits, jnp.maximum(targets, 0)[..., None], axis=-1)[..., 0]
    plain = loss = normalizer - chosen
    if not _is_zero(settings.label_smoothing):
        share = settings.label_smoothing
        loss = (1 - share) * loss + share * (normalizer - jnp.mean(logits, axis=-1))
    if not _is_zero(settings.z_loss):
        loss = loss + settings.z_loss * normalizer**2
    right = jnp.argmax(logits, axis=-1) == targets
    return Sums(*(jnp.sum(x * counts) for x in (loss, plain, right, counts)))


def _is_zero(number: Any) -> bool:
    """Whether a setting is known to do nothing: in a sweep it is traced, and may be anything."""
    return isinstance(number, int | float) and number == 0


def _squared(prediction: Float[Array, "batch position"], targets: Float[Array, "batch position"]) -> Sums:
    counts = ~jnp.isnan(targets)
    error = jnp.where(counts, prediction.astype(jnp.float32) - jnp.where(counts, targets, 0.0), 0.0)
    square = jnp.sum(optax.losses.squared_error(error))
    count = jnp.sum(counts.astype(jnp.float32))
    return Sums(loss=square, plain=square, right=jnp.zeros(()), count=count)


def with_inputs(edit: Edit, parameters: Parameters, batch: Batch) -> Edit:
    """With real-valued inputs, the token vectors are mixtures of those of the vocabulary."""
    if batch.inputs is None:
        return edit
    mixed = batch.inputs.astype(parameters.embedding.dtype) @ parameters.embedding
    return edit.replace(token_embedding=Change(keep=None, put=mixed))  # type: ignore[attr-defined]


def dropout(
    key: Key[Array, ""], config: ModelConfig, batch: int, length: int, settings: ObjectiveSettings, dtype: Any
) -> Edit | None:
    """Dropout (Srivastava et al. 2014) as an edit: ``x -> keep * x``, keep zero or ``1 / (1 - share)``.

    It falls on the start of the walk and on every step, and with ``attention_dropout`` on the associations.
    None where there is none.
    """
    if not settings.dropout and not settings.attention_dropout:
        return None
    keys = iter(jax.random.split(key, 4))

    def mask(share: float, *shape: int) -> Change:
        kept = jax.random.bernoulli(next(keys), 1 - share, shape)
        return Change(keep=(kept / (1 - share)).astype(dtype), put=-0.0)

    edit, stream = Edit(), (batch, length, config.width)
    if settings.dropout:
        steps = {"attention_step": mask(settings.dropout, config.layers, *stream)}
        if config.feed_forward != "none":
            steps["feed_forward_step"] = mask(settings.dropout, config.layers, *stream)
        edit = Edit(start=mask(settings.dropout, *stream), layers=LayerWalk(**steps))
    if settings.attention_dropout:
        pattern = mask(settings.attention_dropout, config.layers, batch, config.heads, length, length)
        edit = edit.replace(layers=edit.layers.replace(pattern=pattern))  # type: ignore[attr-defined]
    return edit
