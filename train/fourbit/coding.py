"""Which moments are kept as codes, and how: what does not change from step to step."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, Literal

from minitf.parameters import path_name
from minitf.train.fourbit.codebooks import Codebook, dynamic_exponent, linear
from minitf.train.fourbit.layout import Layout, Path, heads_folded, layers_stacked

SECOND = (
    *("rank1_linear", "rank1_de0", "block_linear", "block_de0", "factored"),
    *("block_de", "block_linear_with_zero"),
)
Select = Callable[[Path, Any], bool]


@dataclass(frozen=True)
class MomentCoding:
    """How the moments of a model's weights are coded.

    The first moment has signed dynamic-exponent levels with a scale for each block.

    Attributes:
        bits: of a code, 4 or 8.
        block: how many consecutive numbers of a weight have one scale; even.
        smallest: weights of at most so many numbers (of a layer, when stacked) keep moments in float32, and are
            moved as by ``optax.scale_by_adam``.
        second: scales and levels of the second moment. ``rank1`` has a scale for each row and column, ``block``
            one for each block, which needs no reduction across devices when weights are sharded along leading
            axes; ``linear`` has even levels, ``de0`` those of the dynamic exponent without 0. ``factored`` keeps
            means of rows and columns in float32 (Adafactor), all axes but the last taken as rows. Vectors have
            block scales always, and linear levels when factored. ``block_de`` and ``block_linear_with_zero`` have
            0 as a level and diverge; they are here to show it.
        signed_scale: a block's scale has the sign of its largest number. Without, negative extremes shrink to
            .8875 of themselves in every step, for lack of a level -1.
        exclude: (path, weight) of those to keep in float32, whatever their size.
        stacked: (path, weight) whose first axis is one of layers, each treated by itself.
        matrix: (path, shape) to the shape that one layer's weight is taken as; it must have as many numbers.

    Raises:
        ValueError: a value that has no meaning, naming what would have.
    """

    bits: int = 4
    block: int = 128
    smallest: int = 4096
    second: str = "rank1_linear"
    signed_scale: bool = False
    exclude: Select = lambda path, leaf: False
    stacked: Select = layers_stacked
    matrix: Callable[[Path, tuple[int, ...]], tuple[int, ...]] = heads_folded

    def __post_init__(self) -> None:
        if self.bits not in (4, 8):
            raise ValueError(f"bits is {self.bits}; a code takes 4 or 8")
        if self.block < 2 or self.block % 2:
            raise ValueError(f"block is {self.block}; it must be an even number of at least 2")
        if self.smallest < 0:
            raise ValueError(f"smallest is {self.smallest}; it must be at least 0")
        if self.second not in SECOND:
            raise ValueError(f"second is {self.second!r}; it must be one of {', '.join(SECOND)}")

    def layout(self, path: Path, leaf: Any) -> Layout:
        """Which tensors a weight is. Raises ValueError for a ``matrix`` of another size."""
        stacked = self.stacked(path, leaf)
        one = leaf.shape[1:] if stacked else leaf.shape
        folded = tuple(self.matrix(path, one))
        if math.prod(folded) != math.prod(one):
            raise ValueError(f"matrix makes {folded} of {path_name(path)}, whose shape {one} has another size")
        if self.second == "factored" and len(folded) > 2:
            folded = (math.prod(folded[:-1]), folded[-1])
        return Layout(stacked, leaf.shape[0] if stacked else 1, folded)

    def in_float32(self, path: Path, leaf: Any) -> bool:
        """Whether a weight's moments are kept as they are."""
        return math.prod(self.layout(path, leaf).shape) <= self.smallest or self.exclude(path, leaf)

    @property
    def scale(self) -> Literal["block", "rank1", "factored"]:
        """The kind of scales of a second moment that is no vector."""
        return "factored" if self.second == "factored" else "rank1" if self.second.startswith("rank1") else "block"

    def scale_of(self, shape: tuple[int, ...]) -> Literal["block", "rank1", "factored"]:
        """The kind of scales of a second moment of this shape: vectors have blocks always."""
        return self.scale if len(shape) > 1 else "block"

    @cached_property
    def first_levels(self) -> Codebook:
        """Of first moments."""
        return dynamic_exponent(self.bits, signed=True)

    @cached_property
    def second_levels(self) -> Codebook:
        """Of second moments."""
        levels = {
            "": partial(linear, self.bits),
            "linear": partial(linear, self.bits),
            "linear_with_zero": partial(linear, self.bits, zero=True),
            "de": partial(dynamic_exponent, self.bits, signed=False),
            "de0": partial(dynamic_exponent, self.bits, signed=False, zero=False),
        }
        return levels[self.second.partition("_")[2]]()
