"""Training a sparse autoencoder: one compiled loop over batches of vectors, or of tokens that walk inside it."""

from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct
from jaxtyping import Array, Float

from minitf.analysis.sparse_autoencoder.autoencoder import (
    AutoencoderConfig,
    SparseAutoencoder,
    check_rows,
    normalized,
    unit,
)
from minitf.analysis.sparse_autoencoder.losses import Losses, losses
from minitf.analysis.sparse_autoencoder.place import Place, batch_rows, checked_batches
from minitf.analysis.stream import Progress, stream
from minitf.walk import Leaf, leaf

ADAM = optax.adam(1e-3)


@struct.dataclass
class History:
    """What every step saw, on its batch and before it: the parts of the loss, and the share of dead latents."""

    loss: Leaf = leaf("step")
    reconstruction: Leaf = leaf("step")
    l0: Leaf = leaf("step")
    dead_share: Leaf = leaf("step")


@struct.dataclass
class Training:
    """An autoencoder and its history. ``finished`` is False if training was interrupted; the rest was done."""

    autoencoder: SparseAutoencoder
    history: History
    finished: bool = struct.field(pytree_node=False, default=True)


def train(
    autoencoder: SparseAutoencoder,
    batches: Iterable[Any],
    config: AutoencoderConfig,
    *,
    source: Place | None = None,
    optimizer: optax.GradientTransformation = ADAM,
    steps_per_program: int = 50,
    progress: Progress = iter,
) -> Training:
    """Take one step for every batch, and return where that leads.

    Where decoder rows are kept at length 1, the part of their slope along them is taken away before the optimizer
    sees it, and after the step they are brought back to 1 (Gao et al. 2024, Rajamanoharan et al. 2024).

    Args:
        autoencoder: where to start, as ``initialize`` makes it or as another training left it (moments of the
            optimizer, and what is known of dead latents, begin anew).
        batches: ``[row, width]`` vectors; with a ``source``, ``[batch, position]`` tokens. All of one shape.
        source: where in the walk of the tokens the vectors are read, inside the compiled step.
        optimizer: defined once; a new one is compiled anew.
        steps_per_program, progress: as :func:`minitf.analysis.stream.stream`.

    Raises:
        ValueError: vectors of another width, tokens that the model cannot read, no batch, or a loss that is not
            finite, with the number of its step.
    """
    setting = _Setting(source, config, optimizer)
    state = _State(autoencoder, optimizer.init(autoencoder), jnp.zeros(config.latents, jnp.int32))
    checked = checked_batches(source, progress(batches))
    done = stream(_step, setting, state, checked, steps_per_program=steps_per_program)
    return Training(done.state.autoencoder, done.records, done.finished)


@struct.dataclass
class _Setting:
    """What every step reads."""

    source: Place | None
    config: AutoencoderConfig = struct.field(pytree_node=False)
    optimizer: optax.GradientTransformation = struct.field(pytree_node=False)


@struct.dataclass
class _State:
    """What goes from step to step; ``idle`` is how many rows ago a latent was last active."""

    autoencoder: SparseAutoencoder
    moments: Any
    idle: Any


def _step(given: _Setting, state: _State, batch: Array) -> tuple[_State, History]:
    config, before = given.config, state.autoencoder
    rows = batch_rows(given.source, batch)
    check_rows(rows, config)
    inputs = normalized(before, rows)
    dead = state.idle >= config.dead_after

    def total(autoencoder: SparseAutoencoder) -> tuple[Float[Array, ""], tuple[Losses, Array]]:
        parts, active = losses(autoencoder, inputs, config, dead)
        return parts.total, (parts, active)

    (loss, (parts, active)), slope = jax.value_and_grad(total, has_aux=True)(before)
    if config.unit_rows:
        along = jnp.sum(slope.decoder * before.decoder, axis=-1, keepdims=True)
        slope = slope.replace(decoder=slope.decoder - along * before.decoder)
    moves, moments = given.optimizer.update(slope, state.moments, before)
    after = optax.apply_updates(before, moves).replace(scale=before.scale)
    if config.unit_rows:
        after = after.replace(decoder=unit(after.decoder))
    # Counted no further than it matters, so that the count cannot overflow.
    idle = jnp.where(active, 0, jnp.minimum(state.idle, config.dead_after) + np.int32(len(rows)))
    history = History(loss, parts.reconstruction, parts.l0, jnp.mean(dead))
    return _State(after, moments, idle), history
