"""What AdamW with moments of few bits costs beside optax's: an update alone, a whole training step, the state."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import optax

from minitf.analysis import bench
from minitf.analysis.bench import Row, Say
from minitf.analysis.train_bench.program import training
from minitf.analysis.train_bench.sizes import GPU_SIZES, SIZES, Size
from minitf.train.fourbit import adamw_4bit, state_bytes

SHAPES = ((768, 3072),) * 4
OPTIMIZERS: Mapping[str, optax.GradientTransformation] = {
    **{
        second: adamw_4bit(1e-3, second=second)
        for second in ("rank1_linear", "block_linear", "block_de0", "factored")
    },
    "8 bit, rank1_linear": adamw_4bit(1e-3, bits=8),
}
# What it says of the update alone, a step of training says of what people wait for.
TRAINED_WITH = ("adamw_4bit", "adamw_4bit_factor", "adamw_8bit")


def bench_fourbit(
    *,
    seed: int = 0,
    rounds: int = 7,
    say: Say = lambda sentence: None,
    shapes: Sequence[tuple[int, ...]] = SHAPES,
    optimizers: Mapping[str, optax.GradientTransformation] = OPTIMIZERS,
    trained: Size | None = None,
) -> Iterator[Row]:
    """Time of an update and of a training step beside optax.adamw's, and bytes of state.

    Args:
        seed: of weights and gradients.
        rounds: how often each is measured, in turns.
        say: told what is being measured.
        shapes: of the weights.
        optimizers: by the name that the table gives them, for updates and state.
        trained: the model whose training steps are timed; one for this device, unless it is given.
    """
    weights = {str(i): jax.ShapeDtypeStruct(shape, "float32") for i, shape in enumerate(shapes)}
    theirs = optax.adamw(1e-3)
    sides = {name: _stepping(o, weights, seed) for name, o in {**optimizers, "optax": theirs}.items()}
    measured = bench.interleaved(sides, rounds, say)
    size = sum(weight.size for weight in weights.values())
    note = f"{size / 1e6:.2f} million numbers in {len(shapes)} weights, float32; weights and state are given away"
    for name in optimizers:
        yield bench.cost_row(f"AdamW update: {name}", "optax.adamw", measured[name], measured["optax"], "ms", note)
    trained = trained or (GPU_SIZES[0] if jax.default_backend() == "gpu" else SIZES[-1])
    yield from _training_steps(trained, rounds, say)
    whole = state_bytes(weights, theirs) / 1e6
    for name, optimizer in optimizers.items():
        ours = state_bytes(weights, optimizer) / 1e6
        yield bench.cost_row(f"AdamW state: {name}", "optax.adamw", [ours], [whole], "MB", note)


def _training_steps(size: Size, rounds: int, say: Say) -> list[Row]:
    """Milliseconds of a step of ``minitf train``."""

    def stepping(name: str) -> Callable[[], float]:
        say(f"training with {name}: compiling")
        train = training(size, name).train
        train()

        def measure() -> float:
            began = time.perf_counter()
            train()
            return 1e3 * (time.perf_counter() - began) / size.steps

        return measure

    sides = {name: stepping(name) for name in ("adamw", *TRAINED_WITH)}
    measured = bench.interleaved(sides, rounds, lambda what: say(f"training: {what}"))
    note = f"{size.name}, vocabulary {size.vocabulary}, {size.batch * size.length} tokens a step, {size.precision}"
    return [
        bench.cost_row(f"training step: {name}", "adamw", measured[name], measured["adamw"], "ms", note)
        for name in TRAINED_WITH
    ]


def _stepping(optimizer: optax.GradientTransformation, weights: Any, seed: int) -> Callable[[], float]:
    """Milliseconds of one update, weights and state given away; compiled before."""

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
