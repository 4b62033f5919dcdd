"""Where in a walk an autoencoder stands: one leaf, whose vectors are rows to read and to replace."""

from collections.abc import Iterable, Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Float, Int

from minitf.analysis.stream import checked_tokens
from minitf.config import ModelConfig
from minitf.edits import set_to
from minitf.model import check_tokens, walk
from minitf.parameters import Parameters
from minitf.resume import layer_walk, run_between
from minitf.walk import Walk, get, leaf_axes


@struct.dataclass
class Place:
    """One leaf of a model's walk with a vector for every batch and position, as rows = batch x position.

    What comes after the position is one vector: of ``layers.z`` that of all heads together. It is a pytree that
    holds the parameters, so that programs take it as an argument.

    Attributes:
        name: such as ``"layers.resid_post"`` or ``"context"``.
        layer: which one, for leaves of the layers; None for others.

    Raises:
        ValueError: there is no such leaf or layer, or the leaf has no vector for every position.
    """

    parameters: Parameters
    config: ModelConfig = struct.field(pytree_node=False)
    name: str = struct.field(pytree_node=False)
    layer: int | None = struct.field(pytree_node=False, default=None)

    def __post_init__(self) -> None:
        get(Walk(), self.name)
        axes = leaf_axes()[self.name]
        if axes[0] == "layer":
            if self.layer is None or not 0 <= self.layer < self.config.layers:
                raise ValueError(
                    f"{self.name!r} is a leaf of layers 0 to {self.config.layers - 1}; layer is {self.layer}"
                )
            axes = axes[1:]
        elif self.layer is not None:
            raise ValueError(f"{self.name!r} is no leaf of a layer, but layer is {self.layer}; leave it out")
        if axes[:2] != ("batch", "position") or len(axes) < 3:
            raise ValueError(f"{self.name!r} is [{', '.join(axes)}]: no vector for every batch and position")

    def rows(self, tokens: Int[Array, "batch position"]) -> Float[Array, "row width"]:
        """The vectors there in the walk of these tokens, one after another.

        Layers after it do not run, and of the layers before it nothing but their end is kept.

        Raises:
            ValueError: this model's walk has no such leaf.
        """
        check_tokens(tokens, self.config)
        return self._rows(tokens)

    # Called outside of any jit, it is compiled once; and what leads to other leaves than this one is left out.
    @partial(jax.jit, inline=True)
    def _rows(self, tokens: Int[Array, "batch position"]) -> Float[Array, "row width"]:
        if self.layer is None:
            value = get(walk(self.parameters, tokens, self.config), self.name)
        else:
            start = walk(self.parameters, tokens, self.config).start
            stream = run_between(self.parameters, start, self.config, 0, self.layer)
            here = layer_walk(self.parameters, stream, self.config, self.layer)
            value = get(Walk(layers=here), self.name)
        if value is None:
            raise ValueError(f"this model's walk has no {self.name!r}")
        return value.reshape(tokens.size, -1)

    def logits_with(
        self, tokens: Int[Array, "batch position"], rows: Float[Array, "row width"]
    ) -> Float[Array, "batch position vocabulary"]:
        """The logits of the walk of these tokens with its vectors there replaced."""
        shapes = jax.eval_shape(lambda p, t: walk(p, t, self.config), self.parameters, tokens)
        like, index = get(shapes, self.name), {}
        shape = like.shape
        if self.layer is not None:
            shape, index = shape[1:], {"layer": self.layer}
        edit = set_to(shapes, self.name, jnp.asarray(rows, like.dtype).reshape(shape), **index)
        return walk(self.parameters, tokens, self.config, edit=edit).logits


def checked_batches(source: Place | None, batches: Iterable[Any]) -> Iterator[np.ndarray]:
    """The batches on the host; tokens are refused where the model cannot read them."""
    for batch in batches:
        yield np.asarray(batch) if source is None else checked_tokens(batch, source.config)


def batch_rows(source: Place | None, batch: Array) -> Array:
    """A batch of rows itself, or the rows at a place in the walk of a batch of tokens."""
    return batch if source is None else source.rows(batch)
