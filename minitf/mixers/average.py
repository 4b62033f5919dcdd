"""Averages of the past that do not look at the data: a bag, and an exponential average."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from minitf.config import ModelConfig
from minitf.filter import in_statistics_dtype, statistics_dtype
from minitf.mixers.contract import (
    About,
    Filtered,
    Heads,
    Mixer,
    Now,
    Pairs,
    State,
    Step,
    Weights,
    product_association,
    recurrence,
    visible,
)


@dataclasses.dataclass(frozen=True)
class Uniform(Mixer):
    """``A[t, s] = 1 / (t + 1)``: a bag of what came before; in a model that sees both ways, of everything."""

    def about(self, config: ModelConfig) -> About:
        """Every key counts the same."""
        return About(
            causal=config.causal,
            heads=config.heads,
            granularity="head",
            normalized="exactly",
            state=config.heads * config.head_size,
        )

    def declare(self, config: ModelConfig, make: Any) -> Mapping[str, Any]:
        """Values and the map back."""
        return values_and_output(make)

    def association(self, weights: Weights, f: Filtered, config: ModelConfig) -> Pairs:
        """One over the number of keys in sight."""
        seen = visible(f.v.shape[1], config).astype(f.v.dtype)
        pattern = seen / jnp.sum(seen, axis=-1, keepdims=True)
        return jnp.broadcast_to(pattern, (1, config.heads, *pattern.shape))

    def aggregate(self, weights: Weights, f: Filtered, config: ModelConfig) -> Heads:
        """A running mean."""
        if not config.causal:
            return jnp.broadcast_to(jnp.mean(f.v, axis=1, keepdims=True), f.v.shape)
        count = jnp.arange(1, f.v.shape[1] + 1)[:, None, None]
        return (jnp.cumsum(in_statistics_dtype(f.v), axis=1) / count).astype(f.v.dtype)

    def empty_state(self, config: ModelConfig, batch: int, slots: int, dtype: Any) -> State:
        """The mean of nothing."""
        return jnp.zeros((batch, config.heads, config.head_size), statistics_dtype(dtype))

    def step(self, weights: Weights, f: Filtered, state: State, position: Now, config: ModelConfig) -> Step:
        """``c += (v - c) / (t + 1)``."""
        mean = state + (f.v[:, 0] - state) / (position + 1).astype(state.dtype)[:, None, None]
        return mean[:, None], mean


@dataclasses.dataclass(frozen=True)
class ExponentialAverage(Mixer):
    """``A[t, s] = (1 - a) a^(t - s)``, one trained rate a for each head; slow and fast ones at the start."""

    def about(self, config: ModelConfig) -> About:
        """The distance alone counts."""
        return About(
            causal=True,
            heads=config.heads,
            granularity="head",
            by_lag=True,
            normalized="at most",
            state=config.heads * config.head_size,
        )

    def declare(self, config: ModelConfig, make: Any) -> Mapping[str, Any]:
        """Values, the map back, and ``rate``: a is its sigmoid, at the start from .73 to .98."""
        return {**values_and_output(make), "rate": make.weight("head", "even", 1.5, center=2.5)}

    def association(self, weights: Weights, f: Filtered, config: ModelConfig) -> Pairs:
        """Powers of the rates."""
        rate = in_statistics_dtype(weights["rate"])
        decay = jnp.broadcast_to(jax.nn.log_sigmoid(rate), (1, f.v.shape[1], config.heads))
        return product_association(decay, jnp.broadcast_to(jax.nn.sigmoid(-rate), decay.shape))

    def aggregate(self, weights: Weights, f: Filtered, config: ModelConfig) -> Heads:
        """A parallel scan."""
        return recurrence(*self._terms(weights, f.v)).astype(f.v.dtype)

    def empty_state(self, config: ModelConfig, batch: int, slots: int, dtype: Any) -> State:
        """Zero."""
        return jnp.zeros((batch, config.heads, config.head_size), statistics_dtype(dtype))

    def step(self, weights: Weights, f: Filtered, state: State, position: Now, config: ModelConfig) -> Step:
        """``h = a h + (1 - a) v``."""
        decay, share = self._terms(weights, f.v)
        mean = decay[0] * state + share[:, 0]
        return mean[:, None], mean

    @staticmethod
    def _terms(weights: Weights, v: Array) -> tuple[Array, Array]:
        rate = in_statistics_dtype(weights["rate"])[None, None, :, None]
        return jax.nn.sigmoid(rate), jax.nn.sigmoid(-rate) * v


def values_and_output(make: Any) -> dict[str, Any]:
    """The two filters that nearly every mixer by heads has: into values, and from heads back to the stream."""
    return {
        "value": make.matrix("width head head_width", "width"),
        "output": make.matrix("head head_width width", "head head_width", output=True),
    }
