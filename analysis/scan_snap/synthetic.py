"""The paper's synthetic experiments: Syn-Small (Fig. 4, 5) and Syn-Medium (Fig. 6, 11, 12)."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float

from minitf.analysis.scan_snap.results import SmallRun
from minitf.config import token_tables
from minitf.parameters import Parameters, initialize
from minitf.tables import count_walk
from minitf.train import optimizers
from minitf.train.loop import History, Report, Task, every, train
from minitf.train.optimizers import Rates
from minitf.train.sequence_classes import CountBatch, SequenceClasses, population, sample_counts

STEPS, BATCH, MOMENTUM, RECORD_EVERY = 100, 128, 0.9, 2
MEDIUM_QUERIES = (1, 3, 5, 10)
MEDIUM_ATTENTION_RATES = (0.5, 1.0, 2.0, 3.0)
MEDIUM_RATIOS = (1.0, 2.0, 5.0, 10.0)


def loss(parameters: Parameters, batch: CountBatch) -> Float[Array, ""]:
    """Cross-entropy of the next token over all outputs, mean over the batch, nats."""
    logits = count_walk(parameters, batch.queries, batch.counts).logits[:, 0]
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, batch.labels))


def task(
    data: SequenceClasses, initializer: Literal["zeros", "fan_in"], optimizer: Literal["sgd", "adam"]
) -> Task:
    """Training of the token tables on sequence classes; hyper-parameters are :class:`Rates`."""
    config = token_tables(data.vocabulary, initializer)
    make = {"sgd": lambda rate: optimizers.sgd(rate, MOMENTUM), "adam": optimizers.adam}[optimizer]

    def record(parameters: Parameters) -> dict[str, Array]:
        every_class = population(data)
        layers = count_walk(parameters, every_class.queries, every_class.counts).layers
        return {"association": layers.pattern[0, :, 0, 0], "attention_logits": layers.scores[0, :, 0, 0]}

    return Task(
        initialize=lambda key: initialize(config, key),
        batch=lambda key, step: sample_counts(data, key, BATCH),
        loss=loss,
        optimizer=lambda rates: optimizers.by_part(make, rates),
        record=record,
    )


def seed_keys(seed: int, count: int) -> Array:
    """One key per run: seed, seed + 1, ..."""
    return jax.vmap(jax.random.key)(jnp.arange(seed, seed + count))


@dataclass(frozen=True)
class SmallSetting:
    """One setting of Fig. 4 or 5."""

    name: str
    optimizer: Literal["sgd", "adam"]
    decoder_rate: float
    attention_rate: float


SMALL_SETTINGS = (
    SmallSetting("SGD (1, 1)", "sgd", 1.0, 1.0),
    SmallSetting("SGD (10, 1)", "sgd", 10.0, 1.0),
    SmallSetting("Adam 0.1", "adam", 0.1, 0.1),
    SmallSetting("Adam 0.5", "adam", 0.5, 0.5),
    SmallSetting("Adam 1", "adam", 1.0, 1.0),
)


def run_small(
    settings: Sequence[SmallSetting],
    data: SequenceClasses,
    seeds: int,
    seed: int = 0,
    steps: int = STEPS,
    report: Report | None = None,
) -> tuple[list[SmallRun], list[History]]:
    """Syn-Small under each setting; settings of one optimizer train as one program."""
    runs: dict[str, SmallRun] = {}
    histories = []
    for kind in dict.fromkeys(s.optimizer for s in settings):
        chosen = [s for s in settings if s.optimizer == kind]
        rates = Rates(
            decoder=jnp.array([s.decoder_rate for s in chosen]),
            attention=jnp.array([s.attention_rate for s in chosen]),
        )
        history = train(
            task(data, "zeros", kind),
            seed_keys(seed, seeds),
            rates,
            every(steps, RECORD_EVERY),
            report=report,
        )
        histories.append(history)
        for i, setting in enumerate(chosen):
            runs[setting.name] = SmallRun(
                name=setting.name,
                optimizer=kind,
                decoder_rate=setting.decoder_rate,
                attention_rate=setting.attention_rate,
                record_steps=history.record_steps,
                loss=history.loss[:, i],
                association=history.records["association"][:, i],
                attention_logits=history.records["attention_logits"][:, i],
                probability=data.probability,
                distinct=data.is_distinct,
                common=np.arange(data.contextual) < data.common,
            )
    return [runs[s.name] for s in settings if s.name in runs], histories
