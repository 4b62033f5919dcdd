"""A diagonal linear state space (S4D, Gu et al. 2022): an association made of fixed oscillations that die out."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from minitf.config import ModelConfig
from minitf.filter import in_statistics_dtype, statistics_dtype
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
    by_distance,
    check_least,
)


@dataclasses.dataclass(frozen=True)
class DiagonalStateSpace(Mixer):
    """``A[t, s] = K[t - s]``, ``K[j] = Re sum_n C_n exp(step a_n)^j (exp(step a_n) - 1) / a_n``, by channel.

    ``a_n`` starts at ``-1/2 + i pi n`` (S4D-Lin). What a channel holds now is added under a weight of its own.

    Attributes:
        states: how many oscillations each channel has.
    """

    states: int = 16

    def check(self, config: ModelConfig) -> None:
        """Raise ValueError for no state."""
        check_least(self, 1, "states")

    def about(self, config: ModelConfig) -> About:
        """Distances alone; signed."""
        return About(
            causal=True,
            heads=config.width,
            granularity="channel",
            by_lag=True,
            state=2 * self.states * config.width,
        )

    def declare(self, config: ModelConfig, make: Any) -> Mapping[str, Any]:
        """Each channel's step, decays, frequencies, what it reads of them, what it keeps, and the map back."""
        sizes = {"channel": config.width, "state": self.states, "one": 1}
        half = math.pi * (self.states - 1) / 2
        return {
            "log_step": make.weight("channel", "uniform", 2.3, center=-4.6, **sizes),
            "log_decay": make.weight("channel state", "constant", center=math.log(0.5), **sizes),
            "frequency": make.weight("channel state", "even", half, center=half, **sizes),
            "read": make.weight("channel state", "normal", 1.0, **sizes),
            "read_imaginary": make.weight("channel state", "normal", 1.0, **sizes),
            "skip": make.weight("channel", "ones", **sizes),
            "output": make.matrix("channel one width", "channel", output=True, **sizes),
        }

    def filter(
        self, weights: Weights, x: Seen, config: ModelConfig, positions: At, state: State = None
    ) -> Filtered:
        """The channels themselves."""
        return Filtered(v=x[..., None])

    def association(self, weights: Weights, f: Filtered, config: ModelConfig) -> Pairs:
        """The kernel at every distance."""
        length = f.v.shape[1]
        return by_distance(self._kernel(weights, length), length)

    def aggregate(self, weights: Weights, f: Filtered, config: ModelConfig) -> Heads:
        """A convolution by fast Fourier transforms, with room so that nothing comes round."""
        length = f.v.shape[1]
        # No transform is taken in half precision.
        kernel = jnp.fft.rfft(self._kernel(weights, length), 2 * length, axis=-1)
        v = jnp.fft.rfft(in_statistics_dtype(jnp.moveaxis(f.v[..., 0], 1, 2)), 2 * length, axis=-1)
        z = jnp.fft.irfft(kernel * v, 2 * length, axis=-1)[..., :length]
        return jnp.moveaxis(z, 2, 1)[..., None].astype(f.v.dtype)

    def empty_state(self, config: ModelConfig, batch: int, slots: int, dtype: Any) -> State:
        """Oscillations at rest; real and imaginary parts last."""
        return jnp.zeros((batch, config.width, self.states, 2), statistics_dtype(dtype))

    def step(self, weights: Weights, f: Filtered, state: State, position: Now, config: ModelConfig) -> Step:
        """``h = exp(step a) h + (exp(step a) - 1) / a v``."""
        log_turn, push, read = self._terms(weights)
        h = jnp.exp(log_turn) * (state[..., 0] + 1j * state[..., 1]) + push * f.v[:, 0]
        z = jnp.sum((read * h).real, axis=-1)
        after = jnp.stack([h.real, h.imag], axis=-1).astype(state.dtype)
        return z[:, None, :, None], after

    def gate(self, weights: Weights, z: Heads, f: Filtered, config: ModelConfig) -> Heads:
        """What the channel holds now, added."""
        return z + weights["skip"][:, None] * f.v

    @staticmethod
    def _terms(weights: Weights) -> tuple[Array, Array, Array]:
        """``step a``, ``(exp(step a) - 1) / a``, and C, each ``[channel, state]``, complex."""
        w = jax.tree.map(in_statistics_dtype, weights)
        a = -jnp.exp(w["log_decay"]) + 1j * w["frequency"]
        log_turn = jnp.exp(w["log_step"])[:, None] * a
        return log_turn, jnp.expm1(log_turn) / a, w["read"] + 1j * w["read_imaginary"]

    def _kernel(self, weights: Weights, length: int) -> Float[Array, "channel lag"]:
        log_turn, push, read = self._terms(weights)
        lag = jnp.arange(length, dtype=statistics_dtype(weights["read"].dtype))

        def one(terms: tuple[Array, Array]) -> Array:
            turn, size = terms
            return jnp.sum((size[:, None] * jnp.exp(turn[:, None] * lag)).real, axis=0)

        return jax.vmap(one)((log_turn, read * push))
