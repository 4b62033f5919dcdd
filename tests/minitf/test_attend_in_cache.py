"""Attention that never stores its association is score, associate and combine, with their slopes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from properties.models import relative_error

from minitf import ModelConfig, aggregate, attend_in_cache, initialize, walk
from minitf.mixers import softmax


def drawn(batch, length, heads, groups, width=8, dtype=np.float64):
    rng = np.random.default_rng(length)
    of = lambda heads: rng.normal(size=(batch, length, heads, width)).astype(dtype)
    return of(heads), of(groups), of(groups), of(heads)


def plainly(q, k, v, scale, causal):
    scores = aggregate.score(q, k, scale)
    forbidden = ~aggregate.allowed_pairs(q.shape[1], causal, True)
    return aggregate.combine(aggregate.associate(jnp.where(forbidden, -jnp.inf, scores)), v)


def with_slopes(attend, scale, causal):
    def run(q, k, v, moved):
        z, back = jax.vjp(lambda *x: attend(*x, scale, causal), q, k, v)
        return z, back(moved)

    return jax.jit(run)


# Less than a block, and blocks of which the last is shorter; heads that share keys; few sequences of many.
@pytest.mark.parametrize("cache", [1, 2**18])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("length", "heads", "groups"), [(5, 4, 4), (5, 6, 2), (150, 4, 1), (1, 2, 2)])
def test_mixtures_and_slopes_are_those_of_the_association(monkeypatch, cache, causal, length, heads, groups):
    monkeypatch.setattr(attend_in_cache, "cores", lambda: 1)
    monkeypatch.setattr(attend_in_cache, "ONE_CORE_BYTES", cache)
    with jax.enable_x64(True):
        inputs = drawn(6, length, heads, groups)
        found = with_slopes(attend_in_cache.attend_in_cache, 0.3, causal)(*inputs)
        expected = with_slopes(plainly, 0.3, causal)(*inputs)
        assert jax.tree.all(jax.tree.map(lambda x: x.dtype == jnp.float64, found))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-11, atol=1e-11), found, expected)


def test_no_sequence_at_all_is_none_attended():
    inputs = (x[:0] for x in drawn(1, 5, 4, 2, dtype=np.float32))
    z, slopes = with_slopes(attend_in_cache.attend_in_cache, 0.3, True)(*inputs)
    assert z.shape == (0, 5, 4, 8) and [x.shape[2] for x in slopes] == [4, 2, 2]


def test_half_precision_stays_half_and_near():
    inputs = drawn(2, 70, 4, 2, dtype=np.float32)
    half = jax.tree.map(lambda x: jax.device_put(x.astype(jnp.bfloat16)), inputs)
    run = lambda x: with_slopes(attend_in_cache.attend_in_cache, 0.3, True)(*x)
    for found, expected in zip(jax.tree.leaves(run(half)), jax.tree.leaves(run(inputs)), strict=True):
        assert found.dtype == jnp.bfloat16
        # Eight bits, and a handful of products on the way.
        assert relative_error(np.asarray(found, np.float32), expected) < 8 * 2.0**-8


def test_scores_of_hundreds_neither_overflow_nor_vanish():
    q, k, v, moved = drawn(1, 70, 2, 2, dtype=np.float32)
    found = with_slopes(attend_in_cache.attend_in_cache, 300.0, True)(q, k, v, moved)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(found))
    np.testing.assert_allclose(found[0], jax.jit(plainly, static_argnums=(3, 4))(q, k, v, 300.0, True), atol=1e-3)


def test_models_side_by_side_are_models_alone():
    inputs = [np.stack([x, x[::-1]]).astype(np.float32) for x in drawn(4, 9, 2, 2)[:3]]
    attend = lambda *x: attend_in_cache.attend_in_cache(*x, 0.5, True)
    together = jax.jit(jax.vmap(attend))(*inputs)
    for number in range(2):
        alone = jax.jit(attend)(*(x[number] for x in inputs))
        np.testing.assert_allclose(together[number], alone, rtol=1e-5, atol=1e-5)


def test_a_walk_without_associations_uses_it_on_one_cpu_and_not_on_several(monkeypatch):
    config = ModelConfig(vocabulary=7, layers=1, width=8, heads=2, length=6)
    parameters, tokens = initialize(config, jax.random.key(0)), jnp.zeros((2, 6), jnp.int32)
    asked = []
    monkeypatch.setattr(softmax, "attend_in_cache", lambda *x: asked.append(x) or plainly(*x))
    trace = lambda **how: jax.eval_shape(lambda p: walk(p, tokens, config, **how), parameters)
    trace()
    trace(association=False, valid=jnp.ones(tokens.shape, bool))
    assert asked == []
    trace(association=False)
    assert len(asked) == 1
    jax.clear_caches()
    monkeypatch.setattr(jax, "device_count", lambda: 8)
    trace(association=False)
    assert len(asked) == 1
