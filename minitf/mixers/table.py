"""Associations that are weights: the same whatever the text (or, in one case, made by the query alone)."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from minitf import aggregate
from minitf.config import ModelConfig
from minitf.mixers.average import values_and_output
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
    check_least,
    project,
    remember,
    visible,
)


class _Rows(Mixer):
    """Mixers whose rows are known at any position without the keys: decoding keeps the values alone."""

    def rows(self, weights: Weights, f: Filtered, config: ModelConfig, positions: Array, keys: int) -> Array:
        """``[batch or 1, head, query, key]`` of the queries at ``positions`` ``[#batch, query]``."""
        raise NotImplementedError

    def association(self, weights: Weights, f: Filtered, config: ModelConfig) -> Pairs:
        """All rows."""
        length = f.v.shape[1]
        return self.rows(weights, f, config, jnp.arange(length)[None], length)

    def empty_state(self, config: ModelConfig, batch: int, slots: int, dtype: Any) -> State:
        """Room for the values."""
        return jnp.zeros((batch, slots, config.heads, config.head_size), dtype)

    def step(self, weights: Weights, f: Filtered, state: State, position: Now, config: ModelConfig) -> Step:
        """One row over the values so far."""
        v = remember(state, f.v, position)
        row = self.rows(weights, f, config, position[:, None], v.shape[1])
        return aggregate.combine(jnp.broadcast_to(row, (v.shape[0], *row.shape[1:])), v), v


@dataclasses.dataclass(frozen=True)
class Frozen(_Rows):
    """A constant association: a head's mean over data, say (Hassid et al. 2022, PAPA).

    The weight ``association`` ``[head, length, length]`` is not trained. What a query may not see is cut off and
    the rest made to sum to one. At the start it is all ones, a uniform average.
    """

    def about(self, config: ModelConfig) -> About:
        """The places alone count."""
        return About(
            causal=config.causal,
            heads=config.heads,
            granularity="head",
            normalized="exactly",
            state=config.length * config.heads * config.head_size,
            exponent=2.0,
        )

    def declare(self, config: ModelConfig, make: Any) -> Mapping[str, Any]:
        """Values, the map back, the association."""
        places = {"query": config.length, "key": config.length}
        return {
            **values_and_output(make),
            "association": make.weight("head query key", "ones", trained=False, **places),
        }

    def rows(self, weights: Weights, f: Filtered, config: ModelConfig, positions: Array, keys: int) -> Array:
        """The constant's, cut off and made to sum to one."""
        constant = jax.lax.stop_gradient(weights["association"])[:, positions, :keys]
        seen = _seen(positions, keys, config)
        constant = jnp.where(seen, jnp.moveaxis(constant, 0, 1), 0.0)
        total = jnp.sum(constant, axis=-1, keepdims=True)
        return constant / jnp.where(total == 0, 1.0, total)


@dataclasses.dataclass(frozen=True)
class Synthesizer(_Rows):
    """Scores that no key has a part in (Tay et al. 2021, Synthesizer); softmax over those in sight.

    Attributes:
        variant: ``trained`` or ``fixed`` random scores for every pair of places; ``factored`` into two tables of
            ``rank``; ``dense``, made from the query by a small network.
        rank: of the factored tables.
    """

    variant: str = "trained"
    rank: int = 8

    def check(self, config: ModelConfig) -> None:
        """Raise ValueError for an unknown variant."""
        if self.variant not in ("trained", "fixed", "factored", "dense"):
            raise ValueError(f"variant is {self.variant!r}; choose trained, fixed, factored or dense")
        check_least(self, 1, "rank")

    def about(self, config: ModelConfig) -> About:
        """The places alone count, or, dense, the query too."""
        return About(
            causal=config.causal,
            heads=config.heads,
            granularity="head",
            provenance=frozenset({"query"}) if self.variant == "dense" else frozenset(),
            normalized="exactly",
            state=config.length * config.heads * config.head_size,
            exponent=2.0,
        )

    def declare(self, config: ModelConfig, make: Any) -> Mapping[str, Any]:
        """Values, the map back, and the scores or what makes them."""
        places = {"query": config.length, "key": config.length, "rank": self.rank}
        if self.variant == "dense":
            own = {
                "query": make.matrix("width head head_width", "width"),
                "places": make.weight(
                    "head head_width key", "normal", config.head_size**-0.5, linear=True, **places
                ),
            }
        elif self.variant == "factored":
            scale = self.rank**-0.25
            own = {
                "query": make.weight("head query rank", "normal", scale, linear=True, **places),
                "key": make.weight("head key rank", "normal", scale, linear=True, **places),
            }
        else:
            trained = self.variant == "trained"
            own = {"scores": make.weight("head query key", "normal", 1.0, linear=True, trained=trained, **places)}
        return {**values_and_output(make), **own}

    def filter(
        self, weights: Weights, x: Seen, config: ModelConfig, positions: At, state: State = None
    ) -> Filtered:
        """Values; and, dense, the hidden layer of the scores."""
        q = jax.nn.relu(project(x, weights["query"])) if self.variant == "dense" else None
        return Filtered(v=project(x, weights["value"]), q=q)

    @property
    def leaves(self) -> frozenset[str]:  # type: ignore[override]
        """With a query where there is one."""
        return frozenset({"pattern", "q"}) if self.variant == "dense" else frozenset({"pattern"})

    def rows(self, weights: Weights, f: Filtered, config: ModelConfig, positions: Array, keys: int) -> Array:
        """Softmax of the scores."""
        if self.variant == "dense":
            scores = jnp.einsum("bqhc,hck->bhqk", f.q, weights["places"][..., :keys])
        elif self.variant == "factored":
            scores = jnp.einsum("hbqr,hkr->bhqk", weights["query"][:, positions], weights["key"][:, :keys])
        else:
            table = weights["scores"]
            table = jax.lax.stop_gradient(table) if self.variant == "fixed" else table
            scores = jnp.moveaxis(table[:, positions, :keys], 0, 1)
        return aggregate.associate(jnp.where(_seen(positions, keys, config), scores, -jnp.inf))


def _seen(positions: Array, keys: int, config: ModelConfig) -> Array:
    """``[#batch, 1, query, key]``."""
    if not config.causal:
        return visible(keys, config)[None, None]
    return (jnp.arange(keys) <= positions[..., None])[:, None]
