"""Attention-free transformers (Zhai et al. 2021): each channel weighs keys by itself, helped by their places."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from minitf.config import ModelConfig
from minitf.filter import in_statistics_dtype
from minitf.mixers.aft_sums import (
    evenly_halved,
    from_further_back,
    from_the_block_before,
    in_blocks,
    up_to_each,
)
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
    check_least,
    past,
    project,
    remember,
)
from minitf.mixers.weighted_mean import nothing, together, weighted_sums, with_term


@dataclasses.dataclass(frozen=True)
class AttentionFree(Mixer):
    """``A[t, s] = sigmoid(q_t) softmax over s of (k_s + w[t, s])``, channel by channel.

    Attributes:
        variant: ``full``: w is a table of places; ``simple``: zero; ``local``: a table, zero from ``window``
            places on; ``conv``: a function of t - s below ``window`` for each head's channels, zero beyond.
        window: of ``local`` and ``conv``.

    Sums over many keys are products of exp(k) and exp(w): a row whose every exponent is 69 nats below the largest
    k plus the largest w counts as nothing there (the association has it).
    """

    variant: str = "full"
    window: int = 32

    leaves = frozenset({"pattern", "q", "k"})

    def check(self, config: ModelConfig) -> None:
        """Raise ValueError for an unknown variant, and for channels that heads do not divide."""
        if self.variant not in ("full", "simple", "local", "conv"):
            raise ValueError(f"variant is {self.variant!r}; choose full, simple, local or conv")
        check_least(self, 1, "window")
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
        axes = {"full": "query key", "local": "query lag", "conv": "head lag"}.get(self.variant)
        own = {} if axes is None else {"places": make.weight(axes, "normal", 0.02, lag=self.window, **sizes)}
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
        """A ratio of two sums; simple, running ones; else each block's in halves, and what lies further back."""
        k, v = (in_statistics_dtype(x[..., 0]) for x in (f.k, f.v))
        length = k.shape[1]
        if self.variant == "simple":
            top, bottom, _ = weighted_sums(k, v, jnp.zeros((config.width,), k.dtype))
        else:
            size = evenly_halved(length if self.variant == "full" else min(self.window, length))
            k, v = (in_blocks(x, size) for x in (k, v))
            here, before = (self._block(weights, k.shape[1], size, back) for back in (0, 1))
            sums = up_to_each(k, v, here)
            if self.variant != "full" and k.shape[1] > 1:
                sums = together(together(sums, from_the_block_before(k, v, before)), from_further_back(k, v))
            top, bottom, _ = sums
        mean = (top / bottom).reshape(k.shape[0], -1, config.width)[:, :length]
        return f.q * mean[..., None].astype(f.v.dtype)

    def _block(self, weights: Weights, blocks: int, size: int, back: int) -> Float[Array, "block group query key"]:
        """w of each block's queries for the keys of their own block, or of those so many blocks ``back``."""
        places = weights["places"]
        query, key = np.arange(size)[:, None], np.arange(size)
        if self.variant == "full":
            return jnp.pad(places[:size, :size], [(0, max(size - len(places), 0))] * 2)[None, None]
        lag = back * size + query - key
        reached = (lag >= 0) & (lag < self.window)
        near = np.where(reached, lag, 0)
        if self.variant == "conv":
            found = jnp.broadcast_to(places[:, near], (blocks, len(places), size, size))
        else:
            at = np.minimum(np.arange(blocks)[:, None, None] * size + query, len(places) - 1)
            found = places[at, near][:, None]
        # Keys before the window count as without w.
        return jnp.where(reached, found, 0.0)

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
        if self.variant == "full":
            return weights["places"][at, :keys][None]
        by_query = weights["places"][at[:, None], jnp.clip(lag, 0, self.window - 1)]
        return jnp.where(near, by_query, 0.0)[None]


def channel_filters(make: Any, config: ModelConfig, *names: str) -> dict[str, Any]:
    """Filters whose heads are single channels, and the map from those back to the stream."""
    sizes = {"channel": config.width, "one": 1}
    return {
        **{name: make.matrix("width channel one", "width", **sizes) for name in names},
        "output": make.matrix("channel one width", "channel", output=True, **sizes),
    }
