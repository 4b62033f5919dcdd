"""The trained model that a run starts from, kept in the run's folder: to go on needs nothing from elsewhere."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from minitf import ModelConfig
from minitf.families import native
from minitf.parameters import Parameters, check_fit
from minitf.pretrained import load
from minitf.train.config import TrainConfig
from minitf.vocabulary import FILE, vocabulary_of

FOLDER = "start"


@dataclass(frozen=True)
class Start:
    """A model to go on from.

    Attributes:
        config: what it is.
        parameters: its weights, on the host.
        vocabulary: the folder of its vocabulary; None where it has none that could be read.
    """

    config: ModelConfig
    parameters: Parameters
    vocabulary: Path | None

    def fitted(self, model: ModelConfig) -> Parameters:
        """Its weights for a model that may be shorter, and then has the first of its learned positions.

        Raises ValueError where they are not those of such a model.
        """
        parameters: Any = self.parameters
        if model.length < self.config.length and parameters.position is not None:
            parameters = parameters.replace(position=parameters.position[: model.length])
        try:
            check_fit(parameters, model)
        except ValueError as error:
            raise ValueError(
                f"training.start_from and settings of model do not go together: {error}. Leave those out that the "
                "model to start from decides"
            ) from error
        return parameters


def started_from(config: TrainConfig, out: Path, say: Callable[[str], None]) -> Start | None:
    """The model that a run in ``out`` starts from, which is copied there at first; None for fresh weights.

    Raises ValueError for what cannot be loaded, and for a model of text without a tokenizer.
    """
    source = config.training.start_from
    if not source:
        return None
    folder = out / FOLDER
    if not (folder / "config.json").exists():
        say(f"Copying the model to start from, {source}")
        model = load(source)
        native.save(folder, model.config, model.parameters, vocabulary_of(model.tokenizer))
    model = load(folder)
    knows = (folder / FILE).exists()
    if not knows and not config.task and config.data.format != "tokens" and not config.data.encoding:
        raise ValueError(
            f"minitf has no tokenizer for {source}: say data.encoding, or train on tokens (data.format=tokens). "
            "A tokenizer.json beside the model is read where the package tokenizers is installed"
        )
    weights = jax.tree.map(np.asarray, model.parameters)
    return Start(model.config, weights, folder if knows else None)
