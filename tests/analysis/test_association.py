import dataclasses
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from properties.models import GPT2, LLAMA, compiled, random_parameters, random_tokens

from minitf import mixers, walk
from minitf.analysis import association, prediction_quality
from minitf.analysis.association import (
    FRACTIONS,
    REPLACEMENTS,
    by_head,
    in_order,
    low_rank,
    orders,
    top_k,
    with_heads_replaced,
)
from minitf.analysis.prediction_quality import as_quality, next_tokens, quality
from minitf.edits import set_to

KEY = jax.random.key(0)
PARAMETERS, TOKENS = random_parameters(GPT2), random_tokens(GPT2, batch=3, length=7)


@cache
def intact_walk():
    return compiled(GPT2)(PARAMETERS, TOKENS)


@cache
def data_walk():
    return compiled(GPT2)(PARAMETERS, random_tokens(GPT2, seed=1, batch=8, length=7))


def test_of_equal_weights_the_latest_are_kept():
    config = dataclasses.replace(GPT2, mixer=mixers.Uniform())
    walked = walk(random_parameters(config), TOKENS, config)
    for count in (1, 4):
        found = np.asarray(top_k(count)(walked, walked, config, KEY))
        lag = np.arange(7)[:, None] - np.arange(7)
        np.testing.assert_array_equal(found > 0, np.broadcast_to((lag >= 0) & (lag < count), found.shape))
        np.testing.assert_allclose(found.sum(axis=-1), 1, atol=1e-6)


@pytest.mark.parametrize("name", REPLACEMENTS)
def test_every_replacement_is_an_association_of_what_is_in_sight(name):
    found = np.asarray(REPLACEMENTS[name](intact_walk(), data_walk(), GPT2, KEY))
    assert found.shape == intact_walk().layers.pattern.shape
    # Of some rows a close matrix of small rank leaves less.
    size = np.minimum(found.sum(axis=-1), 1) if name.startswith("rank") else found.sum(axis=-1)
    np.testing.assert_allclose(np.median(size) if name.startswith("rank") else size, 1, atol=1e-5)
    assert found.min() >= 0 and not np.any(np.triu(found, 1))


def test_constant_ones_have_no_part_of_the_text_and_the_others_do():
    other = walk(PARAMETERS, random_tokens(GPT2, seed=2, batch=3, length=7), GPT2)
    constant = {"uniform", "mean over data", "mean per lag", "identity", "random", "positions only"}
    for name, replacement in REPLACEMENTS.items():
        same = np.array_equal(
            replacement(intact_walk(), data_walk(), GPT2, KEY), replacement(other, data_walk(), GPT2, KEY)
        )
        assert same == (name in constant), name


def test_the_mean_per_lag_is_a_function_of_the_distance_before_rows_sum_to_one():
    average = np.asarray(data_walk().layers.pattern).mean(axis=1)
    found = np.asarray(association.by_lag(intact_walk(), data_walk(), GPT2, KEY))[:, 0]
    for t in range(7):
        distances = [np.diagonal(average, -lag, -2, -1).mean(axis=-1) for lag in range(t + 1)]
        by_distance = np.stack(distances)
        row = by_distance[::-1] / by_distance.sum(axis=0)
        np.testing.assert_allclose(found[..., t, : t + 1], np.moveaxis(row, 0, -1), atol=1e-6)


def test_shuffled_rows_keep_their_weights_and_lose_their_places():
    found = np.asarray(association.shuffled(intact_walk(), data_walk(), GPT2, KEY))
    np.testing.assert_array_equal(np.sort(found, axis=-1), np.sort(intact_walk().layers.pattern, axis=-1))
    assert np.abs(found - intact_walk().layers.pattern).max() > 0.01


def test_all_of_the_weights_and_the_whole_rank_are_the_pattern_itself():
    for replacement in (top_k(7), low_rank(7)):
        np.testing.assert_allclose(
            replacement(intact_walk(), data_walk(), GPT2, KEY), intact_walk().layers.pattern, atol=1e-5
        )
    first = np.asarray(top_k(1)(intact_walk(), data_walk(), GPT2, KEY))
    np.testing.assert_array_equal(first.argmax(axis=-1), np.asarray(intact_walk().layers.pattern).argmax(axis=-1))
    np.testing.assert_allclose(first.max(axis=-1), 1, rtol=1e-6)


def test_where_places_alone_make_the_scores_they_are_all_of_the_association():
    config = dataclasses.replace(GPT2, position="alibi")
    parameters = random_parameters(config)
    attention = parameters.layers.attention
    zero = {name: jnp.zeros_like(getattr(attention, name)) for name in ("query", "query_bias")}
    layers = dataclasses.replace(parameters.layers, attention=dataclasses.replace(attention, **zero))
    parameters = dataclasses.replace(parameters, layers=layers)
    intact = walk(parameters, TOKENS, config)
    positions = association.positions_only(intact, intact, config, KEY)
    np.testing.assert_allclose(positions, intact.layers.pattern, atol=1e-6)
    contents = association.contents_only(intact, intact, config, KEY)
    np.testing.assert_allclose(contents, association.uniform(intact, intact, config, KEY), atol=1e-6)


def test_what_rounding_leaves_of_a_row_is_not_made_a_row():
    """Of a close matrix, rows that are nearly gone depend on rounding: they grow ten times and no more."""
    whole = np.zeros((1, 1, 1, 3, 3), np.float32)
    whole[..., 0, 0], whole[..., 1, 0], whole[..., 2, :] = 1.0, 1.0, (0.004, 0.0, 0.996)
    pattern = jnp.asarray(whole)
    intact = intact_walk()
    intact = dataclasses.replace(intact, layers=dataclasses.replace(intact.layers, pattern=pattern))
    one_layer = dataclasses.replace(GPT2, layers=1)
    found = np.asarray(low_rank(1)(intact, intact, one_layer, KEY))[0, 0, 0]
    np.testing.assert_allclose(found[:2, 0], 1, rtol=1e-5)
    left = np.linalg.svd(whole[0, 0, 0])
    close = left[0][2, 0] * left[1][0] * left[2][0, 0]
    np.testing.assert_allclose(found[2, 0], 10 * close, rtol=1e-3)


def test_a_window_ends_what_is_in_sight():
    config = dataclasses.replace(GPT2, mixer=(mixers.Softmax(window=3), mixers.Softmax()))
    run, parameters = compiled(config), random_parameters(config)
    intact = association.kept(run(parameters, TOKENS))
    for name, replace in association.possible(intact).items():
        found = np.asarray(replace(intact, intact, config, KEY))
        assert not np.any(np.tril(found[0], -3)) and not np.any(np.triu(found, 1)), name
        if name in ("uniform", "rows shuffled", "random"):
            assert np.any(np.tril(found[1], -3)), name
    uniform = np.asarray(association.uniform(intact, intact, config, KEY))
    np.testing.assert_allclose(uniform[0, ..., 5, 3:6], 1 / 3, rtol=1e-6)


@pytest.mark.parametrize("mixer", [mixers.Mamba(states=4), mixers.DeltaNet(), mixers.Gru(), mixers.Uniform()])
def test_of_other_mixers_every_replacement_is_as_heavy_as_what_it_replaces(mixer):
    config = dataclasses.replace(GPT2, mixer=mixer)
    run, parameters = compiled(config), random_parameters(config)
    intact, data = run(parameters, TOKENS), run(parameters, random_tokens(config, seed=1, batch=8, length=7))
    intact, data = association.kept(intact), association.kept(data)
    pattern = np.asarray(intact.layers.pattern)
    total = np.asarray(data.layers.pattern).mean(axis=1, keepdims=True)
    for name, replace in association.possible(intact).items():
        found = np.asarray(replace(intact, data, config, KEY))
        assert found.shape == pattern.shape and not np.any(np.triu(found, 1)), name
        if name in ("uniform", "identity", "random", "mean over data"):
            expected = np.broadcast_to(total.sum(axis=-1), pattern.shape[:-1])
            np.testing.assert_allclose(found.sum(axis=-1), expected, rtol=1e-4, atol=1e-5)
        elif name == "mean per lag":
            expected = np.broadcast_to(np.abs(total).sum(axis=-1), pattern.shape[:-1])
            np.testing.assert_allclose(np.abs(found).sum(axis=-1), expected, rtol=1e-4, atol=1e-5)
        else:
            expected, size = np.abs(pattern).sum(axis=-1), np.abs(found).sum(axis=-1)
            if name.startswith("rank"):  # which leaves less of some rows
                assert np.all(size < expected * (1 + 1e-4) + 1e-5)
                assert np.isclose(size, expected, rtol=1e-4, atol=1e-5).mean() > 0.3
            else:
                np.testing.assert_allclose(size, expected, rtol=1e-4, atol=1e-5)
    for whole in (top_k(7), low_rank(7)):
        rounding = 1e-5 * np.abs(pattern).max()  # of the largest number in a decomposed matrix
        np.testing.assert_allclose(whole(intact, data, config, KEY), pattern, atol=rounding)


@pytest.mark.parametrize("config", [GPT2, LLAMA], ids=["gpt2", "llama"])
def test_a_head_replaced_is_one_edited_walk(config):
    parameters, tokens = random_parameters(config), random_tokens(config, length=6)
    intact = walk(parameters, tokens, config)
    replacement = association.uniform(intact, intact, config, KEY)
    found = as_quality(
        by_head(
            parameters, intact, replacement, prediction_quality.metric(next_tokens(tokens), intact.logits), config
        )
    )
    assert found.loss.shape == (config.layers, config.heads)
    for layer, head in ((0, 1), (1, 0)):
        edit = set_to(intact, "layers.pattern", replacement[layer, :, head], layer=layer, head=head)
        expected = quality(walk(parameters, tokens, config, edit=edit).logits, next_tokens(tokens), intact.logits)
        for name in ("loss", "accuracy", "divergence"):
            np.testing.assert_allclose(
                getattr(found, name)[layer, head], getattr(expected, name), rtol=1e-4, atol=1e-6
            )


def test_a_share_of_the_heads_is_replaced_together():
    replacement = association.shuffled(intact_walk(), data_walk(), GPT2, KEY)
    metric = prediction_quality.metric(next_tokens(TOKENS), intact_walk().logits)
    importance = as_quality(by_head(PARAMETERS, intact_walk(), replacement, metric, GPT2)).loss
    first = orders(np.asarray(importance), [0])["most important first"]
    masks = jnp.stack([in_order(first, fraction, (GPT2.layers, GPT2.heads)) for fraction in FRACTIONS])
    assert masks.sum(axis=(1, 2)).tolist() == [0, 2, 3, 5, 6]
    found = as_quality(with_heads_replaced(PARAMETERS, TOKENS, replacement, masks, metric, GPT2))
    intact = quality(intact_walk().logits, next_tokens(TOKENS), intact_walk().logits)
    np.testing.assert_allclose(found.loss[0], intact.loss, rtol=1e-5)
    every = set_to(intact_walk(), "layers.pattern", replacement)
    logits = walk(PARAMETERS, TOKENS, GPT2, edit=every).logits
    np.testing.assert_allclose(
        found.loss[-1], quality(logits, next_tokens(TOKENS), intact_walk().logits).loss, rtol=1e-5
    )
    assert found.divergence[0] < 1e-6 < found.divergence[-1]


def test_orders_go_from_least_to_most_and_back_and_at_random():
    found = orders(np.array([[3.0, 1.0], [2.0, 0.0]]), [4])
    assert found["least important first"].tolist() == [3, 1, 2, 0]
    assert found["most important first"].tolist() == [0, 2, 1, 3]
    assert sorted(found["random order 4"].tolist()) == [0, 1, 2, 3]


def test_what_cannot_be_is_told():
    replacement = association.uniform(intact_walk(), data_walk(), GPT2, KEY)
    with pytest.raises(
        ValueError, match=r"^the masks are of \(3, 3\) layers and heads; the replacement has \(2, 3\)$"
    ):
        with_heads_replaced(PARAMETERS, TOKENS, replacement, jnp.ones((1, 3, 3), bool), jnp.mean, GPT2)
