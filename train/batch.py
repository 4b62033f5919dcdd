"""What a step of training reads: tokens, and what the model should have answered at each position."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int, Int32, Key

NO_TARGET = -1

# Of the chosen positions (Devlin et al. 2019): shares that show the mask, and a random token; the rest, the truth.
SHOWN_MASKED = 0.8
SHOWN_RANDOM = 0.1


@struct.dataclass
class Batch:
    """Sequences and their targets, position by position.

    ``tokens`` is int32 ``[batch, position]``. ``targets`` has the same axes: int32, where -1 (`NO_TARGET`) counts
    for nothing, or float32 for regression, where NaN counts for nothing. ``inputs`` is None, or float32
    ``[batch, position, vocabulary]``: mixtures of tokens, which stand in place of tokens (what enters the model is
    ``inputs @ embedding``, so that a one-hot mixture is its token, and any real vector can be read). (Under
    ``vmap`` and ``scan`` leaves have more axes and may be placeholders, so they have no type here.)
    """

    tokens: Any
    targets: Any
    inputs: Any = None


def next_token(window: Int[Array, "batch length_plus_one"]) -> Batch:
    """Every token of the window but the last, and as its target the one after it."""
    return Batch(tokens=window[:, :-1].astype(jnp.int32), targets=window[:, 1:].astype(jnp.int32))


def labelled(rows: Int[Array, "batch length_plus_one"], filler: int) -> Batch:
    """Sequences, filled up with a token, and the token of each one's label, which its last position is to tell."""
    tokens, label = rows[:, :-1].astype(jnp.int32), rows[:, -1:].astype(jnp.int32)
    return Batch(tokens=tokens, targets=jnp.where(_is_last(tokens, filler), label, NO_TARGET))


def measured(rows: Int32[Array, "batch length_plus_one"], filler: int) -> Batch:
    """Sequences, filled up with a token, and each one's number, whose float32 bits are last in its row."""
    tokens, number = rows[:, :-1], jax.lax.bitcast_convert_type(rows[:, -1:], jnp.float32)
    return Batch(tokens=tokens, targets=jnp.where(_is_last(tokens, filler), number, jnp.nan))


def _is_last(tokens: Int32[Array, "batch position"], filler: int) -> Bool[Array, "batch position"]:
    """Which position is the last of its sequence; of an empty one the first."""
    last = jnp.maximum(jnp.sum(tokens != filler, axis=1, keepdims=True) - 1, 0)
    return jnp.arange(tokens.shape[1]) == last


def masked(
    tokens: Int[Array, "batch position"],
    key: Key[Array, ""],
    share: float | Float[Array, ""],
    mask_token: int,
    size: int | None = None,
) -> Batch:
    """Each position is chosen with probability ``share``, and one where chance chooses none of a sequence; the
    targets are the true tokens of the chosen ones.

    Of the chosen positions 80 % show ``mask_token``, 10 % a uniformly random token below ``size``, and 10 % what
    they held (Devlin et al. 2019, BERT). ``mask_token`` is the first id after those of the data, unless they have
    one of their own, and then ``size`` says how many they are.

    Raises ValueError, when traced, for a share outside (0, 1], and for a ``mask_token`` below 1.
    """
    if isinstance(share, int | float) and not 0 < share <= 1:
        raise ValueError(f"share is {share}; the share of positions to be guessed must be above 0 and at most 1")
    if mask_token < 1:
        raise ValueError(f"mask_token is {mask_token}; it must be the first id after the data's, so at least 1")
    of_choice, of_fate, of_token = jax.random.split(key, 3)
    chance = jax.random.uniform(of_choice, tokens.shape)
    chosen = (chance < share) | (chance == jnp.min(chance, axis=1, keepdims=True))
    fate = jax.random.uniform(of_fate, tokens.shape)
    random = jax.random.randint(of_token, tokens.shape, 0, mask_token if size is None else size)
    instead = jnp.where(fate < SHOWN_MASKED + SHOWN_RANDOM, random, tokens)
    instead = jnp.where(fate < SHOWN_MASKED, mask_token, instead)
    return Batch(
        tokens=jnp.where(chosen, instead, tokens).astype(jnp.int32),
        targets=jnp.where(chosen, tokens, NO_TARGET).astype(jnp.int32),
    )
