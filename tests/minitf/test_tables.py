import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from properties.models import in_float64, quick_jit, random_parameters

from minitf import token_tables, walk
from minitf.parameters import named
from minitf.tables import count_walk
from minitf.walk import leaf_axes, leaves

VOCABULARY, LENGTH = 6, 7
CONFIG = token_tables(VOCABULARY)
FEW = settings(derandomize=True, deadline=None, database=None, max_examples=15)
sequences = st.lists(
    st.lists(st.integers(0, VOCABULARY - 1), min_size=LENGTH, max_size=LENGTH), min_size=2, max_size=2
)


def counts_of(tokens):
    """How often each token stands before the last."""
    return np.stack([np.bincount(row[:-1], minlength=VOCABULARY) for row in np.asarray(tokens)]).astype(np.float64)


@pytest.fixture(scope="module")
def both():
    """Logits and gradients of the last position, by positions and by counts."""

    def by_position(parameters, tokens, counts):
        return walk(parameters, tokens, CONFIG).logits[:, -1]

    def by_count(parameters, tokens, counts):
        return count_walk(parameters, tokens[:, -1], counts).logits[:, 0]

    def with_gradient(logits):
        loss = lambda *arguments: (jnp.sum(jnp.sin(logits(*arguments))), logits(*arguments))
        return quick_jit(jax.value_and_grad(loss, has_aux=True))

    return with_gradient(by_position), with_gradient(by_count)


@FEW
@given(tokens=sequences, seed=st.integers(0, 99))
def test_counts_give_the_last_position_of_the_sequence_and_its_gradients(both, tokens, seed):
    with jax.enable_x64(True):
        parameters, tokens = in_float64(random_parameters(CONFIG, seed)), jnp.array(tokens, jnp.int32)
        found = [run(parameters, tokens, counts_of(tokens)) for run in both]
        (((_, logits), gradient), ((_, expected), expected_gradient)) = found
        np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-12)
        for name, value in named(gradient).items():
            np.testing.assert_allclose(value, named(expected_gradient)[name], rtol=0, atol=1e-12, err_msg=name)
        # With one kind of token before the query, attention has nothing to choose from.
        if all((row > 0).sum() > 1 for row in counts_of(tokens)):
            assert np.asarray(named(gradient)["layers.attention.table"]).any()


@FEW
@given(tokens=sequences, order=st.permutations(range(LENGTH - 1)))
def test_the_order_of_tokens_does_not_matter(both, tokens, order):
    with jax.enable_x64(True):
        parameters, tokens = in_float64(random_parameters(CONFIG)), np.array(tokens, np.int32)
        shuffled = np.concatenate([tokens[:, list(order)], tokens[:, -1:]], axis=1)
        one, other = (both[0](parameters, jnp.asarray(t), counts_of(t))[0][1] for t in (tokens, shuffled))
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-12)
        np.testing.assert_array_equal(counts_of(tokens), counts_of(shuffled))


def test_probabilities_are_the_limit_of_infinite_length():
    # Tian et al. 2023, Lemma 2: c_n(l) is proportional to P(l | n) exp(z).
    probability = np.array([[0.5, 0.25, 0.125, 0.125, 0.0, 0.0]])
    with jax.enable_x64(True):
        parameters, query = in_float64(random_parameters(CONFIG)), jnp.array([3])
        run = quick_jit(count_walk)
        limit = run(parameters, query, probability)
        table = np.asarray(parameters.layers.attention.table[0, 0])
        expected = probability[0] * np.exp(table[3])
        expected /= expected.sum()
        np.testing.assert_allclose(limit.layers.pattern[0, 0, 0, 0], expected, atol=1e-14)
        direction = expected / np.linalg.norm(expected)
        np.testing.assert_allclose(limit.end[0, 0], direction, atol=1e-14)
        np.testing.assert_allclose(limit.logits[0, 0], direction @ np.asarray(parameters.unembedding), atol=1e-13)
        # Long sequences come near at the pace of their sampling noise, one over the root of the length.
        for length in (10**2, 10**4, 10**6):
            drawn = np.random.default_rng(0).multinomial(length, probability[0])[None].astype(float)
            sampled = run(parameters, query, drawn).layers.pattern
            assert np.abs(sampled - limit.layers.pattern).max() < 5 / np.sqrt(length)


def test_counting_only_the_tokens_that_occur_gives_the_same_walk():
    parameters, queries = random_parameters(CONFIG), jnp.array([5, 0])
    counts = jnp.array([[1.0, 2.0, 0.0, 1.0], [0.0, 0.0, 3.0, 1.0]])
    short = count_walk(parameters, queries, counts)
    full = count_walk(parameters, queries, jnp.pad(counts, ((0, 0), (0, 2))))
    np.testing.assert_allclose(short.logits, full.logits, atol=1e-6)
    np.testing.assert_allclose(short.end, full.end, atol=1e-6)
    assert short.layers.pattern.shape == (1, 2, 1, 1, 4)


def test_the_walk_of_counts_is_a_walk():
    parameters, queries = random_parameters(CONFIG), jnp.array([1, 2])
    found = count_walk(parameters, queries, jnp.ones((2, VOCABULARY)))
    ordinary = jax.eval_shape(lambda p, t: walk(p, t, CONFIG), parameters, jnp.zeros((2, LENGTH), jnp.int32))
    assert [name for name, _ in leaves(found)] == [name for name, _ in leaves(ordinary)]
    for name, leaf in leaves(found):
        assert leaf.ndim == len(leaf_axes()[name]), name
    pattern, v = found.layers.pattern[0, :, 0, 0], found.layers.v[0, 0, :, 0]
    np.testing.assert_allclose(pattern @ v, found.layers.z[0, :, 0, 0], atol=1e-6)
    np.testing.assert_allclose(found.layers.pattern.sum(-1), 1.0, rtol=1e-6)


def test_a_query_that_follows_nothing_has_seen_nothing():
    parameters = random_parameters(CONFIG)
    loss = lambda p: jnp.sum(count_walk(p, jnp.array([1]), jnp.zeros((1, VOCABULARY))).logits ** 2)
    value, gradient = jax.value_and_grad(loss)(parameters)
    assert float(value) == 0.0
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(gradient))
