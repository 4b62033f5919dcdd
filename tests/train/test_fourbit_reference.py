"""Whole runs against the algorithm in plain numpy, one tensor at a time, by looking at all levels."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fourbit_weights import BLOCK, FIRST, KINDS, LEVELS, few_bits, gradients

from minitf.train import fourbit


def weights():
    """1-D, 2-D, 3-D, of odd sizes, with whole blocks along the last axis, stacked, and none."""
    shapes = {
        "vector": (75,),
        "matrix": (12, 32),
        "odd": (7, 11),
        "order_three": (3, 5, 16),
        "none": None,
        "layers": {"wide": (2, 6, 16), "odd": (3, 5, 7)},
    }
    return jax.tree.map(lambda s: jnp.zeros(s), shapes, is_leaf=lambda x: isinstance(x, tuple))


def reference_codes(x, levels):
    """By looking at all levels."""
    return np.abs(x[..., None] - np.asarray(levels, np.float32)).argmin(axis=-1)


def reference_blocks(x):
    flat = np.pad(x.reshape(-1), (0, -x.size % BLOCK))
    return flat.reshape(-1, BLOCK)


def reference_scales(x, kind):
    """Of every number, and those that are kept."""
    if kind.startswith("block") or x.ndim == 1:
        kept = np.abs(reference_blocks(x)).max(axis=1)
        return np.repeat(kept, BLOCK)[: x.size].reshape(x.shape)
    scale = np.full(x.shape, np.inf, np.float32)
    for axis in range(x.ndim):
        for i in range(x.shape[axis]):
            at = (slice(None),) * axis + (i,)
            scale[at] = np.minimum(scale[at], x[at].max())
    return scale


class Reference:
    def __init__(self, shape, kind):
        self.kind, self.t = kind, 0
        self.m, self.v = np.zeros(shape, np.float32), np.zeros(shape, np.float32)
        if self.factored:
            self.rows, self.columns = np.zeros(shape[0]), np.zeros(shape[1])

    @property
    def factored(self):
        return self.kind == "factored" and self.m.ndim > 1

    def step(self, g):
        f, one = np.float32, lambda b: np.float32(1 - b)
        self.t += 1
        m = f(0.9) * self.m + one(0.9) * g
        if self.factored:
            self.rows = 0.999 * self.rows + 0.001 * (g.astype(float) ** 2).mean(axis=1)
            self.columns = 0.999 * self.columns + 0.001 * (g.astype(float) ** 2).mean(axis=0)
            v = np.outer(self.rows, self.columns) / self.rows.mean()
        else:
            v = f(0.999) * self.v + one(0.999) * (g * g)
        self.m_codes, self.m = self.coded(m, FIRST.levels, "block")
        if not self.factored:
            levels = LEVELS.get(self.kind, LEVELS["block_linear"]).levels
            self.v_codes, self.v = self.coded(v, levels, self.kind)
        return m / (1 - 0.9**self.t) / (np.sqrt(v / (1 - 0.999**self.t)) + 1e-8)

    @staticmethod
    def coded(x, levels, kind):
        scale = reference_scales(x, kind)
        codes = reference_codes(x / np.where(scale == 0, 1, scale), levels)
        if levels[0] == levels[1]:  # DE-0 has a level twice, of which the second is for what is above it
            codes += (codes == 0) & (x > levels[0] * scale)
        return codes, (np.asarray(levels, np.float32)[codes] * scale).astype(np.float32)


def codes_of(packed, size):
    """Of one tensor: a block's first half is in the low bits."""
    return np.concatenate([packed & 15, packed >> 4], axis=-1).reshape(-1)[:size]


def tensors(tree):
    """Leaves by name, stacked ones layer by layer."""
    found = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree, is_leaf=lambda x: isinstance(x, fourbit.Moments)):
        name = jax.tree_util.keystr(path)
        layers = {"wide": 2, "odd": 3}[path[-1].key] if "layers" in name else None
        for i in range(layers or 1):
            found[f"{name}{i}"] = jax.tree.map(lambda x, i=i: np.asarray(x[i] if layers else x), leaf)  # noqa: B023
    return found


@pytest.mark.parametrize("second", KINDS)
def test_after_twenty_steps_all_codes_are_those_of_a_search_among_the_levels(second):
    # An order-three tensor is a matrix when factored, as the reference knows them.
    fold = lambda path, shape: (15, 16) if second == "factored" and shape == (3, 5, 16) else shape
    optimizer = few_bits(second, matrix=fold)
    state, step = optimizer.init(weights()), jax.jit(optimizer.update)
    references = {name: Reference(fold(None, x.shape), second) for name, x in tensors(weights()).items()}
    for number in range(20):
        update, state = step(gradients(number, weights()), state)
        expected = {
            n: r.step(np.reshape(tensors(gradients(number, weights()))[n], r.m.shape))
            for n, r in references.items()
        }
    assert len(references) == 9
    for name, moments in tensors(state.moments).items():
        reference = references[name]
        assert np.array_equal(codes_of(moments.mean.codes, reference.m.size), reference.m_codes.reshape(-1)), name
        if reference.factored:
            assert moments.square.scales[0] == pytest.approx(reference.rows, rel=1e-5)
            assert moments.square.scales[1] == pytest.approx(reference.columns, rel=1e-5)
        else:
            codes = codes_of(moments.square.codes, reference.v.size)
            assert np.array_equal(codes, reference.v_codes.reshape(-1)), name
        # With the same codes, what is left is the rounding of some ten operations in float32.
        assert tensors(update)[name].reshape(-1) == pytest.approx(expected[name].reshape(-1), rel=1e-5, abs=1e-6)
