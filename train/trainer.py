"""The outer loop: programs that are compiled once, and a walk from stop to stop in which nothing waits for a
number.

``run`` is a generator: it hands over the state and what was measured after every call of the program, and who
reads it evaluates, keeps and shows what is due. One model, or many side by side, on one device or a mesh of them.
"""

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Int

from minitf.cores import CACHE_BYTES, few_at_a_time
from minitf.train import sharding
from minitf.train.batch import NO_TARGET, Batch
from minitf.train.config import ObjectiveSettings, TrainConfig
from minitf.train.objective import sums
from minitf.train.step import Measures, Program, State, in_precision, side_by_side

Tree = Any
Windows = Callable[[int, int], Int[np.ndarray, "seed step batch length_plus_one"]]  # from that step, so many
SECOND_OF_WORK = {"cpu": 2e10, "gpu": 1e14, "tpu": 1e14}  # operations, about
MOST_STEPS = 100


@dataclass(frozen=True)
class Models:
    """What trains together: each seed with each combination of swept numbers, seeds outermost.

    Attributes:
        seeds: one for each model.
        hyper: of each model, by name, ``[model]``; empty without a sweep.
        batched: whether arrays have a ``model`` axis; a single model's have not.
    """

    seeds: tuple[int, ...]
    hyper: dict[str, np.ndarray]

    @property
    def batched(self) -> bool:
        """Whether there are more than one."""
        return len(self.seeds) > 1

    @property
    def different_seeds(self) -> tuple[int, ...]:
        """Each seed once, in order."""
        return tuple(dict.fromkeys(self.seeds))


def models_of(config: TrainConfig) -> Models:
    """The models of a run."""
    t = config.training
    grid = list(itertools.product(*config.sweep.values()))
    seeds = [t.seed + i for i in range(t.seeds) for _ in grid]
    hyper = {
        name: np.tile(np.array([point[place] for point in grid], np.float32), t.seeds)
        for place, name in enumerate(config.sweep)
    }
    return Models(tuple(seeds), hyper)


@dataclass(frozen=True)
class Compiled:
    """The programs of a run, compiled for its models and devices.

    Attributes:
        start: () -> state.
        advance: (state, windows or None, done, to) -> state, measures; the state given is used up.
        state: shapes of the state, and where its parts lie.
        most: steps that one call takes, at most.
        batch: sequences of a step, of all processes together.
        temporary_bytes: what a call needs beside its inputs and outputs, as the compiler says; on each device.
        argument_bytes: what its inputs need.
        at_once: models that run side by side.
    """

    start: Callable[[], State]
    advance: Callable[..., tuple[State, Measures]]
    state: State
    most: int
    batch: int
    temporary_bytes: int
    argument_bytes: int
    at_once: int = 1


def steps_per_call(config: TrainConfig, flops: float, kind: str | None = None) -> int:
    """Steps in one program: about a second of work, so that calls cost nothing and Ctrl-C does not wait long.

    ``kind`` of device is that of this process, unless it is said.
    """
    chosen = config.training.steps_per_call
    if chosen:
        return min(chosen, config.training.steps)
    work = SECOND_OF_WORK.get(kind or jax.default_backend(), 2e10)
    return int(min(max(work / max(flops, 1.0), 1), MOST_STEPS, config.training.steps))


def models_at_once(config: TrainConfig, many: int, state: State, kind: str | None = None) -> int:
    """How many models run side by side: on a CPU as many as fit in a core's cache, elsewhere all that memory has
    room for, of which :func:`compiled` takes care. ``kind`` of device is that of this process, unless it is said.
    """
    if config.training.at_once:
        return min(config.training.at_once, many)
    if (kind or jax.default_backend()) != "cpu":
        return many
    size = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state)) / many
    return few_at_a_time(many, max(int(CACHE_BYTES / size), 1))


def memory_of(mesh: Mesh) -> int | None:
    """Bytes that one device has for programs, where it says so; a CPU does not."""
    return (mesh.local_devices[0].memory_stats() or {}).get("bytes_limit")


def compiled(
    program: Program,
    mesh: Mesh,
    flops: float,
    length: int,
    memory: int | None = None,
    initial: Callable[[], Tree] | None = None,
) -> Compiled:
    """Compile a run's programs. Of many models fewer run side by side, at most half of them each time, until what
    the compiler says that a call needs is there.

    Args:
        program: what trains.
        mesh: of :func:`minitf.train.sharding.mesh_of`.
        flops: operations of one step of all models, about, which decides how many steps a call takes.
        length: of the windows.
        memory: bytes that each device has for them; else what :func:`memory_of` says, if it says anything.
        initial: () -> parameters on the host, that every model starts from; else each has its own, from its key.
    """
    config, models = program.config, models_of(program.config)
    if not models.batched:
        program = dataclasses.replace(program, stream=sharding.of_stream(mesh))
    most = steps_per_call(config, flops)
    # The first model's alone, or all of them; a typed key for each.
    keys = jax.vmap(jax.random.key)(jnp.asarray(models.seeds))
    hyper = {name: jnp.asarray(values) for name, values in models.hyper.items()}
    seed_of = jnp.asarray([models.different_seeds.index(seed) for seed in models.seeds])
    if models.batched:
        begin = lambda given: jax.vmap(program.start, in_axes=(0, 0, None))(keys, hyper, given)
        shapes = jax.eval_shape(begin, None)
        at_once = models_at_once(config, len(models.seeds), shapes)
        go_on = lambda at_once, state, windows, done, to: side_by_side(program, most, at_once)(
            state, keys, hyper, windows, seed_of, done, to
        )
    else:
        at_once = 1
        key, numbers = keys[0], {name: values[0] for name, values in hyper.items()}
        begin = lambda given: program.start(key, numbers, given)
        shapes = jax.eval_shape(begin, None)
        go_on = lambda at_once, state, windows, done, to: program.advance(
            state, key, numbers, None if windows is None else windows[0], done, to, most
        )
    placed = sharding.of_state(shapes, program.model, mesh, models.batched)
    windows = None
    if program.draw is None:
        shape = (len(models.different_seeds), most, config.training.batch, length + 1)
        windows = jax.ShapeDtypeStruct(shape, np.int32, sharding=sharding.of_windows(mesh))
    number = jax.ShapeDtypeStruct((), np.int32)
    state = jax.tree.map(lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where), shapes, placed)
    one = sharding.everywhere(mesh)
    there = memory or memory_of(mesh)
    while True:
        run = jax.jit(partial(go_on, at_once), donate_argnums=0, out_shardings=(placed, Measures(one, one)))
        ready = run.lower(state, windows, number, number).compile()
        temporary, arguments = _needs(ready)
        if at_once == 1 or config.training.at_once or there is None or temporary + arguments <= there:
            break
        at_once = few_at_a_time(len(models.seeds), -(-at_once // 2))
    return Compiled(
        start=lambda: jax.jit(begin, out_shardings=placed)(
            None if initial is None else sharding.placed_whole(initial(), placed.parameters)
        ),
        advance=lambda state, windows, done, to: ready(state, windows, np.int32(done), np.int32(to)),
        state=state,
        most=most,
        batch=config.training.batch,
        temporary_bytes=temporary,
        argument_bytes=arguments,
        at_once=at_once,
    )


def _needs(ready: Any) -> tuple[int, int]:
    """Temporary bytes of a compiled program and those of its inputs, on each device; 0 where it does not say."""
    needs = ready.memory_analysis()
    return (0, 0) if needs is None else (int(needs.temp_size_in_bytes), int(needs.argument_size_in_bytes))


@dataclass(frozen=True)
class Taken:
    """The steps ``first`` to ``done``, the state after them, and ``measures`` ``[..., step]``, on the device."""

    first: int
    done: int
    state: State
    measures: Measures


def run(
    programs: Compiled, state: State, done: int, stops: Sequence[int], windows: Windows | None, mesh: Mesh
) -> Iterator[Taken]:
    """Train from step ``done`` on to every one of ``stops``, which increase; each is the end of a call.

    What is yielded is not waited for: the device goes on while its reader reads. The next call begins when the
    next item is asked for, and uses the yielded state up. Data of the next call is made while the device works.
    """
    calls = list(_calls(done, stops, programs.most))
    if windows is None:
        for first, to in calls:
            state, measures = programs.advance(state, None, first, to)
            yield Taken(first, to, state, measures)
        return
    with ThreadPoolExecutor(1) as thread:
        make = lambda first: thread.submit(_placed, windows, first, programs.most, mesh, programs.batch)
        coming = make(calls[0][0]) if calls else None
        for number, (first, to) in enumerate(calls):
            assert coming is not None
            tokens = coming.result()
            coming = make(calls[number + 1][0]) if number + 1 < len(calls) else None
            state, measures = programs.advance(state, tokens, first, to)
            yield Taken(first, to, state, measures)


def _calls(done: int, stops: Sequence[int], most: int) -> Iterator[tuple[int, int]]:
    for stop in stops:
        while done < stop:
            to = min(done + most, stop)
            yield done, to
            done = to


def _placed(windows: Windows, first: int, steps: int, mesh: Mesh, batch: int) -> Array:
    return sharding.placed(windows(first, steps), mesh, batch)


@dataclass(frozen=True)
class Evaluation:
    """On held-out data, for each model: ``loss`` in nats (or squared error), and ``accuracy``."""

    loss: np.ndarray
    accuracy: np.ndarray


def evaluator(
    program: Program, mesh: Mesh, batched: bool, at_once: int | None = None
) -> Callable[[Tree, Batch], Evaluation]:
    """A function of parameters and batches ``[part, batch, position]``; no dropout, no penalties.

    Of many models, ``at_once`` are evaluated side by side, or one after another.
    """
    plain = ObjectiveSettings(kind=program.objective, chunk=program.config.objective.chunk)
    dtype = jnp.dtype(program.config.training.precision)

    def of_one(parameters: Tree, batches: Batch) -> Tree:
        parameters = in_precision(parameters, dtype)

        def of_part(batch: Batch) -> Tree:
            return sums(parameters, batch, program.model, program.objective, plain, unroll=program.unroll)

        return jax.tree.map(jnp.sum, jax.lax.map(of_part, batches))

    def of_all(parameters: Tree, batches: Batch) -> Tree:
        return (
            jax.lax.map(lambda one: of_one(one, batches), parameters, batch_size=at_once)
            if batched
            else of_one(parameters, batches)
        )

    one = sharding.everywhere(mesh)
    measured = jax.jit(of_all, out_shardings=one)

    def evaluate(parameters: Tree, batches: Batch) -> Evaluation:
        found = jax.tree.map(np.asarray, measured(parameters, batches))
        count = np.maximum(found.count, 1)
        return Evaluation(loss=np.asarray(found.plain / count), accuracy=np.asarray(found.right / count))

    return evaluate


def in_parts(batch: Batch, size: int) -> Batch:
    """A batch of any size as ``[part, size, position]``; what fills up the last part does not count."""
    many = batch.tokens.shape[0]
    parts = -(-many // size)
    nothing = np.nan if np.issubdtype(batch.targets.dtype, np.floating) else NO_TARGET

    def cut(x: Any, fill: Any) -> np.ndarray:
        rest = [(0, parts * size - many), *((0, 0),) * (x.ndim - 1)]
        return np.pad(np.asarray(x), rest, constant_values=fill).reshape(parts, size, *x.shape[1:])

    return Batch(
        tokens=cut(batch.tokens, 0),
        targets=cut(batch.targets, nothing),
        inputs=None if batch.inputs is None else cut(batch.inputs, 0.0),
    )
