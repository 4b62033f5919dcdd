"""A configuration made ready to train: its data or task, its model, and what it is measured on."""

import dataclasses
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Float32

from minitf import ModelConfig
from minitf.analysis.training.start import Start, started_from
from minitf.config import from_plain, to_plain
from minitf.parameters import Parameters
from minitf.train import tasks
from minitf.train.batch import Batch, labelled, masked, measured, next_token
from minitf.train.config import TrainConfig
from minitf.train.example_loader import ExampleLoader, Examples, spread_examples
from minitf.train.loader import Loader, chunk, spread_windows
from minitf.train.settings import meant, told_of
from minitf.train.step import Program
from minitf.train.symbols import Data, prepare
from minitf.train.trainer import Windows, in_parts, models_of
from minitf.vocabulary import Labelled, Measured, Vocabulary, mask_token_of

# Sequences of held-out data that are looked at for statistics.
LOOKED_AT = 16
DATA = "data.json"  # in a run's folder: what its data is


@dataclass(frozen=True)
class Prepared:
    """What a run needs.

    Attributes:
        program: what trains.
        length: positions of a sequence.
        windows: tokens of steps, for each seed; None where data is made on the device.
        held_out: ``[part, batch, position]``, to measure on.
        looked_at: a few of them ``[batch, position]``, for statistics.
        vocabulary: what tokens are; None for a task.
        source: one sentence on the data.
        identity: what the data is.
        references: losses that need no model, by name.
        measured_on: what ``held_out`` is, for people.
        filler: the token after sequences that are shorter than others; None where there is none.
        initial: () -> parameters that every model starts from; None where each has its own.
    """

    program: Program
    length: int
    windows: Windows | None
    held_out: Batch
    looked_at: Batch
    vocabulary: Vocabulary | None
    source: str
    identity: dict[str, Any]
    references: dict[str, float]
    measured_on: str = "data that was not trained on"
    filler: int | None = None
    initial: Callable[[], Parameters] | None = None


def prepared(
    config: TrainConfig, out: Path, say: Callable[[str], None], part: tuple[int, int] = (0, 1)
) -> Prepared:
    """Make everything ready; data that is read from files, and a model to start from, are kept in ``out``.

    ``part`` says which of how many equal parts of each batch this process reads.

    Raises ValueError for a task, files or a model that cannot be, in a sentence for people.
    """
    start = started_from(config, out, say)
    if config.task:
        ready = _of_task(config, start)
    else:
        known = None if start is None else start.vocabulary
        data = prepare(config.data, out / "data", say, vocabulary=known, check=partial(check_data, out))
        if config.keep.sample_every and config.objective_on_files == "next_token":
            _check_prompt(config.keep.prompt, data.vocabulary)
        masked = config.objective_on_files == "masked_token" and mask_token_of(data.vocabulary) is None
        if start is not None and (config.data.told or masked):
            start = start.with_room(data.vocabulary.size + 1)
        ready = _of_data(config, data, start, part)
    if start is None:
        return ready
    start.check(ready.program.model)
    source = f"{ready.source}, from the weights of {config.training.start_from}"
    return dataclasses.replace(ready, source=source, initial=partial(start.parameters, ready.program.model))


def _check_prompt(prompt: str, vocabulary: Vocabulary) -> None:
    """Raises ValueError for one that is no tokens: now, and not when the first sample is due."""
    try:
        vocabulary.encode(prompt)
    except ValueError as error:
        raise ValueError(f"keep.prompt is {prompt!r}: {error}") from error


def check_data(out: Path, identity: Mapping[str, Any]) -> None:
    """Raises ValueError for other data than that with which the run in ``out`` began, if it began."""
    try:
        began_with = json.loads((out / DATA).read_bytes())
    except FileNotFoundError:
        return
    except ValueError:
        began_with = None  # damaged
    if began_with != json.loads(json.dumps(identity)):
        raise ValueError(
            f"the files that {out} trains on have changed since it began. Put them back, or use --overwrite to "
            "begin anew."
        )


def _of_task(config: TrainConfig, start: Start | None) -> Prepared:
    settings = dict(config.task)
    task = tasks.make(str(settings.pop("name", "")), settings)
    kind = config.objective.kind or task.objective
    if (kind == "regression") != (task.objective == "regression") or kind == "masked_token":
        raise ValueError(f"objective.kind is {kind!r}; the task {config.task['name']} is for {task.objective!r}")
    model = model_of(config, task.vocabulary, task.length, start=None if start is None else start.config)
    held_out = task.held_out()
    return Prepared(
        program=Program(config, model, kind, draw=task.draw),
        length=task.length,
        windows=None,
        held_out=in_parts(held_out, min(config.training.batch, len(held_out.tokens))),
        looked_at=jax.tree.map(lambda x: x[:LOOKED_AT], held_out),
        vocabulary=None,
        source=f"the task {config.task['name']}",
        identity={},
        references=task.references(),
        measured_on=task.measured_on,
    )


def _of_data(config: TrainConfig, data: Data, start: Start | None, part: tuple[int, int]) -> Prepared:
    kind = config.objective_on_files
    told = {"classification": config.data.label, "regression": config.data.target}
    if any((kind == one) != bool(column) for one, column in told.items()):
        raise ValueError(
            f"objective.kind is {kind!r}; files are for next_token or masked_token, or tables with a column "
            "data.label for classification, or data.target for regression"
        )
    if kind in told:
        return _of_examples(config, data, start, part)
    is_masked = kind == "masked_token"
    begun, known = None if start is None else start.config, data.vocabulary.size
    own_mask = mask_token_of(data.vocabulary)
    rows = known + (is_masked and own_mask is None)
    model = model_of(config, rows, None, causal=not is_masked, start=begun)
    length, size = model.length, config.training.batch
    mask_token = known if own_mask is None else own_mask

    def as_batch(window: Any, key: Any) -> Batch:
        if is_masked:
            return masked(window[:, :-1], key, config.objective.mask_share, mask_token, known)
        return next_token(window)

    for side, tokens in (("training", data.train), ("validation", data.validation)):
        if len(tokens.ids) <= length:
            raise ValueError(
                f"the data has {len(tokens.ids)} tokens for {side}, and one window of model.length={length} (and "
                f"the token after it) needs {length + 1}. Give more data, a shorter window, or another share for "
                f"validation (of whole documents, by their hash; data.validation={config.data.validation})"
            )
    loaders = [Loader(data.train.ids, length, size, seed, *part) for seed in models_of(config).different_seeds]
    windows = spread_windows(data.validation.ids, length, size * config.keep.evaluation_batches)
    held_out = as_batch(jax.numpy.asarray(windows), jax.random.key(0))
    return Prepared(
        program=Program(config, model, kind, as_batch=as_batch),
        length=length,
        windows=lambda first, steps: np.stack([chunk(loader, first, steps) for loader in loaders]),
        held_out=in_parts(held_out, min(size, len(windows))),
        looked_at=jax.tree.map(lambda x: x[:LOOKED_AT], held_out),
        vocabulary=data.vocabulary,
        source=data.source,
        identity=dict(data.identity),
        references={"tokens' frequencies": _frequencies(data)},
    )


def _of_examples(config: TrainConfig, data: Data, start: Start | None, part: tuple[int, int]) -> Prepared:
    """Tables with a label or a number for each row: one more token, after all others, fills rows up."""
    vocabulary, size = data.vocabulary, config.training.batch
    assert isinstance(vocabulary, Labelled | Measured)
    filler = vocabulary.size
    model = model_of(config, filler + 1, None, start=None if start is None else start.config)
    train, validation = (
        Examples(tokens.ids, vocabulary.inner.size, model.length, filler, _told(data, side))
        for side, tokens in (("train", data.train), ("validation", data.validation))
    )
    as_batch = partial(labelled if isinstance(vocabulary, Labelled) else measured, filler=filler)
    loaders = [ExampleLoader(train, size, seed, *part) for seed in models_of(config).different_seeds]
    rows = spread_examples(validation, size * config.keep.evaluation_batches)
    held_out = as_batch(jax.numpy.asarray(rows))
    long = max(train.longest, validation.longest)
    cut = f", of the longest of {long} tokens the first {model.length}" if long > model.length else ""
    if isinstance(vocabulary, Labelled):
        what = f"{len(vocabulary.labels)} of them labels of {len(train)} rows"
        references = {"the labels' frequencies": _label_frequencies(vocabulary, train, validation)}
    else:
        what = (
            f"the {vocabulary.name} of {len(train)} rows (mean {vocabulary.mean:.4g}, in deviations of "
            f"{vocabulary.deviation:.4g})"
        )
        assert validation.numbers is not None
        references = {"the mean": float(np.mean(np.square(validation.numbers, dtype=np.float64)))}
    return Prepared(
        program=Program(config, model, config.objective_on_files, as_batch=lambda rows, key: as_batch(rows)),
        length=model.length,
        windows=lambda first, steps: np.stack([chunk(loader, first, steps) for loader in loaders]),
        held_out=in_parts(held_out, min(size, len(rows))),
        looked_at=jax.tree.map(lambda x: x[:LOOKED_AT], held_out),
        vocabulary=vocabulary,
        source=f"{data.source}, {what}{cut}",
        identity=dict(data.identity),
        references=references,
        filler=filler,
    )


def _told(data: Data, side: str) -> Float32[np.ndarray, " example"] | None:
    """What the model is to tell of each sequence of a side, where that is a number."""
    return data.vocabulary.told(data.numbers[side]) if isinstance(data.vocabulary, Measured) else None


def _label_frequencies(vocabulary: Labelled, train: Examples, validation: Examples) -> float:
    """The loss on validation data of answering with each label's share of the training data, nats a row."""
    seen, asked = (np.bincount(one.labels, minlength=len(vocabulary.labels)) for one in (train, validation))
    return float(-np.sum(asked * np.log((seen + 1) / (seen + 1).sum())) / asked.sum())


def _frequencies(data: Data) -> float:
    """The loss on validation data of answering with each token's share of the training data, nats a token."""
    most = 10_000_000
    seen = np.bincount(data.train.ids[:most], minlength=data.vocabulary.size) + 1.0
    asked = np.bincount(data.validation.ids[:most], minlength=data.vocabulary.size)
    return float(-np.sum(asked * np.log(seen / seen.sum())) / asked.sum())


def model_of(
    config: TrainConfig,
    vocabulary: int,
    length: int | None,
    causal: bool = True,
    start: ModelConfig | None = None,
) -> ModelConfig:
    """The model of a run, with what its data says, or a model to start from, where the configuration is silent.

    Raises ValueError where it cannot hold the data.
    """
    known = {field.name for field in dataclasses.fields(ModelConfig)}
    fields = {"vocabulary": vocabulary, "causal": causal, **({} if length is None else {"length": length})}
    fields |= ({} if start is None else to_plain(start)) | dict(config.model)
    unknown = [name for name in fields if name not in known]
    if unknown:
        raise ValueError(
            f"there is no model.{unknown[0]}{meant(unknown[0], known)}; a model has {', '.join(sorted(known))}"
        )
    try:
        model = from_plain(fields)
    except TypeError as error:
        raise ValueError(f"model: {error}") from error
    except ValueError as error:
        raise ValueError(told_of("model", error, known)) from error
    if model.vocabulary < vocabulary:
        raise ValueError(f"model.vocabulary is {model.vocabulary}; the data has {vocabulary} tokens")
    if length is not None and model.length < length:
        raise ValueError(f"model.length is {model.length}; the task's sequences have {length} positions")
    return model
