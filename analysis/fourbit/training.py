"""Whole runs: a small transformer on a Markov chain, by several optimizers and seeds in one program.

All optimizers start from the same weights and see the same batches; what is left between them is their own.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int

from minitf import ModelConfig, initialize, walk
from minitf.train.fourbit import adamw_4bit
from minitf.train.loop import Task, train

CONFIG = ModelConfig(vocabulary=16, layers=1, width=32, heads=2, length=16)
BATCH, HELD_OUT, RATE = 8, 512, 3e-3
CHAIN_SEED = 7
# How sharply a token says which comes next: the chain's entropy stays well below that of all tokens alike.
SHARPNESS = 2.0
# So that all weights but norms are coded: of a layer, the smallest matrix has 1024 numbers, the embedding 512.
SMALLEST = 256

Make = Callable[[Any], optax.GradientTransformation]
OPTIMIZERS: Mapping[str, Make] = {
    "32 bit": lambda rate: optax.adamw(rate, weight_decay=0.01),
    "rank-1/linear": lambda rate: adamw_4bit(rate, smallest=SMALLEST),
    "B128/DE-0, signed scale": lambda rate: adamw_4bit(
        rate, smallest=SMALLEST, second="block_de0", signed_scale=True
    ),
    "factored": lambda rate: adamw_4bit(rate, smallest=SMALLEST, second="factored"),
}
DIVERGING: Mapping[str, Make] = {
    "B128/DE": lambda rate: adamw_4bit(rate, smallest=SMALLEST, second="block_de"),
    "B128/linear with 0": lambda rate: adamw_4bit(rate, smallest=SMALLEST, second="block_linear_with_zero"),
}


@dataclass(frozen=True)
class Runs:
    """At the end: ``loss`` ``[seed]`` on held-out texts, ``farthest`` ``[seed]``, the largest weight."""

    loss: Float[np.ndarray, " seed"]
    farthest: Float[np.ndarray, " seed"]


def chain() -> Float[Array, "token next"]:
    """Logits of the next token."""
    return SHARPNESS * jax.random.normal(jax.random.key(CHAIN_SEED), (CONFIG.vocabulary, CONFIG.vocabulary))


def texts(key: Any, count: int) -> Int[Array, "count length_plus_one"]:
    """Texts of the chain, int32 ``[count, length + 1]``."""
    first, rest = jax.random.split(key)
    start = jax.random.randint(first, (count,), 0, CONFIG.vocabulary)

    def go_on(token: Array, own: Any) -> tuple[Array, Array]:
        after = jax.random.categorical(own, chain()[token])
        return after, after

    _, tokens = jax.lax.scan(go_on, start, jax.random.split(rest, CONFIG.length))
    return jnp.concatenate([start[None], tokens]).T


def loss(parameters: Any, tokens: Int[Array, "count length_plus_one"]) -> Float[Array, ""]:
    """Mean nats of the next token."""
    logits = walk(parameters, tokens[:, :-1], CONFIG, association=False).logits
    return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()


def side_by_side(optimizers: Sequence[optax.GradientTransformation]) -> optax.GradientTransformation:
    """One optimizer for parameters with a leading axis, of which each part has its own."""
    part = lambda tree, number: jax.tree.map(lambda x: x[number], tree)

    def init(parameters: Any) -> Any:
        return [optimizer.init(part(parameters, number)) for number, optimizer in enumerate(optimizers)]

    def update(gradients: Any, states: Any, parameters: Any = None) -> tuple[Any, Any]:
        done = [
            optimizer.update(part(gradients, number), states[number], part(parameters, number))
            for number, optimizer in enumerate(optimizers)
        ]
        return jax.tree.map(lambda *x: jnp.stack(x), *(moved for moved, _ in done)), [state for _, state in done]

    return optax.GradientTransformation(init, update)


def runs(makes: Mapping[str, Make], seeds: int = 5, steps: int = 300) -> dict[str, Runs]:
    """Train all seeds with every optimizer. A run that diverges goes on, and does not touch the others."""
    count, every_loss = len(makes), jax.vmap(loss, in_axes=(0, None))
    held_out = texts(jax.random.key(CHAIN_SEED), HELD_OUT)

    def largest(parameters: Any) -> Float[Array, " optimizer"]:
        of_each = [jnp.max(jnp.abs(x).reshape(count, -1), axis=1) for x in jax.tree.leaves(parameters)]
        return jnp.max(jnp.stack(of_each), axis=0)

    task = Task(
        initialize=lambda key: jax.tree.map(lambda x: jnp.stack([x] * count), initialize(CONFIG, key)),
        batch=lambda key, step: texts(key, BATCH),
        loss=lambda parameters, tokens: every_loss(parameters, tokens).sum(),
        optimizer=lambda rate: side_by_side([make(rate) for make in makes.values()]),
        record=lambda p: (every_loss(p, held_out), largest(p)),
    )
    keys = jax.random.split(jax.random.key(0), seeds)
    history = train(task, keys, jnp.array([RATE]), [steps], stop_on_divergence=False, records_per_chunk=1)
    found = [record[:, 0, -1] for record in history.records]
    return {name: Runs(found[0][:, number], found[1][:, number]) for number, name in enumerate(makes)}
