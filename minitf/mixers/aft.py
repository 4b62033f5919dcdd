"""Attention-free transformers (Zhai et al. 2021): each channel weighs keys by itself, helped by their places."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from minitf.config import ModelConfig
from minitf.mixers.contract import (
    About,
    At,
    Filtered,
    Heads,
    Mixer,
    Now,
    Pairs,
    Seen,
    State,
    Step,
    Weights,
    past,
    project,
    remember,
)
from minitf.mixers.weighted_mean import EMPTY, nothing, together, weighted_sums, with_term


@dataclasses.dataclass(frozen=True)
class AttentionFree(Mixer):
    """``A[t, s] = sigmoid(q_t) softmax over s of (k_s + w[t, s])``, channel by channel.

    Attributes:
        variant: ``full``: w is a table of places; ``simple``: zero; ``local``: a table, zero from ``window``
            places on; ``conv``: a function of t - s below ``window`` for each head's channels, zero beyond.
        window: of ``local`` and ``conv``.
    """

    variant: str = "full"
    window: int = 32

    leaves = frozenset({"pattern", "q", "k"})

    def check(self, config: ModelConfig) -> None:
        """Raise ValueError for an unknown variant, and for channels that heads do not divide."""
        if self.variant not in ("full", "simple", "local", "conv"):
            raise ValueError(f"variant is {self.variant!r}; choose full, simple, local or conv")
        if self.window < 1:
            raise ValueError(f"window is {self.window}; it must be at least 1")
        if self.variant == "conv" and config.width % config.heads:
            raise ValueError(f"{config.heads} heads do not divide {config.width} channels")

    def about(self, config: ModelConfig) -> About:
        """Keys and places, under the query's gate."""
        simple = self.variant == "simple"
        return About(
            causal=True,
            heads=config.width,
            granularity="channel",
            provenance=frozenset({"query", "key"}),
            normalized="at most",
            state=3 * config.width if simple else 2 * config.length * config.width,
            exponent=2.0 if self.variant == "full" else 1.0,
        )

    def declare(self, config: ModelConfig, make: Any) -> Mapping[str, Any]:
        """Queries, keys, values, the map back, the table."""
        sizes = {"channel": config.width, "one": 1, "query": config.length, "key": config.length}
        own = {}
        if self.variant in ("full", "local"):
            own = {"places": make.weight("query key", "normal", 0.02, **sizes)}
        if self.variant == "conv":
            own = {"places": make.weight("head lag", "normal", 0.02, lag=self.window)}
        return {
            **channel_filters(make, config, "query", "key", "value"),
            **own,
        }

    def filter(
        self, weights: Weights, x: Seen, config: ModelConfig, positions: At, state: State = None
    ) -> Filtered:
        """Queries, keys and values, one number for each channel."""
        q, k, v = (project(x, weights[name]) for name in ("query", "key", "value"))
        return Filtered(v=v, q=jax.nn.sigmoid(q), k=k)

    def association(self, weights: Weights, f: Filtered, config: ModelConfig) -> Pairs:
        """Softmax for each channel, under the gate."""
        length = f.v.shape[1]
        k = jnp.moveaxis(f.k[..., 0], 2, 1)[:, :, None, :]
        rows = self._rows(weights, config, jnp.arange(length), length)
        scores = jnp.where(past(length), k + rows, -jnp.inf)
        return jax.nn.softmax(scores, axis=-1) * jnp.moveaxis(f.q, 1, 2)

    def aggregate(self, weights: Weights, f: Filtered, config: ModelConfig) -> Heads:
        """A ratio of two products; simple, of two running sums; where w ends early, of both."""
        k, v, length = f.k[..., 0], f.v[..., 0], f.v.shape[1]
        if self.variant == "simple":
            top, bottom, _ = weighted_sums(k, v, jnp.zeros((config.width,), k.dtype))
            return f.q * (top / bottom)[..., None]
        if self.variant == "full":
            return f.q * _ratio(k, v, weights["places"])[..., None]
        return f.q * _near_and_far(k, v, self._near(weights, length))[..., None]

    def _near(self, weights: Weights, length: int) -> Float[Array, "block group query key"]:
        """w of each block's queries for the keys of the block before and their own; blocks as long as the window.

        One block for all where only the distance counts.
        """
        size = min(self.window, length)
        lag = size + np.arange(size)[:, None] - np.arange(2 * size)
        reached = (lag >= 0) & (lag < self.window)
        near = np.where(reached, lag, 0)
        if self.variant == "conv":
            found = weights["places"][None, :, near]
        else:
            at = np.arange(-(-length // size))[:, None, None] * size + np.arange(size)[:, None]
            last = weights["places"].shape[0] - 1
            found = weights["places"][np.clip(at, 0, last), np.clip(at - near, 0, last)][:, None]
        # Keys before the window count as without w, later ones not at all.
        return jnp.where(reached, found, jnp.where(lag < 0, -jnp.inf, 0.0))

    def empty_state(self, config: ModelConfig, batch: int, slots: int, dtype: Any) -> State:
        """Room for keys and values; simple, the running sums and the peak."""
        if self.variant == "simple":
            return nothing(jnp.zeros((batch, config.width), dtype))
        room = jnp.zeros((batch, slots, config.width), dtype)
        return room, room

    def step(self, weights: Weights, f: Filtered, state: State, position: Now, config: ModelConfig) -> Step:
        """One row over the keys so far; simple, one more term of the sums."""
        if self.variant == "simple":
            sums = with_term(state, f.k[:, 0, :, 0], f.v[:, 0, :, 0])
            return f.q * (sums[0] / sums[1])[:, None, :, None], sums
        k, v = (remember(kept, new[..., 0], position) for kept, new in zip(state, (f.k, f.v), strict=True))
        slots = k.shape[1]
        rows = jax.vmap(lambda at: self._rows(weights, config, at[None], slots)[:, 0])(position)
        scores = jnp.moveaxis(k, 1, 2) + rows
        scores = jnp.where(jnp.arange(slots) <= position[:, None, None], scores, -jnp.inf)
        mean = jnp.einsum("bcs,bsc->bc", jax.nn.softmax(scores, axis=-1), v)
        return f.q * mean[:, None, :, None], (k, v)

    def _rows(
        self, weights: Weights, config: ModelConfig, at: Int[Array, " query"], keys: int
    ) -> Float[Array, "channels query key"]:
        """w, one for all channels or for each."""
        lag = at[:, None] - jnp.arange(keys)
        if self.variant == "simple":
            return jnp.zeros((1, at.shape[0], keys), jnp.float32)
        near = (lag >= 0) & (lag < self.window)
        if self.variant == "conv":
            by_head = weights["places"][:, jnp.clip(lag, 0, self.window - 1)]
            return jnp.repeat(jnp.where(near, by_head, 0.0), config.width // config.heads, axis=0)
        table = weights["places"][at, :keys]
        return (jnp.where(near, table, 0.0) if self.variant == "local" else table)[None]


def channel_filters(make: Any, config: ModelConfig, *names: str) -> dict[str, Any]:
    """Filters whose heads are single channels, and the map from those back to the stream."""
    sizes = {"channel": config.width, "one": 1}
    return {
        **{name: make.matrix("width channel one", "width", **sizes) for name in names},
        "output": make.matrix("channel one width", "channel", output=True, **sizes),
    }


def _ratio(
    k: Float[Array, "batch position channel"],
    v: Float[Array, "batch position channel"],
    places: Float[Array, "place place"],
) -> Float[Array, "batch position channel"]:
    """``sum_s exp(k_s + w_ts) v_s`` over the same without v, in blocks of queries.

    In each block keys are measured from the highest one up to its end, so that a product of two exponentials, and
    no exponential of every triple, is enough.
    """
    length, found = k.shape[1], []
    block = max(64, -(-length // 8))
    for first in range(0, length, block):
        stop = min(first + block, length)
        highest = jax.lax.stop_gradient(jnp.max(k[:, :stop], axis=1, keepdims=True))
        weight = jnp.exp(k[:, :stop] - highest)
        bias = jnp.where(past(length)[first:stop, :stop], places[first:stop, :stop], -jnp.inf)
        bias = jnp.exp(bias - jax.lax.stop_gradient(jnp.max(bias, axis=-1, keepdims=True)))
        top, bottom = (jnp.einsum("ts,bsc->btc", bias, x) for x in (weight * v[:, :stop], weight))
        found.append(top / bottom)
    return jnp.concatenate(found, axis=1)


def _near_and_far(
    k: Float[Array, "batch position channel"],
    v: Float[Array, "batch position channel"],
    near: Float[Array, "#block group query key"],
) -> Float[Array, "batch position channel"]:
    """The same where w is zero but for the block of the query and the one before; groups share out the channels.

    Both parts keep their own highest exponent.
    """
    (batch, length, channels), (_, groups, size, _) = k.shape, near.shape
    spread = lambda x, fill: jnp.pad(x, ((0, 0), (0, -length % size), (0, 0)), constant_values=fill)
    k, v = (spread(x, fill).reshape(batch, -1, size, channels) for x, fill in ((k, -jnp.inf), (v, 0.0)))
    blocks = k.shape[1]

    # A block is a key itself: its sums are running sums over so few.
    of_block = jax.nn.logsumexp(k, axis=2), jnp.sum(jax.nn.softmax(k, axis=2) * v, axis=2)
    sums = weighted_sums(*of_block, jnp.zeros((channels,), k.dtype))
    two_back = lambda x, fill: jnp.pad(x, ((0, 0), (2, 0), (0, 0)), constant_values=fill)[:, :blocks, None]
    far = two_back(sums[0], EMPTY[0]), two_back(sums[1], EMPTY[1]), two_back(sums[2], EMPTY[2])

    before = lambda x, fill: jnp.pad(x[:, :-1], ((0, 0), (1, 0), (0, 0), (0, 0)), constant_values=fill)
    k, v = (jnp.concatenate([before(x, fill), x], axis=2) for x, fill in ((k, -jnp.inf), (v, 0.0)))
    highest = jax.lax.stop_gradient(jnp.max(k, axis=2, keepdims=True))
    most = jax.lax.stop_gradient(jnp.max(near, axis=3))
    weight, bias = jnp.exp(k - highest), jnp.exp(near - most[..., None])
    bias = jnp.broadcast_to(bias, (blocks, *bias.shape[1:]))
    by_group = lambda x: x.reshape(batch, blocks, 2 * size, groups, -1)
    top, bottom = (
        jnp.einsum("ngts,bnsgc->bntgc", bias, by_group(x)).reshape(batch, blocks, size, channels)
        for x in (weight * v, weight)
    )
    near_peak = highest + jnp.repeat(jnp.moveaxis(most, 1, 2), channels // groups, axis=2)

    top, bottom, _ = together((top, bottom, near_peak), far)
    return (top / bottom).reshape(batch, -1, channels)[:, :length]
