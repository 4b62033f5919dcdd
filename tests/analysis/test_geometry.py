"""The geometry of walks, compared with a walk followed point by point; and the controls."""

import itertools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from properties.models import (
    BERT,
    GPT2,
    LLAMA,
    bits,
    compiled,
    examples,
    random_parameters,
    random_tokens,
)

from minitf import Walk, mixers
from minitf.analysis import geometry
from minitf.analysis.lens import logit_lens, stations
from minitf.parameters import split_layers
from minitf.walk import LayerWalk

HYBRID = replace(GPT2, mixer=(mixers.Retention(), mixers.Softmax()))
ATTENTION_ONLY = replace(GPT2, feed_forward="none", layers=3)


def run(config):
    parameters, tokens = random_parameters(config), random_tokens(config)
    return parameters, tokens, compiled(config)(parameters, tokens)


def between(u, v):
    return np.arccos(np.clip(u @ v / np.sqrt((u @ u) * (v @ v)), -1, 1))


@pytest.mark.parametrize("config", [GPT2, LLAMA, BERT, ATTENTION_ONLY], ids=["gpt2", "llama", "bert", "attention"])
def test_every_measure_is_the_one_of_a_walk_followed_point_by_point(config):
    _, _, walk = run(config)
    found = geometry.encoding_geometry(walk, config)
    points = np.float64(stations(walk))
    points = np.concatenate([points[:1], points[1::2]]) if config.feed_forward == "none" else points
    for batch, position in np.ndindex(2, 5):
        h = points[:, batch, position]
        travelled = 0.0
        for j in range(1, len(h)):
            d = h[j] - h[j - 1]
            travelled += np.sqrt(d @ d)
            place = (j - 1, batch, position)
            whole = h[-1] - h[0]
            expected = {
                "relative_step": np.sqrt(d @ d) / np.sqrt(h[j - 1] @ h[j - 1]),
                "point_angle": between(h[j - 1], h[j]),
                "radial": d @ h[j - 1] / np.sqrt((d @ d) * (h[j - 1] @ h[j - 1])),
                "progress": (h[j] - h[0]) @ whole / (whole @ whole),
            }
            if j + 1 < len(h):
                expected["turning_angle"] = between(d, h[j + 1] - h[j])
            for name, value in expected.items():
                # Some ten roundings of points that are up to ten times as long as a move.
                assert abs(getattr(found, name)[place] - value) < 2e-5 * max(1, abs(value)), name
        assert abs(found.efficiency[batch, position] - np.sqrt(whole @ whole) / travelled) < 2e-5
    assert len(found.turning_angle) == len(found.relative_step) - 1 == len(h) - 2


def walk_through(points):
    """A walk through given points, ``[2 * layers + 1, width]``, at one position."""
    points = jnp.asarray(points, jnp.float32)[:, None, None]
    leaves = {"resid_pre": points[:-1:2], "resid_mid": points[1::2], "resid_post": points[2::2]}
    return Walk(layers=LayerWalk(**leaves))


def test_a_straight_walk_is_efficient_and_does_not_turn():
    found = geometry.encoding_geometry(walk_through([[1, 0], [2, 0], [4, 0], [5, 0], [8, 0]]), GPT2)
    np.testing.assert_allclose(found.relative_step.ravel(), [1, 1, 0.25, 0.6], rtol=1e-6)
    np.testing.assert_allclose(found.turning_angle, 0, atol=1e-6)
    np.testing.assert_allclose(found.progress.ravel(), [1 / 7, 3 / 7, 4 / 7, 1], rtol=1e-6)
    np.testing.assert_allclose(found.radial, 1, rtol=1e-6)
    np.testing.assert_allclose(found.efficiency, 1, rtol=1e-6)


def test_a_walk_around_a_square_turns_by_right_angles_and_gets_nowhere():
    found = geometry.encoding_geometry(walk_through([[0, 0], [1, 0], [1, 1], [0, 1], [0, 0]]), GPT2)
    np.testing.assert_allclose(found.turning_angle, np.pi / 2, rtol=1e-6)
    np.testing.assert_array_equal(found.efficiency, 0)
    np.testing.assert_array_equal(found.progress, 0)  # no way to go: zero, not NaN
    assert found.relative_step[0] == found.radial[0] == 0
    assert found.point_angle[0] == found.point_angle[3] == np.float32(np.pi / 2)


def test_small_angles_are_exact_where_the_arc_cosine_is_not():
    for tilt in (1e-2, 1e-4, 1e-6):
        one, other = jnp.asarray([1.0, 0.0]), jnp.asarray([np.cos(tilt), np.sin(tilt)], jnp.float32)
        assert abs(geometry.angle(one, other) - tilt) < 1e-5 * tilt


def test_random_moves_turn_by_right_angles_and_are_as_efficient_as_a_random_walk():
    moves = np.random.default_rng(0).normal(size=(65, 4096))
    found = geometry.encoding_geometry(walk_through(np.cumsum(moves, axis=0)), GPT2)
    np.testing.assert_allclose(found.turning_angle, np.pi / 2, atol=5 / np.sqrt(4096))
    np.testing.assert_allclose(found.efficiency, 64**-0.5, rtol=0.1)


def test_values_split_into_those_of_attention_and_of_the_feed_forward():
    _, _, walk = run(GPT2)
    step = geometry.encoding_geometry(walk, GPT2).relative_step
    attention, feed_forward = geometry.by_sublayer(step, GPT2)
    size = lambda x: np.linalg.norm(x, axis=-1)
    expected = size(walk.layers.attention_step) / size(walk.layers.resid_pre)
    np.testing.assert_allclose(attention, expected, rtol=1e-4)
    np.testing.assert_allclose(
        feed_forward, size(walk.layers.feed_forward_step) / size(walk.layers.resid_mid), rtol=1e-4
    )
    alone, none = geometry.by_sublayer(step, ATTENTION_ONLY)
    assert len(alone) == len(step) and not len(none)


def test_the_rank_of_the_true_next_token_counts_the_tokens_that_the_lens_prefers():
    parameters, tokens, walk = run(GPT2)
    found = geometry.next_token_rank(parameters, walk, tokens, GPT2)
    logits = np.asarray(logit_lens(parameters, walk, GPT2))
    assert found.shape == (5, 2, 4)
    for station, batch, position in np.ndindex(found.shape):
        row = logits[station, batch, position]
        assert found[station, batch, position] == sum(x > row[tokens[batch, position + 1]] for x in row)


def test_jumps_are_the_distances_between_the_output_vectors_of_neighbours():
    for config in (GPT2, LLAMA):
        parameters, tokens, _ = run(config)
        table = np.float64(parameters.embedding if config.tied else parameters.unembedding.T)
        expected = [
            [np.linalg.norm(table[b] - table[a]) for a, b in itertools.pairwise(row)] for row in np.asarray(tokens)
        ]
        np.testing.assert_allclose(geometry.jumps(parameters, tokens, config), expected, rtol=1e-5, atol=1e-6)
        pairs = [np.linalg.norm(a - b) for i, a in enumerate(table) for j, b in enumerate(table) if i != j]
        found = geometry.random_jump(parameters, config, jax.random.key(0), 4000)
        assert abs(found - np.mean(pairs)) < 5 * np.std(pairs) / np.sqrt(4000)


@examples(20)
@example(row=[0] * 7, run=2)  # a run that overlaps its own repetition
@given(row=st.lists(st.integers(0, 2), min_size=7, max_size=7), run=st.integers(1, 3))
def test_a_run_is_a_revisit_when_it_stands_earlier_in_the_sequence(row, run):
    found = geometry.revisits(jnp.asarray([row], jnp.int32), run)[0]
    runs = [tuple(row[i : i + run]) for i in range(len(row) - run + 1)]
    assert list(found) == [r in runs[:i] for i, r in enumerate(runs)]


@pytest.mark.parametrize("layers", [2, 3, 5])
def test_shuffled_layers_are_the_same_layers_none_in_its_place(layers):
    config = replace(GPT2, layers=layers)
    parameters = random_parameters(config)
    shuffled = geometry.shuffled_layers(parameters, config, jax.random.key(0))
    before, after = (np.asarray(p.layers.attention.query) for p in (parameters, shuffled))
    order = [next(i for i in range(layers) if (before[i] == x).all()) for x in after]
    assert sorted(order) == list(range(layers)) and all(i != place for place, i in enumerate(order))
    into = np.asarray(parameters.layers.feed_forward.into)
    np.testing.assert_array_equal(shuffled.layers.feed_forward.into, into[order])
    np.testing.assert_array_equal(shuffled.embedding, parameters.embedding)


def test_controls_of_single_layers_are_those_of_the_stack():
    stacked = random_parameters(GPT2)
    for control in (geometry.shuffled_layers, geometry.random_initialization):
        single = control(split_layers(stacked), GPT2, jax.random.key(0))
        assert bits(single) == bits(split_layers(control(stacked, GPT2, jax.random.key(0))))


@pytest.mark.parametrize("config", [GPT2, replace(LLAMA, unembedding_bias=True)], ids=["tied", "untied"])
def test_a_permuted_vocabulary_walks_replaced_text(config):
    parameters, tokens, _ = run(config)
    permuted = geometry.permuted_vocabulary(parameters, config, jax.random.key(3))
    table = np.asarray(parameters.embedding)
    order = np.array([np.argmax((table == row).all(-1)) for row in np.asarray(permuted.embedding)])
    assert sorted(order) == list(range(config.vocabulary)) and (order != np.arange(config.vocabulary)).any()
    found = compiled(config)(permuted, tokens)
    expected = compiled(config)(parameters, jnp.asarray(order[tokens], jnp.int32))
    assert bits(found.end) == bits(expected.end)
    np.testing.assert_allclose(found.logits, np.asarray(expected.logits)[..., order], rtol=1e-5, atol=1e-5)


def test_a_random_initialization_has_the_shapes_and_dtypes_and_other_numbers():
    parameters = jax.tree.map(lambda x: x.astype(jnp.bfloat16), random_parameters(LLAMA))
    fresh = geometry.random_initialization(parameters, LLAMA, jax.random.key(0))
    assert jax.tree.map(jnp.shape, fresh) == jax.tree.map(jnp.shape, parameters)
    assert {x.dtype for x in jax.tree.leaves(fresh)} == {jnp.dtype(jnp.bfloat16)}
    assert bits(fresh.embedding) != bits(parameters.embedding)


@pytest.mark.parametrize(
    ("ask", "sentence"),
    [
        (lambda p: geometry.encoding_geometry(Walk(), GPT2), "keep them in the walk"),
        (lambda p: geometry.shuffled_layers(p, replace(GPT2, layers=1), jax.random.key(0)), "one layer cannot"),
        (lambda p: geometry.shuffled_layers(p, HYBRID, jax.random.key(0)), "different mixers cannot take"),
        (
            lambda p: geometry.revisits(jnp.zeros((1, 3), jnp.int32), 4),
            "run of 4 tokens does not fit sequences of 3",
        ),
        (lambda p: geometry.random_jump(p, replace(GPT2, vocabulary=1), jax.random.key(0)), "no jumps"),
        (
            lambda p: geometry.permuted_vocabulary(
                p, replace(GPT2, embedding="one_hot", tied=False, vocabulary=12), jax.random.key(0)
            ),
            "one-hot embeddings cannot be permuted",
        ),
    ],
)
def test_what_cannot_be_asked_is_refused_with_a_sentence(ask, sentence):
    with pytest.raises(ValueError, match=sentence):
        ask(random_parameters(GPT2))


def test_the_geometry_runs_compiled_and_by_vmap():
    parameters, tokens, walk = run(LLAMA)
    forward = jax.jit(lambda t: geometry.encoding_geometry(compiled(LLAMA)(parameters, t), LLAMA))
    many = jnp.stack([tokens, tokens[::-1]])
    together = jax.vmap(forward)(many)
    one = geometry.encoding_geometry(walk, LLAMA)
    for a, b in zip(jax.tree.leaves(together), jax.tree.leaves(one), strict=True):
        np.testing.assert_allclose(a[0], b, rtol=1e-3, atol=1e-5)
