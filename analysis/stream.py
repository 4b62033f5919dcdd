"""Fitting to a stream: one step for every batch, and many steps in one compiled program."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from minitf.config import ModelConfig

Tree = Any
REMEDY = "choose a smaller learning rate, or look for inputs or weights that are not finite"
# (what stays, state, batch) -> state, numbers to keep. A function defined once: every new one is compiled anew.
Step = Callable[[Tree, Tree, Array], tuple[Tree, Tree]]
Progress = Callable[[Iterable[Any]], Iterable[Any]]


@dataclass(frozen=True)
class Streamed:
    """What a stream left.

    Attributes:
        state: after the last step that counts.
        records: what the steps kept, with a leading ``step`` axis, on the host.
        finished: False when interrupted (Ctrl-C) between two programs; the rest holds what was done before.
    """

    state: Tree
    records: Tree
    finished: bool


def stream(
    step: Step,
    given: Tree,
    state: Tree,
    batches: Iterable[Any],
    *,
    steps_per_program: int,
    progress: Progress = iter,
) -> Streamed:
    """Take one step for every batch, to the end of the stream.

    Args:
        step: a pure function; it is part of the program's identity, so it must not be made anew for every call.
        given: a pytree that all steps read.
        state: a pytree that goes from step to step.
        batches: arrays of one shape; an array iterates over its first axis.
        steps_per_program: how many steps one dispatch takes, and how many are lost by an interruption.
        progress: wraps the batches, such as ``rich.progress.track``.

    Raises:
        ValueError: no batch, batches of several shapes, a step that kept a number that is not finite, or a state
            that is not finite in the end.
    """
    if steps_per_program < 1:
        raise ValueError(f"steps_per_program is {steps_per_program}; it must be at least 1")
    records: list[Tree] = []
    done, finished = 0, False
    try:
        for group in _groups(progress(batches), steps_per_program):
            # Every program has the same shape: the last one is filled up with batches of which no step is taken.
            filled = np.stack(group + group[-1:] * (steps_per_program - len(group)))
            after, kept = _program(given, state, filled, np.int32(len(group)), step=step)
            kept = jax.tree.map(lambda x: np.asarray(x)[: len(group)], kept)  # noqa: B023
            _check_finite(kept, done)
            records.append(kept)
            state, done = after, done + len(group)
        finished = True
    except KeyboardInterrupt:
        if not records:
            raise
    if not records:
        raise ValueError("there is no batch to take a step on; the stream is empty, or was read before")
    # Losses are those before their steps, so none of them shows what the last step did.
    if not all(np.isfinite(x).all() for x in jax.tree.leaves(state) if jnp.issubdtype(x.dtype, jnp.inexact)):
        raise ValueError(f"what the last step, {done - 1}, led to is not finite; {REMEDY}")
    return Streamed(state, jax.tree.map(lambda *parts: np.concatenate(parts), *records), finished)


def checked_tokens(batch: Any, config: ModelConfig) -> np.ndarray:
    """One batch of tokens, on the host. Raises ValueError where the model cannot read it."""
    tokens = np.asarray(batch)
    if tokens.ndim != 2 or not np.issubdtype(tokens.dtype, np.integer):
        raise ValueError(
            f"a batch of tokens is [batch, position] of whole numbers; this one is {tokens.dtype} {tokens.shape}"
        )
    if tokens.size and not 0 <= tokens.min() <= tokens.max() < config.vocabulary:
        raise ValueError(
            f"tokens go from 0 to {config.vocabulary - 1} here; a batch has {tokens.min()} to {tokens.max()}"
        )
    return tokens


@partial(jax.jit, static_argnames="step")
def _program(given: Tree, state: Tree, batches: Array, count: Array, *, step: Step) -> tuple[Tree, Tree]:
    """As many steps as ``count`` says, one after another."""
    step = jax.jit(step)  # traced once, though asked twice
    shapes = jax.eval_shape(step, given, state, batches[0])[1]
    nothing = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)

    def one(state: Tree, inputs: tuple[Array, Array]) -> tuple[Tree, Tree]:
        number, batch = inputs
        return jax.lax.cond(number < count, lambda: step(given, state, batch), lambda: (state, nothing))

    return jax.lax.scan(one, state, (jnp.arange(batches.shape[0]), batches))


def _groups(batches: Iterable[Any], size: int) -> Iterator[list[np.ndarray]]:
    """The batches on the host, in groups of one program; the last may be smaller."""
    source = iter(batches)
    shape = None
    while group := [np.asarray(batch) for batch in islice(source, size)]:
        for batch in group:
            shape = shape or batch.shape
            if batch.shape != shape:
                raise ValueError(f"all batches must have one shape; one has {batch.shape}, the first {shape}")
        yield group


def _check_finite(records: Tree, done: int) -> None:
    values = [np.asarray(x, np.float64) for x in jax.tree.leaves(records)]
    bad = ~np.all([np.isfinite(x.reshape(len(x), -1)).all(axis=1) for x in values], axis=0)
    if bad.any():
        raise ValueError(f"the loss at step {done + int(bad.argmax())} (the first is 0) is not finite; {REMEDY}")
