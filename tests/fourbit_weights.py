"""Weights, gradients and levels that the tests of moments of four bits share."""

import jax
import jax.numpy as jnp
import numpy as np

from minitf.train import fourbit
from minitf.train.fourbit import scale_by_adam_4bit

BLOCK = 16
KINDS = ("rank1_linear", "block_linear", "block_de0", "factored")
FIRST = fourbit.dynamic_exponent(signed=True)
LEVELS = {
    "rank1_linear": fourbit.linear(),
    "block_linear": fourbit.linear(),
    "block_de0": fourbit.dynamic_exponent(signed=False, zero=False),
}


def few_bits(second="rank1_linear", **settings):
    """All weights quantized, in small blocks."""
    return scale_by_adam_4bit(**({"smallest": 0, "block": BLOCK, "second": second} | settings))


def gradients(step, like, seed=0):
    """Of very unlike sizes, as rows and columns of a model's are."""
    flat, tree = jax.tree.flatten(like)
    rng = np.random.default_rng([seed, step])
    drawn = []
    for number, leaf in enumerate(flat):
        sizes = np.random.default_rng(number)
        drawn_leaf = rng.normal(size=leaf.shape)
        for axis, size in enumerate(leaf.shape):
            drawn_leaf *= np.exp(sizes.normal(size=size)).reshape(-1, *[1] * (leaf.ndim - 1 - axis))
        drawn.append(jnp.asarray(drawn_leaf, jnp.float32))
    return tree.unflatten(drawn)
