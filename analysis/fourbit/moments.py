"""Moments that stay coded for many steps: whether their codes still change, and whether they are biased."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float

from minitf.train.fourbit import Adam4BitState, as_adam, dequantize, dynamic_exponent, scale_by_adam_4bit

ROWS, COLUMNS = 32, 256


@dataclass(frozen=True)
class Drift:
    """Of second moments after many steps of gradients that do not change in size.

    Attributes:
        changed: share of packed bytes that differ between two thirds of the steps and the end.
        bias: mean of log10 of the coded moment over the exact one, where that is not 0.
        spread: its deviation.
        zeros: share of moments that are 0.
    """

    changed: float
    bias: float
    spread: float
    zeros: float


def drift(
    steps: int = 1500, seed: int = 0, *, b2: float = 0.999, stochastic: bool = False, **coding: Any
) -> Drift:
    """Keep second moments coded for ``steps`` steps; ``coding`` is the optimizer's."""
    coding = {"smallest": 0, **coding}
    optimizer = scale_by_adam_4bit(b2=b2, stochastic=stochastic, **coding)
    start, end, exact = _kept(optimizer, b2, steps, jax.random.key(seed))
    changed = np.mean(np.asarray(start.moments.square.codes) != np.asarray(end.moments.square.codes))
    coded = np.asarray(as_adam(end, exact, **coding).nu)
    seen = coded > 0
    ratio = np.log10(coded[seen] / np.asarray(exact)[seen])
    return Drift(float(changed), float(ratio.mean()), float(ratio.std()), float(np.mean(~seen)))


def _kept(
    optimizer: optax.GradientTransformation, b2: float, steps: int, key: Any
) -> tuple[Adam4BitState, Adam4BitState, Array]:
    """The state at two thirds of the steps and at the end, and the exact second moments."""
    sizes = jax.random.split(jax.random.fold_in(key, 0))
    size = jnp.exp(jax.random.normal(sizes[0], (ROWS, 1)) + jax.random.normal(sizes[1], (1, COLUMNS)))

    @jax.jit
    def third(carry: tuple, first: Array) -> tuple:
        def one(carry: tuple, number: Array) -> tuple[tuple, None]:
            state, exact = carry
            gradient = size * jax.random.normal(jax.random.fold_in(key, number + 1), size.shape)
            _, state = optimizer.update(gradient, state)
            return (state, b2 * exact + (1 - b2) * gradient**2), None

        return jax.lax.scan(one, carry, first + jnp.arange(steps // 3))[0]

    carry = (optimizer.init(size), jnp.zeros_like(size))
    for number in range(3):
        before = carry[0]
        carry = third(carry, jnp.int32(number * (steps // 3)))
    return before, carry[0], carry[1]


def momentum_of(gradient: float, steps: int = 200, **settings: Any) -> Float[np.ndarray, " number"]:
    """What a momentum becomes, over what it should, under a gradient that is the same for all in every step."""
    optimizer = scale_by_adam_4bit(smallest=0, second="block_linear", **settings)
    constant = jnp.full(128, gradient, jnp.float32)

    @jax.jit
    def run() -> Any:
        step = lambda state, _: (optimizer.update(constant, state)[1], None)
        return jax.lax.scan(step, optimizer.init(constant), None, length=steps)[0]

    levels = dynamic_exponent(settings.get("bits", 4), signed=True)
    # Coded once more, a negative extreme is .8875 of what the step used: that is its scale.
    state = run().moments.mean
    used = np.abs(np.asarray(state.scales[0]))
    decoded = np.asarray(dequantize(state, (128,), levels))
    return np.sign(decoded) * used.reshape(-1) / gradient
