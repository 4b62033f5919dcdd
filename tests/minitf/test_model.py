from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from properties.models import (
    GPT2,
    LLAMA,
    compiled,
    configs,
    examples,
    quick_jit,
    random_parameters,
    random_tokens,
    relative_error,
    shapes,
)

from minitf import Change, Edit, ModelConfig, identity_edit, initialize, mixers, token_tables, walk
from minitf.declaration import check_fit
from minitf.edits import ablate
from minitf.model import unembed
from minitf.parameters import split_layers
from minitf.places import places_from_start
from minitf.walk import get, leaf_axes, put


def test_more_tokens_than_the_model_is_long_are_refused():
    with pytest.raises(ValueError, match="^9 tokens are more than the model's length of 8$"):
        walk(random_parameters(GPT2), jnp.zeros((1, 9), jnp.int32), GPT2)


@pytest.mark.parametrize("wrong", [-1, 13])
def test_a_token_outside_the_vocabulary_is_refused_where_it_can_be_seen(wrong):
    parameters, tokens = random_parameters(GPT2), random_tokens(GPT2).at[1, 2].set(wrong)
    forward = lambda: walk(parameters, tokens, GPT2)
    for refused in (forward, lambda: jax.eval_shape(forward)):
        with pytest.raises(ValueError, match=f"^there is no token {wrong}; the vocabulary is 0 to 12$"):
            refused()


def untyped(function):
    """Past the type checker of these tests, as users have none."""
    return getattr(function, "__wrapped__", function)


@pytest.mark.parametrize(
    ("tokens", "told"),
    [
        (
            np.zeros(8, np.int32),
            r"^tokens: int32 of the shape \(8,\); whole numbers are needed, \[batch, position\]",
        ),
        (np.zeros((2, 8), np.float32), r"^tokens: float32 of the shape \(2, 8\)"),
        (np.zeros((0, 8), np.int32), r"\[batch, position\], at least one$"),
        ([[1, 2]], r"^tokens: a list; make it an array: jnp.array"),
    ],
)
def test_what_are_no_tokens_is_told(tokens, told):
    with pytest.raises(ValueError, match=told):
        untyped(walk)(random_parameters(GPT2), tokens, GPT2)


HYBRID = replace(GPT2, mixer=(mixers.Mamba(), mixers.Softmax()))


@pytest.mark.parametrize(
    ("config", "of", "told"),
    [
        (GPT2, HYBRID, "they lack layers.0.attention.gate"),
        (HYBRID, GPT2, "they have layers.0.attention"),
        (
            replace(GPT2, hidden=20),
            GPT2,
            r"layers.feed_forward.into has the shape \(2, 12, 20\), .* \(2, 12, 48\)",
        ),
        (replace(GPT2, layers=3), GPT2, r"layers.attention.key has the shape \(3, 12, 3, 4\)"),
    ],
)
def test_parameters_of_another_model_are_told_by_a_weight(config, of, told):
    parameters = jax.eval_shape(lambda: initialize(config, jax.random.key(0)))
    with pytest.raises(ValueError, match=f"^the parameters are not of this model: .*{told}"):
        jax.eval_shape(lambda p: walk(p, random_tokens(of), of), parameters)


def test_single_layers_are_of_the_model_and_other_sizes_are_not():
    check_fit(split_layers(random_parameters(GPT2)), GPT2)
    with pytest.raises(ValueError, match=r"layers.0.feed_forward.into has the shape \(12, 48\)"):
        check_fit(split_layers(random_parameters(GPT2)), replace(GPT2, hidden=20))


def test_padding_of_another_shape_is_refused():
    with pytest.raises(ValueError, match=r"^valid has the shape \(2, 4\); the tokens it is of have \(2, 5\)$"):
        untyped(walk)(random_parameters(GPT2), random_tokens(GPT2), GPT2, valid=jnp.ones((2, 4), bool))


@pytest.mark.parametrize(
    ("mask", "what"),
    [(np.ones((2, 5), int), "int64"), (np.ones((2, 5)), "float64"), ([[True] * 5] * 2, "list")],
    ids=["int", "float", "list"],
)
def test_padding_that_is_not_said_in_booleans_is_refused(mask, what):
    with pytest.raises(ValueError, match=f"^valid is {what}; it must be an array of booleans, True where"):
        untyped(places_from_start)(5, GPT2, mask)


def test_an_edit_of_a_hybrid_is_refused_by_a_model_of_equal_layers():
    other = jax.eval_shape(lambda: walk(initialize(HYBRID, jax.random.key(0)), random_tokens(HYBRID), HYBRID))
    edit = ablate(other, "layers.z", layer=1, head=0)
    with pytest.raises(ValueError, match=r"the edit of 'layers.z' is of a model whose layers differ"):
        walk(random_parameters(GPT2), random_tokens(GPT2), GPT2, edit=edit)


def test_which_layer_of_those_that_differ_is_edited_cannot_be_traced():
    other = jax.eval_shape(lambda: walk(initialize(HYBRID, jax.random.key(0)), random_tokens(HYBRID), HYBRID))
    with pytest.raises(ValueError, match=r"the layers of this model differ in 'layers.z': say which by a number"):
        jax.eval_shape(lambda number: ablate(other, "layers.z", layer=number, head=0), 1)


def test_a_number_is_no_key():
    with pytest.raises(ValueError, match=r"^key is 3; it must be a random key, such as jax.random.key\(0\)$"):
        untyped(initialize)(GPT2, 3)


def test_an_edit_of_another_depth_is_refused():
    edit = put(Edit(), "layers.resid_mid", Change(jnp.ones((3, 1, 1, 1)), jnp.zeros((3, 1, 1, 1))))
    match = "^the edit of 'layers.resid_mid' has 3 layers on its first axis; the model has 2$"
    with pytest.raises(ValueError, match=match):
        walk(random_parameters(GPT2), random_tokens(GPT2), GPT2, edit=edit)


@examples(12)
@given(config=configs())
def test_an_edit_is_refused_exactly_where_the_walk_has_no_such_leaf(config):
    like = shapes(config)
    forward = lambda edit: walk(random_parameters(config), random_tokens(config), config, edit=edit)
    assert jax.eval_shape(forward, identity_edit(like)) == like
    for name in leaf_axes():
        if get(like, name) is None:
            with pytest.raises(ValueError, match=f"has no '{name}'"):
                forward(put(Edit(), name, Change(jnp.float32(1), jnp.float32(0))))


def test_logits_of_any_context_can_be_asked_for():
    parameters, tokens = random_parameters(GPT2), random_tokens(GPT2)
    found = compiled(GPT2)(parameters, tokens)
    assert relative_error(unembed(parameters, found.context, GPT2), found.logits) < 1e-6


def test_a_short_sequence_is_the_start_of_a_long_one():
    parameters, tokens = random_parameters(LLAMA), random_tokens(LLAMA)
    run = quick_jit(lambda p, t: walk(p, t, LLAMA).logits)
    assert relative_error(run(parameters, tokens[:, :3]), run(parameters, tokens)[:, :3]) < 1e-6


def test_a_model_of_attention_alone_ends_each_layer_after_it():
    config = ModelConfig(vocabulary=7, layers=2, width=8, heads=2, length=5, feed_forward="none")
    found = compiled(config)(random_parameters(config), random_tokens(config))
    np.testing.assert_array_equal(found.layers.resid_post, found.layers.resid_mid)
    assert found.layers.pre is found.layers.feed_forward_step is None


def test_parallel_halves_read_the_same_stream():
    parallel = ModelConfig(vocabulary=7, width=8, heads=2, length=5, parallel=True)
    parameters, tokens = random_parameters(parallel), random_tokens(parallel)
    cut = Edit(layers=put(Edit(), "layers.attention_step", Change(jnp.float32(0), jnp.float32(0))).layers)
    plain, without = compiled(parallel)(parameters, tokens), compiled(parallel)(parameters, tokens, cut)
    np.testing.assert_array_equal(without.layers.feed_forward_step, plain.layers.feed_forward_step)
    sequential = ModelConfig(vocabulary=7, width=8, heads=2, length=5)
    plain, without = compiled(sequential)(parameters, tokens), compiled(sequential)(parameters, tokens, cut)
    assert relative_error(without.layers.feed_forward_step, plain.layers.feed_forward_step) > 1e-2


def test_the_papers_model_scores_by_its_table_and_mixes_the_tokens_themselves():
    config = token_tables(6)
    parameters, tokens = random_parameters(config), random_tokens(config)
    found = compiled(config)(parameters, tokens)
    table = np.asarray(parameters.layers.attention.table[0, 0])
    tokens = np.asarray(tokens)
    scores = table[tokens[:, :, None], tokens[:, None, :]]
    past = np.tril(np.ones((5, 5), bool), -1)
    np.testing.assert_allclose(
        np.where(past, found.layers.scores[0, :, 0], 0), np.where(past, scores, 0), atol=1e-6
    )
    np.testing.assert_array_equal(found.start, np.eye(6)[tokens])
    np.testing.assert_allclose(
        found.layers.attention_step[0], np.asarray(found.layers.pattern[0, :, 0]) @ np.eye(6)[tokens], atol=1e-6
    )
    lengths = np.linalg.norm(np.asarray(found.end), axis=-1)
    np.testing.assert_allclose(lengths[:, 1:], 1.0, rtol=1e-6)
    assert not lengths[:, 0].any()
