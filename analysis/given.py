"""What a person gave, checked before anything runs on it."""

from collections.abc import Iterable

from minitf.config import ModelConfig


def check_tokens(tokens: Iterable[int], config: ModelConfig) -> None:
    """Raises ValueError, for people, where the model has no such token."""
    for token in tokens:
        if not 0 <= token < config.vocabulary:
            raise ValueError(f"there is no token {token}; the model's are 0 to {config.vocabulary - 1}")
