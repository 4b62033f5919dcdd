"""Optimizers, by optax, with rates that may be traced numbers: a grid of rates is one ``vmap``."""

import math
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax
import optax.contrib
from flax import struct
from jaxtyping import Array, Float, Key

from minitf import ModelConfig
from minitf.declaration import Declaration, declare, is_declaration
from minitf.parameters import path_name
from minitf.train.config import OptimizerSettings
from minitf.train.fourbit import adamw_4bit

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


def adamw(
    rate: Rate, weight_decay: float = 0.01, mask: Callable[[Any], Any] | None = None
) -> optax.GradientTransformation:
    """AdamW (Loshchilov and Hutter 2019); the decay is decoupled and times the rate; all decay, or a mask."""
    return optax.adamw(rate, weight_decay=weight_decay, mask=mask)


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


def share_of_rate(count: Any, settings: OptimizerSettings, steps: int) -> Array:
    """The schedule: the share of the rate that step ``count`` (from 0) has; it rises, then falls to ``final``."""
    count = jnp.asarray(count, jnp.float32)
    risen = jnp.minimum(1.0, (count + 1) / max(settings.warm_up, 1))
    done = jnp.clip((count - settings.warm_up) / max(steps - settings.warm_up, 1), 0.0, 1.0)
    if settings.schedule == "constant":
        return risen
    if settings.schedule == "wsd":
        cool = max(settings.cool_down * steps, 1.0)
        done = jnp.clip((count - (steps - cool)) / cool, 0.0, 1.0)
    if settings.schedule == "cosine":
        done = (1 - jnp.cos(jnp.pi * done)) / 2
    return risen * (1 - (1 - settings.final) * done)


def from_settings(
    settings: OptimizerSettings, config: ModelConfig, steps: int, seed: int | Key[Array, ""] = 0
) -> optax.GradientTransformation:
    """The optimizer that the settings describe, for a model's parameters and a number of steps.

    The settings' numbers may be traced. Raises ValueError for a combination that there is not.
    """
    s = settings
    rate = lambda count: s.rate * share_of_rate(count, s, steps)
    betas, mask = (s.momentum, s.second_momentum), decaying(config, s.decay)
    decay = {"weight_decay": s.weight_decay, "mask": mask}
    # Without one nothing is kept for it; a swept one is traced, and may be anything.
    momentum = None if isinstance(s.momentum, int | float) and s.momentum == 0 else s.momentum
    match s.name:
        case "sgd":
            inner = optax.chain(optax.sgd(rate, momentum=s.momentum), decayed(rate, s.weight_decay, mask))
        case "adam":
            inner = optax.adam(rate, *betas, s.epsilon)
        case "adamw":
            inner = optax.adamw(rate, *betas, s.epsilon, **decay)
        case "lion":
            inner = optax.lion(rate, *betas, **decay)
        case "adafactor":
            inner = optax.chain(_adafactor(rate, momentum, config), decayed(rate, s.weight_decay, mask))
        case "muon":
            inner = _muon(s, config, steps, mask)
        case _:
            inner = _of_few_bits(s, rate, mask, seed)
    return clipped(inner, s.clip) if s.clip else inner


def decaying(config: ModelConfig, which: Literal["matrices", "all"]) -> Callable[[Any], Any]:
    """A mask of parameters: which weights decay, linear maps alone or all; never what is not trained."""

    def decays(declaration: Declaration, weight: Any) -> bool:
        return declaration.trained and (which == "all" or declaration.linear)

    def mask(parameters: Any) -> Any:
        return jax.tree.map(decays, declare(config), parameters, is_leaf=is_declaration)

    return mask


def decayed(
    rate: Callable[[Any], Any], weight_decay: float | Float[Array, ""], mask: Callable[[Any], Any]
) -> optax.GradientTransformation:
    """Decoupled weight decay after any other transformation: ``update - rate * weight_decay * parameter``."""
    return optax.masked(_pull(rate, weight_decay), mask)


def _pull(rate: Callable[[Any], Any], weight_decay: float | Float[Array, ""]) -> optax.GradientTransformation:
    def update(updates: Any, count: Any, parameters: Any) -> tuple[Any, Any]:
        by = rate(count) * weight_decay
        return jax.tree.map(lambda u, p: u - by * p, updates, parameters), count + 1

    return optax.GradientTransformation(lambda _: jnp.zeros((), jnp.int32), update)


def _adafactor(
    rate: Callable[[Any], Any], momentum: float | Float[Array, ""] | None, config: ModelConfig
) -> optax.GradientTransformation:
    """Adafactor (Shazeer and Stern 2018) as ``optax.adafactor`` has it, but factored by whole linear maps.

    By itself it factors the largest two axes, from 128 each: of a map that gives many narrow heads, none. As optax
    does, it clips by the root mean square of a weight in all layers together.
    """
    return optax.chain(
        _of_matrices(optax.scale_by_factored_rms(), config),
        optax.clip_by_block_rms(1.0),
        optax.scale_by_learning_rate(rate, flip_sign=False),
        optax.identity() if momentum is None else optax.ema(momentum, debias=False),
        optax.scale(-1.0),
    )


def _of_matrices(inner: optax.GradientTransformation, config: ModelConfig) -> optax.GradientTransformation:
    """A transformation that sees a linear map as one matrix, or one for each layer, whatever axes it has."""

    def as_matrix(declaration: Declaration, weight: Array) -> Array:
        if declaration.sides is None:
            return weight
        summed, made = (tuple(weight.shape[axis] for axis in axes) for axes in declaration.sides)
        several = weight.shape[: weight.ndim - len(summed) - len(made)]
        return weight.reshape(*several, math.prod(summed), math.prod(made))

    def matrices(tree: Any) -> Any:
        return jax.tree.map(as_matrix, declare(config), tree, is_leaf=is_declaration)

    def update(updates: Any, state: Any, parameters: Any) -> tuple[Any, Any]:
        found, state = inner.update(matrices(updates), state, matrices(parameters))
        return jax.tree.map(lambda new, old: new.reshape(old.shape), found, updates), state

    return optax.GradientTransformation(lambda parameters: inner.init(matrices(parameters)), update)


def muon_axes(config: ModelConfig) -> Any:
    """Of every weight inside a layer that is a linear map and trained, which axes it sums over and which it makes.

    None of another. Layers are a batch of matrices, and so no axis of either kind; heads belong to one map (Jordan
    et al. 2024), where what they give is put side by side or summed.
    """

    def axes(path: tuple[Any, ...], declaration: Declaration) -> Any:
        inside = path_name(path).startswith("layers.") and declaration.trained
        if not inside or declaration.sides is None:
            return None
        return optax.contrib.MuonDimensionNumbers(*declaration.sides)

    return jax.tree_util.tree_map_with_path(axes, declare(config), is_leaf=is_declaration)


def _muon(
    s: OptimizerSettings, config: ModelConfig, steps: int, mask: Callable[[Any], Any]
) -> optax.GradientTransformation:
    """Muon for the linear maps inside the layers, AdamW for the rest."""
    axes = muon_axes(config)

    def labels(parameters: Any) -> Any:
        return jax.tree.map(
            lambda numbers, _: "rest" if numbers is None else "muon",
            axes,
            parameters,
            is_leaf=lambda x: x is None or isinstance(x, optax.contrib.MuonDimensionNumbers),
        )

    share = lambda count: share_of_rate(count, s, steps)
    matrices = optax.contrib.muon(
        lambda count: s.muon_rate * share(count),
        beta=0.95,
        weight_decay=s.weight_decay,
        muon_weight_dimension_numbers=axes,
    )
    rest = optax.adamw(
        lambda count: s.rate * share(count),
        s.momentum,
        s.second_momentum,
        s.epsilon,
        weight_decay=s.weight_decay,
        mask=mask,
    )
    return optax.partition({"muon": matrices, "rest": rest}, labels)


def _of_few_bits(
    s: OptimizerSettings, rate: Callable[[Any], Any], mask: Callable[[Any], Any], seed: int | Key[Array, ""]
) -> optax.GradientTransformation:
    return adamw_4bit(
        rate,
        s.momentum,
        s.second_momentum,
        s.epsilon,
        weight_decay=s.weight_decay,
        mask=mask,
        bits=8 if s.name == "adamw_8bit" else 4,
        second="factored" if s.name == "adamw_4bit_factor" else s.second,
        signed_scale=s.signed_scale,
        stochastic=s.stochastic,
        seed=seed,
    )
