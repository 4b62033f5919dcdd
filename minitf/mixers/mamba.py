"""Mamba: state spaces whose steps are made from the text (Gu and Dao 2023), and their form by heads (2024)."""

import dataclasses
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
    check_least,
    chunked_products,
    decayed_products,
    from_chunks,
    in_chunks,
    normed,
    past,
    project,
    recurrence,
    short_convolution,
    sums_between,
)

CHUNK = 32  # positions whose states are held at once


class _Convolved(Mixer):
    """What both have: an input map, a short convolution, a gate."""

    expand: int
    taps: int

    leaves = frozenset({"pattern", "q", "k"})

    @property
    def reach(self) -> int:  # type: ignore[override]
        """The convolution's."""
        return self.taps - 1

    def inner(self, config: ModelConfig) -> int:
        """How many channels there are inside."""
        return self.expand * config.width


@dataclasses.dataclass(frozen=True)
class Mamba(_Convolved):
    """``A[t, s] = sum_n C_t[n] exp(a[c, n] sum of step_j[c] over s < j <= t) step_s[c] B_s[n]``, by channel (S6).

    In the walk q is C and k is B, one head of ``states``.

    Attributes:
        states: numbers that each channel holds.
        expand: channels inside, as a multiple of the model's width.
        taps: of the short convolution.
        rank: of the map to the steps; 0 for width / 16.
    """

    states: int = 16
    expand: int = 2
    taps: int = 4
    rank: int = 0

    def check(self, config: ModelConfig) -> None:
        """Raise ValueError for settings below one."""
        check_least(self, 1, "states", "expand", "taps")
        check_least(self, 0, "rank")

    def about(self, config: ModelConfig) -> About:
        """Pairs and every step between; signed."""
        inner = self.inner(config)
        return About(
            causal=True,
            heads=inner,
            granularity="channel",
            provenance=frozenset({"pair", "path"}),
            state=inner * self.states + (self.taps - 1) * config.width,
        )

    def declare(self, config: ModelConfig, make: Any) -> Mapping[str, Any]:
        """As the published model has them; its one input map is two here."""
        sizes = {
            "channel": self.inner(config),
            "one": 1,
            "state": self.states,
            "rank": self.rank or -(-config.width // 16),
            "tap": self.taps,
        }
        return {
            "value": make.matrix("width channel", "width", **sizes),
            "gate": make.matrix("width channel", "width", **sizes),
            "kernel": make.weight("tap channel", "uniform", self.taps**-0.5, **sizes),
            "kernel_bias": make.weight("channel", "zeros", **sizes),
            "query": make.matrix("channel state", "channel", **sizes),
            "key": make.matrix("channel state", "channel", **sizes),
            "step_into": make.matrix("channel rank", "channel", **sizes),
            "step_out": make.matrix("rank channel", "rank", **sizes),
            # The inverse of softplus, of steps from .001 to .1.
            "step_bias": make.weight("channel", "uniform", 2.33, center=-4.58, **sizes),
            "log_decay": make.weight("channel state", "log", **sizes),
            "skip": make.weight("channel", "ones", **sizes),
            "output": make.matrix("channel one width", "channel", output=True, **sizes),
        }

    def filter(
        self, weights: Weights, x: Seen, config: ModelConfig, positions: At, state: State = None
    ) -> Filtered:
        """Channels after the convolution; steps, B and C made from them; the gate."""
        v = _convolved(project(x, weights["value"][..., None])[..., 0], weights)
        gate = project(x[:, self.reach :], weights["gate"][..., None])
        q, k = (project(v, weights[name][:, None, :]) for name in ("query", "key"))
        step = project(project(v, weights["step_into"][..., None])[..., 0], weights["step_out"][..., None])[..., 0]
        step = jax.nn.softplus(in_statistics_dtype(step) + weights["step_bias"])
        return Filtered(v=v[..., None], q=q, k=k, extras={"step": step, "gate": gate})

    def association(self, weights: Weights, f: Filtered, config: ModelConfig) -> Pairs:
        """A sum over the states, one at a time."""
        length = f.v.shape[1]
        step = jnp.moveaxis(f.extras["step"], 2, 1)
        between = sums_between(step)

        def add(found: Array, n: Array) -> tuple[Array, None]:
            rate = _rates(weights)[:, n, None, None]
            weight = f.q[:, :, 0, n][:, None, :, None] * f.k[:, :, 0, n][:, None, None, :]
            return found + weight * jnp.exp(-rate * between) * step[:, :, None, :], None

        whole = jax.lax.scan(add, jnp.zeros_like(between), jnp.arange(self.states))[0]
        return jnp.where(past(length), whole, 0.0)

    def aggregate(self, weights: Weights, f: Filtered, config: ModelConfig) -> Heads:
        """One chunk after another, so that few states are held at once.

        Inside, on a CPU, position after position, whose states stay in its caches; elsewhere so many small steps
        would take longer than all positions of a chunk together.
        """
        rate = _rates(weights)
        inside = jax.checkpoint(_in_turn if jax.default_backend() == "cpu" else _together)
        chunk = lambda state, now: inside(rate, state, now)
        empty = self.empty_state(config, f.v.shape[0], 0, f.v.dtype)
        parts = (f.q[:, :, 0], f.k[:, :, 0], f.v[..., 0], f.extras["step"])
        _, z = jax.lax.scan(chunk, empty, tuple(in_chunks(x, CHUNK) for x in parts))
        return from_chunks(z, f.v.shape[1])[..., None].astype(f.v.dtype)

    def empty_state(self, config: ModelConfig, batch: int, slots: int, dtype: Any) -> State:
        """Nothing held."""
        return jnp.zeros((batch, self.inner(config), self.states), statistics_dtype(dtype))

    def step(self, weights: Weights, f: Filtered, state: State, position: Now, config: ModelConfig) -> Step:
        """``h = exp(step a) h + step B v``."""
        step = f.extras["step"][:, 0]
        decay = jnp.exp(-step[..., None] * _rates(weights))
        state = decay * state + (step * f.v[:, 0, :, 0])[..., None] * f.k[:, 0]
        return jnp.einsum("bcn,bn->bc", state, f.q[:, 0, 0])[:, None, :, None], state

    def gate(self, weights: Weights, z: Heads, f: Filtered, config: ModelConfig) -> Heads:
        """What the channel holds now, added; then swish."""
        return (z + weights["skip"][:, None] * f.v) * jax.nn.silu(f.extras["gate"])


Chunk = tuple[Array, ...]  # queries, keys, values, steps


def _in_turn(rate: Array, state: Array, now: Chunk) -> tuple[Array, Array]:
    """The state after a chunk, and what is read at each of its positions."""

    def one(h: Array, now: Chunk) -> tuple[Array, Array]:
        q, k, v, step = now
        h = jnp.exp(-step[..., None] * rate) * h + (step * v)[..., None] * k[:, None, :]
        return h, jnp.einsum("bcn,bn->bc", h, q)

    state, z = jax.lax.scan(one, state, tuple(jnp.moveaxis(x, 1, 0) for x in now))
    return state, jnp.moveaxis(z, 0, 1)


def _together(rate: Array, state: Array, now: Chunk) -> tuple[Array, Array]:
    """The same; the states of all positions are held."""
    q, k, v, step = now
    decay = jnp.exp(-step[..., None] * rate)
    inputs = (step * v)[..., None] * k[:, :, None, :]
    h = recurrence(decay, inputs.at[:, 0].add(decay[:, 0] * state))
    return h[:, -1], jnp.einsum("btcn,btn->btc", h, q)


@dataclasses.dataclass(frozen=True)
class Mamba2(_Convolved):
    """``A[t, s] = exp(a sum of step_j over s < j <= t) step_s C_t . B_s``, by head: one decay for a whole head.

    In the walk q is C and k is B, the same for all heads.

    Attributes:
        states: width of C and B.
        expand: width inside, as a multiple of the model's.
        taps: of the short convolution over values, B and C.
    """

    states: int = 16
    expand: int = 2
    taps: int = 4

    def check(self, config: ModelConfig) -> None:
        """Raise ValueError for settings below one, and for heads that do not divide the width inside."""
        check_least(self, 1, "states", "expand", "taps")
        if self.inner(config) % config.heads:
            raise ValueError(f"{config.heads} heads do not divide a width inside of {self.inner(config)}")

    def about(self, config: ModelConfig) -> About:
        """Pairs and every step between; signed."""
        inner = self.inner(config)
        return About(
            causal=True,
            heads=config.heads,
            granularity="head",
            provenance=frozenset({"pair", "path"}),
            state=inner * self.states + (self.taps - 1) * config.width,
        )

    def declare(self, config: ModelConfig, make: Any) -> Mapping[str, Any]:
        """As the published model has them; its one input map is five here, and its convolution three."""
        sizes = {
            "inner": self.inner(config),
            "inner_head_width": self.inner(config) // config.heads,
            "state": self.states,
            "tap": self.taps,
        }
        kernel = {"distribution": "uniform", "scale": self.taps**-0.5}
        return {
            "value": make.matrix("width inner", "width", **sizes),
            "gate": make.matrix("width head inner_head_width", "width", **sizes),
            "query": make.matrix("width state", "width", **sizes),
            "key": make.matrix("width state", "width", **sizes),
            "step": make.matrix("width head", "width", **sizes),
            "kernel": make.weight("tap inner", **kernel, **sizes),
            "query_kernel": make.weight("tap state", **kernel, **sizes),
            "key_kernel": make.weight("tap state", **kernel, **sizes),
            "kernel_bias": make.weight("inner", "zeros", **sizes),
            "query_kernel_bias": make.weight("state", "zeros", **sizes),
            "key_kernel_bias": make.weight("state", "zeros", **sizes),
            "step_bias": make.weight("head", "uniform", 2.33, center=-4.58, **sizes),
            "log_decay": make.weight("head", "log", **sizes),
            "skip": make.weight("head", "ones", **sizes),
            "gain": make.weight("head inner_head_width", "ones", **sizes),
            "output": make.matrix("head inner_head_width width", "head inner_head_width", output=True, **sizes),
        }

    def filter(
        self, weights: Weights, x: Seen, config: ModelConfig, positions: At, state: State = None
    ) -> Filtered:
        """Values, B and C after their convolutions; steps; the gate."""
        flat = {name: project(x, weights[name][..., None])[..., 0] for name in ("value", "query", "key")}
        v, q, k = (
            _convolved(flat[name], weights, prefix)
            for name, prefix in (("value", ""), ("query", "query_"), ("key", "key_"))
        )
        now = x[:, self.reach :]
        step = in_statistics_dtype(project(now, weights["step"][..., None])[..., 0])
        return Filtered(
            v=v.reshape(*v.shape[:2], config.heads, -1),
            q=q[:, :, None],
            k=k[:, :, None],
            extras={"step": jax.nn.softplus(step + weights["step_bias"]), "gate": project(now, weights["gate"])},
        )

    def association(self, weights: Weights, f: Filtered, config: ModelConfig) -> Pairs:
        """Products, less the longer the way."""
        return decayed_products(*self._terms(weights, f, config))

    def aggregate(self, weights: Weights, f: Filtered, config: ModelConfig) -> Heads:
        """Chunk by chunk (state space duality)."""
        q, k, decay = self._terms(weights, f, config)
        return chunked_products(q, k, f.v, decay)

    def empty_state(self, config: ModelConfig, batch: int, slots: int, dtype: Any) -> State:
        """Nothing held."""
        shape = (batch, config.heads, self.states, self.inner(config) // config.heads)
        return jnp.zeros(shape, statistics_dtype(dtype))

    def step(self, weights: Weights, f: Filtered, state: State, position: Now, config: ModelConfig) -> Step:
        """``S = exp(step a) S + step B v^T``."""
        q, k, decay = self._terms(weights, f, config)
        kept = jnp.exp(decay[:, 0])[..., None, None]
        state = kept * state + k[:, 0, :, :, None] * f.v[:, 0, :, None, :]
        return jnp.einsum("bhn,bhnv->bhv", q[:, 0], state)[:, None], state

    def gate(self, weights: Weights, z: Heads, f: Filtered, config: ModelConfig) -> Heads:
        """What the head holds now, added; swish; a root-mean-square norm over all heads."""
        y = (z + weights["skip"][:, None] * f.v) * jax.nn.silu(f.extras["gate"])
        together = y.reshape(*y.shape[:2], -1)
        return normed(together, "rms", config, weights["gain"].reshape(-1)).reshape(y.shape)

    @staticmethod
    def _terms(weights: Weights, f: Filtered, config: ModelConfig) -> tuple[Array, Array, Array]:
        """C, ``step B`` and ``step a`` of each head."""
        step = f.extras["step"]
        q = jnp.broadcast_to(f.q, (*step.shape, f.q.shape[-1]))
        return q, (f.k * step[..., None]).astype(f.k.dtype), -step * _rates(weights)


def _rates(weights: Weights) -> Array:
    """How fast what is held dies out, for each channel and state, or each head."""
    return jnp.exp(in_statistics_dtype(weights["log_decay"]))


def _convolved(x: Float[Array, "batch seen channel"], weights: Weights, prefix: str = "") -> Array:
    bias = weights[f"{prefix}kernel_bias"]
    # Where nothing came before, inputs were zero: the input map has no bias.
    return jax.nn.silu(short_convolution(x, weights[f"{prefix}kernel"]) + bias)
