"""Sequences of which something is to be told: a label, which is a token too, or a number, which is none."""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float32, Float64, Int32

from minitf.vocabulary.kinds import FILE, Vocabulary, checked, describe


@dataclass(frozen=True)
class Labelled:
    """Another vocabulary, and after its tokens one for each label that a sequence may have."""

    inner: Vocabulary
    labels: tuple[str, ...]

    @property
    def size(self) -> int:
        """All tokens, those of labels included."""
        return self.inner.size + len(self.labels)

    def encode(self, text: str) -> Int32[np.ndarray, " token"]:
        """The tokens of a sequence."""
        return self.inner.encode(text)

    def example(self, text: str, label: str) -> Int32[np.ndarray, " token"]:
        """The tokens of a sequence, then that of its label. Raises ValueError for a label that there is not."""
        if label not in self.labels:
            known = ", ".join(map(repr, self.labels[:10]))
            raise ValueError(
                f"{label!r} is none of the labels {known}. A model that tells labels goes on with its own: for "
                "others start from one of the sequences alone, or from none"
            )
        return np.append(self.inner.encode(text), np.int32(self.inner.size + self.labels.index(label)))

    def decode(self, ids: Iterable[Any]) -> str:
        """The text; labels are in brackets."""
        tokens = checked(ids, self.size)
        places = np.flatnonzero(tokens >= self.inner.size)
        parts = np.split(tokens, np.sort(np.concatenate([places, places + 1])))
        named = lambda part: "".join(f"[{self.labels[one - self.inner.size]}]" for one in part.tolist())
        is_label = lambda part: part.size and part[0] >= self.inner.size
        return "".join(named(part) if is_label(part) else self.inner.decode(part) for part in parts)

    def piece(self, token: int) -> bytes:
        """What one token stands for."""
        return self.inner.piece(token) if token < self.inner.size else self.decode([token]).encode()

    def save(self, folder: Path) -> None:
        """Write the other vocabulary, and the labels."""
        self.inner.save(folder)
        describe(folder, "labelled", {"inner": json.loads((folder / FILE).read_bytes()), "labels": self.labels})


@dataclass(frozen=True)
class Measured:
    """Another vocabulary, of sequences each of which has a number: that of the column ``name``.

    What a model tells is the number less the ``mean``, in ``deviation`` (those of what it was trained on).
    """

    inner: Vocabulary
    name: str
    mean: float
    deviation: float

    @property
    def size(self) -> int:
        """Tokens of the sequences; a number is none."""
        return self.inner.size

    def encode(self, text: str) -> Int32[np.ndarray, " token"]:
        """The tokens of a sequence."""
        return self.inner.encode(text)

    def decode(self, ids: Iterable[Any]) -> str:
        """The text."""
        return self.inner.decode(ids)

    def piece(self, token: int) -> bytes:
        """What one token stands for."""
        return self.inner.piece(token)

    def told(self, number: Float64[np.ndarray, " example"]) -> Float32[np.ndarray, " example"]:
        """What a model is to tell for these numbers."""
        return ((number - self.mean) / self.deviation).astype(np.float32)

    def number(self, told: Any) -> Any:
        """The number that a model's first logit means."""
        return self.mean + self.deviation * told

    def save(self, folder: Path) -> None:
        """Write the other vocabulary, and what its numbers are."""
        self.inner.save(folder)
        inner = json.loads((folder / FILE).read_bytes())
        numbers = {"name": self.name, "mean": self.mean, "deviation": self.deviation}
        describe(folder, "measured", {"inner": inner, **numbers})
