"""What a person gave, checked before anything runs on it."""

from collections.abc import Iterable
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array

from minitf import model
from minitf.config import ModelConfig
from minitf.parameters import AttentionParameters, Parameters


def check_tokens(tokens: Iterable[int], config: ModelConfig) -> None:
    """Raises ValueError, for people, where the model has no such token."""
    for token in tokens:
        if not 0 <= token < config.vocabulary:
            raise ValueError(f"there is no token {token}; the model's are 0 to {config.vocabulary - 1}")


def check_targets(targets: Any, like: Array, config: ModelConfig, name: str = "target") -> None:
    """Raises ValueError where they are not one token for every position of a leaf ``[batch, position, ...]``."""
    places = like.shape[:2]
    if jnp.shape(targets) != places:
        raise ValueError(
            f"{name} of shape {jnp.shape(targets)} will not do: one token is needed for each of the {places} "
            f"positions, such as jnp.full({places}, 3)"
        )
    model.check_tokens(targets, config, name)


def stacked_attention(parameters: Parameters, what: str) -> AttentionParameters:
    """The weights of softmax attention, all layers'. Raises ValueError, naming ``what`` needs them, for others."""
    if isinstance(parameters.layers, tuple) or not isinstance(parameters.layers.attention, AttentionParameters):
        raise ValueError(
            f"{what} are of softmax attention in layers that are alike and stacked, as initialize makes them"
        )
    return parameters.layers.attention
