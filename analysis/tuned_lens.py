"""The tuned lens (Belrose et al. 2023, arXiv 2303.08112): the logit lens behind a translator for each station.

A translator is an affine map of the residual stream, fitted so that the final norm and the unembedding, which stay
as they are, read at its station what the model says in the end. It answers what *can* be read there by a linear
map, which need not be what the model uses: compare with the logit lens, which needs no fit.

A walk is translated and then read by :mod:`minitf.analysis.lens`, so both lenses give the same numbers.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct
from jaxtyping import Array, Float, Int
from safetensors.numpy import save as to_safetensors

from minitf import filter
from minitf.analysis.lens import LensReading, divergence, lens, read, station_names, stations
from minitf.analysis.stream import Progress, checked_tokens, stream
from minitf.config import ModelConfig
from minitf.families.weights import open_file
from minitf.files import write_atomically
from minitf.filter import in_statistics_dtype
from minitf.model import walk
from minitf.parameters import Parameters
from minitf.walk import LayerWalk, Leaf, Walk, leaf

# The first slopes, of early stations that say nothing like the end, are huge: without the clip they throw the
# translators far off.
SGD = optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(0.1, momentum=0.9, nesterov=True))


@struct.dataclass
class TunedLens:
    """A translator for each station, in residual form: ``h + h weight + bias``; the last one's is zero.

    The stations are those of :func:`minitf.analysis.lens.stations`. The last is the end of the walk, which the
    model itself reads, so it needs no translator and keeps none.
    """

    weight: Leaf = leaf("station width output_width")
    bias: Leaf = leaf("station output_width")


@struct.dataclass
class Training:
    """A tuned lens, and how it came about.

    ``loss`` is the mean KL(final || lens) of each step's batch before the step, in nats. ``finished`` is False if
    training was interrupted; the rest then holds what was done.
    """

    lens: TunedLens
    loss: Leaf = leaf("step station")
    finished: bool = struct.field(pytree_node=False, default=True)


def initialize(config: ModelConfig, dtype: Any = jnp.float32) -> TunedLens:
    """The tuned lens that is the logit lens: all zero."""
    count = len(station_names(config))
    return TunedLens(
        weight=jnp.zeros((count, config.width, config.width), dtype), bias=jnp.zeros((count, config.width), dtype)
    )


def translate(tuned: TunedLens, walked: Walk) -> Walk:
    """The stations of a walk, translated, and its logits as they are: a walk that every lens reads.

    ``lens(parameters, translate(tuned, walked), targets, config)`` reads it, as does ``logit_lens``.

    Raises:
        ValueError: the walk lacks a station, or the lens is for another number of stations or another width.
    """
    points = stations(walked)
    expected = (len(points), *points.shape[-1:] * 2)
    if tuned.weight.shape != expected:
        raise ValueError(f"the tuned lens has weights of shape {tuned.weight.shape}; this walk needs {expected}")
    points = jax.vmap(_translated)(tuned, points)
    mid, post = points[1::2], points[2::2]
    pre = jnp.concatenate([points[:1], post[:-1]])
    return Walk(layers=LayerWalk(resid_pre=pre, resid_mid=mid, resid_post=post), logits=walked.logits)


def tuned_lens(
    parameters: Parameters,
    tuned: TunedLens,
    walked: Walk,
    targets: Int[Array, "batch position"],
    config: ModelConfig,
) -> LensReading:
    """Rank and log-probability of the targets, and the divergence from the model's output, at every station.

    As :func:`minitf.analysis.lens.lens`, through the translators; raises what it and :func:`translate` raise.
    """
    return lens(parameters, translate(tuned, walked), targets, config)


def mean_divergence(
    translator: TunedLens,
    parameters: Parameters,
    point: Float[Array, "batch position width"],
    final: Float[Array, "batch position vocabulary"],
    config: ModelConfig,
) -> Float[Array, ""]:
    """What training lowers: the mean KL(final || lens) over all positions of one station, in nats.

    Args:
        translator: of that station alone, without the ``station`` axis.
        final: the log-probabilities that the model ends with.
    """
    says = read(parameters, _translated(translator, point), config)
    return jnp.mean(divergence(final, jax.nn.log_softmax(in_statistics_dtype(says))))


def train(
    parameters: Parameters,
    batches: Iterable[Any],
    config: ModelConfig,
    *,
    optimizer: optax.GradientTransformation = SGD,
    start: TunedLens | None = None,
    steps_per_program: int = 25,
    progress: Progress = iter,
) -> Training:
    """Fit the translators of all stations together, one step for each batch of tokens.

    The model stays as it is, and walks once for every batch, inside the compiled step. The losses of the stations
    do not depend on each other, so their slopes are taken one after another: the logits of one station at a time
    are in memory.

    Args:
        batches: ``[batch, position]`` tokens of full sequences, all of one shape: an array
            ``[step, batch, position]``, or anything that iterates, such as a generator that reads a corpus.
        optimizer: for all stations together. The paper's rate of 1, falling to 0 (``optax.linear_schedule``), is
            sooner done in models with a final norm; without one it can be unstable where .1 is not. Defined
            once: a new one is compiled anew.
        start: where to go on from (with fresh moments); from the logit lens by default.
        steps_per_program, progress: as :func:`minitf.analysis.stream.stream`.

    Raises:
        ValueError: tokens that the model cannot read, a ``start`` for another model, no batch, or a loss that is
            not finite, with the number of its step.
    """
    tuned = initialize(config) if start is None else start
    _check_shapes(tuned, config, "the lens to start from")
    setting = _Setting(parameters, config, optimizer)
    tokens = (checked_tokens(batch, config) for batch in progress(batches))
    done = stream(_step, setting, (tuned, optimizer.init(tuned)), tokens, steps_per_program=steps_per_program)
    return Training(lens=done.state[0], loss=done.records, finished=done.finished)


def save(path: Path, tuned: TunedLens) -> None:
    """Write a tuned lens as safetensors, ``weight`` and ``bias``. Raises OSError."""
    arrays = {name: np.ascontiguousarray(getattr(tuned, name)) for name in ("weight", "bias")}
    write_atomically(Path(path), to_safetensors(arrays))


def load(path: Path, config: ModelConfig) -> TunedLens:
    """Read a tuned lens of a model of this configuration.

    Raises:
        ValueError: no safetensors file there, other tensors than ``weight`` and ``bias``, or other shapes.
    """
    arrays = open_file(Path(path))
    if set(arrays) != {"weight", "bias"}:
        raise ValueError(f"{path} holds {', '.join(sorted(arrays)) or 'nothing'}; a tuned lens is weight and bias")
    tuned = TunedLens(**{name: jnp.array(value) for name, value in arrays.items()})
    _check_shapes(tuned, config, str(path))
    return tuned


@struct.dataclass
class _Setting:
    """What every step reads."""

    parameters: Parameters
    config: ModelConfig = struct.field(pytree_node=False)
    optimizer: optax.GradientTransformation = struct.field(pytree_node=False)


def _step(given: _Setting, state: tuple[TunedLens, Any], tokens: Array) -> tuple[tuple[TunedLens, Any], Array]:
    tuned, moments = state
    walked = walk(given.parameters, tokens, given.config)
    final = jax.nn.log_softmax(in_statistics_dtype(walked.logits))

    def one(station: tuple[TunedLens, Array]) -> tuple[Array, TunedLens]:
        translator, point = station
        return jax.value_and_grad(mean_divergence)(translator, given.parameters, point, final, given.config)

    loss, slope = jax.lax.map(one, (tuned, stations(walked)))
    # At the end there is nothing to learn, and an optimizer that divides by the slope would follow its roundings.
    slope = jax.tree.map(lambda x: x.at[-1].set(0), slope)
    moves, moments = given.optimizer.update(slope, moments, tuned)
    return (optax.apply_updates(tuned, moves), moments), loss


def _translated(
    translator: TunedLens, stream: Float[Array, "batch position width"]
) -> Float[Array, "batch position width"]:
    """Points of one station, translated: in at least float32, and then in the dtype of the stream again."""
    rows = in_statistics_dtype(stream.reshape(-1, stream.shape[-1]))
    rows = rows + filter.linear(rows, translator.weight, translator.bias)
    return rows.astype(stream.dtype).reshape(stream.shape)


def _check_shapes(tuned: TunedLens, config: ModelConfig, what: str) -> None:
    like = jax.eval_shape(lambda: initialize(config))
    for name in ("weight", "bias"):
        found, expected = getattr(tuned, name).shape, getattr(like, name).shape
        if found != expected:
            raise ValueError(f"{name} in {what} has shape {found}; this model's tuned lens has {expected}")
