"""Where the tokens of a run stand, which pairs may meet, and what earlier positions left behind."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Int

from minitf import aggregate
from minitf.config import ModelConfig


@struct.dataclass
class Cache:
    """The positions already done.

    ``states`` is what each layer's mixer hands on: of softmax attention keys and values, each ``[layer, batch,
    slot, key_value_head, head_width]``, in which slot i holds position i and what later slots hold is not read.
    ``filled`` ``[batch]`` counts the positions of each sequence; ``slots`` is how many there is room for.
    """

    states: Any
    filled: Any
    slots: int = struct.field(pytree_node=False)


@struct.dataclass
class Places:
    """Where the tokens stand.

    ``query`` ``[#batch, position]`` are their positions; ``forbidden`` ``[#batch, 1, query, key]`` the pairs that
    may not meet; ``counts`` ``[batch, position]``, where tokens go on from a state, which of them do, all if None;
    ``goes_on`` says whether positions came before, in a cache; ``association`` whether the walk is to hold scores
    and patterns; ``padded`` whether some positions are padding.
    """

    query: Any
    forbidden: Any
    counts: Any = None
    goes_on: bool = struct.field(pytree_node=False, default=False)
    association: bool = struct.field(pytree_node=False, default=True)
    padded: bool = struct.field(pytree_node=False, default=False)


def places_from_start(
    length: int, config: ModelConfig, valid: Bool[Array, "batch position"] | None, association: bool = True
) -> Places:
    """The places of a whole sequence; padding, where ``valid`` is False, meets no query.

    Raises ValueError for a mask that is not of booleans.
    """
    if valid is not None and not (hasattr(valid, "dtype") and jnp.issubdtype(valid.dtype, jnp.bool_)):
        what = getattr(valid, "dtype", type(valid).__name__)
        raise ValueError(
            f"valid is {what}; it must be an array of booleans, True where there is a token (such as mask == 1)"
        )
    forbidden = ~aggregate.allowed_pairs(length, config.causal, config.attend_self)[None, None]
    if valid is not None:
        forbidden = forbidden | ~valid[:, None, None, :]
    return Places(jnp.arange(length)[None], forbidden, association=association, padded=valid is not None)


def places_after(
    cache: Cache,
    length: int,
    config: ModelConfig,
    counts: Bool[Array, "batch position"] | None = None,
) -> Places:
    """The places of the ``length`` tokens that follow those in the cache."""
    return places_at(cache.filled[:, None] + jnp.arange(length), cache.slots, config, counts)


def places_at(
    query: Int[Array, "batch position"],
    slots: int,
    config: ModelConfig,
    counts: Bool[Array, "batch position"] | None = None,
) -> Places:
    """The places of tokens at those positions, after others whose slots hold them."""
    key = jnp.arange(slots)
    forbidden = (key > query[..., None]) if config.attend_self else (key >= query[..., None])
    return Places(query, forbidden[:, None], counts, goes_on=True)


def together(states: Sequence[Any], config: ModelConfig) -> Any:
    """The layers' states as :class:`Cache` holds them: stacked, or, where layers differ, a tuple."""
    if isinstance(config.mixer, tuple):
        return tuple(states)
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *states)
