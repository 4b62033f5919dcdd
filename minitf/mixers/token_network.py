"""Mixers whose weights reach over places: gMLP's gate and MLP-Mixer's network."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from minitf.config import ModelConfig
from minitf.filter import statistics_dtype
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
    normed,
    project,
    remember,
    visible,
)


@dataclasses.dataclass(frozen=True)
class SpatialGate(Mixer):
    """gMLP's unit (Liu et al. 2021): ``z[t, c] = gate[t, c] (b[t] + sum_s W[t, s] v[s, c])``.

    One matrix over places serves every channel, and the query's gate stands before it:
    ``A[t, s] = gate[t] W[t, s]``. The matrix starts near zero and b at one, so that it begins as a feed-forward
    layer.
    """

    def about(self, config: ModelConfig) -> About:
        """The query's gate and the places."""
        return About(
            causal=config.causal,
            heads=config.width,
            granularity="channel",
            provenance=frozenset({"query"}),
            state=config.length * config.width,
            exponent=2.0,
        )

    def declare(self, config: ModelConfig, make: Any) -> Mapping[str, Any]:
        """Two filters, the gain of the values' norm, the matrix over places and its bias, the map back."""
        places = {"query": config.length, "key": config.length, "channel": config.width, "one": 1}
        return {
            "gate": make.matrix("width channel one", "width", **places),
            "value": make.matrix("width channel one", "width", **places),
            "gain": make.weight("channel", "ones", **places),
            "places": make.weight("query key", "normal", 0.1 / config.length, linear=True, **places),
            "places_bias": make.weight("query", "ones", **places),
            "output": make.matrix("channel one width", "channel", output=True, **places),
        }

    def filter(
        self, weights: Weights, x: Seen, config: ModelConfig, positions: At, state: State = None
    ) -> Filtered:
        """The gate, and the normed values."""
        gate, v = (jax.nn.gelu(project(x, weights[name])) for name in ("gate", "value"))
        v = normed(v[..., 0], "layer", config, weights["gain"])[..., None]
        bias = jnp.broadcast_to(weights["places_bias"][positions][..., None, None], gate.shape)
        return Filtered(v=v, q=gate, extras={"bias": bias})

    leaves = frozenset({"pattern", "q"})

    def association(self, weights: Weights, f: Filtered, config: ModelConfig) -> Pairs:
        """The matrix with each query's gate before it."""
        return jnp.moveaxis(f.q, 1, 2) * self._places(weights, config, f.v.shape[1])

    def aggregate(self, weights: Weights, f: Filtered, config: ModelConfig) -> Heads:
        """One product for all channels."""
        return f.q * jnp.einsum("ts,bshc->bthc", self._places(weights, config, f.v.shape[1]), f.v)

    @staticmethod
    def _places(weights: Weights, config: ModelConfig, length: int) -> Float[Array, "query key"]:
        return jnp.where(visible(length, config), weights["places"][:length, :length], 0.0)

    def empty_state(self, config: ModelConfig, batch: int, slots: int, dtype: Any) -> State:
        """Room for the values."""
        return jnp.zeros((batch, slots, config.width, 1), dtype)

    def step(self, weights: Weights, f: Filtered, state: State, position: Now, config: ModelConfig) -> Step:
        """One row over the values so far."""
        v = remember(state, f.v, position)
        slots = v.shape[1]
        row = jnp.where(jnp.arange(slots) <= position[:, None], weights["places"][position, :slots], 0.0)
        return f.q * jnp.einsum("bs,bshc->bhc", row, v)[:, None], v

    def gate(self, weights: Weights, z: Heads, f: Filtered, config: ModelConfig) -> Heads:
        """The bias, under the gate as well."""
        return z + f.q * f.extras["bias"]


@dataclasses.dataclass(frozen=True)
class TokenNetwork(Mixer):
    """MLP-Mixer's token mixing (Tolstikhin et al. 2021): a network over places, the same for every channel.

    It is not linear in the values, so there is no association. In a causal model hidden numbers have places too,
    evenly: each is made of the positions up to its place, and is read from there on.
    """

    hidden: int = 0  # as many as there are places, by default

    leaves = frozenset()

    def check(self, config: ModelConfig) -> None:
        """Raise ValueError for a negative number."""
        check_least(self, 0, "hidden")

    def about(self, config: ModelConfig) -> About:
        """No association."""
        state = (self.hidden or config.length) * config.width if config.causal else 0
        return About(
            causal=config.causal, heads=1, granularity="none", state=state, exponent=1.0 if self.hidden else 2.0
        )

    def declare(self, config: ModelConfig, make: Any) -> Mapping[str, Any]:
        """The network's two maps."""
        sizes = {"key": config.length, "query": config.length, "hidden_places": self.hidden or config.length}
        return {
            "into": make.matrix("key hidden_places", "key", **sizes),
            "out": make.matrix("hidden_places query", "hidden_places", output=True, **sizes),
        }

    def filter(
        self, weights: Weights, x: Seen, config: ModelConfig, positions: At, state: State = None
    ) -> Filtered:
        """The points themselves."""
        return Filtered(v=x[:, :, None, :])

    def association(self, weights: Weights, f: Filtered, config: ModelConfig) -> None:
        """There is none."""
        return

    def aggregate(self, weights: Weights, f: Filtered, config: ModelConfig) -> Heads:
        """The network over places."""
        into, out = self._maps(weights, config)
        length = f.v.shape[1]
        hidden = jax.nn.gelu(jnp.einsum("bshc,sk->bkhc", f.v, into[:length]))
        return jnp.einsum("bkhc,kt->bthc", hidden, out[:, :length])

    @staticmethod
    def _maps(weights: Weights, config: ModelConfig) -> tuple[Array, Array]:
        """Into and out of what is hidden; of a causal model without what would tell of later positions."""
        into, out = weights["into"], weights["out"]
        if not config.causal:
            return into, out
        length, hidden = into.shape
        place = np.arange(hidden) * length // hidden
        seen = np.arange(length)[:, None] <= place
        read = place[:, None] <= np.arange(length)
        return jnp.where(seen, into, 0.0), jnp.where(read, out, 0.0)

    def empty_state(self, config: ModelConfig, batch: int, slots: int, dtype: Any) -> State:
        """What is hidden, before its activation, made of nothing yet."""
        return jnp.zeros((batch, self.hidden or config.length, 1, config.width), statistics_dtype(dtype))

    def step(self, weights: Weights, f: Filtered, state: State, position: Now, config: ModelConfig) -> Step:
        """One more term of what is hidden; what has its place by now is read."""
        into, out = self._maps(weights, config)
        state = state + into[position][:, :, None, None] * f.v
        return jnp.einsum("bkhc,kb->bhc", jax.nn.gelu(state), out[:, position])[:, None], state
