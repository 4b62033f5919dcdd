"""A causal convolution: each channel's last few values under fixed weights."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp

from minitf.config import ModelConfig
from minitf.mixers.aft import channel_filters
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
    by_distance,
    check_least,
    short_convolution,
)


@dataclasses.dataclass(frozen=True)
class Convolution(Mixer):
    """``A[t, s] = kernel[t - s]``, by channel; zero from ``taps`` positions on."""

    taps: int = 8

    def check(self, config: ModelConfig) -> None:
        """Raise ValueError for no tap."""
        check_least(self, 1, "taps")

    def about(self, config: ModelConfig) -> About:
        """Distances alone; signed."""
        return About(
            causal=True,
            heads=config.width,
            granularity="channel",
            by_lag=True,
            state=(self.taps - 1) * config.width,
        )

    def declare(self, config: ModelConfig, make: Any) -> Mapping[str, Any]:
        """Values, the kernel (its last tap is the present position), the map back."""
        kernel = make.weight("tap channel", "uniform", self.taps**-0.5, tap=self.taps, channel=config.width)
        return {**channel_filters(make, config, "value"), "kernel": kernel}

    def association(self, weights: Weights, f: Filtered, config: ModelConfig) -> Pairs:
        """The kernel at every distance."""
        return by_distance(weights["kernel"][::-1].T, f.v.shape[1])

    def aggregate(self, weights: Weights, f: Filtered, config: ModelConfig) -> Heads:
        """A sum over the taps."""
        v = jnp.pad(f.v[..., 0], ((0, 0), (self.taps - 1, 0), (0, 0)))
        return short_convolution(v, weights["kernel"])[..., None]

    def empty_state(self, config: ModelConfig, batch: int, slots: int, dtype: Any) -> State:
        """The last values."""
        return jnp.zeros((batch, self.taps - 1, config.width), dtype)

    def step(self, weights: Weights, f: Filtered, state: State, position: Now, config: ModelConfig) -> Step:
        """The taps over the last values."""
        values = jnp.concatenate([state, f.v[..., 0]], axis=1)
        return short_convolution(values, weights["kernel"])[..., None], values[:, 1:]
