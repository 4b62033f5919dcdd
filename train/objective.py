"""What training minimizes: sums over targets, so that parts of a batch add up to the whole.

Dropout is an edit of the walk, and a real-valued input is one too: a mixture of token vectors in their place.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Key

from minitf import ModelConfig, Parameters, walk
from minitf.layer import mixer_of
from minitf.train.batch import NO_TARGET, Batch
from minitf.train.config import Objective, ObjectiveSettings
from minitf.train.cross_entropy import Sums, cross_entropy, in_chunks
from minitf.walk import Change, Edit, LayerWalk


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
            its last, which that position answers, or, where positions see all others, the mean of their logits;
            ``regression`` compares the first logit, of such a model its mean over the sequence.
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
        told = walked.logits[..., 0].astype(jnp.float32)
        if not config.causal:
            told = jnp.broadcast_to(jnp.mean(told, axis=1, keepdims=True), told.shape)
        return _squared(told, batch.targets)
    context, targets = walked.context, batch.targets
    if kind == "classification":
        place = targets.shape[1] - 1 - jnp.argmax(targets[:, ::-1] != NO_TARGET, axis=1)[:, None]
        targets = jnp.take_along_axis(targets, place, axis=1)
        if config.causal:
            context = jnp.take_along_axis(context, place[..., None], axis=1)
        else:
            logits = jnp.mean(walked.logits.astype(jnp.float32), axis=1, keepdims=True)
            return cross_entropy(logits, targets, settings)
    return in_chunks(parameters, context, targets, config, settings)


def _squared(prediction: Float[Array, "batch position"], targets: Float[Array, "batch position"]) -> Sums:
    counts = ~jnp.isnan(targets)
    error = jnp.where(counts, prediction - jnp.where(counts, targets, 0.0), 0.0)
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

    def mask(share: float, *shape: int, key: Key[Array, ""] | None = None) -> Change:
        kept = jax.random.bernoulli(next(keys) if key is None else key, 1 - share, shape)
        return Change(keep=(kept / (1 - share)).astype(dtype), put=-0.0)

    edit, stream = Edit(), (batch, length, config.width)
    if settings.dropout:
        steps = {"attention_step": mask(settings.dropout, config.layers, *stream)}
        if config.feed_forward != "none":
            steps["feed_forward_step"] = mask(settings.dropout, config.layers, *stream)
        edit = Edit(start=mask(settings.dropout, *stream), layers=LayerWalk(**steps))
    if settings.attention_dropout:
        share = settings.attention_dropout
        heads = [_associations(config.layer(number)) for number in range(config.layers)]
        if not any(heads):
            raise ValueError(f"attention_dropout is {share}; no layer of this model has an association")
        if len(set(heads)) == 1:
            pattern: Any = mask(share, config.layers, batch, heads[0], length, length)
        else:
            each = zip(heads, jax.random.split(next(keys), config.layers), strict=True)
            pattern = tuple(mask(share, batch, many, length, length, key=k) if many else None for many, k in each)
        edit = edit.replace(layers=edit.layers.replace(pattern=pattern))  # type: ignore[attr-defined]
    return edit


def _associations(layer: ModelConfig) -> int:
    """How many associations a layer has: one for each head or channel."""
    mixer = mixer_of(layer)
    return mixer.about(layer).heads if "pattern" in mixer.leaves else 0
