"""The trained model that a run starts from, kept in the run's folder: to go on needs nothing from elsewhere."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np

from minitf import ModelConfig, initialize
from minitf.analysis.run_folder import Problem
from minitf.declaration import check_fit
from minitf.families import native
from minitf.parameters import Parameters
from minitf.train.config import TrainConfig
from minitf.train.kept_models import load
from minitf.vocabulary import FILE, vocabulary_of

FOLDER = "start"
SETTING = "training.start_from"


@dataclass(frozen=True)
class Start:
    """A model to go on from, in a folder.

    Attributes:
        folder: where its copy is.
        config: what it is.
        vocabulary: the folder of its vocabulary; None where it has none that could be read.
    """

    folder: Path
    config: ModelConfig
    vocabulary: Path | None

    def with_room(self, tokens: int) -> "Start":
        """The same with rows for so many tokens, if it has fewer; new ones are those of a fresh model."""
        return replace(self, config=replace(self.config, vocabulary=max(self.config.vocabulary, tokens)))

    def check(self, model: ModelConfig) -> None:
        """Raises ValueError where the weights are not those of such a model, but for its length."""
        shapes = jax.eval_shape(lambda key: _cut(initialize(self.config, key), model), jax.random.key(0))
        try:
            check_fit(shapes, model)
        except ValueError as error:
            raise ValueError(
                f"{SETTING} and settings of model do not go together: {error}. Leave those out that the model to "
                "start from decides"
            ) from error

    def parameters(self, model: ModelConfig) -> Parameters:
        """The weights, on the host; of learned positions and of tokens as many as the model has."""
        with _on_the_host():
            kept = load(self.folder)
            more = _with_more(_cut(kept.parameters, model), model, model.vocabulary - kept.config.vocabulary)
            return jax.tree.map(np.asarray, more)


def started_from(config: TrainConfig, out: Path, say: Callable[[str], None]) -> Start | None:
    """The model that a run in ``out`` starts from, which is copied there at first; None for fresh weights.

    Raises ValueError for what cannot be loaded, and for a model of text without a tokenizer.
    """
    source = config.training.start_from
    if not source:
        return None
    folder = out / FOLDER
    reads = not config.task and config.data.format != "tokens" and not config.data.encoding
    if not (folder / "config.json").exists() or (reads and not (folder / FILE).exists()):
        say(f"Copying the model to start from, {source}")
        with _on_the_host():
            model = load(source)
        vocabulary = vocabulary_of(model.tokenizer)
        if reads and vocabulary is None:
            raise ValueError(
                f"minitf has no tokenizer for {source}: say data.encoding, or train on tokens "
                "(data.format=tokens). It reads a tokenizer.json beside the model where the package tokenizers is "
                "installed, for GPT-2 what tiktoken has, and llama2.c's tokenizer.bin"
            )
        native.save(folder, model.config, model.parameters, vocabulary)
    return Start(folder, native.load_config(folder), folder if (folder / FILE).exists() else None)


def config_of(source: str) -> ModelConfig:
    """What a model to start from is. Raises ValueError for what cannot be loaded."""
    with _on_the_host():
        return load(source).config


def check_elsewhere(config: TrainConfig, out: Path) -> None:
    """Raises Problem for a model inside the folder of the run, which may be replaced before it is read."""
    source = config.training.start_from
    if source and not source.startswith("hub:") and Path(source).resolve().is_relative_to(out.resolve()):
        raise Problem(f"the model to start from, {source}, lies in the folder of this run: choose another --out")


def _cut(parameters: Parameters, model: ModelConfig) -> Any:
    """With the first of its learned positions, where the model has fewer."""
    known: Any = parameters.position
    return parameters if known is None else replace(parameters, position=known[: model.length])


def _with_more(parameters: Parameters, model: ModelConfig, tokens: int) -> Parameters:
    """With fresh rows for so many more tokens."""
    if not tokens:
        return parameters
    tables = {"embedding": 0, "unembedding": 1, "unembedding_bias": 0}
    fresh = initialize(replace(model, vocabulary=tokens), jax.random.key(0))
    joined: dict[str, Any] = {
        name: np.concatenate((known, getattr(fresh, name)), axis)
        for name, axis in tables.items()
        if (known := getattr(parameters, name)) is not None
    }
    return replace(parameters, **joined)


def _on_the_host() -> AbstractContextManager[Any]:
    """Arrays are made in the machine's memory, where JAX has its CPU beside other devices."""
    try:
        return jax.default_device(jax.local_devices(backend="cpu")[0])
    except RuntimeError:
        return nullcontext()
