"""What the trained models of softmax attention lose when their association is replaced, task by task."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from minitf.analysis import association
from minitf.analysis.association import FRACTIONS, REPLACEMENTS
from minitf.analysis.mixer_study.tasks import Batch, Task
from minitf.analysis.patching import Metric
from minitf.config import ModelConfig
from minitf.model import walk
from minitf.walk import Walk

OTHERS = 64  # sequences that are not measured on: for means over data, and for what heads cost alone
RANDOM_ORDERS = 2


@dataclasses.dataclass(frozen=True)
class Replaced:
    """For each replacement, the task's value with shares of the heads replaced, on all held-out sequences.

    And with each head replaced alone, on others, by which heads are ordered.
    """

    task: str
    names: tuple[str, ...]
    orders: tuple[str, ...]
    fractions: np.ndarray  # [fraction]
    intact: np.ndarray  # [seed]
    values: np.ndarray  # [replacement, order, fraction, seed]
    heads: np.ndarray  # [replacement, seed, layer, head]

    def at(self, name: str, order: str, fraction: float) -> np.ndarray:
        """The value of each seed."""
        which = self.fractions.tolist().index(fraction)
        return self.values[self.names.index(name), self.orders.index(order), which]


def replace_all(
    parameters: Any, config: ModelConfig, task: Task, seed: int = 0, *, pause: Callable[[], None] = lambda: None
) -> Replaced:
    """Every replacement in trained models ``[seed, ...]``.

    Args:
        parameters: of softmax attention, several seeds.
        config: of the model.
        task: what it was trained on.
        seed: of data for means and of what is random.
        pause: called before each replacement; what it raises ends the work.
    """
    measured, others = task.held_out, task.draw(jax.random.fold_in(jax.random.key(seed), 1), OTHERS)
    kept = jax.jit(lambda p, t: association.kept(walk(p, t, config)))
    metrics = _metric(task, measured), _metric(task, others)
    seeds = jax.tree.leaves(parameters)[0].shape[0]
    found = []
    for number in range(seeds):
        one = jax.tree.map(lambda x: x[number], parameters)  # noqa: B023
        walks = kept(one, measured.tokens), kept(one, others.tokens)
        found.append(_one_seed(one, config, task, walks, metrics, seed, pause))
    values, heads, intact_values = (np.stack(x, axis=-1) for x in zip(*found, strict=True))
    return Replaced(
        task=task.name,
        names=tuple(REPLACEMENTS),
        orders=tuple(association.orders(np.zeros((config.layers, config.heads)), range(RANDOM_ORDERS))),
        fractions=np.array(FRACTIONS),
        intact=intact_values,
        values=values,
        heads=np.moveaxis(heads, -1, 1),
    )


def _metric(task: Task, batch: Batch) -> Metric:
    return lambda logits: jnp.asarray(task.value(task.score(logits, batch)))


def _one_seed(
    parameters: Any,
    config: ModelConfig,
    task: Task,
    walks: tuple[Walk, Walk],
    metrics: tuple[Metric, Metric],
    seed: int,
    pause: Callable[[], None],
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Values ``[replacement, order, fraction]``, of single heads ``[replacement, layer, head]``, and intact.

    ``walks`` and ``metrics`` are of what is measured on, and of the others.
    """
    values, alone = [], []
    (intact, others), (metric, metric_of_others) = walks, metrics
    for number, replace in enumerate(REPLACEMENTS.values()):
        pause()
        key = jax.random.fold_in(jax.random.key(seed), number)
        pattern, of_others = (jax.jit(replace, static_argnums=2)(x, others, config, key) for x in (intact, others))
        heads = np.asarray(association.by_head(parameters, others, of_others, metric_of_others, config))
        harm = -heads if task.measure == "accuracy" else heads
        masks = association.every_share(association.orders(harm, range(RANDOM_ORDERS)), harm.shape)
        together = association.with_heads_replaced(
            parameters, task.held_out.tokens, pattern, masks, metric, config
        )
        values.append(np.asarray(together).reshape(-1, len(FRACTIONS)))
        alone.append(heads)
    return np.stack(values), np.stack(alone), np.asarray(metric(intact.logits))
