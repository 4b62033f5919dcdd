"""Optimizers, by optax, with rates that may be traced numbers: a grid of rates is one ``vmap``."""

from collections.abc import Callable
from typing import Any, Literal

import jax
import optax
from flax import struct
from jaxtyping import Array, Float

from minitf.parameters import path_name

Rate = float | Float[Array, ""] | Callable[[Any], Any]


@struct.dataclass
class Rates:
    """Learning rates of the two parts of a model: ``decoder`` (eta_Y) and ``attention`` (eta_Z).

    Each is a :data:`Rate`, or an array of them for a grid of runs (so it has no narrower type here).
    """

    decoder: Any
    attention: Any


def check_rates(**rates: float) -> None:
    """Refuse a learning rate that is negative or not a number, by name."""
    for name, rate in rates.items():
        if not rate >= 0 or rate == float("inf"):
            raise ValueError(f"{name} is {rate}; a learning rate must be a finite number of at least 0")


def sgd(rate: Rate, momentum: float = 0.0) -> optax.GradientTransformation:
    """SGD with velocity-form momentum: velocity = momentum * velocity + gradient; p -= rate * velocity.

    Torch's form without dampening or Nesterov: with momentum .9 the effective rate is ten times ``rate``.
    """
    return optax.sgd(rate, momentum=momentum or None)


def adam(rate: Rate) -> optax.GradientTransformation:
    """Adam (Kingma and Ba 2015) with the usual .9, .999, 1e-8."""
    return optax.adam(rate)


def adamw(rate: Rate, weight_decay: float = 0.01) -> optax.GradientTransformation:
    """AdamW (Loshchilov and Hutter 2019); the decay is decoupled and multiplied by the rate."""
    return optax.adamw(rate, weight_decay=weight_decay)


def clipped(optimizer: optax.GradientTransformation, norm: float) -> optax.GradientTransformation:
    """The optimizer on gradients scaled down to a global norm of at most ``norm``."""
    if not norm > 0:
        raise ValueError(f"the gradient norm to clip to is {norm}; it must be above 0")
    return optax.chain(optax.clip_by_global_norm(norm), optimizer)


def part_of(path: tuple[Any, ...]) -> Literal["attention", "decoder"]:
    """Which rate a weight learns with: what makes associations (all under an ``attention``), or the rest."""
    return "attention" if "attention" in path_name(path).split(".") else "decoder"


def by_part(make: Callable[[Rate], optax.GradientTransformation], rates: Rates) -> optax.GradientTransformation:
    """One optimizer with two rates: ``make(rates.attention)`` for the attention weights, the other elsewhere."""

    def labels(parameters: Any) -> Any:
        return jax.tree_util.tree_map_with_path(lambda path, _: part_of(path), parameters)

    return optax.partition({"decoder": make(rates.decoder), "attention": make(rates.attention)}, labels)
