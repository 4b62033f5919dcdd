"""Softmax attention (Vaswani et al. 2017): the association of every pair, from a query and a key."""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from minitf import aggregate, filter
from minitf.attend_in_cache import attend_in_cache, block_of, blocks
from minitf.changes import apply, fits
from minitf.config import ModelConfig
from minitf.mixers.contract import (
    About,
    At,
    Filtered,
    Heads,
    Mixed,
    Mixer,
    Now,
    Pairs,
    Seen,
    State,
    Step,
    Stream,
    Weights,
    normed,
    remember,
)
from minitf.places import Places, places_at, places_from_start
from minitf.walk import LayerWalk


@dataclasses.dataclass(frozen=True)
class Softmax(Mixer):
    """``A[t, s] = softmax over s of q_t . k_s / sqrt(head_width)``, with the model's heads, groups and positions.

    Attributes:
        window: how many keys a query sees, itself the last (Beltagy et al. 2020); 0 for all.
        trained: which of the filters learn: False freezes those of queries and keys as they were drawn.

    The kind ``config.attention == "table"`` has one free matrix in place of queries' and keys' filters.
    """

    window: int = 0
    trained: bool = True

    leaves = frozenset({"q", "k", "scores", "pattern"})

    def check(self, config: ModelConfig) -> None:
        """Raise ValueError for a window that is none."""
        if self.window < 0:
            raise ValueError(f"window is {self.window}; it must be at least 1, or 0 to see everything")
        if self.window and not config.causal:
            raise ValueError("a window ends at the query: a model that sees both ways cannot have one")

    def about(self, config: ModelConfig) -> About:
        """Pairs and positions; rows sum to one. While decoding, a window's keys stay beside all others."""
        return About(
            causal=config.causal,
            heads=config.heads,
            granularity="head",
            provenance=frozenset({"pair"}),
            normalized="exactly",
            state=2 * config.length * config.groups * config.head_size,
            exponent=1.0 if self.window else 2.0,
        )

    def declare(self, config: ModelConfig, make: Any) -> Any:
        """As :class:`minitf.parameters.AttentionParameters` names them.

        Queries and keys that are never trained start as large as makes scores of normed inputs vary by one: the
        usual small ones would leave a nearly uniform average for good.
        """
        weights = make.attention()
        if self.trained or config.attention == "table":
            return weights
        scale = config.width**-0.5
        untrained = partial(make.weight, distribution="normal", scale=scale, linear=True, trained=False)
        query, key = untrained("width head head_width"), untrained("width key_value_head head_width")
        return dataclasses.replace(weights, query=query, key=key)

    def filter(
        self, weights: Weights, x: Seen, config: ModelConfig, positions: At, state: State = None
    ) -> Filtered:
        """Queries, keys and values, each ``[batch, position, head, head_width]``."""
        batch, length, width = x.shape
        rows = x.reshape(-1, width)

        def heads(weight: Array, bias: Array | None) -> Float[Array, "rows head head_width"]:
            flat = filter.linear(
                rows, weight.reshape(weight.shape[0], -1), None if bias is None else bias.reshape(-1)
            )
            return flat.reshape(rows.shape[0], *weight.shape[1:])

        if config.attention == "table":
            q = heads(jnp.moveaxis(weights.table, 0, 1), None)
            k = v = rows[:, None, :]
        else:
            query, key = weights.query, weights.key
            if not self.trained:
                query, key = jax.lax.stop_gradient((query, key))
            q = heads(query, weights.query_bias)
            k = heads(key, weights.key_bias)
            v = heads(weights.value, weights.value_bias)
        if config.query_key_norm:
            q, k = (normed(y, "rms", config, gain) for y, gain in ((q, weights.query_gain), (k, weights.key_gain)))
        if config.position == "rotary":
            at = jnp.broadcast_to(positions, (batch, length)).reshape(-1)
            q, k = (
                filter.rotate(
                    y,
                    at,
                    config.rotated_width,
                    config.rotary_base,
                    config.rotary_interleaved,
                    config.rotary_scaling,
                )
                for y in (q, k)
            )
        q, k, v = (y.reshape(batch, length, *y.shape[1:]) for y in (q, k, v))
        return Filtered(v=v, q=q, k=k)

    def association(self, weights: Weights, f: Filtered, config: ModelConfig) -> Pairs:
        """The pattern, whole."""
        places = _whole(f.q.shape[1], config, self.window)
        mixed = _associate(f, config, LayerWalk(), places, f.q.shape[1])
        return mixed.pattern

    def aggregate(self, weights: Weights, f: Filtered, config: ModelConfig) -> Heads:
        """In blocks of queries, or, with a window, in chunks of keys."""
        return self._mixed(f, config, LayerWalk(), _whole(f.q.shape[1], config, self.window)).z

    def start(self, config: ModelConfig, batch: int, slots: int, dtype: Any) -> tuple[Array, Array]:
        """Room for keys and values."""
        shape = (batch, slots, config.groups, config.head_size)
        return jnp.zeros(shape, dtype), jnp.zeros(shape, dtype)

    def empty_state(self, config: ModelConfig, batch: int, slots: int, dtype: Any) -> State:
        """The same."""
        return self.start(config, batch, slots, dtype)

    def step(self, weights: Weights, f: Filtered, state: State, position: Now, config: ModelConfig) -> Step:
        """The query against the keys so far."""
        k, v = (remember(kept, new, position) for kept, new in zip(state, (f.k, f.v), strict=True))
        places = _narrowed(places_at(position[:, None], k.shape[1], config), k.shape[1], self.window)
        return _associate(Filtered(v=v, q=f.q, k=k), config, LayerWalk(), places, 1).z, (k, v)

    def mix(
        self, weights: Weights, x: Stream, config: ModelConfig, edit: LayerWalk, places: Places, past: Any
    ) -> Mixed:
        """Filters, association and aggregate with their edits; keys and values of the past from ``past``."""
        f = self.filter(weights, x, config, places.query)
        q = apply(edit.q, f.q)
        if past is None:
            k, v = apply(edit.k, f.k), apply(edit.v, f.v)
        else:
            k, v, past = _with_past(f, edit, places, past)
        f = Filtered(v=v, q=q, k=k)
        places = _narrowed(places, k.shape[1], self.window)
        mixed = self._mixed(f, config, edit, places)
        z = apply(edit.z, mixed.z)
        return dataclasses.replace(mixed, q=q, k=k, v=v, z=z, out=z, state=past)

    def _mixed(self, f: Filtered, config: ModelConfig, edit: LayerWalk, places: Places) -> Mixed:
        length = f.q.shape[1]
        edited = edit.scores is not None or edit.pattern is not None
        usual = is_usual(config) and not places.goes_on and not places.padded
        if usual and not places.association and not self.window:
            if fits_card(f.q.dtype, config.head_size) and jax.default_backend() == "gpu":
                return Mixed(z=aggregate.attend(f.q, f.k, f.v, _scale(config), config.causal))
            if _is_one_cpu():
                return Mixed(z=attend_in_cache(f.q, f.k, f.v, _scale(config), config.causal))
        whole = edited or places.goes_on
        mixed = _associate(f, config, edit, places, length if whole else _block(length, config))
        chunks = self.window and not whole and not places.padded and config.position != "alibi"
        if chunks and length > 2 * self.window:
            z = _in_window(f, _scale(config), self.window, config.attend_self)
            mixed = dataclasses.replace(mixed, z=z)
        return mixed


def _with_past(
    f: Filtered, edit: LayerWalk, places: Places, past: tuple[Array, Array]
) -> tuple[Array, Array, tuple[Array, Array]]:
    """Keys and values of all slots as they are seen, and as they are kept.

    A change that fits what is new is kept; one of all slots, at each step, would be made of them again and again.
    """
    sequence, seen, after = jnp.arange(len(f.v))[:, None], [], []
    for change, new, kept in zip((edit.k, edit.v), (f.k, f.v), past, strict=True):
        of_new = fits(change, new)
        whole = kept.at[sequence, places.query].set(apply(change, new) if of_new else new)
        seen.append(whole if of_new else apply(change, whole))
        after.append(whole)
    return seen[0], seen[1], (after[0], after[1])


def _scale(config: ModelConfig) -> float:
    return 1.0 if config.attention == "table" else config.head_size**-0.5


def _block(length: int, config: ModelConfig) -> int:
    return block_of(length) if config.causal else length


def _whole(length: int, config: ModelConfig, window: int) -> Places:
    return _narrowed(places_from_start(length, config, None), length, window)


def _narrowed(places: Places, keys: int, window: int) -> Places:
    """With a window, what lies before it is forbidden too."""
    if not window:
        return places
    before = places.query[..., :, None] - jnp.arange(keys) >= window
    return dataclasses.replace(places, forbidden=places.forbidden | before[:, None])


def _associate(f: Filtered, config: ModelConfig, edit: LayerWalk, places: Places, size: int) -> Mixed:
    """Scores, pattern, and the values mixed under it.

    Where queries see the past alone, they are taken in blocks of ``size``, each with the keys up to its end: what
    is forbidden anyway is then not computed, and nobody pays for putting the blocks together who does not read
    them.
    """
    length, keys = f.q.shape[1], f.k.shape[1]
    scores, patterns, mixed = [], [], []
    for here in blocks(length, size):
        seen = keys if size >= length else here.stop
        some = aggregate.score(f.q[:, here], f.k[:, :seen], _scale(config))
        if config.position == "alibi":
            some = some + aggregate.alibi_bias(config.heads, places.query[:, here], seen).astype(some.dtype)
        some = jnp.where(places.forbidden[:, :, here, :seen], -jnp.inf, apply(edit.scores, some))
        if not places.association:
            mixed.append(aggregate.combine_scored(some, f.v[:, :seen]))
            continue
        pattern = apply(edit.pattern, aggregate.associate(some))
        mixed.append(aggregate.combine(pattern, f.v[:, :seen]))
        rest = ((0, 0), (0, 0), (0, 0), (0, keys - seen))
        scores.append(jnp.pad(some, rest, constant_values=-jnp.inf))
        patterns.append(jnp.pad(pattern, rest))
    z = jnp.concatenate(mixed, axis=1)
    if not places.association:
        return Mixed(z=z)
    return Mixed(
        scores=jnp.concatenate(scores, axis=2),
        pattern=jnp.concatenate(patterns, axis=2),
        z=z,
    )


def _in_window(
    f: Filtered, scale: float, window: int, attend_self: bool
) -> Float[Array, "batch query head head_width"]:
    """The aggregate in chunks as long as the window, each with its own keys and those of the chunk before."""
    batch, length = f.q.shape[:2]
    chunks = -(-length // window)

    def taken_apart(x: Array) -> Array:
        x = jnp.pad(x, ((0, 0), (0, chunks * window - length), (0, 0), (0, 0)))
        return x.reshape(batch * chunks, window, *x.shape[2:])

    def with_the_one_before(x: Array) -> Array:
        here = taken_apart(x).reshape(batch, chunks, window, *x.shape[2:])
        before = jnp.pad(here, ((0, 0), (1, 0), (0, 0), (0, 0), (0, 0)))[:, :-1]
        return jnp.concatenate([before, here], axis=2).reshape(batch * chunks, 2 * window, *x.shape[2:])

    scores = aggregate.score(taken_apart(f.q), with_the_one_before(f.k), scale)
    query, key = jnp.arange(window)[:, None], jnp.arange(-window, window)[None, :]
    allowed = (key <= query if attend_self else key < query) & (query - key < window)
    first = (jnp.arange(batch * chunks) % chunks == 0)[:, None, None]
    allowed = allowed[None] & ~(first & (key < 0)[None])
    pattern = aggregate.associate(jnp.where(allowed[:, None], scores, -jnp.inf))
    z = aggregate.combine(pattern, with_the_one_before(f.v))
    return z.reshape(batch, chunks * window, *z.shape[2:])[:, :length]


def is_usual(config: ModelConfig) -> bool:
    """Whether the association is one that kernels compute: of queries and keys alone."""
    return config.attention == "query_key" and config.position != "alibi" and config.attend_self


def fits_card(dtype: Any, head_width: int) -> bool:
    """Whether cuDNN's fused attention takes such queries: in half precision, of heads of some widths."""
    return dtype in (jnp.bfloat16, jnp.float16) and head_width % 8 == 0 and head_width <= 128


def _is_one_cpu() -> bool:
    """Whether sequences may be taken one after another: on several devices they lie side by side."""
    return jax.default_backend() == "cpu" and jax.device_count() == 1
