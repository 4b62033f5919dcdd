"""What is trained in the benchmark, on either side: standard library only."""

import dataclasses
from typing import Literal


@dataclasses.dataclass(frozen=True)
class Size:
    """A GPT with pre-norms, learned positions and a tied unembedding, by AdamW with weights in float32.

    ``seeds`` models train one after another on the peer's side, and together on ours. ``steps`` are taken in one
    turn. ``published`` is GPT-2 itself, with biases: the peer's side is then that of transformers.
    """

    name: str
    layers: int
    width: int
    heads: int
    vocabulary: int
    length: int
    batch: int
    steps: int
    seeds: int = 1
    precision: Literal["float32", "bfloat16"] = "float32"  # of the computation
    published: bool = False
    products: int = 8192  # width of the matrices by which is measured what a card can do

    @property
    def tokens(self) -> int:
        """Of one turn of one model."""
        return self.steps * self.batch * self.length

    @property
    def flops(self) -> int:
        """Of a step, for each token: six for each weight of a product, and those of attention, causal or not.

        As PaLM's paper counts them (appendix B), and nanoGPT.
        """
        weights = 12 * self.layers * self.width**2 + self.vocabulary * self.width
        return 6 * weights + 12 * self.layers * self.width * self.length


# For one core.
SIZES = (
    Size("16 wide, 64 seeds", 1, 16, 2, 64, 8, 2, 64, seeds=64),
    Size("1 layer, 128 wide, 64 tokens", 1, 128, 4, 256, 64, 64, 8),
    Size("4 layers, 256 wide, 256 tokens", 4, 256, 4, 4096, 256, 8, 2),
)
# For a GPU. The vocabulary of GPT-2 is padded on both sides: matrices of odd sizes are slow there.
GPU_SIZES = (
    Size("GPT-2 124M, 1024 tokens", 12, 768, 12, 50304, 1024, 16, 10, precision="bfloat16", published=True),
    Size("64 wide, 1024 seeds", 1, 64, 4, 256, 64, 16, 32, seeds=1024),
)
RATE = 1e-3
DECAY = 0.1
