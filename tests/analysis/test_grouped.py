import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from minitf.analysis.scan_snap import synthetic
from minitf.analysis.scan_snap.grouped import Layout, grouped, make_loss, place, roomy, trim, usual
from minitf.train.loop import train
from minitf.train.sequence_classes import SequenceClasses, syn_medium

BATCH = synthetic.BATCH
DATA = SequenceClasses(queries=4, next_per_query=2, common=3, distinct=4, length=17)


def plain_and_grouped(data):
    plain = synthetic.task(data, "fan_in", "sgd")
    return plain, grouped(plain, data, BATCH)


def relative(a, b):
    return float(jnp.max(jnp.abs(a - b)) / jnp.max(jnp.abs(b)))


@pytest.mark.parametrize("layout", [None, (4, 4, 4, 4), (128, 1, 1, 1)], ids=["usual", "too few", "skewed"])
def test_loss_and_gradient_are_those_of_the_count_walk(layout):
    plain, fast = plain_and_grouped(DATA)
    loss = make_loss(DATA, BATCH, None if layout is None else Layout(layout))
    for seed in range(2):
        key = jax.random.key(seed)
        parameters = plain.initialize(key)
        value, gradient = jax.value_and_grad(plain.loss)(parameters, plain.batch(key, jnp.int32(0)))
        ours, ours_gradient = jax.value_and_grad(loss)(trim(parameters, DATA), fast.batch(key, jnp.int32(0)))
        # The same float32 sums in another order.
        assert float(ours) == pytest.approx(float(value), rel=2e-6)
        # What trimming leaves out has no gradient at all.
        filled = place(ours_gradient, jax.tree.map(jnp.zeros_like, parameters), DATA)
        for a, b in zip(jax.tree.leaves(filled), jax.tree.leaves(gradient), strict=True):
            assert relative(a, b) < 5e-6


def test_a_run_is_the_plain_run():
    rates = synthetic.grid((1.0, 3.0), (1.0, 10.0))
    plain, fast = plain_and_grouped(DATA)
    keys = synthetic.seed_keys(0, 2)
    reference = train(plain, keys, rates, [0, 10, 20])
    ours = train(fast, keys, rates, [0, 10, 20], how="map")
    np.testing.assert_allclose(ours.loss, reference.loss, rtol=1e-4, atol=1e-6)
    for name, value in reference.records.items():
        # A seed and rate of 20 steps: float32 rounding that training carries along.
        np.testing.assert_allclose(ours.records[name], value, atol=1e-5 * max(1.0, np.abs(value).max()))


def test_trimming_and_placing_go_back_and_forth():
    parameters = synthetic.task(DATA, "fan_in", "sgd").initialize(jax.random.key(0))
    trimmed = trim(parameters, DATA)
    assert trimmed.layers.attention.table.shape == (1, 1, 4, DATA.vocabulary)
    assert trimmed.unembedding.shape == (DATA.contextual, DATA.vocabulary)
    again = place(trimmed, parameters, DATA)
    for a, b in zip(jax.tree.leaves(again), jax.tree.leaves(parameters), strict=True):
        assert np.array_equal(a, b)


@pytest.mark.parametrize("queries", [3, 5, 10])
def test_the_usual_slots_hold_nearly_every_batch_in_far_less_room(queries):
    layout = usual(syn_medium(queries), BATCH)
    assert len(layout.slots) == queries and list(layout.slots) == sorted(layout.slots, reverse=True)
    counts = np.random.default_rng(1).multinomial(BATCH, np.full(queries, 1 / queries), size=20_000)
    overflows = np.any(np.sort(counts, axis=1)[:, ::-1] > layout.slots, axis=1).mean()
    # At most a thousandth by a union bound: 20 expected, give or take 4.5 both here and in the simulation there.
    assert overflows < 50 / 20_000
    assert sum(layout.slots) < 1.6 * BATCH < sum(roomy(syn_medium(queries), BATCH).slots)


def test_tiers_are_the_runs_of_equal_slots():
    layout = Layout((9, 9, 4, 4, 2))
    assert layout.tiers == [(2, 9), (2, 4), (1, 2)]
    assert layout.starts.tolist() == [0, 9, 18, 22, 26, 28]


def test_a_panel_that_is_grouped_measures_the_same(monkeypatch):
    fast, _ = synthetic.run_medium(5, 1, steps=5, length=8)
    monkeypatch.setattr(synthetic, "GROUPED_FROM", 99)
    slow, _ = synthetic.run_medium(5, 1, steps=5, length=8)
    for field in dataclasses.fields(slow):
        if field.name != "recall":  # a token may stand on the other side of a threshold
            np.testing.assert_allclose(getattr(fast, field.name), getattr(slow, field.name), rtol=1e-4)
