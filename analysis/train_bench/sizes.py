"""What is trained in the benchmark, on either side: standard library only."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Size:
    """A GPT with pre-norms, learned positions, a tied unembedding and no biases, by AdamW in float32.

    ``seeds`` models train one after another on the peer's side, and together on ours. ``steps`` are taken in one
    turn.
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

    @property
    def tokens(self) -> int:
        """Of one turn of one model."""
        return self.steps * self.batch * self.length


SIZES = (
    Size("16 wide, 64 seeds", 1, 16, 2, 64, 8, 2, 64, seeds=64),
    Size("1 layer, 128 wide, 64 tokens", 1, 128, 4, 256, 64, 64, 8),
    Size("4 layers, 256 wide, 256 tokens", 4, 256, 4, 4096, 256, 8, 2),
)
RATE = 1e-3
DECAY = 0.1
