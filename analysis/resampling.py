"""Other examples of the same class: what a resample is drawn from."""

import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Int, UInt32

from minitf.walk import Leaf, leaf


@struct.dataclass
class Classes:
    """Examples by equivalence class, and that for each position where there are positions.

    ``order`` has the examples of a class next to each other. An example's class has ``size`` members, which begin
    at ``start``; the example is the one with number ``rank`` among them.
    """

    order: Leaf = leaf("batch position")
    start: Leaf = leaf("batch position")
    size: Leaf = leaf("batch position")
    rank: Leaf = leaf("batch position")


def classes(labels: Int[np.ndarray, " batch *position"]) -> Classes:
    """The classes of examples with equal labels."""
    order = np.argsort(labels, axis=0, kind="stable")
    sorted_labels = np.take_along_axis(labels, order, axis=0)
    begins = np.ones(labels.shape, bool)
    begins[1:] = sorted_labels[1:] != sorted_labels[:-1]
    place = by_example(np.arange(len(labels)), labels.shape)
    start = np.maximum.accumulate(np.where(begins, place, 0), axis=0)
    ends = np.where(np.roll(begins, -1, axis=0), place + 1, len(labels))
    stop = np.minimum.accumulate(ends[::-1], axis=0)[::-1]

    def unsorted(values: np.ndarray) -> np.ndarray:
        found = np.empty_like(values)
        np.put_along_axis(found, order, values, axis=0)
        return found

    return Classes(order=order, start=unsorted(start), size=unsorted(stop - start), rank=unsorted(place - start))


def by_example(values: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """One value for each example, the same at all positions that ``shape`` may have."""
    return np.broadcast_to(values.reshape(-1, *[1] * (len(shape) - 1)), shape)


def draw(
    among: Classes, like: Int[Array, " batch"], bits: UInt32[Array, "batch position"]
) -> Int[Array, " batch *position"]:
    """For each of the examples ``like``, another one of its class, all others with the same probability.

    One for each position where the classes are by position. An example alone in its class stands for itself. The
    remainder of 32 random ``bits`` is fair to a part in 2**32 / size.
    """
    order, start, size, rank = (jnp.asarray(x) for x in (among.order, among.start, among.size, among.rank))
    start, size, rank = start[like], size[like], rank[like]
    own_bits = bits if size.ndim == 2 else bits[:, 0]
    further = 1 + (own_bits % jnp.maximum(size - 1, 1).astype(jnp.uint32)).astype(rank.dtype)
    return jnp.take_along_axis(order, start + (rank + further) % size, axis=0)
