"""What a step of AdamW with moments of few bits costs beside optax's, in time and bytes."""

import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import optax

from minitf.analysis import bench
from minitf.analysis.bench import Row, Say
from minitf.train.fourbit import adamw_4bit, state_bytes

SHAPES = ((768, 3072),) * 4
OPTIMIZERS: Mapping[str, optax.GradientTransformation] = {
    **{
        second: adamw_4bit(1e-3, second=second)
        for second in ("rank1_linear", "block_linear", "block_de0", "factored")
    },
    "8 bit, rank1_linear": adamw_4bit(1e-3, bits=8),
}


def bench_fourbit(
    *,
    seed: int = 0,
    rounds: int = 7,
    say: Say = lambda sentence: None,
    shapes: Sequence[tuple[int, ...]] = SHAPES,
    optimizers: Mapping[str, optax.GradientTransformation] = OPTIMIZERS,
) -> list[Row]:
    """Time of a step beside optax.adamw's, weights and state given away, and bytes of state.

    Args:
        seed: of weights and gradients.
        rounds: how often each is measured, in turns.
        say: told what is being measured.
        shapes: of the weights.
        optimizers: by the name that the table gives them.
    """
    weights = {str(i): jax.ShapeDtypeStruct(shape, "float32") for i, shape in enumerate(shapes)}
    theirs = optax.adamw(1e-3)
    sides = {name: _stepping(o, weights, seed) for name, o in {**optimizers, "optax": theirs}.items()}
    measured = bench.interleaved(sides, rounds, say)
    size = sum(weight.size for weight in weights.values())
    note = f"{size / 1e6:.2f} million numbers in {len(shapes)} weights, float32; weights and state are given away"
    rows = [
        bench.cost_row(f"AdamW step: {name}", "optax.adamw", measured[name], measured["optax"], "ms", note)
        for name in optimizers
    ]
    whole = state_bytes(weights, theirs) / 1e6
    for name, optimizer in optimizers.items():
        ours = state_bytes(weights, optimizer) / 1e6
        rows.append(bench.cost_row(f"AdamW state: {name}", "optax.adamw", [ours], [whole], "MB", note))
    return rows


def _stepping(optimizer: optax.GradientTransformation, weights: Any, seed: int) -> Callable[[], float]:
    """Milliseconds of one step, compiled before."""

    @partial(jax.jit, donate_argnums=(0, 1))
    def step(parameters: Any, state: Any, gradients: Any) -> tuple[Any, Any]:
        update, state = optimizer.update(gradients, state, parameters)
        return optax.apply_updates(parameters, update), state

    drawn = lambda number: {
        name: jax.random.normal(jax.random.fold_in(jax.random.key(seed + number), int(name)), weight.shape)
        for name, weight in weights.items()
    }
    gradients = drawn(1)
    parameters = drawn(0)
    kept = list(step(parameters, optimizer.init(parameters), gradients))

    def measure() -> float:
        jax.block_until_ready(kept)
        began = time.perf_counter()
        kept[:] = step(*kept, gradients)
        jax.block_until_ready(kept)
        return 1e3 * (time.perf_counter() - began)

    return measure
