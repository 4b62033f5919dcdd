"""Attention statistics and pattern scores, compared with loops over queries and keys."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from properties.models import BERT, GPT2, compiled, examples, random_parameters, random_tokens

from minitf import ModelConfig, mixers, walk
from minitf.analysis import patterns


def pattern_of(config, batch=2, length=5):
    return compiled(config)(random_parameters(config), random_tokens(config, 0, batch, length)).layers.pattern


@pytest.mark.parametrize(
    "config", [GPT2, BERT, replace(GPT2, attend_self=False)], ids=["causal", "both", "others"]
)
def test_statistics_are_those_of_a_loop_over_queries_and_keys(config):
    valid = np.ones((2, 5), bool)
    valid[1, 3:] = False
    parameters, tokens = random_parameters(config), random_tokens(config)
    pattern = walk(parameters, tokens, config, valid=jnp.asarray(valid)).layers.pattern
    found = patterns.statistics(pattern, config, jnp.asarray(valid))
    a = np.float64(pattern)
    for layer, head in np.ndindex(2, config.heads):
        rows = []
        for b, i in zip(*np.nonzero(valid), strict=True):
            keys = [
                j
                for j in range(5)
                if valid[b, j] and (j <= i or not config.causal) and (j != i or config.attend_self)
            ]
            row = {j: a[layer, b, head, i, j] for j in keys}
            spread = -sum(p * np.log(p) for p in row.values() if p > 0)
            rows.append(
                {
                    "entropy": spread,
                    "entropy_share": spread / np.log(len(keys)) if len(keys) > 1 else 0.0,
                    "distance": sum(p * abs(i - j) for j, p in row.items()),
                    "first": row.get(0, 0.0),
                    "itself": row.get(i, 0.0),
                    "previous": row.get(i - 1, 0.0),
                }
            )
        for name in rows[0]:
            expected = np.mean([row[name] for row in rows])
            assert abs(getattr(found, name)[layer, head] - expected) < 2e-6, name


def test_uniform_attention_has_all_the_entropy_it_may_have():
    uniform = jnp.tri(6) / jnp.arange(1, 7)[:, None]
    np.testing.assert_allclose(patterns.entropy(uniform), np.log(np.arange(1, 7)), atol=1e-6)
    np.testing.assert_allclose(
        patterns.entropy_share(uniform, jnp.tri(6, dtype=bool)), [0, 1, 1, 1, 1, 1], atol=1e-6
    )
    np.testing.assert_allclose(patterns.mean_distance(uniform), np.arange(6) / 2, atol=1e-6)


def test_what_a_window_hides_is_nothing_that_uniform_attention_lacks():
    """In sight of a query are the keys of its layer's window, so their number is what entropy is a share of."""
    narrow, wide = mixers.Softmax(window=3), mixers.Softmax()
    for mixer, windows in ((narrow, (3,)), ((narrow, wide), (3, 6))):
        config = ModelConfig(vocabulary=5, layers=2, width=8, heads=2, length=6, mixer=mixer)
        lag = jnp.arange(6)[:, None] - jnp.arange(6)
        seen = jnp.stack([(lag >= 0) & (lag < window) for window in windows]).astype(float)
        uniform = jnp.broadcast_to((seen / seen.sum(-1, keepdims=True))[:, None, None], (len(windows), 1, 2, 6, 6))
        uniform = jnp.broadcast_to(uniform, (2, 1, 2, 6, 6))
        # The first query sees one key, and has no choice.
        np.testing.assert_allclose(patterns.statistics(uniform, config).entropy_share, 5 / 6, atol=1e-6)
        alone = patterns.statistics(uniform[1:], config.layer(1)).entropy_share
        np.testing.assert_allclose(alone, 5 / 6, atol=1e-6)


def test_a_convolution_sees_as_many_keys_as_it_has_taps():
    of = lambda mixer: ModelConfig(vocabulary=5, layers=2, width=8, heads=2, length=6, mixer=mixer)
    same = [patterns.pairs_in_sight(6, of(one)) for one in (mixers.Convolution(taps=3), mixers.Softmax(window=3))]
    np.testing.assert_array_equal(*same)


def test_one_hot_attention_has_no_entropy_and_its_gradient_is_finite():
    previous = jnp.eye(5, k=-1).at[0, 0].set(1.0)
    assert not np.asarray(patterns.entropy(previous)).any()
    assert np.isfinite(jax.grad(lambda a: patterns.entropy(a).sum())(previous)).all()
    np.testing.assert_array_equal(patterns.mass_on_previous(previous), [0, 1, 1, 1, 1])
    np.testing.assert_array_equal(patterns.mass_on_first(previous), [1, 1, 0, 0, 0])
    np.testing.assert_array_equal(patterns.mass_on_itself(previous), [1, 0, 0, 0, 0])


@examples(20)
@given(tokens=st.lists(st.integers(0, 3), min_size=8, max_size=8))
def test_templates_mark_the_pairs_they_are_named_for(tokens):
    row = jnp.asarray([tokens], jnp.int32)
    found = {
        "previous": patterns.previous_token_template(row)[0],
        "duplicate": patterns.duplicate_token_template(row)[0],
        "induction": patterns.induction_template(row)[0],
    }
    for i, j in np.ndindex(len(tokens), len(tokens)):
        assert found["previous"][i, j] == (j == i - 1)
        assert found["duplicate"][i, j] == (j < i and tokens[i] == tokens[j])
        assert found["induction"][i, j] == (0 < j <= i and tokens[j - 1] == tokens[i])


def test_a_pattern_score_is_the_share_of_the_attention_on_the_template():
    tokens = random_tokens(GPT2) % 3
    a = np.float64(compiled(GPT2)(random_parameters(GPT2), tokens).layers.pattern)
    template = patterns.duplicate_token_template(tokens)
    found = patterns.pattern_score(jnp.asarray(a, jnp.float32), template)
    for layer, batch, head in np.ndindex(found.shape):
        on = sum(a[layer, batch, head, i, j] for i, j in np.argwhere(template[batch]))
        assert abs(found[layer, batch, head] - on / a[layer, batch, head].sum()) < 1e-6
    anything = patterns.pattern_score(jnp.asarray(a, jnp.float32), jnp.ones((1, 5, 5), bool))
    np.testing.assert_allclose(anything, 1.0, atol=1e-6)


def test_heads_that_do_what_a_template_says_score_one():
    tokens = jnp.asarray([[4, 1, 2, 3, 1, 2, 3]], jnp.int32)
    induction = patterns.induction_template(tokens).astype(jnp.float32)[:, None]
    assert patterns.pattern_score(induction, patterns.induction_template(tokens)) == 1.0
    assert patterns.pattern_score(induction, patterns.duplicate_token_template(tokens)) == 0.0
    assert patterns.pattern_score(jnp.zeros((1, 1, 7, 7)), patterns.induction_template(tokens)) == 0.0


@pytest.mark.parametrize("beginning", [None, 0, 5])
def test_repeated_tokens_are_two_copies_of_random_ids_after_the_beginning(beginning):
    tokens = np.asarray(patterns.repeated_tokens(jax.random.key(0), 50, 6, 10, beginning))
    if beginning is not None:
        assert (tokens[:, 0] == beginning).all()
        tokens = tokens[:, 1:]
        assert beginning not in tokens
    np.testing.assert_array_equal(tokens[:, :6], tokens[:, 6:])
    assert set(tokens.flat) == set(range(10)) - {beginning}


@pytest.mark.parametrize("beginning", [False, True])
def test_the_induction_score_averages_the_stripe_over_the_second_copy(beginning):
    period, length = 4, 8 + beginning
    generator = np.random.default_rng(0)
    a = generator.uniform(size=(2, 3, length, length)).astype(np.float32)
    found = patterns.induction_score(jnp.asarray(a), period, beginning)
    expected = np.mean([a[..., i, i - 3] for i in range(period + beginning, length)], axis=0)
    np.testing.assert_allclose(found, expected, atol=1e-6)
    tokens = patterns.repeated_tokens(jax.random.key(1), 1, period, 1000, 0 if beginning else None)
    head = patterns.induction_template(tokens).astype(jnp.float32)
    np.testing.assert_allclose(patterns.induction_score(head, period, beginning), 1.0)


@pytest.mark.parametrize(
    ("ask", "sentence"),
    [
        (lambda: patterns.repeated_tokens(jax.random.key(0), 1, 1, 9), "a period of 1 repeats nothing"),
        (lambda: patterns.repeated_tokens(jax.random.key(0), 1, 3, 9, 9), "beginning token 9 is outside"),
        (lambda: patterns.repeated_tokens(jax.random.key(0), 1, 3, 1, 0), "leaves no token to repeat"),
        (lambda: patterns.induction_score(jnp.zeros((9, 9)), 3), "over 9 positions is not one of 6"),
        (
            lambda: patterns.pattern_score(jnp.zeros((1, 2, 5, 5)), jnp.zeros((1, 4, 4), bool)),
            r"template of \(4, 4\) query and key positions does not fit",
        ),
    ],
)
def test_what_cannot_be_asked_is_refused_with_a_sentence(ask, sentence):
    with pytest.raises(ValueError, match=sentence):
        ask()


def test_all_statistics_run_compiled():
    pattern = pattern_of(GPT2)
    compiled_too = jax.jit(lambda p: patterns.statistics(p, GPT2))(pattern)
    for a, b in zip(*map(jax.tree.leaves, (compiled_too, patterns.statistics(pattern, GPT2))), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)
