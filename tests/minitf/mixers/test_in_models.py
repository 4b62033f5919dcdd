"""Every mixer in a model: causality, decoding, long sequences, half precision."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg
from minitf_mixers import EVERY, ONE_WAY, filtered, inputs, model, stepped, weights
from properties.models import (
    compiled,
    compiled_logits,
    likeliest_after,
    random_parameters,
    random_tokens,
    relative_error,
    shapes,
)

from minitf import ModelConfig, change, compose, initialize, mixers, walk
from minitf.decode import empty_cache, generate
from minitf.mixers.mamba import _in_turn, _together
from minitf.mixers.products import inverse_of_unit_triangle
from minitf.model import walk_on
from minitf.walk import get


def beyond_a_chunk(name):
    """A model, its weights, and more tokens than the chunk of any chunked form: two tests compile it once."""
    config = model(name, length=80)
    return config, random_parameters(config), random_tokens(config, length=70)


@pytest.mark.parametrize("name", ONE_WAY)
def test_a_later_token_changes_nothing_before_it(name):
    config, parameters, tokens = beyond_a_chunk(name)
    run = compiled_logits(config)
    other = np.array(tokens)
    other[:, 66] = (other[:, 66] + 1) % config.vocabulary
    before, after = (np.asarray(run(parameters, x)) for x in (tokens, other))
    assert relative_error(after[:, :66], before[:, :66]) < 1e-5
    assert relative_error(after[:, 66:], before[:, 66:]) > 1e-3


@functools.cache
def long_run(name):
    """A model for so many positions; of its mixer two programs for two tests.

    The aggregate and what comes out of the gate; the recurrence's aggregate.
    """
    config = model(name, layers=1, length=2048)
    mixer = config.mixer

    def together(own, x):
        f = filtered(mixer, own, x, config)
        z = mixer.aggregate(own, f, config)
        return z, mixer.gate(own, z, f, config)

    return config, jax.jit(together), jax.jit(lambda own, x: stepped(mixer, own, x, config))


@pytest.mark.parametrize("name", ONE_WAY)
def test_long_sequences_stay_finite_and_the_three_forms_agree_at_their_end(name):
    config, together, by_step = long_run(name)
    of = weights(config), 3 * inputs(config.length, batch=1)
    z = np.asarray(together(*of)[0])
    assert np.isfinite(z).all()
    # Sums of thousands of float32 numbers, taken in two orders.
    assert relative_error(by_step(*of)[:, -64:], z[:, -64:]) < 1e-3


@pytest.mark.parametrize("name", EVERY)
def test_half_precision_stays_finite_and_near_and_loses_nothing_over_many_positions(name):
    """Sums over positions, and what they fade by, are held in float32."""
    config, together, by_step = long_run(name)
    halves = lambda tree: jax.tree.map(lambda y: jnp.asarray(np.asarray(y, jnp.bfloat16)), tree)
    # Where a mixer's state follows every rounding, few bits go further with some weights than with others.
    own, x = halves((weights(config, seed=5), inputs(config.length, batch=1)))
    single = lambda tree: jax.tree.map(lambda y: np.asarray(y, np.float32), tree)
    # The other test's program, where what comes later changes nothing.
    expected, expected_out = single(
        together(*map(jax.device_put, single((own, x if config.causal else x[:, :700]))))
    )
    x = x[:, :700]
    z, out = together(own, x)
    assert z.dtype == out.dtype == jnp.bfloat16
    z, out = single((z, out))
    assert np.isfinite(z).all() and np.isfinite(out).all()
    # Eight bits, and up to twenty sums and products on the way.
    assert relative_error(out, expected_out[:, :700]) < 40 * 2.0**-8
    for found in (z, single(by_step(own, x))) if config.causal else (z,):
        # A cell's gates see what it held, rounding and all.
        most = 0.1 if name in ("gru", "lstm") else 0.02
        assert relative_error(found[:, 500:], expected[:, 500:700]) < most


@pytest.mark.parametrize("name", ONE_WAY)
def test_decoding_gives_the_full_passs_logits_at_every_position(name):
    config, parameters, tokens = beyond_a_chunk(name)
    whole = compiled_logits(config)(parameters, tokens)
    cache, found = empty_cache(config, 2, 80), []

    @jax.jit
    def go_on(part, cache):
        walked, cache = walk_on(parameters, part, cache, config)
        return walked.logits, cache

    # One alone is nothing else to mixers that step through however many there are.
    ends = [34, 68, 69] if isinstance(config.mixer, mixers.Softmax) else [35]
    for part in np.split(np.asarray(tokens), ends, axis=1):
        logits, cache = go_on(part, cache)
        found.append(logits)
    assert relative_error(np.concatenate(found, axis=1), whole) < 1e-4
    assert cache.filled.tolist() == [70, 70]


@pytest.mark.parametrize("name", ["softmax", "aft simple", "rwkv6", "mamba", "delta", "mingru"])
def test_an_edit_of_some_positions_is_the_same_from_a_cache(name):
    config = model(name, length=6)
    parameters, tokens = random_parameters(config), random_tokens(config, length=6)
    like = shapes(config, tokens=tokens)
    noise = np.random.default_rng(0).normal(size=get(like, "layers.z").shape[2:])
    of_values = lambda keep: change(like, "layers.v", layer=0, position=2, keep=keep)
    of_z = lambda keep, put: change(like, "layers.z", layer=1, keep=keep, put=put * noise)
    # Edits of the same leaves, so of one program; the first of them changes nothing.
    edits = [compose(of_values(keep), of_z(*z)) for keep, z in ((1, (1, 0)), (0, (1, 0)), (1, (0.5, 1)))]
    run = compiled_logits(config)
    on = jax.jit(
        lambda edit: walk_on(parameters, tokens, empty_cache(config, len(tokens), 6), config, edit=edit)[0].logits
    )
    plain, *edited = (run(parameters, tokens, edit) for edit in edits)
    for edit, whole in zip(edits, (plain, *edited), strict=True):
        assert relative_error(on(edit), whole) < 1e-4
    for whole in edited:
        assert relative_error(plain, whole) > 1e-3


# One of each kind of state: which positions count is decided for all in one place.
@pytest.mark.parametrize("name", ["softmax", "uniform", "frozen", "aft simple", "rwkv6", "mamba", "lstm"])
def test_prompts_of_different_lengths_continue_as_each_would_alone(name):
    config = model(name, length=10)
    parameters, prompts = random_parameters(config), [[3, 1, 4, 1], [5]]
    together = np.asarray(generate(parameters, prompts, config, steps=3).tokens)
    logits_of = lambda tokens: compiled_logits(config)(parameters, tokens)
    np.testing.assert_array_equal(together, likeliest_after(logits_of, prompts, together))


def test_queries_and_keys_that_are_never_trained_get_no_gradient_and_scores_of_size_one():
    config = ModelConfig(
        vocabulary=40, layers=1, width=64, heads=4, length=32, mixer=mixers.Softmax(trained=False), norm="rms"
    )
    parameters = jax.jit(lambda key: initialize(config, key))(jax.random.key(0))
    tokens = random_tokens(config, batch=4, length=32)
    slope = jax.jit(jax.grad(lambda p: jnp.sum(walk(p, tokens, config).logits ** 2)))(parameters)
    slope = slope.layers.attention
    assert not np.any(slope.query) and not np.any(slope.key) and np.any(slope.value)
    scores = np.asarray(compiled(config)(parameters, tokens).layers.scores)
    assert 0.7 < np.std(scores[np.isfinite(scores)]) < 1.4


@pytest.mark.parametrize("size", [1, 2, 5, 64, 77])
def test_the_inverse_of_a_unit_triangle_is_scipys(size):
    rng = np.random.default_rng(size)
    # Rows as long as those of keys of length one: the largest that the delta rule writes.
    triangle = np.tril(rng.uniform(-1, 1, (3, size, size)), -1) + np.eye(size)
    with jax.enable_x64(True):
        found = jax.jit(inverse_of_unit_triangle)(jnp.asarray(triangle))
    expected = np.stack([scipy.linalg.solve_triangular(x, np.eye(size), lower=True) for x in triangle])
    np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-9 * np.abs(expected).max())
    # The same key all along: differences of neighbors.
    alike = jnp.asarray(np.tril(np.ones((size, size), np.float32)))
    np.testing.assert_array_equal(jax.jit(inverse_of_unit_triangle)(alike), np.eye(size) - np.eye(size, k=-1))


def test_the_inverse_of_a_unit_triangle_stands_in_a_sweep_of_sweeps():
    rng = np.random.default_rng(0)
    triangle = jnp.asarray(np.tril(rng.uniform(-1, 1, (2, 2, 2, 3, 64, 64)), -1) + np.eye(64), jnp.float32)
    swept = jax.jit(jax.vmap(jax.vmap(inverse_of_unit_triangle)))(triangle)
    flat = jax.jit(inverse_of_unit_triangle)(triangle.reshape(-1, 64, 64))
    np.testing.assert_allclose(swept, flat.reshape(triangle.shape), rtol=1e-4)


def test_mambas_chunks_are_the_same_in_turn_and_together():
    rng = np.random.default_rng(0)
    of = lambda *shape: rng.normal(size=shape)
    with jax.enable_x64(True):
        rate, state, steps = np.exp(of(5, 3)), of(2, 5, 3), np.log1p(np.exp(of(2, 7, 5)))
        now = (of(2, 7, 3), of(2, 7, 3), of(2, 7, 5), steps)
        loss = lambda way: lambda *x: sum(jnp.sum(jnp.sin(part)) for part in way(*x))
        found = [
            jax.jit(jax.value_and_grad(loss(way), (0, 1, 2)))(rate, state, now) for way in (_in_turn, _together)
        ]
    jax.tree.map(lambda one, other: np.testing.assert_allclose(one, other, rtol=1e-12, atol=1e-12), *found)
