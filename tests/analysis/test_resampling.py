"""Draws are of other examples of the same class, each with the same probability."""

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from properties.models import examples, quick_jit

from minitf.analysis.resampling import classes, draw

quick_draw = quick_jit(draw)
some_labels = hnp.arrays(int, st.sampled_from([(7,), (7, 3)]), elements=st.integers(0, 3))


@examples(60)
@given(labels=some_labels, like=hnp.arrays(int, 7, elements=st.integers(0, 6)), seed=st.integers(0, 9))
def test_what_is_drawn_is_another_example_of_the_class_where_there_is_one(labels, like, seed):
    bits = np.random.default_rng(seed).integers(2**32, size=(7, 3), dtype=np.uint32)
    found = np.asarray(quick_draw(classes(labels), like, bits))
    assert found.shape == labels.shape
    columns = zip(labels.reshape(7, -1).T, found.reshape(7, -1).T, strict=True)
    for label, drawn in columns:
        for asked, got in zip(like, drawn, strict=True):
            assert label[got] == label[asked]
            assert (got == asked) == ((label == label[asked]).sum() == 1)


def test_all_others_are_drawn_with_the_same_probability_and_each_by_itself():
    labels = np.array([[2, 0, 2], [1, 0, 1], [2, 0, 2], [2, 1, 2], [1, 1, 1], [2, 1, 2]])
    among, count = classes(labels), 3000
    bits = jax.random.bits(jax.random.key(0), (count, 6, 3), jnp.uint32)
    found = np.asarray(quick_jit(jax.vmap(draw, (None, None, 0)))(among, np.arange(6), bits))
    for example in range(6):
        for position in range(3):
            label = labels[:, position]
            others = [i for i in range(6) if i != example and label[i] == label[example]]
            share = np.bincount(found[:, example, position], minlength=6) / count
            expected = np.isin(np.arange(6), others) / len(others)
            # Five standard deviations of a binomial share.
            assert (np.abs(share - expected) <= 5 * np.sqrt(expected * (1 - expected) / count)).all()
    # Two examples of a class, or two positions with the same classes, do not know of each other: 1/3 * 1/3.
    both = lambda a, b: np.mean(a & b)
    sigma = 5 * np.sqrt(0.25 / count)
    assert abs(both(found[:, 0, 0] == 3, found[:, 2, 0] == 3) - 1 / 9) < sigma
    assert abs(both(found[:, 0, 0] == 2, found[:, 0, 2] == 2) - 1 / 9) < sigma
