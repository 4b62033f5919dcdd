"""Linear attention and its kin: the association is a product of query and key, and decoding keeps one matrix."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from minitf import filter
from minitf.config import ModelConfig
from minitf.filter import in_statistics_dtype, statistics_dtype
from minitf.mixers.average import values_and_output
from minitf.mixers.contract import (
    CHUNK,
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
    chunked_products,
    decayed_products,
    from_chunks,
    in_chunks,
    normed,
    past,
    product,
    project,
)

NEARLY_ZERO = 1e-18  # the least that a row of linear attention is divided by: its square is a number too


class _Products(Mixer):
    """What linear attention, retention and DeltaNet have in common."""

    leaves = frozenset({"pattern", "q", "k"})

    def declare(self, config: ModelConfig, make: Any) -> Mapping[str, Any]:
        """Queries, keys, values, the map back."""
        return {
            **values_and_output(make),
            "query": make.matrix("width head head_width", "width"),
            "key": make.matrix("width head head_width", "width"),
        }

    def empty_state(self, config: ModelConfig, batch: int, slots: int, dtype: Any) -> State:
        """``S = sum of k v^T``, nothing yet."""
        return jnp.zeros((batch, config.heads, config.head_size, config.head_size), statistics_dtype(dtype))


@dataclasses.dataclass(frozen=True)
class LinearAttention(_Products):
    """``A[t, s] = phi(q_t) . phi(k_s)``, rows made to sum to one; phi = elu + 1 (Katharopoulos et al. 2020).

    Where all products of a row are too small for its number format, the row is zero.
    """

    def about(self, config: ModelConfig) -> About:
        """Pairs; a matrix for each head, and its norm."""
        return About(
            causal=True,
            heads=config.heads,
            granularity="head",
            provenance=frozenset({"pair"}),
            normalized="exactly",
            state=config.heads * config.head_size * (config.head_size + 1),
        )

    def filter(
        self, weights: Weights, x: Seen, config: ModelConfig, positions: At, state: State = None
    ) -> Filtered:
        """Values; queries and keys made positive."""
        q, k = (_positive(project(x, weights[name])) for name in ("query", "key"))
        return Filtered(v=project(x, weights["value"]), q=q, k=k)

    def association(self, weights: Weights, f: Filtered, config: ModelConfig) -> Pairs:
        """Products over their sum."""
        products = jnp.where(past(f.q.shape[1]), product("bthc,bshc->bhts", _rescaled(f.q), f.k), 0.0)
        return products / jnp.maximum(jnp.sum(products, axis=-1, keepdims=True), NEARLY_ZERO)

    def aggregate(self, weights: Weights, f: Filtered, config: ModelConfig) -> Heads:
        """Chunk by chunk; the sums of the rows are mixed as one more value."""
        ones = jnp.ones((*f.v.shape[:3], 1), f.v.dtype)
        decay = jnp.zeros((1, f.v.shape[1], config.heads), f.v.dtype)
        both = chunked_products(_rescaled(f.q), f.k, jnp.concatenate([f.v, ones], axis=-1), decay)
        return both[..., :-1] / jnp.maximum(both[..., -1:], NEARLY_ZERO)

    def empty_state(self, config: ModelConfig, batch: int, slots: int, dtype: Any) -> State:
        """``S``, with one more column for the sums of the rows."""
        return jnp.zeros((batch, config.heads, config.head_size, config.head_size + 1), statistics_dtype(dtype))

    def step(self, weights: Weights, f: Filtered, state: State, position: Now, config: ModelConfig) -> Step:
        """``S += phi(k) [v, 1]^T``."""
        v = jnp.concatenate([f.v, jnp.ones((*f.v.shape[:3], 1), f.v.dtype)], axis=-1)[:, 0]
        state = state + f.k[:, 0, :, :, None] * v[:, :, None, :]
        both = jnp.einsum("bhc,bhcv->bhv", _rescaled(f.q)[:, 0], state)
        return (both[..., :-1] / jnp.maximum(both[..., -1:], NEARLY_ZERO))[:, None], state


@dataclasses.dataclass(frozen=True)
class Retention(_Products):
    """``A[t, s] = g^(t - s) q_t . k_s / sqrt(head_width)``, ``g = 1 - 2^(-5 - head)`` (Sun et al. 2023, RetNet).

    Queries and keys turn with their position; each head is normed by itself and gated.
    """

    def about(self, config: ModelConfig) -> About:
        """Pairs and distances; signed."""
        return About(
            causal=True,
            heads=config.heads,
            granularity="head",
            provenance=frozenset({"pair"}),
            state=config.heads * config.head_size**2,
        )

    def check(self, config: ModelConfig) -> None:
        """Raise ValueError for heads that cannot turn."""
        if config.head_size % 2:
            raise ValueError(f"retention turns pairs of components: a head of {config.head_size} is odd")

    def declare(self, config: ModelConfig, make: Any) -> Mapping[str, Any]:
        """Those of linear attention, and the gate."""
        return {**super().declare(config, make), "gate": make.matrix("width head head_width", "width")}

    def filter(
        self, weights: Weights, x: Seen, config: ModelConfig, positions: At, state: State = None
    ) -> Filtered:
        """Values, gate; queries and keys turned."""
        at = jnp.broadcast_to(positions, x.shape[:2]).reshape(-1)

        def turned(name: str) -> Array:
            heads = project(x, weights[name])
            return filter.rotate(
                heads.reshape(-1, *heads.shape[2:]), at, config.head_size, config.rotary_base, True
            ).reshape(heads.shape)

        q, k = turned("query"), turned("key") * config.head_size**-0.5
        return Filtered(v=project(x, weights["value"]), q=q, k=k, extras={"gate": project(x, weights["gate"])})

    def association(self, weights: Weights, f: Filtered, config: ModelConfig) -> Pairs:
        """Products, less the further apart."""
        return decayed_products(f.q, f.k, _retained(config, f.q.shape[1], f.q.dtype))

    def aggregate(self, weights: Weights, f: Filtered, config: ModelConfig) -> Heads:
        """Chunk by chunk."""
        return chunked_products(f.q, f.k, f.v, _retained(config, f.q.shape[1], f.q.dtype))

    def step(self, weights: Weights, f: Filtered, state: State, position: Now, config: ModelConfig) -> Step:
        """``S = g S + k v^T``."""
        kept = jnp.exp(_retained(config, 1, f.q.dtype))[0, 0, :, None, None]
        state = kept * state + f.k[:, 0, :, :, None] * f.v[:, 0, :, None, :]
        return jnp.einsum("bhc,bhcv->bhv", f.q[:, 0], state)[:, None], state

    def gate(self, weights: Weights, z: Heads, f: Filtered, config: ModelConfig) -> Heads:
        """Each head normed, then gated by swish."""
        return normed(z, "layer", config) * jax.nn.silu(f.extras["gate"])


@dataclasses.dataclass(frozen=True)
class DeltaNet(_Products):
    """``S += beta k (v - S^T k)^T``: what a key held is replaced (Schlag et al. 2021; Yang et al. 2024).

    ``A[t, s] = beta_s q_t^T prod over s < j <= t of (I - beta_j k_j k_j^T) k_s``, keys of length one. Over a
    stretch of positions it is ``tril(Q K^T) (I + tril(diag(beta) K K^T, -1))^-1 diag(beta)``.
    """

    def about(self, config: ModelConfig) -> About:
        """Pairs, and every key between; signed."""
        return About(
            causal=True,
            heads=config.heads,
            granularity="head",
            provenance=frozenset({"pair", "path"}),
            state=config.heads * config.head_size**2,
        )

    def declare(self, config: ModelConfig, make: Any) -> Mapping[str, Any]:
        """Those of linear attention, and each head's rate of writing."""
        return {**super().declare(config, make), "rate": make.matrix("width head", "width")}

    def filter(
        self, weights: Weights, x: Seen, config: ModelConfig, positions: At, state: State = None
    ) -> Filtered:
        """Values, rates; queries and keys of length one."""
        q, k = (unit(project(x, weights[name])) for name in ("query", "key"))
        rate = jax.nn.sigmoid(project(x, weights["rate"][..., None]))[..., 0]
        return Filtered(v=project(x, weights["value"]), q=q, k=k, extras={"rate": rate})

    def association(self, weights: Weights, f: Filtered, config: ModelConfig) -> Pairs:
        """By the inverse of a triangle."""
        rate = jnp.moveaxis(f.extras["rate"], 2, 1)
        products = jnp.where(past(f.q.shape[1]), jnp.einsum("bthc,bshc->bhts", f.q, f.k), 0.0)
        return products @ inverse_of_unit_triangle(_written(f.k, f.extras["rate"])) * rate[:, :, None, :]

    def aggregate(self, weights: Weights, f: Filtered, config: ModelConfig) -> Heads:
        """Chunk by chunk; between chunks by the state."""

        def chunk(state: Array, now: tuple[Array, ...]) -> tuple[Array, Array]:
            q, k, v, rate = now
            fresh = (v - jnp.einsum("bshc,bhcv->bshv", k, state)) * rate[..., None]
            new = inverse_of_unit_triangle(_written(k, rate)) @ jnp.moveaxis(fresh, 2, 1)
            products = jnp.where(past(q.shape[1]), jnp.einsum("bthc,bshc->bhts", q, k), 0.0)
            z = jnp.einsum("bthc,bhcv->bthv", q, state) + jnp.einsum("bhts,bhsv->bthv", products, new)
            return state + jnp.einsum("bshc,bhsv->bhcv", k, new), z

        empty = self.empty_state(config, f.v.shape[0], 0, f.v.dtype)
        parts = tuple(in_chunks(in_statistics_dtype(x), CHUNK) for x in (f.q, f.k, f.v, f.extras["rate"]))
        return from_chunks(jax.lax.scan(chunk, empty, parts)[1], f.v.shape[1]).astype(f.v.dtype)

    def step(self, weights: Weights, f: Filtered, state: State, position: Now, config: ModelConfig) -> Step:
        """What the key held, replaced in part."""
        k, rate = f.k[:, 0], f.extras["rate"][:, 0, :, None]
        fresh = rate * (f.v[:, 0] - jnp.einsum("bhc,bhcv->bhv", k, state))
        state = state + k[..., None] * fresh[:, :, None, :]
        return jnp.einsum("bhc,bhcv->bhv", f.q[:, 0], state)[:, None], state


def _retained(config: ModelConfig, length: int, dtype: Any) -> Float[Array, "1 position head"]:
    """Log of what each head keeps from one position to the next."""
    kept = np.log1p(-(2.0 ** (-5.0 - np.arange(config.heads))))
    return jnp.broadcast_to(jnp.asarray(kept, statistics_dtype(dtype)), (1, length, config.heads))


def _written(
    k: Float[Array, "batch position head head_width"], rate: Float[Array, "batch position head"]
) -> Float[Array, "batch head query key"]:
    """``I + tril(diag(rate) K K^T, -1)``."""
    length = k.shape[1]
    products = jnp.einsum("bthc,bshc->bhts", k * rate[..., None], k)
    return jnp.where(past(length) & ~jnp.eye(length, dtype=bool), products, 0.0) + jnp.eye(length, dtype=k.dtype)


def inverse_of_unit_triangle(x: Float[Array, "*axes row column"]) -> Float[Array, "*axes row column"]:
    """The inverse of lower triangles with ones on the diagonal, from that of their halves.

    Products alone: XLA's solve on a CPU waits for its own threads, and for ever where two programs run at once.
    """
    size = x.shape[-1]
    whole = 1 << max(size - 1, 0).bit_length()
    more = whole - size
    *rest, last = x.shape[:-2] or (1,)
    padded = jnp.pad(x, [(0, 0)] * (x.ndim - 2) + [(0, more), (0, more)])
    padded = padded + jnp.diag(jnp.pad(jnp.zeros(size, x.dtype), (0, more), constant_values=1))
    # The blocks of all heads are one axis: each vmap of a sweep adds another, and XLA's products on a CPU refuse
    # arrays of many. (Heads alone, so that they stay divided among devices.)
    inverse = jnp.ones((*rest, last * whole, 1, 1), x.dtype)
    half = 1
    while half < whole:
        count = whole // (2 * half)
        blocks = padded.reshape(*rest, last, count, 2 * half, count, 2 * half)
        below = jnp.moveaxis(jnp.diagonal(blocks, axis1=-4, axis2=-2), -1, -3)[..., half:, :half]
        pairs = inverse.reshape(*rest, last * count, 2, half, half)
        upper, lower = pairs[..., 0, :, :], pairs[..., 1, :, :]
        corner = -lower @ below.reshape(*rest, last * count, half, half) @ upper
        inverse = jnp.concatenate(
            [
                jnp.concatenate([upper, jnp.zeros_like(upper)], axis=-1),
                jnp.concatenate([corner, lower], axis=-1),
            ],
            axis=-2,
        )
        half *= 2
    return inverse[..., :size, :size].reshape(x.shape)


def unit(x: Float[Array, "*axes head_width"]) -> Float[Array, "*axes head_width"]:
    """The last axis made of length one; zero stays zero, and its gradient finite."""
    square = jnp.sum(jnp.square(in_statistics_dtype(x)), axis=-1, keepdims=True)
    return (x * jax.lax.rsqrt(square + 1e-12)).astype(x.dtype)


def _rescaled(q: Float[Array, "*axes"]) -> Float[Array, "*axes"]:
    """Queries whose largest component is one: of rows that are made to sum to one any factor is gone."""
    return q / jax.lax.stop_gradient(jnp.maximum(jnp.max(q, axis=-1, keepdims=True), NEARLY_ZERO))


def _positive(x: Float[Array, "*axes"]) -> Float[Array, "*axes"]:
    """elu + 1, without what adding and taking away one leaves of small numbers: it is above zero."""
    return jnp.where(x > 0, x + 1, jnp.exp(jnp.minimum(x, 0)))
