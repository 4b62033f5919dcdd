import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minitf import aggregate

FEW = settings(derandomize=True, deadline=None, database=None, max_examples=25)


def normal(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_grouped_heads_share_keys_and_values_in_order(groups):
    q, k, v = normal(2, 5, 4, 3), normal(2, 6, groups, 3, seed=1), normal(2, 6, groups, 3, seed=2)
    scores = aggregate.score(q, k, 0.5)
    pattern = aggregate.associate(scores)
    z = aggregate.combine(pattern, v)
    assert (scores.shape, z.shape) == ((2, 4, 5, 6), (2, 5, 4, 3))
    for head in range(4):
        group = head * groups // 4
        expected = 0.5 * np.einsum("bqc,bkc->bqk", q[:, :, head], k[:, :, group])
        np.testing.assert_allclose(scores[:, head], expected, atol=1e-6)
        np.testing.assert_allclose(
            z[:, :, head], np.einsum("bqk,bkc->bqc", pattern[:, head], v[:, :, group]), atol=1e-6
        )


def test_who_may_look_where():
    see = lambda causal, attend_self: aggregate.allowed_pairs(3, causal, attend_self).astype(int).tolist()
    assert see(True, True) == [[1, 0, 0], [1, 1, 0], [1, 1, 1]]
    assert see(True, False) == [[0, 0, 0], [1, 0, 0], [1, 1, 0]]
    assert see(False, True) == [[1, 1, 1], [1, 1, 1], [1, 1, 1]]
    assert see(False, False) == [[0, 1, 1], [1, 0, 1], [1, 1, 0]]


@pytest.mark.parametrize(
    ("heads", "slopes"),
    [
        (1, [2**-8]),
        (8, [2**-1, 2**-2, 2**-3, 2**-4, 2**-5, 2**-6, 2**-7, 2**-8]),
        (3, [2**-4, 2**-8, 2**-2]),
        (6, [2**-2, 2**-4, 2**-6, 2**-8, 2**-1, 2**-3]),
    ],
)
def test_alibi_falls_with_distance_at_the_published_slopes(heads, slopes):
    bias = aggregate.alibi_bias(heads, jnp.arange(4), 4)
    assert bias.shape == (heads, 4, 4)
    np.testing.assert_allclose(-bias[:, 3, 2], slopes)
    np.testing.assert_allclose(-bias[:, 3, 0], 3 * np.array(slopes))
    np.testing.assert_array_equal(bias, bias.transpose(0, 2, 1))


@FEW
@given(shift=st.floats(-1e4, 1e4))
def test_an_association_is_the_softmax_and_forgets_a_shift(shift):
    scores = normal(2, 3, 4)
    exact = np.exp(np.asarray(scores, np.float64))
    exact /= exact.sum(-1, keepdims=True)
    np.testing.assert_allclose(aggregate.associate(scores), exact, atol=1e-6)
    # A shifted score keeps only the digits that the shift leaves it.
    np.testing.assert_allclose(aggregate.associate(scores + shift), exact, atol=1e-6 + abs(shift) * 2.0**-23)


def test_a_query_that_may_see_nothing_has_a_row_of_zeros_and_finite_gradients():
    scores = jnp.array([[-jnp.inf, -jnp.inf], [0.0, -jnp.inf]])
    np.testing.assert_array_equal(aggregate.associate(scores), [[0, 0], [1, 0]])
    masked = lambda x: jnp.where(jnp.isneginf(scores), -jnp.inf, x)
    gradient = jax.grad(lambda x: jnp.sum(jnp.sin(aggregate.associate(masked(x)))))(jnp.ones((2, 2)))
    assert np.isfinite(gradient).all()


@pytest.mark.parametrize("groups", [1, 2])
def test_values_mixed_before_they_are_divided_are_those_mixed_after_and_so_are_slopes(groups):
    with jax.enable_x64(True):
        draw = lambda *shape: jnp.asarray(np.random.default_rng(len(shape)).normal(size=shape))
        scores, v = 9 * draw(3, 2, 5, 6), draw(3, 6, groups, 4, 1)[..., 0]
        # The first query sees nothing, others a part.
        scores = jnp.where(jnp.arange(6) < jnp.arange(5)[:, None], scores, -jnp.inf)
        after = lambda s, v: aggregate.combine(aggregate.associate(s), v)
        np.testing.assert_allclose(aggregate.combine_scored(scores, v), after(scores, v), atol=1e-13)
        weigh = draw(3, 5, 2, 4)
        slopes = [
            jax.grad(lambda s, v, mix=mix: jnp.sum(weigh * mix(s, v)), argnums=(0, 1))(scores, v)
            for mix in (aggregate.combine_scored, after)
        ]
        for found, expected in zip(*slopes, strict=True):
            np.testing.assert_allclose(found, expected, atol=1e-12)


def test_large_scores_do_not_overflow():
    np.testing.assert_array_equal(aggregate.associate(jnp.array([[3e38, -3e38]])), [[1, 0]])


@FEW
@given(counts=st.lists(st.integers(0, 4), min_size=3, max_size=3).filter(any))
def test_a_key_of_multiplicity_n_is_n_equal_keys(counts):
    scores = np.array([0.3, -1.2, 2.0], np.float32)
    repeated = np.repeat(scores, counts)
    owner = np.repeat(np.arange(3), counts)
    one_by_one = np.asarray(aggregate.associate(jnp.asarray(repeated)[None]), np.float64)[0]
    found = aggregate.associate(jnp.asarray(scores)[None], jnp.asarray(counts, jnp.float32)[None])[0]
    np.testing.assert_allclose(found, np.bincount(owner, one_by_one, minlength=3), atol=1e-6)


@FEW
@given(scale=st.floats(1e-3, 1e3))
def test_only_the_proportions_of_multiplicities_matter(scale):
    scores, counts = normal(1, 5), jnp.array([[1.0, 2.0, 0.0, 0.5, 3.0]])
    np.testing.assert_allclose(
        aggregate.associate(scores, counts * scale), aggregate.associate(scores, counts), atol=1e-6
    )


def test_a_key_that_never_occurs_is_not_attended_to_however_high_its_score():
    found = aggregate.associate(jnp.array([[1e9, 0.0]]), jnp.array([[0.0, 1.0]]))
    np.testing.assert_array_equal(found, [[0.0, 1.0]])
    none = aggregate.associate(jnp.array([[1.0, 0.0]]), jnp.zeros((1, 2)))
    np.testing.assert_array_equal(none, [[0.0, 0.0]])


def test_half_precision_scores_give_a_half_precision_association():
    found = aggregate.associate(jnp.zeros((1, 3), jnp.bfloat16))
    assert found.dtype == jnp.bfloat16
    assert float(found[0, 0]) == pytest.approx(1 / 3, rel=2**-8)


def test_adding_branches_is_an_aggregate_of_weights_one():
    a, b, c = normal(2, 3), normal(2, 3, seed=1), normal(2, 3, seed=2)
    np.testing.assert_allclose(aggregate.add(a, b, c), np.sum([a, b, c], axis=0), atol=1e-6)
    np.testing.assert_array_equal(aggregate.add(a), a)
    assert math.isclose(float(jax.grad(lambda x: jnp.sum(aggregate.add(x, b)))(a)[0, 0]), 1.0)
