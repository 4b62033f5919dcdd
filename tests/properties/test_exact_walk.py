"""Whatever the architecture, the walk adds up, is known before it runs, and is what it claims to be."""

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from properties.models import (
    BATCH,
    LENGTH,
    NAMED,
    bits,
    compiled,
    compiled_logits,
    configs,
    examples,
    largest,
    neutral,
    random_parameters,
    random_tokens,
    relative_error,
)

from minitf import describe
from minitf import walk as run_walk
from minitf.walk import leaves, station_steps

EXACT = 1e-5  # the contract for float32


def arrays(walk):
    """The walk's leaves by their last names, in float64, so that adding them up adds no error."""
    return {name.split(".")[-1]: np.asarray(x, np.float64) for name, x in leaves(walk)}


def check_stations(walk, config):
    found = arrays(walk)
    moves = np.asarray(station_steps(walk), np.float64)
    assert moves.shape == (2 * config.layers, BATCH, LENGTH, config.width)
    assert relative_error(found["start"] + moves.sum(0), found["end"]) < EXACT
    np.testing.assert_array_equal(found["resid_pre"][0], found["start"])
    np.testing.assert_array_equal(found["resid_pre"][1:], found["resid_post"][:-1])
    np.testing.assert_array_equal(found["resid_post"][-1], found["end"])


def check_steps(walk, config):
    """Where no norm follows the addition, the steps themselves lead from the start to the end."""
    found = arrays(walk)
    if not config.post_norm and config.residual:
        steps = found["attention_step"].sum(0) + found.get("feed_forward_step", np.zeros(1)).sum(0)
        assert relative_error(found["start"] + steps, found["end"]) < EXACT


def check_heads(walk, config, parameters):
    found = arrays(walk)
    bias = parameters.layers.attention.output_bias
    bias = 0.0 if bias is None else np.asarray(bias)[:, None, None, :]
    assert relative_error(found["head_steps"].sum(3) + bias, found["attention_step"]) < EXACT
    share = config.heads // config.groups
    v = np.repeat(found["v"], share, axis=3)
    assert relative_error(np.einsum("lbhqk,lbkhc->lbqhc", found["pattern"], v), found["z"]) < EXACT


def check_associations(walk, config):
    found = arrays(walk)
    query, key = np.arange(LENGTH)[:, None], np.arange(LENGTH)[None, :]
    seen = (key <= query) | (not config.causal)
    seen &= (key != query) | config.attend_self
    assert (found["pattern"] >= 0).all()
    assert not found["pattern"][..., ~seen].any()
    assert np.isneginf(found["scores"][..., ~seen]).all()
    assert np.isfinite(found["scores"][..., seen]).all()
    expected = np.broadcast_to(seen.any(-1).astype(float), found["pattern"].shape[:-1])
    np.testing.assert_allclose(found["pattern"].sum(-1), expected, atol=1e-6)


def check_description(walk, config, parameters, tokens):
    """Names, axes, shapes and bytes, from nothing but shapes."""
    forward = lambda p, t: run_walk(p, t, config)
    only_shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), (parameters, tokens))
    described = {d.name: d for d in describe(forward, *only_shapes)}
    actual = dict(leaves(walk))
    assert list(described) == list(actual)
    size = {"batch": BATCH, "query": LENGTH, "key": LENGTH, "position": LENGTH, "layer": config.layers}
    size |= {"width": config.width, "head": config.heads, "head_width": config.head_size}
    size |= {"key_value_head": config.groups, "hidden": config.hidden_size, "vocabulary": config.vocabulary}
    for name, d in described.items():
        assert d.shape == actual[name].shape == tuple(size[axis] for axis in d.axes)
        assert d.dtype == actual[name].dtype.name
        assert d.bytes == actual[name].nbytes


@examples(8)
@given(config=configs())
def test_every_walk_adds_up_and_is_what_was_described(config):
    parameters, tokens = random_parameters(config), random_tokens(config)
    found = compiled(config)(parameters, tokens)
    check_stations(found, config)
    check_steps(found, config)
    check_heads(found, config, parameters)
    check_associations(found, config)
    check_description(found, config, parameters, tokens)


# A third layer would be sliced out of the weights by as many programs again.
@examples(3)
@given(config=configs(layers=2))
def test_op_by_op_nothing_depends_on_an_edit_that_changes_nothing(config):
    parameters, tokens = random_parameters(config), random_tokens(config)
    with jax.disable_jit():
        plain = run_walk(parameters, tokens, config)
        edited = run_walk(parameters, tokens, config, edit=neutral(config))
    assert bits(edited) == bits(plain)


def check_bits(config, unroll):
    """Same with or without: dropping the rest of the walk moves no bit of the logits."""
    parameters, tokens = random_parameters(config), random_tokens(config)
    kept = compiled(config, unroll)(parameters, tokens).logits
    dropped = compiled_logits(config, unroll)(parameters, tokens)
    assert bits(kept) == bits(dropped)


# Each architecture once, in a loop or without one.
@pytest.mark.optimized
@pytest.mark.parametrize(("name", "unroll"), [("gpt2", 1), ("llama", True), ("bert", 1), ("neox", True)])
def test_logits_are_the_same_bit_for_bit_whether_the_walk_is_kept_or_dropped(name, unroll):
    check_bits(NAMED[name], unroll)


@pytest.mark.optimized
@examples(4)
@given(config=configs(), unroll=st.sampled_from([1, True]))
def test_in_any_model_too_dropping_the_rest_of_the_walk_moves_no_bit_of_the_logits(config, unroll):
    check_bits(config, unroll)


@pytest.mark.parametrize("name", NAMED)
def test_unrolled_layers_are_the_scanned_ones(name):
    config = NAMED[name]
    parameters, tokens = random_parameters(config), random_tokens(config)
    scanned, unrolled = (compiled(config, unroll)(parameters, tokens) for unroll in (1, True))
    for (leaf, one), (_, other) in zip(leaves(scanned), leaves(unrolled), strict=True):
        finite = np.isfinite(one)
        assert largest(np.where(finite, one, 0) - np.where(finite, other, 0)) <= 64 * 2**-24 * largest(
            np.where(finite, one, 0)
        ), leaf
