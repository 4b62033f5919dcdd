"""The models that are measured."""

import dataclasses

from minitf.config import ModelConfig


@dataclasses.dataclass(frozen=True)
class Size:
    """A GPT-2-like model and its input: ``batch`` sequences of ``length`` tokens."""

    layers: int
    width: int
    heads: int
    vocabulary: int
    batch: int
    length: int

    @property
    def name(self) -> str:
        """Layers/width, as tables have it."""
        return f"{self.layers}/{self.width}"

    @property
    def sweep(self) -> float:
        """Multiplications of a sweep over all heads, in forward passes: less than this no arithmetic can do.

        Two walks to begin with; then each edited run has the rest of its own layer, the layers after it, and of
        the last one keys and values everywhere and the rest at the one position that is read.
        """
        rows, square, read = self.batch * self.length, self.width**2, self.batch
        mixing = self.length * self.width  # scores and values, over half of all pairs
        whole = 12 * square + mixing
        logits = self.width * self.vocabulary
        forward = rows * (self.layers * whole + logits)
        begin = rows * (2 * (self.layers - 1) * whole + 3 * square + mixing)
        end = rows * 2 * square + read * (10 * square + mixing + logits)
        runs = sum(
            rows * (9 * square + (self.layers - 2 - layer) * whole) + end for layer in range(self.layers - 1)
        ) + read * (9 * square + logits)
        return (begin + self.heads * runs) / forward

    @property
    def config(self) -> ModelConfig:
        """The model, in a form that GPT-2's family can express."""
        return ModelConfig(
            vocabulary=self.vocabulary,
            layers=self.layers,
            width=self.width,
            heads=self.heads,
            length=max(256, self.length),
            biases=True,
            tied=True,
        )


READ = (Size(2, 64, 4, 512, 4, 32), Size(4, 256, 4, 4096, 8, 128), Size(12, 768, 12, 4096, 1, 64))
# About 260 thousand and 10 million parameters; the prompt is as long as ``length``.
WRITE = (Size(5, 64, 8, 512, 1, 16), Size(8, 320, 8, 4096, 1, 16))
NEW_TOKENS = 64
