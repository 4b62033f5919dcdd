"""Gated recurrences: minGRU, whose gates see the input alone, and GRU and LSTM, whose gates see what they hold.

In all three ``A[t, s] = (product of keep over s < j <= t) * write_s``. The cells' gates and candidates depend on
the state before, so their filter is not position-local: it runs the cell, and the association is what it found.
An edit of the values is mixed under the association that was found without it. Only from a cache do the gates of
later positions see what the edit made, for there the cell goes on from it.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from minitf.config import ModelConfig
from minitf.filter import in_statistics_dtype, statistics_dtype
from minitf.mixers.aft import channel_filters
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
    product_association,
    project,
    recurrence,
)


class _Gated(Mixer):
    """By channel: ``h = keep * h + write * v``."""

    def about(self, config: ModelConfig) -> About:
        """Keys and what lies between."""
        return About(
            causal=True,
            heads=config.width,
            granularity="channel",
            provenance=frozenset({"key", "path"}),
            normalized="at most",
            state=config.width,
        )

    def association(self, weights: Weights, f: Filtered, config: ModelConfig) -> Pairs:
        """Products of what was kept."""
        return product_association(f.extras["log_keep"], f.extras["write"])

    def aggregate(self, weights: Weights, f: Filtered, config: ModelConfig) -> Heads:
        """A parallel scan."""
        keep = jnp.exp(in_statistics_dtype(f.extras["log_keep"]))
        return recurrence(keep[..., None], f.extras["write"][..., None] * f.v)

    def empty_state(self, config: ModelConfig, batch: int, slots: int, dtype: Any) -> State:
        """Nothing held."""
        return jnp.zeros((batch, config.width), statistics_dtype(dtype))

    def step(self, weights: Weights, f: Filtered, state: State, position: Now, config: ModelConfig) -> Step:
        """``h = keep * h + write * v``."""
        keep = jnp.exp(in_statistics_dtype(f.extras["log_keep"][:, 0]))
        h = keep * state + f.extras["write"][:, 0] * f.v[:, 0, :, 0]
        return h[:, None, :, None], h


@dataclasses.dataclass(frozen=True)
class MinimalGru(_Gated):
    """``h = (1 - g) h + g v``, g and v from the input alone (Feng et al. 2024, minGRU)."""

    def declare(self, config: ModelConfig, make: Any) -> Mapping[str, Any]:
        """The gate's filter, the values', the map back."""
        return channel_filters(make, config, "gate", "value")

    def filter(
        self, weights: Weights, x: Seen, config: ModelConfig, positions: At, state: State = None
    ) -> Filtered:
        """Values and gates."""
        pre = project(x, weights["gate"])[..., 0]
        extras = {"log_keep": jax.nn.log_sigmoid(-pre), "write": jax.nn.sigmoid(pre)}
        return Filtered(v=project(x, weights["value"]), extras=extras)


class _Cell(_Gated):
    """A cell: its gates see what it held."""

    parts: tuple[str, ...]

    def declare(self, config: ModelConfig, make: Any) -> Mapping[str, Any]:
        """Each part's maps from the input and from what is held, with their biases; the map back."""
        sizes = {"channel": config.width, "held": config.width, "one": 1}
        found: dict[str, Any] = {"output": make.matrix("channel one width", "channel", output=True, **sizes)}
        for part in self.parts:
            found[f"{part}_input"] = make.matrix("width channel", "width", **sizes)
            found[f"{part}_held"] = make.matrix("held channel", "held", **sizes)
            found[f"{part}_input_bias"] = make.weight("channel", "zeros", **sizes)
            found[f"{part}_held_bias"] = make.weight("channel", "zeros", **sizes)
        return found

    def filter(
        self, weights: Weights, x: Seen, config: ModelConfig, positions: At, state: State = None
    ) -> Filtered:
        """The cell, position after position: candidates, and what was kept and written."""
        inputs = tuple(
            project(x, weights[f"{part}_input"][..., None])[..., 0] + weights[f"{part}_input_bias"]
            for part in self.parts
        )
        if state is None:
            state = self.empty_state(config, x.shape[0], 0, x.dtype)

        def one(state: Any, now: tuple[Array, ...]) -> tuple[Any, tuple[Array, ...]]:
            return self.cell(weights, state, now)

        _, found = jax.lax.scan(one, state, tuple(jnp.moveaxis(y, 1, 0) for y in inputs))
        v, log_keep, write, *rest = (jnp.moveaxis(y, 0, 1) for y in found)
        extras = {"log_keep": log_keep, "write": write} | ({"out": rest[0].astype(x.dtype)} if rest else {})
        return Filtered(v=v[..., None].astype(x.dtype), extras=extras)

    def cell(self, weights: Weights, state: Any, inputs: tuple[Array, ...]) -> tuple[Any, tuple[Array, ...]]:
        """State after one position; the candidate, the log of what is kept, what is written."""
        raise NotImplementedError


def _held(weights: Weights, part: str, h: Array) -> Array:
    weight = weights[f"{part}_held"]
    return h.astype(weight.dtype) @ weight + weights[f"{part}_held_bias"]


@dataclasses.dataclass(frozen=True)
class Gru(_Cell):
    """``h = keep h + (1 - keep) tanh(W x + r (U h))`` (Cho et al. 2014; reset as PyTorch has it)."""

    parts = ("reset", "keep", "value")

    def cell(self, weights: Weights, state: Any, inputs: tuple[Array, ...]) -> tuple[Any, tuple[Array, ...]]:
        """One position."""
        reset, pre, value = inputs
        r = jax.nn.sigmoid(reset + _held(weights, "reset", state))
        pre = pre + _held(weights, "keep", state)
        v = jnp.tanh(value + r * _held(weights, "value", state))
        keep, write = jax.nn.sigmoid(pre), jax.nn.sigmoid(-pre)
        return keep * state + write * v, (v, jax.nn.log_sigmoid(pre), write)


@dataclasses.dataclass(frozen=True)
class Lstm(_Cell):
    """``c = f c + i g``, read as ``o tanh(c)`` (Hochreiter and Schmidhuber 1997; Gers et al. 2000).

    The association is that of the cell c; the reading is local, and is the gate.
    """

    parts = ("write", "keep", "value", "out")

    def about(self, config: ModelConfig) -> About:
        """Keys and what lies between; what is written need not make room."""
        return dataclasses.replace(super().about(config), normalized="no", state=2 * config.width)

    def cell(self, weights: Weights, state: Any, inputs: tuple[Array, ...]) -> tuple[Any, tuple[Array, ...]]:
        """One position."""
        h, c = state
        write, keep, value, out = (x + _held(weights, part, h) for x, part in zip(inputs, self.parts, strict=True))
        write, v, out = jax.nn.sigmoid(write), jnp.tanh(value), jax.nn.sigmoid(out)
        c = jax.nn.sigmoid(keep) * c + write * v
        return (out * jnp.tanh(c), c), (v, jax.nn.log_sigmoid(keep), write, out)

    def empty_state(self, config: ModelConfig, batch: int, slots: int, dtype: Any) -> State:
        """Nothing held, nothing read."""
        zero = jnp.zeros((batch, config.width), statistics_dtype(dtype))
        return zero, zero

    def step(self, weights: Weights, f: Filtered, state: State, position: Now, config: ModelConfig) -> Step:
        """The cell, and what is read of it."""
        z, c = super().step(weights, f, state[1], position, config)
        return z, (f.extras["out"][:, 0] * jnp.tanh(c), c)

    def gate(self, weights: Weights, z: Heads, f: Filtered, config: ModelConfig) -> Heads:
        """``o tanh(c)``."""
        return f.extras["out"][..., None] * jnp.tanh(z)
