"""RWKV: channels that fade (version 4, Peng et al. 2023) and matrices that fade as the text says (6, 2024)."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from minitf.config import ModelConfig
from minitf.filter import in_statistics_dtype, statistics_dtype
from minitf.mixers.aft import channel_filters
from minitf.mixers.average import values_and_output
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
    Stream,
    Weights,
    check_least,
    from_chunks,
    in_chunks,
    normed,
    past,
    project,
    sums_after,
)
from minitf.mixers.weighted_mean import faded, nothing, weighted_means, with_term

SHIFTED = ("query", "key", "value", "gate", "fade")  # what RWKV-6 makes of shifted inputs
CHUNK = 16  # of RWKV-6, whose chunks hold an exponent for each pair and channel


@dataclasses.dataclass(frozen=True)
class Rwkv4(Mixer):
    """``A[t, s] = sigmoid(r_t) softmax over s of (k_s - (t - 1 - s) w; of the present one k_t + u)``, by channel.

    Filters see the input before as well (token shift), under fixed shares.
    """

    reach = 1
    leaves = frozenset({"pattern", "q", "k"})

    def about(self, config: ModelConfig) -> About:
        """Keys and distances, under the query's gate."""
        return About(
            causal=True,
            heads=config.width,
            granularity="channel",
            provenance=frozenset({"query", "key"}),
            normalized="at most",
            state=4 * config.width,
        )

    def declare(self, config: ModelConfig, make: Any) -> Mapping[str, Any]:
        """Three filters and their shares of the present input, the fading and the bonus, the map back."""
        return {
            **channel_filters(make, config, "query", "key", "value"),
            **{
                f"{name}_share": make.weight("width", "even", 0.5, center=0.5)
                for name in ("query", "key", "value")
            },
            "fade": make.weight("channel", "even", 2.0, center=-2.0, channel=config.width),
            "bonus": make.weight("channel", "constant", center=-1.2, channel=config.width),
        }

    def filter(
        self, weights: Weights, x: Seen, config: ModelConfig, positions: At, state: State = None
    ) -> Filtered:
        """Receptance, key and value of the shifted input."""
        q, k, v = (project(shifted(x, weights[f"{n}_share"]), weights[n]) for n in ("query", "key", "value"))
        return Filtered(v=v, q=jax.nn.sigmoid(q), k=k)

    def association(self, weights: Weights, f: Filtered, config: ModelConfig) -> Pairs:
        """Softmax for each channel, under the gate."""
        length = f.v.shape[1]
        at = jnp.arange(length)
        lag = (at[:, None] - 1 - at[None, :]).astype(f.k.dtype)
        fade, bonus = self._constants(weights)
        places = jnp.where(jnp.eye(length, dtype=bool), bonus[:, None, None], -lag * fade[:, None, None])
        scores = jnp.moveaxis(f.k[..., 0], 2, 1)[:, :, None, :] + places
        return jax.nn.softmax(jnp.where(past(length), scores, -jnp.inf), axis=-1) * jnp.moveaxis(f.q, 1, 2)

    def aggregate(self, weights: Weights, f: Filtered, config: ModelConfig) -> Heads:
        """Running sums by a parallel scan."""
        return f.q * weighted_means(f.k[..., 0], f.v[..., 0], *self._constants(weights))[..., None]

    def empty_state(self, config: ModelConfig, batch: int, slots: int, dtype: Any) -> State:
        """Two sums and their highest exponent."""
        return nothing(jnp.zeros((batch, config.width), dtype))

    def step(self, weights: Weights, f: Filtered, state: State, position: Now, config: ModelConfig) -> Step:
        """The present key with its bonus is read, and then added without."""
        fade, bonus = self._constants(weights)
        k, v = f.k[:, 0, :, 0], f.v[:, 0, :, 0]
        read, weight, _ = with_term(state, k + bonus, v)
        return f.q * (read / weight)[:, None, :, None], with_term(faded(state, fade), k, v)

    @staticmethod
    def _constants(weights: Weights) -> tuple[Array, Array]:
        return jnp.exp(weights["fade"]), weights["bonus"]


@dataclasses.dataclass(frozen=True)
class Rwkv6(Mixer):
    """``A[t, s] = r_t . (k_s * product of w over s < j < t)``, of the present one ``r_t . (u * k_t)``, by head.

    Every component of the state fades at a rate made from the input: ``S = diag(w) S + k v^T``. So are the shares
    of the present input that each filter sees (the token shift). Heads are normed and gated.

    Attributes:
        rank: of the network that makes the rates.
        shift_rank: of those that make the shares.
    """

    rank: int = 16
    shift_rank: int = 8

    def check(self, config: ModelConfig) -> None:
        """Raise ValueError for no rank."""
        check_least(self, 1, "rank", "shift_rank")

    reach = 1
    leaves = frozenset({"pattern", "q", "k"})

    def about(self, config: ModelConfig) -> About:
        """Pairs and what lies between; signed."""
        return About(
            causal=True,
            heads=config.heads,
            granularity="head",
            provenance=frozenset({"pair", "path"}),
            state=config.heads * config.head_size**2 + config.width,
        )

    def declare(self, config: ModelConfig, make: Any) -> Mapping[str, Any]:
        """Filters and their shares, the networks of shares and rates, the bonus, the heads' norm, the map back."""
        names, sizes = SHIFTED, {"shift": len(SHIFTED), "shift_rank": self.shift_rank}
        return {
            **values_and_output(make),
            **{name: make.matrix("width head head_width", "width") for name in ("query", "key", "gate")},
            **{f"{name}_share": make.weight("width", "even", 0.5, center=0.5) for name in names},
            "shift_share": make.weight("width", "even", 0.5, center=0.5),
            # The shares begin as they are without their networks.
            "shift_into": make.weight("width shift shift_rank", "zeros", linear=True, **sizes),
            "shift_out": make.weight("shift shift_rank width", "uniform", 0.01, linear=True, **sizes),
            "fade_into": make.matrix("width rank", "width", rank=self.rank),
            "fade_out": make.matrix("rank head head_width", "rank", rank=self.rank),
            "fade_bias": make.weight("head head_width", "even", 2.5, center=-3.5),
            "bonus": make.weight("head head_width", "even", 0.5, center=0.5),
            "gain": make.weight("head head_width", "ones"),
            "offset": make.weight("head head_width", "zeros"),
        }

    def filter(
        self, weights: Weights, x: Seen, config: ModelConfig, positions: At, state: State = None
    ) -> Filtered:
        """Receptance, key, value, gate, and the log of each component's fading."""
        seen = dict(zip(SHIFTED, self._shifted(weights, x), strict=True))
        q, k, v, gate = (project(seen[name], weights[name]) for name in ("query", "key", "value", "gate"))
        hidden = jnp.tanh(project(seen["fade"], weights["fade_into"][..., None])[..., 0])
        fade = -jnp.exp(in_statistics_dtype(weights["fade_bias"] + project(hidden, weights["fade_out"])))
        return Filtered(v=v, q=q, k=k, extras={"fade": fade, "gate": gate})

    @staticmethod
    def _shifted(weights: Weights, x: Seen) -> tuple[Stream, ...]:
        """Each filter's mixture of the input and the one before, under shares that a first mixture decides.

        As Peng et al. 2024 have it, where shares are those of the input before.
        """
        into, out = weights["shift_into"], weights["shift_out"]
        hidden = jnp.tanh(project(shifted(x, weights["shift_share"]), into))
        more = jnp.einsum("btnr,nrw->nbtw", hidden, out)
        return tuple(shifted(x, weights[f"{name}_share"] + some) for name, some in zip(SHIFTED, more, strict=True))

    def association(self, weights: Weights, f: Filtered, config: ModelConfig) -> Pairs:
        """A sum over components, one at a time."""

        def one(c: Array) -> Array:
            q, k, fade = (x[..., c, None] for x in (f.q, f.k, f.extras["fade"]))
            return _inside(q, k, fade, weights["bonus"][:, c, None])

        return jnp.sum(jax.lax.map(one, jnp.arange(config.head_size)), axis=0)

    def aggregate(self, weights: Weights, f: Filtered, config: ModelConfig) -> Heads:
        """Chunk by chunk; between chunks by the state."""

        def chunk(state: Array, now: tuple[Array, ...]) -> tuple[Array, Array]:
            q, k, v, fade = now
            z = jnp.einsum("bhts,bshv->bthv", _inside(q, k, fade, weights["bonus"]), v)
            z = z + jnp.einsum("bthc,bhcv->bthv", q * jnp.exp(_before(fade)), state)
            new = jnp.einsum("bshc,bshv->bhcv", k * jnp.exp(sums_after(fade)), v)
            return jnp.exp(jnp.sum(fade, axis=1))[..., None] * state + new, z

        empty = self.empty_state(config, f.v.shape[0], 0, f.v.dtype)
        parts = tuple(in_chunks(in_statistics_dtype(x), CHUNK) for x in (f.q, f.k, f.v, f.extras["fade"]))
        return from_chunks(jax.lax.scan(chunk, empty, parts)[1], f.v.shape[1]).astype(f.v.dtype)

    def empty_state(self, config: ModelConfig, batch: int, slots: int, dtype: Any) -> State:
        """``S``, nothing yet."""
        return jnp.zeros((batch, config.heads, config.head_size, config.head_size), statistics_dtype(dtype))

    def step(self, weights: Weights, f: Filtered, state: State, position: Now, config: ModelConfig) -> Step:
        """The present key with its bonus is read, and then added without."""
        q, new = f.q[:, 0], f.k[:, 0, :, :, None] * f.v[:, 0, :, None, :]
        z = jnp.einsum("bhc,bhcv->bhv", q, state + weights["bonus"][..., None] * new)
        return z[:, None], jnp.exp(f.extras["fade"][:, 0])[..., None] * state + new

    def gate(self, weights: Weights, z: Heads, f: Filtered, config: ModelConfig) -> Heads:
        """Each head normed, then gated by swish."""
        heads = normed(z, "layer", config) * weights["gain"] + weights["offset"]
        return heads * jax.nn.silu(f.extras["gate"])


def shifted(
    x: Float[Array, "batch seen width"], share: Float[Array, "*axes width"]
) -> Float[Array, "batch position width"]:
    """Each input mixed with the one before, ``share`` of the present one."""
    return share * x[:, 1:] + (1 - share) * x[:, :-1]


def _before(x: Float[Array, "batch position ..."]) -> Float[Array, "batch position ..."]:
    """The sum of x over all positions before each."""
    return jnp.pad(jnp.cumsum(x[:, :-1], axis=1), ((0, 0), (1, 0), *((0, 0),) * (x.ndim - 2)))


def _inside(
    q: Float[Array, "batch position head component"],
    k: Float[Array, "batch position head component"],
    fade: Float[Array, "batch position head component"],
    bonus: Float[Array, "head component"],
) -> Float[Array, "batch head query key"]:
    """The association among these positions alone."""
    length = q.shape[1]
    earlier = (past(length) & ~jnp.eye(length, dtype=bool))[None, :, :, None, None]
    # What fades after s and before t, each summed by itself: differences of long sums would lose their digits.
    fading = jnp.where(earlier, jax.lax.expand_dims(fade, (2,)), 0.0)
    between = _before(fading)
    weight = jnp.exp(jnp.where(earlier, between, -jnp.inf))
    found = jnp.einsum("bthc,bshc,btshc->bhts", q, k, weight)
    present = jnp.einsum("bthc,hc->bht", q * k, bonus)
    return found + present[..., None] * jnp.eye(length, dtype=q.dtype)
