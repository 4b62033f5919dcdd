"""The compiled loop: many steps in one program, recording on the way, many runs at once.

One run is a pure function of its hyper-parameters and its key. ``train`` vmaps it over all runs, so a grid of
seeds and rates is one program; what a run records comes to the host once per chunk.
"""

import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Key

from minitf.cores import CACHE_BYTES, cores, largest_divisor
from minitf.in_turn import in_turn

Tree = Any
Report = Callable[[int, float], None]  # step, mean loss over the runs


@dataclass(frozen=True)
class Task:
    """What is trained: pure functions of a key, of parameters, and (the optimizer) of hyper-parameters.

    Attributes:
        initialize: key -> parameters.
        batch: (key, step) -> batch, sampled on the device; the key is the run's with the step folded in,
            so any step can be replayed.
        loss: (parameters, batch) -> scalar.
        optimizer: hyper-parameters -> optax transformation; they may be traced numbers.
        record: parameters -> pytree of arrays, kept at the recorded steps; leaves of a walk, say.
    """

    initialize: Callable[[Key[Array, ""]], Tree]
    batch: Callable[[Key[Array, ""], Array], Tree]
    loss: Callable[[Tree, Tree], Array]
    optimizer: Callable[[Tree], optax.GradientTransformation]
    record: Callable[[Tree], Tree] = lambda parameters: ()


@dataclass(frozen=True)
class History:
    """What training left: leading axes are the runs' (as given), then the record or the step.

    Attributes:
        loss: ``[run..., step]`` on each step's batch, before the step; float32.
        records: what ``Task.record`` returned, with axes ``[run..., record, ...]``.
        record_steps: ``[record]``, how many steps had been taken at each record.
        parameters: after the last step, ``[run..., ...]``.
        diverged: ``[run...]``, the first step whose loss was not finite, or -1.
        finished: False when training was interrupted or stopped early; the arrays hold what was done.
    """

    loss: np.ndarray
    records: Tree
    record_steps: np.ndarray
    parameters: Tree
    diverged: np.ndarray
    finished: bool


def every(steps: int, interval: int) -> list[int]:
    """Record steps 0, interval, 2 interval, ... and the last."""
    return sorted({*range(0, steps + 1, interval), steps})


def log_spaced(steps: int, count: int) -> list[int]:
    """About ``count`` record steps from 0 to ``steps``, dense at the start; repeated steps are dropped."""
    between = np.geomspace(1, max(steps, 1), count).round().astype(int).tolist()
    return sorted({0, steps, *(step for step in between if step < steps)})


@dataclass(frozen=True)
class Programs:
    """A task compiled for some shape of seeds, rates and records; :func:`train` takes it to run it again.

    Attributes:
        start: (keys, hyper) -> state.
        chunk: (keys, hyper, state, steps done, targets) -> state, losses, records.
        parts: in how many equal parts the seeds run at once, each in its own thread.
        records_per_chunk: how many records one chunk makes.
        seconds: what compiling took.
        temporary_bytes: what one part's chunk needs beside its inputs and outputs, as the compiler says.
    """

    start: Callable[[Array, Tree], Tree]
    chunk: Callable[..., tuple[Tree, Array, Tree]]
    parts: int
    records_per_chunk: int
    seconds: float
    temporary_bytes: int


def train(
    task: Task,
    keys: Key[Array, " seed"],
    hyper: Tree,
    record_steps: Sequence[int],
    *,
    records_per_chunk: int = 10,
    how: Literal["vmap", "map"] = "vmap",
    report: Report | None = None,
    stop_on_divergence: bool = True,
    programs: Programs | None = None,
) -> History:
    """Train ``seed x rate`` runs together, to the last of ``record_steps``.

    Args:
        task: what to train.
        keys: one typed key per seed. A seed's parameters and data do not depend on its rates, so all the runs
            of a seed see the same batches, and those are sampled once.
        hyper: pytree of arrays with one leading axis, the rates; the optimizer gets one entry of each.
        record_steps: increasing numbers of steps taken; the first is usually 0.
        records_per_chunk: how many records one dispatch makes: the grain of progress and of interruption.
        how: ``vmap`` runs everything side by side. ``map`` is for CPUs: equal shares of the seeds on the cores,
            there one seed after another, and no more of its rates side by side than fit in a core's cache.
        report: called after every chunk.
        stop_on_divergence: stop after the chunk in which a loss stopped being finite.
        programs: of :func:`compile_programs` with the same arguments, to compile once and run often.

    Returns:
        A history with run axes ``[seed, rate]``. Interrupting (Ctrl-C) between chunks returns what was done,
        with ``finished=False``.

    Raises:
        ValueError: the record steps do not increase from at least 0, or a chunk is to hold no record.
    """
    chunks = _chunks(record_steps, records_per_chunk)
    if programs is None:
        programs = compile_programs(task, keys, hyper, record_steps, records_per_chunk=records_per_chunk, how=how)
    shares = jnp.split(keys, programs.parts)
    states, done = [programs.start(share, hyper) for share in shares], 0
    losses: list[np.ndarray] = []
    records: list[Tree] = []
    with ThreadPoolExecutor(programs.parts) as threads:
        try:
            for targets in chunks:
                # Every chunk has the same shape, so there is one program: repeated targets take no step.
                padded = np.pad(targets, (0, records_per_chunk - len(targets)), mode="edge")
                step = partial(_advance, programs.chunk, hyper, done, padded)
                after, lost, kept = zip(*threads.map(step, shares, states), strict=True)
                losses.append(np.concatenate(lost)[..., : int(targets[-1]) - done])
                records.append(jax.tree.map(partial(_joined, len(targets)), *kept))
                states, done = list(after), int(targets[-1])
                if report is not None:
                    report(done, _mean_last(losses))
                if stop_on_divergence and not np.all(np.isfinite(losses[-1])):
                    break
        except KeyboardInterrupt:
            if not records:
                raise
    loss = np.concatenate(losses[: len(records)], axis=-1)
    return History(
        loss=loss,
        records=jax.tree.map(lambda *xs: np.concatenate(xs, axis=2), *records),
        record_steps=np.concatenate(chunks[: len(records)]),
        parameters=jax.tree.map(lambda *xs: jnp.concatenate(xs), *(state[0] for state in states)),
        diverged=first_non_finite(loss),
        finished=len(records) == len(chunks),
    )


def _advance(
    chunk: Callable, hyper: Tree, done: int, targets: np.ndarray, keys: Array, state: Tree
) -> tuple[Tree, np.ndarray, Tree]:
    """One chunk of one share of the seeds, waited for; losses and records on the host."""
    state, loss, records = chunk(keys, hyper, state, np.int32(done), targets)
    return state, np.asarray(loss), jax.tree.map(np.asarray, records)


def _joined(records: int, *shares: np.ndarray) -> np.ndarray:
    """The shares' seeds as one array ``[seed, rate, record, ...]``, without the records that only fill a chunk."""
    return np.concatenate(shares)[:, :, :records]


def _chunks(record_steps: Sequence[int], records_per_chunk: int) -> list[np.ndarray]:
    """The record steps, checked, in the groups that one dispatch makes."""
    if records_per_chunk < 1:
        raise ValueError(f"records_per_chunk is {records_per_chunk}; it must be at least 1")
    steps = np.asarray(record_steps, np.int32)
    if steps.ndim != 1 or len(steps) == 0 or steps[0] < 0 or np.any(np.diff(steps) <= 0):
        raise ValueError(f"record steps must increase from at least 0; they are {list(record_steps)}")
    return [steps[i : i + records_per_chunk] for i in range(0, len(steps), records_per_chunk)]


def compile_programs(
    task: Task,
    keys: Key[Array, " seed"],
    hyper: Tree,
    record_steps: Sequence[int],
    *,
    records_per_chunk: int = 10,
    how: Literal["vmap", "map"] = "vmap",
) -> Programs:
    """Compile what :func:`train` runs, with the same arguments; raises what it raises."""
    began = time.perf_counter()
    chunks = _chunks(record_steps, records_per_chunk)
    # The most steps that any chunk takes.
    capacity = max(int(c[-1]) - int(s) for c, s in zip(chunks, [0, *(c[-1] for c in chunks)], strict=False))
    parts = _parts(len(keys)) if how == "map" else 1
    share = keys[: len(keys) // parts]
    start, chunk = _programs(task, how, max(capacity, 1))
    compiled_start = start.lower(share, hyper).compile()
    state = jax.eval_shape(start, share, hyper)
    targets = jax.ShapeDtypeStruct((records_per_chunk,), np.int32)
    compiled = chunk.lower(share, hyper, state, jax.ShapeDtypeStruct((), np.int32), targets).compile()
    memory = compiled.memory_analysis()
    return Programs(
        start=compiled_start,
        chunk=compiled,
        parts=parts,
        records_per_chunk=records_per_chunk,
        seconds=time.perf_counter() - began,
        temporary_bytes=0 if memory is None else int(memory.temp_size_in_bytes),
    )


def _parts(seeds: int) -> int:
    """Into how many equal shares to divide the seeds: at most one per core of a CPU, one elsewhere."""
    most = cores() if jax.default_backend() == "cpu" else 1
    return largest_divisor(seeds, most)


def first_non_finite(loss: np.ndarray) -> np.ndarray:
    """The first index on the last axis whose value is not finite, or -1."""
    # One more entry than there are, so that no step at all has an argmax too.
    bad = np.pad(~np.isfinite(loss), [(0, 0)] * (loss.ndim - 1) + [(0, 1)])
    return np.where(bad.any(axis=-1), bad.argmax(axis=-1), -1)


def _mean_last(losses: list[np.ndarray]) -> float:
    known = [x for x in losses if x.shape[-1]]
    return float(np.mean(known[-1][..., -1])) if known else float("nan")


def _programs(task: Task, how: Literal["vmap", "map"], capacity: int) -> tuple[Any, Any]:
    """The jitted start and chunk of all runs; ``capacity`` is the most steps that a chunk takes."""

    def start(key: Key[Array, ""], hyper: Tree) -> tuple[Tree, Tree]:
        parameters = task.initialize(jax.random.fold_in(key, 0))
        return parameters, task.optimizer(hyper).init(parameters)

    def draw(key: Key[Array, ""], step: Array) -> Tree:
        return task.batch(jax.random.fold_in(jax.random.fold_in(key, 1), step), step)

    def take(hyper: Tree, state: tuple[Tree, Tree], batch: Tree) -> tuple[tuple[Tree, Tree], Array]:
        parameters, moments = state
        loss, gradient = jax.value_and_grad(task.loss)(parameters, batch)
        update, moments = task.optimizer(hyper).update(gradient, moments, parameters)
        return (optax.apply_updates(parameters, update), moments), loss.astype(jnp.float32)

    # Loops are around what runs side by side, not in it: JAX traces the body of a loop anew, several times, for
    # each axis that is put on it.
    def side_by_side(keys: Array, hyper: Tree, states: Tree, done: Array, targets: Array) -> Any:
        def take_all(states: Tree, step: Array) -> tuple[Tree, Array]:
            def one_seed(key: Key[Array, ""], state: Tree) -> tuple[Tree, Array]:
                return jax.vmap(take, in_axes=(0, 0, None))(hyper, state, draw(key, step))

            return jax.vmap(one_seed)(keys, states)

        runs = len(keys), len(jax.tree.leaves(hyper)[0])
        return _to_each_record(take_all, jax.vmap(jax.vmap(task.record)), states, done, targets, capacity, runs)

    def one_after_another(keys: Array, hyper: Tree, states: Tree, done: Array, targets: Array) -> Any:
        def one_seed(key_and_states: tuple) -> Any:
            key, states = key_and_states
            many = _at_once(states)
            # Drawn once for all rates, which do not all run at the same time.
            batches = jax.lax.map(partial(draw, key), done + jnp.arange(capacity, dtype=jnp.int32))

            def one_group(hyper_and_states: tuple) -> Any:
                hyper, states = hyper_and_states

                def take_all(states: Tree, step: Array) -> tuple[Tree, Array]:
                    batch = jax.tree.map(lambda x: x[step - done], batches)
                    return jax.vmap(take, in_axes=(0, 0, None))(hyper, states, batch)

                return _to_each_record(take_all, jax.vmap(task.record), states, done, targets, capacity, (many,))

            return in_turn(one_group, (hyper, states), many)

        return jax.lax.map(one_seed, (keys, states))

    all_starts = jax.vmap(jax.vmap(start, in_axes=(None, 0)), in_axes=(0, None))
    return jax.jit(all_starts), jax.jit(one_after_another if how == "map" else side_by_side)


def _to_each_record(
    take: Callable[[Tree, Array], tuple[Tree, Array]],
    record: Callable[[Tree], Tree],
    states: Tree,
    done: Array,
    targets: Array,
    capacity: int,
    runs: tuple[int, ...],
) -> tuple[Tree, Array, Tree]:
    """Steps of all runs from ``done`` to each target, and there a record: the states, losses ``[*runs, capacity]``
    (NaN where no step was taken) and records ``[*runs, target, ...]``.
    """

    def one_step(carry: tuple) -> tuple:
        states, losses, step = carry
        states, loss = take(states, step)
        return states, losses.at[..., step - done].set(loss), step + 1

    def to_next_record(carry: tuple, target: Array) -> tuple[tuple, Tree]:
        carry = jax.lax.while_loop(lambda c: c[2] < target, one_step, carry)
        return carry, record(carry[0][0])

    empty = jnp.full((*runs, capacity), jnp.nan, jnp.float32)
    (states, losses, _), records = jax.lax.scan(to_next_record, (states, empty, done), targets)
    return states, losses, jax.tree.map(lambda x: jnp.moveaxis(x, 0, len(runs)), records)


def _at_once(state: Tree) -> int:
    """How many rates of a seed run side by side: as many as fit in a core's cache, a divisor of their number."""
    leaves = jax.tree.leaves(state)
    rates = leaves[0].shape[0]
    bytes_of_one = sum(x.size * x.dtype.itemsize for x in leaves) / rates
    return largest_divisor(rates, int(CACHE_BYTES // bytes_of_one))
