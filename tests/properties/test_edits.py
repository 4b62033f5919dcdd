"""Edits: data, composable, exact where they should be exact, and usable under every transformation."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from properties.models import (
    BERT,
    GPT2,
    LLAMA,
    NEOX,
    bits,
    compiled,
    compiled_logits,
    configs,
    examples,
    in_float64,
    largest,
    neutral,
    quick_jit,
    random_parameters,
    random_tokens,
    relative_error,
    shapes,
)

from minitf import Change, change, compose, identity_edit, walk
from minitf.walk import Edit, get, leaves, put

UNIT = 2.0**-24


EDITED = ("start", "layers.q", "layers.pattern", "layers.head_steps", "layers.pre", "layers.resid_post", "logits")


def random_edit(config, seed, names=EDITED):
    """Changes of ordinary size at the given leaves."""
    generator = np.random.default_rng(seed)
    edit, like = Edit(), shapes(config)
    for name in names:
        shape = get(like, name).shape
        keep, by = 1 + 0.1 * generator.normal(size=shape), 0.1 * generator.normal(size=shape)
        edit = put(edit, name, Change(np.float32(keep), np.float32(by)))
    return edit


def among_all(config, edit):
    """The same edit, of all leaves, as the identity edit is: so of one program for all tests."""
    return compose(neutral(config), edit)


def some(names, seed):
    """A random half of the leaves."""
    return tuple(np.random.default_rng(seed).permutation(names)[: len(names) // 2])


@pytest.fixture(scope="module")
def gpt2():
    return random_parameters(GPT2), random_tokens(GPT2)


@pytest.mark.optimized
@pytest.mark.parametrize("config", [GPT2, LLAMA, NEOX], ids=["gpt2", "llama", "neox"])
def test_the_identity_edit_changes_no_bit(config):
    parameters, tokens = random_parameters(config), random_tokens(config)
    plain = compiled(config)(parameters, tokens)
    assert bits(compiled(config)(parameters, tokens, neutral(config))) == bits(plain)


@pytest.mark.optimized
@examples(4)
@given(config=configs())
def test_compiled_otherwise_the_identity_edit_moves_at_most_the_last_bits(config):
    # XLA may contract a product and a sum into one rounding in the one program and not in the other: one unit
    # here and there, at most some ten such places in a sub-layer of sums of some ten terms each.
    parameters, tokens = random_parameters(config), random_tokens(config)
    plain = compiled_logits(config)(parameters, tokens)
    edited = compiled_logits(config)(parameters, tokens, neutral(config))
    assert relative_error(edited, plain) <= 2 * config.layers * 10 * UNIT


def test_a_thousand_edits_run_through_one_executable(gpt2):
    run = jax.jit(lambda p, t, e: walk(p, t, GPT2, edit=e).logits)
    seen = set()
    for number in range(1000):
        keep = np.ones((2, 1, 1, 3, 1), np.float32)
        keep[number % 2, :, :, number % 3] = 0.001 * number
        edit = put(Edit(), "layers.z", Change(keep, np.full((2, 1, 1, 1, 1), -0.0, np.float32)))
        seen.add(np.asarray(run(*gpt2, edit)).tobytes())
    assert run._cache_size() == 1
    assert len(seen) > 990


def test_a_traced_index_sweeps_over_layers_in_one_program(gpt2):
    like = shapes(GPT2)
    knocked_out = lambda layer: walk(*gpt2, GPT2, edit=change(like, "layers.z", layer=layer, keep=0.0)).logits
    together = quick_jit(jax.vmap(knocked_out))(jnp.arange(2))
    for layer in range(2):
        single = compiled_logits(GPT2)(*gpt2, change(like, "layers.z", layer=layer, keep=0.0))
        assert relative_error(together[layer], single) < 20 * UNIT


@pytest.mark.parametrize("leaf", ["layers.z", "layers.pattern", "layers.v"])
def test_a_head_edited_to_zero_is_a_head_without_output_weights(gpt2, leaf):
    parameters, tokens = gpt2
    edited = compiled_logits(GPT2)(parameters, tokens, change(shapes(GPT2), leaf, **place(leaf), keep=0.0))
    weights = parameters.layers.attention.output.at[1, 2].set(0.0)
    cut = parameters.replace(
        layers=parameters.layers.replace(attention=parameters.layers.attention.replace(output=weights))
    )
    # Zeros are exact in any sum; only the fusing of the edit itself may move a last bit.
    assert relative_error(edited, compiled_logits(GPT2)(cut, tokens)) < 4 * UNIT


def place(leaf):
    return {"layer": 1, ("key_value_head" if leaf == "layers.v" else "head"): 2}


def test_a_head_step_edited_to_zero_takes_the_whole_step_with_it(gpt2):
    parameters, tokens = gpt2
    like = shapes(GPT2)
    without = lambda leaf: among_all(GPT2, change(like, leaf, layer=1, head=2, keep=0.0))
    one, other = (compiled(GPT2)(parameters, tokens, without(leaf)) for leaf in ("layers.head_steps", "layers.z"))
    assert relative_error(one.logits, other.logits) < 20 * UNIT
    assert not np.asarray(one.layers.head_steps[1, :, :, 2]).any()


@examples(10)
@given(first=st.integers(0, 10**6), second=st.integers(0, 10**6))
def test_doing_one_edit_and_then_another_is_their_composition(first, second):
    # On one leaf at a time "then" is defined by what the leaf is after the first edit.
    one, two = (random_edit(GPT2, seed, some(EDITED, seed)) for seed in (first, second))
    both = compose(one, two)
    value = np.random.default_rng(first).normal()
    for name, _ in leaves(shapes(GPT2)):
        expected = value
        for edit in (one, two):
            c = get(edit, name)
            expected = expected if c is None else np.float64(c.keep) * expected + np.float64(c.put)
        c = get(both, name)
        found = value if c is None else np.float64(c.keep) * value + np.float64(c.put)
        np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-6)


@examples(10)
@given(seed=st.integers(0, 10**6), third=st.integers(0, 10**6))
def test_composition_is_associative_and_has_the_identity(seed, third):
    one, two, three = (random_edit(GPT2, s, some(EDITED, s)) for s in (seed, seed + 1, third))
    left, right = compose(compose(one, two), three), compose(one, compose(two, three))
    assert jax.tree.structure(left) == jax.tree.structure(right)
    for a, b in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=16 * UNIT)  # a dozen roundings of numbers around one
    assert bits(compose(one, Edit())) == bits(compose(Edit(), one)) == bits(one)
    for composed in (compose(one, neutral(GPT2)), compose(neutral(GPT2), one)):
        for name, value in leaves(one):
            assert bits(get(composed, name)) == bits(value)


def test_an_edit_of_an_edited_leaf_is_the_composed_edit_of_the_model(gpt2):
    like = shapes(GPT2)
    halve = change(like, "layers.attention_step", layer=0, keep=0.5)
    shift = change(like, "layers.attention_step", layer=0, put=0.25)
    edited = compiled(GPT2)(*gpt2, among_all(GPT2, compose(halve, shift)))
    plain = compiled(GPT2)(*gpt2)
    expected = np.float64(plain.layers.attention_step[0]) * 0.5 + 0.25
    assert relative_error(edited.layers.attention_step[0], expected) < UNIT
    swapped = compiled(GPT2)(*gpt2, among_all(GPT2, compose(shift, halve)))
    assert relative_error(swapped.layers.attention_step[0], expected - 0.125) < UNIT


@functools.cache
def edited_logits():
    return quick_jit(lambda p, t, e: walk(p, t, GPT2, edit=e).logits)


@examples(10)
@given(seed=st.integers(0, 10**6))
def test_edits_under_vmap_are_a_loop_over_edits(seed):
    parameters, tokens = random_parameters(GPT2), random_tokens(GPT2)
    edits = [random_edit(GPT2, seed + i) for i in range(3)]
    together = batched_logits()(parameters, tokens, jax.tree.map(lambda *x: jnp.stack(x), *edits))
    for index, edit in enumerate(edits):
        assert relative_error(together[index], edited_logits()(parameters, tokens, edit)) < 40 * UNIT


@functools.cache
def batched_logits():
    return quick_jit(jax.vmap(lambda p, t, e: walk(p, t, GPT2, edit=e).logits, (None, None, 0)))


def test_edits_under_scan_are_a_loop_over_edits(gpt2):
    edits = [random_edit(GPT2, i) for i in range(3)]
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *edits)
    step = lambda total, edit: (total + 1, walk(*gpt2, GPT2, edit=edit).logits)
    _, found = quick_jit(lambda e: jax.lax.scan(step, 0, e))(stacked)
    for index, edit in enumerate(edits):
        assert relative_error(found[index], edited_logits()(*gpt2, edit)) < 40 * UNIT


@pytest.mark.parametrize("config", [LLAMA, BERT], ids=["llama", "bert"])
def test_the_gradient_by_put_at_the_neutral_edit_is_the_attribution_of_every_leaf(config):
    with jax.enable_x64(True):
        parameters, tokens = in_float64(random_parameters(config)), random_tokens(config)
        like = shapes(config, parameters, tokens)
        edit = identity_edit(like)
        number = lambda e: jnp.sum(jnp.sin(walk(parameters, tokens, config, edit=e).logits))
        # One program: the slopes that come with the other numbers are not looked at.
        both = quick_jit(jax.value_and_grad(number))
        gradient = jax.device_get(both(edit)[1])
        generator = np.random.default_rng(0)
        for name, shape in leaves(like):
            direction, step = generator.normal(size=shape.shape), 1e-6
            if name == "layers.scores":
                # Forbidden pairs stay forbidden whatever an edit says.
                assert not np.asarray(get(gradient, name).put)[np.isneginf(blocked(config, shape))].any()
            moved = [
                both(put(edit, name, Change(get(edit, name).keep, sign * step * direction)))[0] for sign in (1, -1)
            ]
            expected = (float(moved[0]) - float(moved[1])) / (2 * step)
            found = np.sum(np.asarray(get(gradient, name).put) * direction)
            # Central differences err by the third derivative times step^2 and by rounding over step: some 1e-8.
            assert abs(found - expected) <= 1e-7 * max(1.0, abs(found)), name


def blocked(config, shape):
    query, key = np.arange(shape.shape[-2])[:, None], np.arange(shape.shape[-1])[None, :]
    return np.broadcast_to(np.where((key <= query) | (not config.causal), 0.0, -np.inf), shape.shape)


def test_an_edit_can_freeze_a_pattern_so_that_queries_no_longer_matter(gpt2):
    parameters, tokens = gpt2
    frozen = change(shapes(GPT2), "layers.pattern", keep=0.0, put=compiled(GPT2)(*gpt2).layers.pattern)
    loss = quick_jit(jax.grad(lambda p: jnp.sum(jnp.sin(walk(p, tokens, GPT2, edit=frozen).logits))))
    attention = loss(parameters).layers.attention
    assert largest(attention.query) == largest(attention.key) == 0.0
    assert largest(attention.value) > 0.0


@pytest.mark.parametrize("keep", [0.0, 1.0])
def test_no_edit_of_the_scores_lets_a_query_see_the_future(gpt2, keep):
    edit = among_all(GPT2, change(shapes(GPT2), "layers.scores", layer=0, keep=keep, put=5.0))
    found, plain = compiled(GPT2)(*gpt2, edit).layers, compiled(GPT2)(*gpt2).layers
    past = np.tri(5, dtype=bool)
    np.testing.assert_array_equal(np.isneginf(found.scores), np.broadcast_to(~past, found.scores.shape))
    # One number added to all of a query's scores changes nothing; that number alone makes attention uniform.
    expected = plain.pattern[0] if keep else np.broadcast_to(past / past.sum(-1, keepdims=True), (2, 3, 5, 5))
    np.testing.assert_allclose(found.pattern[0], expected, atol=1e-6)


def bad_edits():
    like = shapes(GPT2)
    return {
        "other depth": put(Edit(), "layers.resid_mid", Change(jnp.ones((3, 1, 1, 1)), jnp.zeros((3, 1, 1, 1)))),
        "put of another depth": put(Edit(), "layers.resid_mid", Change(jnp.ones(()), jnp.zeros((3,)))),
        "absent leaf": put(Edit(), "layers.gated", change(like, "layers.pre").layers.pre),
        "other width": put(Edit(), "start", Change(jnp.ones((13,)), jnp.zeros(()))),
        "larger batch": put(Edit(), "logits", Change(jnp.ones((3, 2, 5, 13)), jnp.zeros(()))),
    }


def test_an_edit_that_does_not_fit_is_refused_and_leaves_everything_as_it_was(gpt2):
    parameters, tokens = gpt2
    before = bits(parameters), bits(compiled_logits(GPT2)(parameters, tokens))
    for edit in bad_edits().values():
        with pytest.raises(ValueError, match="edit of|does not fit"):
            walk(parameters, tokens, GPT2, edit=edit)
    assert (bits(parameters), bits(compiled_logits(GPT2)(parameters, tokens))) == before


@pytest.mark.optimized
@examples(8)
@given(seed=st.integers(0, 10**6), config=st.sampled_from([GPT2, LLAMA, NEOX]))
def test_whatever_was_done_the_next_unedited_output_is_the_same(seed, config):
    parameters, tokens = random_parameters(config), random_tokens(config)
    before = bits(parameters), bits(compiled(config)(parameters, tokens))
    # Of all leaves, as the identity edit is: its program is compiled already.
    every = [name for name, _ in leaves(shapes(config))]
    compiled(config)(parameters, tokens, random_edit(config, seed, every))
    with pytest.raises(ValueError, match="more than the model's length"):
        walk(parameters, jnp.zeros((1, 9), jnp.int32), config)
    assert (bits(parameters), bits(compiled(config)(parameters, tokens))) == before


def test_a_change_by_one_number_is_made_in_every_layer(gpt2):
    everywhere = put(Edit(), "layers.attention_step", Change(jnp.float32(0.0), jnp.float32(0.5)))
    found = compiled(GPT2)(*gpt2, everywhere)
    np.testing.assert_array_equal(found.layers.attention_step, np.full((2, 2, 5, 12), 0.5))
