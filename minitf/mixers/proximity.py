"""Attention without parameters: what is near in embedding space is mixed."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp

from minitf import aggregate
from minitf.config import ModelConfig
from minitf.mixers.contract import (
    About,
    At,
    Filtered,
    Mixer,
    Now,
    Pairs,
    Seen,
    State,
    Step,
    Weights,
    remember,
    visible,
)


@dataclasses.dataclass(frozen=True)
class Proximity(Mixer):
    """``H <- softmax(H H^T) H``, one head, no weight at all: association from proximity alone.

    With ``residual=False``, ``norm="none"`` and ``feed_forward="none"`` a model of such layers is the
    parameter-free decoder; its only weights are the embeddings.
    """

    leaves = frozenset({"pattern", "q", "k"})

    def about(self, config: ModelConfig) -> About:
        """Pairs alone."""
        return About(
            causal=config.causal,
            heads=1,
            granularity="head",
            provenance=frozenset({"pair"}),
            normalized="exactly",
            state=2 * config.length * config.width,
            exponent=2.0,
        )

    def declare(self, config: ModelConfig, make: Any) -> Mapping[str, Any]:
        """Nothing."""
        return {}

    def filter(
        self, weights: Weights, x: Seen, config: ModelConfig, positions: At, state: State = None
    ) -> Filtered:
        """The points themselves are queries, keys and values."""
        h = x[:, :, None, :]
        return Filtered(v=h, q=h, k=h)

    def association(self, weights: Weights, f: Filtered, config: ModelConfig) -> Pairs:
        """Softmax of inner products."""
        scores = aggregate.score(f.q, f.k, 1.0)
        return aggregate.associate(jnp.where(visible(f.q.shape[1], config), scores, -jnp.inf))

    def empty_state(self, config: ModelConfig, batch: int, slots: int, dtype: Any) -> State:
        """Room for the points."""
        room = jnp.zeros((batch, slots, 1, config.width), dtype)
        return room, room

    def step(self, weights: Weights, f: Filtered, state: State, position: Now, config: ModelConfig) -> Step:
        """The point against those so far."""
        k, v = (remember(kept, new, position) for kept, new in zip(state, (f.k, f.v), strict=True))
        seen = (jnp.arange(k.shape[1]) <= position[:, None])[:, None, None]
        pattern = aggregate.associate(jnp.where(seen, aggregate.score(f.q, k, 1.0), -jnp.inf))
        return aggregate.combine(pattern, v), (k, v)
