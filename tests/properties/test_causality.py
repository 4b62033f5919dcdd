"""What may depend on what: positions, order, seeds, precision."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from properties.models import (
    BERT,
    GPT2,
    LENGTH,
    LLAMA,
    NAMED,
    NEOX,
    compiled,
    compiled_logits,
    configs,
    examples,
    largest,
    quick_jit,
    random_parameters,
    random_tokens,
    relative_error,
)

from minitf import Change, aggregate, filter, initialize, walk
from minitf.walk import Edit, leaves

UNIT = 2.0**-24


@examples(6)
@given(config=configs(causal=True), place=st.integers(0, LENGTH - 1))
def test_changing_a_token_never_changes_positions_before_it(config, place):
    parameters, tokens = random_parameters(config), random_tokens(config)
    run = quick_jit(lambda p, t: walk(p, t, config).logits)
    changed = np.array(tokens)
    changed[:, place] = (changed[:, place] + 1) % config.vocabulary
    before, after = (np.asarray(run(parameters, x)) for x in (tokens, changed))
    np.testing.assert_array_equal(before[:, :place], after[:, :place])


@pytest.mark.parametrize("name", NAMED)
def test_by_gradient_a_position_depends_on_its_past_alone(name):
    config = NAMED[name]
    parameters, tokens = random_parameters(config), random_tokens(config, batch=1)

    def at(embeddings, place):
        edit = Edit(token_embedding=Change(jnp.zeros(()), embeddings))
        return jnp.sum(jnp.sin(walk(parameters, tokens, config, edit=edit).logits[0, place]))

    embeddings = np.asarray(parameters.embedding)[np.asarray(tokens)]
    by_place = quick_jit(jax.vmap(jax.grad(at), (None, 0)))(embeddings, np.arange(LENGTH))
    influence = np.abs(np.asarray(by_place)[:, 0]).sum(-1)  # [position, token]
    future = ~np.tri(LENGTH, dtype=bool)
    assert (influence[~future] > 0).all()
    assert not influence[future].any() if config.causal else (influence[future] > 0).all()


@examples(5)
@given(
    config=configs(position="none", layers=1, causal=True),
    order=st.permutations(range(LENGTH - 1)),
)
def test_without_positions_the_past_is_a_bag_of_tokens(config, order):
    parameters, tokens = random_parameters(config), random_tokens(config)
    shuffled = np.asarray(tokens)[:, [*order, LENGTH - 1]]
    run = quick_jit(lambda p, t: walk(p, t, config).logits[:, -1])
    assert relative_error(run(parameters, shuffled), run(parameters, tokens)) < 100 * UNIT


def test_with_positions_the_past_has_an_order():
    for config in (GPT2, LLAMA, NEOX):
        parameters, tokens = random_parameters(config), random_tokens(config)
        shuffled = np.asarray(tokens)[:, [3, 2, 1, 0, 4]]
        run = compiled_logits(config)
        one, other = (np.asarray(run(parameters, x))[:, -1] for x in (shuffled, tokens))
        assert largest(one - other) > 1e-3


@pytest.mark.parametrize("config", [GPT2, LLAMA, BERT], ids=["gpt2", "llama", "bert"])
def test_seeds_under_vmap_are_a_loop_over_seeds(config):
    tokens = random_tokens(config)
    keys = jax.random.split(jax.random.key(0), 3)
    draw = lambda key: initialize(config, key)
    many, one_by_one = quick_jit(jax.vmap(draw))(keys), quick_jit(draw)
    together = jax.device_get(quick_jit(jax.vmap(lambda p: walk(p, tokens, config)))(many))
    for index, key in enumerate(keys):
        single = compiled(config)(one_by_one(key), tokens)
        for (name, found), (_, expected) in zip(
            leaves(jax.tree.map(lambda x, i=index: x[i], together)), leaves(single), strict=True
        ):
            one, other = (np.where(np.isfinite(x), x, 0.0) for x in map(np.asarray, (found, expected)))
            assert largest(one - other) <= 1e-5 * max(largest(other), 1e-3), name


@examples(5)
@given(config=configs())
def test_half_precision_runs_without_nan_and_keeps_its_statistics_in_single(config):
    parameters, tokens = random_parameters(config, dtype=jnp.bfloat16), random_tokens(config)
    found = quick_jit(lambda p, t: walk(p, t, config))(parameters, tokens)
    for name, leaf in leaves(found):
        expected = jnp.float32 if name.endswith("norm_scale") else jnp.bfloat16
        assert leaf.dtype == expected, name
        assert not np.isnan(np.asarray(leaf, np.float32)).any(), name
    # The softmax itself is taken in float32: its rows miss one by the rounding of each entry, 2^-9 of it.
    rows = np.asarray(found.layers.pattern, np.float64).sum(-1)
    assert (np.minimum(np.abs(rows - 1), np.abs(rows)) <= 2.0**-8).all()


def test_norms_and_softmax_of_half_precision_numbers_are_those_of_single_precision():
    rows = jnp.asarray(np.random.default_rng(0).normal(size=(4, 300)) + 50, jnp.bfloat16)
    centered = filter.center(rows, "layer")
    assert centered.dtype == jnp.float32
    exact = np.asarray(rows, np.float64)
    scale = filter.norm_scale(centered, "layer", 0.0)
    np.testing.assert_allclose(scale, exact.std(-1), rtol=1e-5)
    # The sum of 4096 ones stops at 256 when it is kept in bfloat16.
    pattern = aggregate.associate(jnp.zeros((1, 4096), jnp.bfloat16))
    np.testing.assert_allclose(np.asarray(pattern, np.float64).sum(), 1.0, rtol=1e-6)


def test_a_vmapped_product_and_reduction_is_compiled_correctly():
    # jax#39103: 0.10.2 gets the norm of a filtered vector wrong, silently, under jit and vmap on the CPU.
    generator = np.random.default_rng(0)
    for rows, inputs, outputs in itertools.product((1, 2, 3, 8, 33), (1, 4, 17), (1, 5, 64)):
        weight, x = generator.normal(size=(outputs, inputs)), generator.normal(size=(rows, inputs))
        squared_length = jax.vmap(lambda w, h: jnp.sum((w @ h) ** 2), (None, 0))
        found = jax.jit(squared_length)(jnp.float32(weight), jnp.float32(x))
        exact = ((x @ weight.T) ** 2).sum(-1)
        np.testing.assert_allclose(found, exact, rtol=0, atol=1e-5 * exact.max())
