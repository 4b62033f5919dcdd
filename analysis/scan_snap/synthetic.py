"""The paper's synthetic experiments: Syn-Small (Fig. 4, 5) and Syn-Medium (Fig. 6, 11, 12)."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float

from minitf.analysis.scan_snap import measures
from minitf.analysis.scan_snap.grouped import grouped
from minitf.analysis.scan_snap.results import MediumPanel, SmallRun
from minitf.config import token_tables
from minitf.declaration import initialize
from minitf.parameters import Parameters
from minitf.tables import count_walk
from minitf.train import optimizers
from minitf.train.loop import History, Programs, Report, Task, compile_programs, every, train
from minitf.train.optimizers import Rates
from minitf.train.sequence_classes import CountBatch, SequenceClasses, population, sample_counts, syn_medium

STEPS, BATCH, MOMENTUM, RECORD_EVERY = 100, 128, 0.9, 2
MEDIUM_QUERIES = (1, 3, 5, 10)
MEDIUM_ATTENTION_RATES = (0.5, 1.0, 2.0, 3.0)
MEDIUM_RATIOS = (1.0, 2.0, 5.0, 10.0)
# Of attention, in units of 1 / vocabulary: the range of the paper's Fig. 11 and 12.
RECALL_THRESHOLDS = np.linspace(0.92, 1.25, 12)


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
        return {
            "association": layers.pattern[0, :, 0, 0],
            "attention_logits": layers.scores[0, :, 0, 0],
            "vocabulary_attention": jax.nn.softmax(layers.q[0, :, 0, 0], axis=-1)[:, : data.contextual],
        }

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
    *,
    seed: int = 0,
    steps: int = STEPS,
    record_every: int = RECORD_EVERY,
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
            every(steps, record_every),
            report=report,
        )
        histories.append(history)
        row_sums = largest_row_sum(history.parameters)
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
                largest_row_sum=row_sums[:, i],
            )
    return [runs[s.name] for s in settings if s.name in runs], histories


def largest_row_sum(parameters: Parameters) -> Float[np.ndarray, "*run"]:
    """The largest ``|row sum|`` of Y and Z, of each run."""
    tables = (parameters.unembedding, parameters.layers.attention.table)
    sums = [np.abs(np.asarray(x).sum(axis=-1)) for x in tables]
    runs = sums[0].ndim - 1
    return np.maximum(*(x.max(axis=tuple(range(runs, x.ndim))) for x in sums))


def _medium_data(queries: int, length: int) -> SequenceClasses:
    return dataclasses.replace(syn_medium(queries), length=length)


def _medium_training(queries: int, seeds: int, seed: int, steps: int, length: int) -> dict[str, Any]:
    """What ``train`` and ``compile_programs`` are called with for one panel."""
    data = _medium_data(queries, length)
    plain = task(data, "fan_in", "sgd")
    # On a CPU one seed's 16 pairs of rates fill the caches, so seeds go one after another in the program.
    how: Literal["vmap", "map"] = "map" if jax.default_backend() == "cpu" else "vmap"
    return {
        "task": grouped(plain, data, BATCH) if queries > 1 else plain,
        "keys": seed_keys(seed, seeds),
        "hyper": grid(MEDIUM_ATTENTION_RATES, MEDIUM_RATIOS),
        "record_steps": every(steps, max(1, steps // 5)),
        "records_per_chunk": 6,
        "how": how,
    }


def compile_medium(queries: int, seeds: int, *, steps: int = STEPS, length: int = 128) -> Programs:
    """The program of :func:`run_medium` with the same arguments, to compile it once and run it often."""
    return compile_programs(**_medium_training(queries, seeds, 0, steps, length))


def run_medium(
    queries: int,
    seeds: int,
    *,
    seed: int = 0,
    steps: int = STEPS,
    length: int = 128,
    report: Report | None = None,
    programs: Programs | None = None,
) -> tuple[MediumPanel, History]:
    """One panel of Fig. 6: 16 pairs of rates and all seeds as one program.

    With more than one query the history's parameters are what training moves (:func:`grouped.trim`).
    """
    data, training = _medium_data(queries, length), _medium_training(queries, seeds, seed, steps, length)
    history = train(**training, report=report, stop_on_divergence=False, programs=programs)
    shape = (seeds, len(MEDIUM_ATTENTION_RATES), len(MEDIUM_RATIOS))
    last = {name: x[:, :, -1].astype(np.float64) for name, x in history.records.items()}
    entropy = measures.distinct_entropy(last["association"], data.is_distinct).mean(axis=-1)
    recall = measures.recall(last["vocabulary_attention"], data.is_distinct, RECALL_THRESHOLDS / data.vocabulary)
    return (
        MediumPanel(
            queries=queries,
            next_per_query=data.next_per_query,
            attention_rates=np.array(MEDIUM_ATTENTION_RATES),
            ratios=np.array(MEDIUM_RATIOS),
            entropy=np.moveaxis(entropy.reshape(shape), 0, -1),
            thresholds=RECALL_THRESHOLDS,
            recall=np.moveaxis(recall.reshape(*shape, -1), 0, 2),
            final_loss=np.moveaxis(history.loss[..., -1].reshape(shape), 0, -1),
        ),
        history,
    )


def grid(attention_rates: Sequence[float], ratios: Sequence[float]) -> Rates:
    """Every pair of eta_Z and eta_Y / eta_Z, ratios fastest."""
    pairs = [(z * ratio, z) for z in attention_rates for ratio in ratios]
    return Rates(decoder=jnp.array([y for y, _ in pairs]), attention=jnp.array([z for _, z in pairs]))
