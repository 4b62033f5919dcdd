"""What each sequence mixer costs: training beside softmax attention, and how a pass grows with the sequence."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from minitf import mixers
from minitf.analysis import bench
from minitf.analysis.bench import Row, Say
from minitf.analysis.every_mixer import BOTH_WAYS, EVERY
from minitf.config import ModelConfig
from minitf.declaration import initialize
from minitf.mixers import Mixer
from minitf.model import walk

WIDTH, HEADS, VOCABULARY = 64, 4, 256
TRAINED = (512, 4096)
GROWTH = (256, 512, 1024, 2048, 4096, 8192)
# So that the shortest passes take longer than starting them, and states of the longest fit.
SIDE_BY_SIDE = 4
SHORTEST = 1e-9
# A window that is short beside the sequences.
MEASURED: Mapping[str, Mixer] = {"softmax, window 128": mixers.Softmax(window=128), **EVERY}
NOTE = "one layer, width 64, 4 heads, batch {}, float32; filters, aggregate and gate of the mixer, no feed-forward"


def bench_mixers(
    *,
    seed: int = 0,
    rounds: int = 3,
    say: Say = lambda sentence: None,
    every: Mapping[str, Mixer] = MEASURED,
    trained: Sequence[int] = TRAINED,
    growth: Sequence[int] = GROWTH,
) -> Iterator[Row]:
    """Training steps beside softmax attention's, and the exponent of a pass's time in the sequence's length.

    The exponent is the slope of log time over log length by least squares, of all lengths and of the longer ones:
    filters, which are linear, are much of a short pass. What a pass of one token takes counts as starting it and
    is subtracted.

    Args:
        seed: of weights and tokens.
        rounds: how often each is measured, in turns with softmax attention.
        say: told what is being measured.
        every: the mixers, by the name that the table gives them.
        trained: lengths at which a training step is measured.
        growth: lengths of the passes, at least two, from short to long.
    """
    for length in trained:
        softmax = _training(mixers.Softmax(), length, seed)
        for name, mixer in every.items():
            if name == "softmax":
                continue
            say(f"training at {length} tokens: {name}")
            sides = {"ours": _training(mixer, length, seed), "softmax": softmax}
            measured = bench.interleaved(sides, rounds, lambda sentence: None)
            yield bench.cost_row(
                f"training step, {length} tokens: {name}",
                "softmax attention",
                measured["ours"],
                measured["softmax"],
                "s",
                NOTE.format(1),
            )
    for name, mixer in every.items():
        say(f"growth: {name}")
        start, *passes = (_least(_forward(mixer, n, seed), rounds) for n in (1, *growth))
        seconds = [max(taken - start, SHORTEST) for taken in passes]
        stated = mixer.about(_config(mixer, growth[-1])).exponent
        for first in sorted({0, (len(growth) - 1) // 2}):
            slope, _ = np.polyfit(np.log(growth[first:]), np.log(seconds[first:]), 1)
            yield bench.value_row(
                f"growth of a pass, {growth[first]} to {growth[-1]} tokens: {name}",
                [float(slope)],
                f"exponent; stated {stated:g}",
                NOTE.format(SIDE_BY_SIDE),
            )


def _config(mixer: Mixer, length: int) -> ModelConfig:
    return ModelConfig(
        vocabulary=VOCABULARY,
        width=WIDTH,
        heads=HEADS,
        length=length,
        mixer=mixer,
        causal=mixer not in {EVERY[name] for name in BOTH_WAYS},
        feed_forward="none",
    )


def _inputs(config: ModelConfig, seed: int, batch: int = 1) -> tuple[Any, Any]:
    tokens = jax.random.randint(jax.random.key(seed + 1), (batch, config.length), 0, config.vocabulary)
    return initialize(config, jax.random.key(seed)), tokens


def _training(mixer: Mixer, length: int, seed: int) -> Callable[[], float]:
    config = _config(mixer, length)
    parameters, tokens = _inputs(config, seed)

    def loss(parameters: Any, tokens: Any) -> Any:
        says = jax.nn.log_softmax(walk(parameters, tokens, config, association=False).logits[:, :-1])
        return -jnp.mean(jnp.take_along_axis(says, tokens[:, 1:, None], axis=-1))

    return _timed(jax.jit(jax.grad(loss)), parameters, tokens)


def _forward(mixer: Mixer, length: int, seed: int) -> Callable[[], float]:
    config = _config(mixer, length)
    parameters, tokens = _inputs(config, seed, SIDE_BY_SIDE)
    return _timed(jax.jit(lambda p, t: walk(p, t, config, association=False).end), parameters, tokens)


def _least(measure: Callable[[], float], rounds: int) -> float:
    return min(measure() for _ in range(rounds))


def _timed(run: Callable[..., Any], *arguments: Any) -> Callable[[], float]:
    """The least seconds of a run among a few, compiled before."""
    once = partial(run, *arguments)
    jax.block_until_ready(once())

    def measure() -> float:
        seconds = []
        for _ in range(2):
            began = time.perf_counter()
            jax.block_until_ready(once())
            seconds.append(time.perf_counter() - began)
        return min(seconds)

    return measure
