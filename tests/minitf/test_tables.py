"""The token-table model on counts is the token-table model on positions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from minitf.config import token_tables
from minitf.model import walk
from minitf.parameters import initialize, named
from minitf.tables import count_walk
from minitf.walk import leaves

VOCABULARY, LENGTH, BATCH = 23, 12, 5


@pytest.fixture(scope="module")
def both():
    """A model, sequences, and the same sequences as counts; float64."""
    with jax.enable_x64(True):
        config = token_tables(VOCABULARY, "fan_in")
        parameters = initialize(config, jax.random.key(0), jnp.float64)
        tokens = jax.random.randint(jax.random.key(1), (BATCH, LENGTH), 0, VOCABULARY)
        counts = jax.nn.one_hot(tokens[:, :-1], VOCABULARY, dtype=jnp.float64).sum(axis=1)
        yield config, parameters, tokens, counts


def test_logits_equal_those_of_the_last_position(both):
    config, parameters, tokens, counts = both
    with jax.enable_x64(True):
        by_position = walk(parameters, tokens, config).logits[:, -1]
        by_count = count_walk(parameters, tokens[:, -1], counts).logits[:, 0]
        np.testing.assert_allclose(by_count, by_position, rtol=0, atol=1e-12)


def test_gradients_equal_those_of_the_last_position(both):
    config, parameters, tokens, counts = both
    with jax.enable_x64(True):
        by_position = jax.grad(lambda p: jnp.sum(walk(p, tokens, config).logits[:, -1] ** 2))(parameters)
        by_count = jax.grad(lambda p: jnp.sum(count_walk(p, tokens[:, -1], counts).logits ** 2))(parameters)
        for name, expected in named(by_position).items():
            np.testing.assert_allclose(named(by_count)[name], expected, rtol=0, atol=1e-12, err_msg=name)


def test_the_walk_has_the_same_leaves_and_stations(both):
    config, parameters, tokens, counts = both
    with jax.enable_x64(True):
        by_position = walk(parameters, tokens, config)
        by_count = count_walk(parameters, tokens[:, -1], counts)
        assert {name for name, _ in leaves(by_count)} == {name for name, _ in leaves(by_position)}
        for name in ("resid_pre", "z", "attention_step", "resid_mid", "resid_post", "attention_norm_scale"):
            expected = getattr(by_position.layers, name)[:, :, -1]
            np.testing.assert_allclose(getattr(by_count.layers, name)[:, :, 0], expected, atol=1e-12, err_msg=name)


def test_the_pattern_of_a_token_is_that_of_all_its_positions_together(both):
    config, parameters, tokens, counts = both
    with jax.enable_x64(True):
        positions = np.asarray(walk(parameters, tokens, config).layers.pattern[0, :, 0, -1, :-1])
        expected = np.zeros((BATCH, VOCABULARY))
        np.add.at(expected, (np.arange(BATCH)[:, None], np.asarray(tokens[:, :-1])), positions)
        found = count_walk(parameters, tokens[:, -1], counts).layers.pattern[0, :, 0, 0]
        np.testing.assert_allclose(found, expected, atol=1e-12)


def test_the_order_of_the_context_does_not_matter(both):
    config, parameters, tokens, _ = both
    with jax.enable_x64(True):
        shuffled = tokens.at[:, :-1].set(tokens[:, :-1][:, ::-1])
        np.testing.assert_allclose(
            walk(parameters, shuffled, config).logits[:, -1],
            walk(parameters, tokens, config).logits[:, -1],
            atol=1e-12,
        )


def test_probabilities_are_the_limit_of_long_sequences(both):
    """Lemma 2: c_n = P(l|n) e^z / sum, whatever the scale of the counts."""
    _, parameters, tokens, counts = both
    with jax.enable_x64(True):
        share = counts / counts.sum(axis=1, keepdims=True)
        z = np.asarray(parameters.layers.attention.table[0, 0])[np.asarray(tokens[:, -1])]
        expected = np.asarray(share) * np.exp(z)
        expected /= expected.sum(axis=1, keepdims=True)
        found = count_walk(parameters, tokens[:, -1], share).layers.pattern[0, :, 0, 0]
        np.testing.assert_allclose(found, expected, atol=1e-12)


def test_counts_of_the_first_tokens_are_enough(both):
    """Tokens beyond the counts never occur: rows of Y and Z that are not read get no gradient."""
    _, parameters, tokens, counts = both
    with jax.enable_x64(True):
        few = counts.at[:, 15:].set(0)
        whole = count_walk(parameters, tokens[:, -1], few)
        short = count_walk(parameters, tokens[:, -1], few[:, :15])
        np.testing.assert_allclose(short.logits, whole.logits, atol=1e-12)
        assert short.layers.pattern.shape == (1, BATCH, 1, 1, 15)
