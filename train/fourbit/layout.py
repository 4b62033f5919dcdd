"""Which tensors a weight of a model is: layers are stacked, heads are folded; and slices that fit in a cache."""

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import jax

from minitf.parameters import path_name
from minitf.train.fourbit.packing import aligned

Path = tuple[Any, ...]
# Of one slice; gradient, moments and what lies between them then stay in a core's cache.
SLICE_NUMBERS = 2**17
# A slice that is shorter takes no longer than starting it.
LEAST_SLICE_NUMBERS = 2**13


@dataclass(frozen=True)
class Layout:
    """A weight as ``layers`` tensors of one shape; ``stacked`` is False where it is one tensor by itself."""

    stacked: bool
    layers: int
    shape: tuple[int, ...]


def layers_stacked(path: Path, leaf: Any) -> bool:
    """Whether a weight's first axis is that of the layers: in minitf it is, in ``layers`` that are not a tuple."""
    parts = path_name(path).split(".")
    return any(part == "layers" and not after.isdigit() for part, after in pairwise(parts))


def heads_folded(path: Path, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape that rank-1 scales see of one layer's weight: heads and their widths are one axis.

    ``[width, head, head_width]`` is a matrix from the stream, ``[head, head_width, width]`` (``output``) one to
    it, and a bias ``[head, head_width]`` is a vector. Other weights are what they are.
    """
    parts = path_name(path).split(".")
    if "attention" not in parts or parts[-1] == "table":
        return shape
    if len(shape) == 2 and parts[-1].endswith("bias"):
        return (math.prod(shape),)
    if len(shape) != 3:
        return shape
    first, second, third = shape
    return (first * second, third) if parts[-1] == "output" else (first, second * third)


def slices(layout: Layout, block: int) -> int | None:
    """In how many slices of its first axis to treat each tensor, all slices one after another; None: all at once.

    One after another where a core's cache is small beside the weight: on CPUs.
    """
    if jax.default_backend() != "cpu" or layout.layers * math.prod(layout.shape) <= 2 * SLICE_NUMBERS:
        return None
    if len(layout.shape) < 2 or not aligned(layout.shape, block):
        return 1
    rows, rest = layout.shape[0], math.prod(layout.shape[1:])
    for count in range(1, rows + 1):
        if rows % count == 0 and rows // count * rest <= SLICE_NUMBERS:
            return count if rows // count * rest >= LEAST_SLICE_NUMBERS else 1
    return 1
