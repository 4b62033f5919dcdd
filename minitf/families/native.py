"""minitf's own files: every model that a :class:`minitf.ModelConfig` describes, each weight under its own name."""

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import save as to_safetensors

from minitf.config import ModelConfig, from_plain, to_plain
from minitf.declaration import declare, declared, is_declaration
from minitf.families.weights import ONE, open_folder, read_json
from minitf.files import write_atomically
from minitf.parameters import Parameters, named, path_name
from minitf.vocabulary import Vocabulary

NAME = "minitf"


def save(folder: Path, config: ModelConfig, parameters: Parameters, vocabulary: Vocabulary | None = None) -> None:
    """Write the vocabulary, model.safetensors, then config.json: a folder without one is not a model."""
    if vocabulary is not None:
        folder.mkdir(parents=True, exist_ok=True)
        vocabulary.save(folder)
    arrays = {name: np.asarray(weight) for name, weight in named(parameters).items()}
    write_atomically(folder / ONE, to_safetensors(arrays))
    settings = {"model_type": NAME, "model": to_plain(config)}
    write_atomically(folder / "config.json", (json.dumps(settings, indent=2) + "\n").encode())


def load_config(folder: Path) -> ModelConfig:
    """The configuration of a folder of ours. Raises ValueError where it holds none."""
    return config_of(read_json(folder / "config.json"))


def config_of(settings: dict[str, Any]) -> ModelConfig:
    """The configuration in a config.json. Raises ValueError where it is none."""
    fields = settings.get("model")
    if not isinstance(fields, dict):
        raise ValueError("config.json: 'model' does not hold a configuration of minitf")
    try:
        return from_plain(fields)
    except (TypeError, KeyError) as error:
        raise ValueError(f"config.json: 'model' does not hold a configuration of minitf: {error}") from error


def read(config: ModelConfig, folder: Path, dtype: Any) -> Parameters:
    """The weights of a folder. Raises ValueError for a missing, unknown, misshapen or non-finite one, by name."""
    found = open_folder(folder)
    odd = sorted(set(found) ^ set(declared(config)))
    if odd:
        what = "a weight that this model does not have" if odd[0] in found else "no weight"
        raise ValueError(f"{folder} holds {what} {odd[0]!r}")

    def weight(path: tuple[Any, ...], declaration: Any) -> jax.Array:
        name = path_name(path)
        value = found[name]
        if value.shape != declaration.shape:
            raise ValueError(f"{folder}: {name} has the shape {value.shape}; this model's has {declaration.shape}")
        if not np.all(np.isfinite(value.astype(np.float32))):
            raise ValueError(f"{folder}: {name} holds numbers that are not finite")
        return jnp.asarray(value, dtype)

    return jax.tree_util.tree_map_with_path(weight, declare(config), is_leaf=is_declaration)
