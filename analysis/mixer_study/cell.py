"""One cell of the matrix: one mixer trained on one task, several seeds and learning rates in one program."""

import dataclasses
import time
from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float

from minitf.analysis.flops import flops
from minitf.analysis.geometry import encoding_geometry
from minitf.analysis.mixer_study.rows import model_for
from minitf.analysis.mixer_study.tasks import Batch, Task
from minitf.config import ModelConfig
from minitf.declaration import count, initialize
from minitf.model import walk
from minitf.record import record
from minitf.train import loop
from minitf.train.loop import Report
from minitf.train.optimizers import adamw, clipped, decaying
from minitf.walk import stacked, with_as_many_heads

WARM_UP = 50
CLIP = 1.0
RECORDS = 20
MOST_MORE = 2.0  # times the steps that a cheap mixer may take to spend what softmax attention spends
LOOKED_AT = 64  # held-out sequences whose walks the geometry is of
SHOWN_HEADS, SHOWN_POSITIONS = 4, 48
GEOMETRY = ("relative_step", "turning_angle", "point_angle", "radial", "efficiency")


@dataclasses.dataclass(frozen=True)
class Cell:
    """What training one mixer on one task left. Values are of the task's measure, on held-out sequences.

    ``association`` is that of the first seed on the first held-out sequence; of mixers that weigh channels, a few
    of those. ``data_dependence`` is 0 where the association does not look at the data, 1 where no two are alike.
    """

    row: str
    task: str
    parameters: int
    hidden: int
    flops: float  # of a training step
    softmax_flops: float
    rates: np.ndarray  # [rate]
    best: int  # the rate whose mean value is best, on sequences that nothing else is measured on
    steps: int  # where parameters are matched, all rows are read after so many steps
    matched_steps: float  # where compute is matched, after so many
    record_steps: np.ndarray  # [record]
    values: np.ndarray  # [rate, seed, record]
    seconds_per_step: float  # all seeds and rates together
    temporary_bytes: int
    geometry: np.ndarray  # [which, seed, move]; of what has one less move, the last is not a number
    data_dependence: np.ndarray  # [seed, layer]; no number without association
    association: np.ndarray  # [layer, head, query, key]; empty without

    def at(self, steps: float | int) -> Float[np.ndarray, " seed"]:
        """Each seed's value after so many steps, with the best rate; between records on a straight line."""
        return np.array([np.interp(steps, self.record_steps, one) for one in self.values[self.best]])

    @property
    def final(self) -> Float[np.ndarray, " seed"]:
        """Each seed's value at matched parameters."""
        return self.at(self.steps)

    @property
    def at_equal_compute(self) -> Float[np.ndarray, " seed"]:
        """Each seed's value at matched compute."""
        return self.at(self.matched_steps)


def train_cell(
    row: str,
    task: Task,
    *,
    seeds: int,
    rates: Sequence[float],
    steps: int,
    seed: int = 0,
    report: Report | None = None,
) -> tuple[Cell, Any]:
    """Train it, measure it; with the trained parameters ``[seed, ...]`` of the best rate.

    Args:
        row: a name of :data:`minitf.analysis.mixer_study.rows.ROWS`.
        task: what to learn.
        seeds: how many; ``seed`` is the first.
        rates: learning rates of AdamW, after a warm-up constant, so that a curve can be read anywhere.
        steps: at which rows of equal size are compared.
        report: as in :func:`minitf.train.loop.train`.

    Raises:
        KeyboardInterrupt: it was interrupted.
    """
    config, softmax = model_for(row, task), model_for("softmax", task)
    cost, softmax_cost = step_flops(config, task), step_flops(softmax, task)
    matched = steps * min(softmax_cost / cost, MOST_MORE)
    last = max(steps, round(matched))
    record_steps = sorted({*loop.every(last, max(1, last // RECORDS)), steps})
    keys = jax.vmap(jax.random.key)(seed + jnp.arange(seeds))
    grid = jnp.asarray(rates, jnp.float32)
    what = training(config, task)
    # On a CPU runs one by one are faster than side by side, and cells run in threads of their own.
    how: Literal["vmap", "map"] = "map" if jax.default_backend() == "cpu" else "vmap"
    settings: dict[str, Any] = {"records_per_chunk": 1, "how": how}
    programs = loop.compile_programs(what, keys, grid, record_steps, **settings)
    began = time.perf_counter()
    history = loop.train(
        what,
        keys,
        grid,
        record_steps,
        report=report,
        stop_on_divergence=False,
        programs=programs,
        **settings,
    )
    if not history.finished:
        raise KeyboardInterrupt  # half a cell is of no use
    seconds = time.perf_counter() - began
    values, choosing = (np.moveaxis(np.asarray(x), 1, 0) for x in history.records)
    best = best_rate(choosing[..., record_steps.index(steps)], task)
    chosen = jax.tree.map(lambda x: x[:, best], history.parameters)
    seen = look(chosen, config, task)
    return Cell(
        row=row,
        task=task.name,
        parameters=count(config),
        hidden=config.hidden,
        flops=cost,
        softmax_flops=softmax_cost,
        rates=np.asarray(rates, np.float64),
        best=best,
        steps=steps,
        matched_steps=float(matched),
        record_steps=np.asarray(history.record_steps),
        values=values,
        seconds_per_step=seconds / max(int(history.record_steps[-1]), 1),
        temporary_bytes=programs.temporary_bytes,
        **seen,
    ), chosen


def training(config: ModelConfig, task: Task) -> loop.Task:
    """The task for the compiled loop: AdamW with a warm-up, gradients clipped; held-out values are recorded."""

    def loss(parameters: Any, batch: Batch) -> Array:
        logits = walk(parameters, batch.tokens, config, association=False).logits
        return task.score(logits, batch).loss

    def optimizer(rate: Array) -> optax.GradientTransformation:
        warming = lambda step: rate * jnp.minimum(1.0, (step + 1) / WARM_UP)
        return clipped(adamw(warming, mask=decaying(config, "all")), CLIP)

    def value(parameters: Any, batch: Batch) -> Array:
        logits = walk(parameters, batch.tokens, config, association=False).logits
        return task.value(task.score(logits, batch))

    return loop.Task(
        initialize=lambda key: initialize(config, key),
        batch=lambda key, step: task.draw(key, task.batch),
        loss=loss,
        optimizer=optimizer,
        record=lambda parameters: (value(parameters, task.held_out), value(parameters, task.choosing)),
    )


def step_flops(config: ModelConfig, task: Task) -> float:
    """Operations of one gradient on one batch."""
    parameters = jax.eval_shape(lambda: initialize(config, jax.random.key(0)))
    batch = jax.eval_shape(lambda: task.draw(jax.random.key(0), task.batch))
    return flops(jax.grad(training(config, task).loss), parameters, batch)


def best_rate(values: Float[np.ndarray, "rate seed"], task: Task) -> int:
    """The rate with the best mean over seeds; one with a value that is not a number is the worst."""
    worth = values.mean(axis=1) * (1 if task.measure == "accuracy" else -1)
    return int(np.argmax(np.where(np.isfinite(worth), worth, -np.inf)))


def look(parameters: Any, config: ModelConfig, task: Task) -> dict[str, np.ndarray]:
    """Of trained models ``[seed, ...]``: the walk's geometry, how far associations depend on data, one of them."""
    tokens = task.held_out.tokens[:LOOKED_AT]

    def one(parameters: Any) -> tuple[Array, Array]:
        walked = walk(parameters, tokens, config)
        found = encoding_geometry(record(walked, RESIDUALS), config)
        moves = 2 * config.layers
        means = [jnp.mean(getattr(found, name), axis=(-2, -1)) for name in GEOMETRY]
        padded = [
            jnp.broadcast_to(x, (moves,))
            if x.ndim == 0
            else jnp.pad(x, (0, moves - len(x)), constant_values=jnp.nan)
            for x in means
        ]
        pattern = walked.layers.pattern
        none = jnp.full(config.layers, jnp.nan)
        dependence = none if pattern is None else data_dependence(with_as_many_heads(pattern, 1))
        return jnp.stack(padded), dependence

    geometry, dependence = jax.jit(jax.vmap(one))(parameters)
    return {
        "geometry": np.moveaxis(np.asarray(geometry), 0, 1),
        "data_dependence": np.asarray(dependence),
        "association": shown_association(jax.tree.map(lambda x: x[0], parameters), config, tokens[:1]),
    }


RESIDUALS = ("layers.resid_pre", "layers.resid_mid", "layers.resid_post")


def data_dependence(pattern: Float[Array, "layer batch head query key"]) -> Float[Array, " layer"]:
    """``n / (n - 1) (1 - |mean A|^2 / mean |A|^2)`` over n sequences: what their mean does not explain."""
    count = pattern.shape[1]
    together = jnp.sum(jnp.mean(pattern, axis=1) ** 2, axis=(1, 2, 3))
    each = jnp.mean(jnp.sum(pattern**2, axis=(2, 3, 4)), axis=1)
    return count / (count - 1) * (1 - together / each)


def shown_association(parameters: Any, config: ModelConfig, tokens: Array) -> np.ndarray:
    """A few heads' (or channels') associations on one sequence, ``[layer, head, query, key]``."""
    pattern = jax.jit(lambda p, t: walk(p, t, config).layers.pattern)(parameters, tokens[:, :SHOWN_POSITIONS])
    if pattern is None:
        return np.zeros((0, 0, 0, 0), np.float32)
    few = lambda count: np.linspace(0, count - 1, min(SHOWN_HEADS, count)).astype(int)
    return np.asarray(stacked([one[0, few(one.shape[1])] for one in pattern], (0,), 0.0))
