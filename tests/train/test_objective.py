"""What is minimized is what the formulas say, however it is cut."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.test_util import check_grads
from minitf_mixers import ASSOCIATED, model

from minitf import ModelConfig, initialize, mixers, walk
from minitf.analysis.flops import flops
from minitf.train.batch import Batch, labelled, measured, next_token
from minitf.train.config import ObjectiveSettings
from minitf.train.objective import dropout, sums

CONFIG = ModelConfig(vocabulary=17, layers=2, width=8, heads=2, length=6)
PARAMETERS = initialize(CONFIG, jax.random.key(0))
WINDOW = jax.random.randint(jax.random.key(1), (3, 7), 0, 17)
BATCH = next_token(WINDOW)
SOME = Batch(BATCH.tokens, jnp.where(jnp.arange(6) % 2 == 0, BATCH.targets, -1))


def of(batch=SOME, kind="next_token", config=CONFIG, parameters=PARAMETERS, edit=None, **settings):
    run = jax.jit(lambda p, b: sums(p, b, config, kind, ObjectiveSettings(**settings), edit=edit))
    return run(parameters, batch)


def test_the_loss_is_optax_cross_entropy_over_the_targets_that_count():
    logits = walk(PARAMETERS, SOME.tokens, CONFIG).logits
    counts = SOME.targets >= 0
    each = optax.losses.softmax_cross_entropy_with_integer_labels(logits, jnp.maximum(SOME.targets, 0))
    found = of()
    np.testing.assert_allclose(found.loss, jnp.sum(each * counts), rtol=1e-6)
    assert found.count == jnp.sum(counts)
    assert found.right == jnp.sum((jnp.argmax(logits, axis=-1) == SOME.targets) & counts)


def test_label_smoothing_and_z_loss_are_as_published():
    logits = walk(PARAMETERS, SOME.tokens, CONFIG).logits
    counts = SOME.targets >= 0
    labels = optax.losses.smooth_labels(jax.nn.one_hot(jnp.maximum(SOME.targets, 0), 17), 0.1)
    each = optax.losses.softmax_cross_entropy(logits, labels) + 0.01 * jax.nn.logsumexp(logits, axis=-1) ** 2
    found = of(label_smoothing=0.1, z_loss=0.01)
    np.testing.assert_allclose(found.loss, jnp.sum(each * counts), rtol=1e-6)
    np.testing.assert_allclose(found.plain, of().loss, rtol=1e-6)


@pytest.mark.parametrize("chunk", [1, 4, 7, 1000])
def test_in_chunks_the_loss_and_its_gradient_are_the_same(chunk):
    def loss(parameters, size):
        return sums(parameters, SOME, CONFIG, "next_token", ObjectiveSettings(z_loss=0.1, chunk=size)).loss

    both = jax.jit(jax.value_and_grad(loss), static_argnums=1)
    for one, other in zip(
        jax.tree.leaves(both(PARAMETERS, chunk)), jax.tree.leaves(both(PARAMETERS, 10**6)), strict=True
    ):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)


def test_the_slope_of_the_loss_is_that_of_optax():
    def expected(parameters):
        logits = walk(parameters, SOME.tokens, CONFIG).logits
        each = optax.losses.softmax_cross_entropy_with_integer_labels(logits, jnp.maximum(SOME.targets, 0))
        return jnp.sum(each * (SOME.targets >= 0))

    loss = lambda p: sums(p, SOME, CONFIG, "next_token", ObjectiveSettings(chunk=4)).loss
    for one, other in zip(
        *(jax.tree.leaves(jax.jit(jax.grad(f))(PARAMETERS)) for f in (loss, expected)), strict=True
    ):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)


def test_models_side_by_side_have_their_own_numbers_in_chunks():
    def slope(z_loss):
        settings = ObjectiveSettings(z_loss=z_loss, chunk=4)
        return jax.grad(lambda p: sums(p, SOME, CONFIG, "next_token", settings).loss)(PARAMETERS).embedding

    numbers = jnp.array([0.0, 0.5])
    together = jax.jit(jax.vmap(slope))(numbers)
    for one, number in zip(together, numbers, strict=True):
        np.testing.assert_allclose(one, slope(float(number)), rtol=1e-5, atol=1e-6)


def test_slopes_of_half_precision_add_up_in_chunks_without_rounding_each():
    def slope(dtype, chunk):
        parameters = jax.tree.map(lambda x: x.astype(dtype), PARAMETERS)
        # Position by position, each with the same slope: a sum in bfloat16 would stop growing at 256 of them.
        batch = Batch(jnp.zeros((1, 600), jnp.int32), jnp.ones((1, 600), jnp.int32))
        config = replace(CONFIG, length=600, position="none")
        loss = lambda p: sums(p, batch, config, "next_token", ObjectiveSettings(chunk=chunk)).loss
        return jax.jit(jax.grad(loss))(parameters.replace(position=None)).unembedding

    found, expected = slope(jnp.bfloat16, 1), slope(jnp.float32, 1)
    assert found.dtype == jnp.bfloat16
    assert jnp.max(jnp.abs(found - expected)) < 0.03 * jnp.max(jnp.abs(expected))


def test_who_reads_the_loss_alone_pays_for_nothing_else():
    loss = lambda p: sums(p, SOME, CONFIG, "next_token", ObjectiveSettings(chunk=4)).loss
    everything = lambda p: sums(p, SOME, CONFIG, "next_token", ObjectiveSettings(chunk=4))
    forward = flops(lambda p: walk(p, SOME.tokens, CONFIG, association=False).logits, PARAMETERS)
    logits = 2 * 18 * 8 * 17
    assert flops(everything, PARAMETERS) - flops(loss, PARAMETERS) > logits
    # Nothing is made again on the way back: about three forward passes, as without chunks.
    assert flops(jax.grad(loss), PARAMETERS) < 3.2 * forward


def test_nothing_as_large_as_all_logits_is_kept_in_chunks():
    config = ModelConfig(vocabulary=4000, layers=1, width=8, length=64, feed_forward="none")
    batch = next_token(jnp.zeros((4, 65), jnp.int32))
    shapes = jax.eval_shape(lambda: initialize(config, jax.random.key(0)))

    def memory(chunk):
        loss = lambda p: sums(p, batch, config, "next_token", ObjectiveSettings(chunk=chunk)).loss
        return jax.jit(jax.grad(loss)).lower(shapes).compile().memory_analysis().temp_size_in_bytes

    logits = 4 * 64 * 4000 * 4
    assert memory(10**6) > logits
    assert memory(16) < logits / 4


def test_classification_is_asked_at_the_last_position_or_of_the_mean():
    logits = walk(PARAMETERS, BATCH.tokens, CONFIG).logits
    cross = optax.losses.softmax_cross_entropy_with_integer_labels
    last = jnp.sum(cross(logits[:, -1], BATCH.targets[:, -1]))
    np.testing.assert_allclose(of(BATCH, "classification").loss, last, rtol=1e-6)
    both_ways = ModelConfig(vocabulary=17, layers=2, width=8, heads=2, length=6, causal=False)
    logits = walk(PARAMETERS, BATCH.tokens, both_ways).logits
    mean = jnp.sum(cross(jnp.mean(logits, axis=1), BATCH.targets[:, -1]))
    np.testing.assert_allclose(of(BATCH, "classification", both_ways).loss, mean, rtol=1e-6)


def test_a_class_is_told_where_its_target_is_whatever_fills_the_row_up():
    rows = jnp.array([[3, 1, 4, 16, 16, 16, 9], [2, 7, 1, 8, 2, 8, 5], [16, 16, 16, 16, 16, 16, 9]])
    batch = labelled(rows, filler=16)
    assert [int(jnp.argmax(row)) for row in batch.targets >= 0] == [2, 5, 0]
    assert jnp.max(batch.targets, axis=1).tolist() == [9, 5, 9]
    own = walk(PARAMETERS, jnp.array([[3, 1, 4]]), CONFIG).logits[0, -1]
    first = jax.tree.map(lambda x: x[:1], batch)
    expected = -jax.nn.log_softmax(own)[9]
    np.testing.assert_allclose(of(first, "classification").loss, expected, rtol=1e-5)


@pytest.mark.parametrize("causal", [True, False])
def test_a_number_is_told_where_its_sequence_ends_or_by_the_mean(causal):
    config = ModelConfig(vocabulary=17, layers=2, width=8, heads=2, length=6, causal=causal)
    numbers = np.array([1.5, -2.0], np.float32)
    rows = jnp.array([[3, 1, 4, 16, 16, 16, 0], [2, 7, 1, 8, 2, 8, 0]], jnp.int32)
    rows = rows.at[:, -1].set(numbers.view(np.int32))
    batch = measured(rows, filler=16)
    np.testing.assert_array_equal(jnp.nansum(batch.targets, axis=1), numbers)
    assert [int(jnp.argmin(jnp.isnan(row))) for row in batch.targets] == [2, 5]
    told = walk(PARAMETERS, rows[:, :-1], config).logits[..., 0]
    told = told[jnp.arange(2), jnp.array([2, 5])] if causal else jnp.mean(told, axis=1)
    found = of(batch, "regression", config)
    np.testing.assert_allclose(found.loss, jnp.sum((told - numbers) ** 2), rtol=1e-5)
    assert found.count == 2


def test_regression_reads_mixtures_of_tokens_and_counts_what_is_a_number():
    one_hot = jax.nn.one_hot(BATCH.tokens, 17)
    targets = jnp.where(jnp.arange(6) % 2 == 0, 1.5, jnp.nan) * jnp.ones((3, 1))
    found = of(Batch(jnp.zeros_like(BATCH.tokens), targets, one_hot), "regression")
    # A one-hot mixture is its token.
    first = walk(PARAMETERS, BATCH.tokens, CONFIG).logits[..., 0]
    np.testing.assert_allclose(found.loss, jnp.sum((first[:, ::2] - 1.5) ** 2), rtol=1e-5)
    assert found.count == 9


def test_the_gradient_of_the_regression_is_finite_and_right_where_targets_are_missing():
    targets = jnp.array([[1.0, jnp.nan, 0.5, jnp.nan, jnp.nan, -1.0]] * 3)
    inputs = jax.random.normal(jax.random.key(2), (3, 6, 17))
    batch = Batch(jnp.zeros((3, 6), jnp.int32), targets, inputs)
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), PARAMETERS)
        loss = lambda p: sums(p, batch, CONFIG, "regression", ObjectiveSettings()).loss
        # The squares are float32, so differences of 1e-3 are good to some 1e-3.
        check_grads(loss, (wide,), order=1, modes=["rev"], eps=1e-3, atol=2e-2, rtol=2e-2)


def test_dropout_leaves_out_its_share_and_keeps_the_mean():
    edit = dropout(jax.random.key(3), CONFIG, 50, 6, ObjectiveSettings(dropout=0.25), jnp.float32)
    for change in (edit.start, edit.layers.attention_step, edit.layers.feed_forward_step):
        values, counts = np.unique(change.keep, return_counts=True)
        np.testing.assert_allclose(values, [0, 1 / 0.75], rtol=1e-6)
        # Four deviations of a share of n.
        assert abs(counts[0] / counts.sum() - 0.25) < 4 * np.sqrt(0.25 * 0.75 / counts.sum())
    assert edit.layers.pattern is None


@pytest.mark.parametrize("name", ASSOCIATED)
def test_every_mixer_has_associations_to_drop(name):
    config = model(name, length=6)
    edit = dropout(jax.random.key(3), config, 3, 6, ObjectiveSettings(attention_dropout=0.5), jnp.float32)
    pattern = lambda p, e: walk(p, jnp.zeros((3, 6), jnp.int32), config, edit=e).layers.pattern
    parameters = jax.eval_shape(lambda: initialize(config, jax.random.key(0)))
    assert jax.eval_shape(pattern, parameters, edit).shape == edit.layers.pattern.keep.shape
    if name == "mamba":
        parameters = initialize(config, jax.random.key(0))
        # The layer after the first has other vectors to mix.
        found, whole = pattern(parameters, edit)[0], pattern(parameters, None)[0]
        np.testing.assert_allclose(found, edit.layers.pattern.keep[0] * whole, rtol=1e-5, atol=1e-6)


def test_layers_that_differ_drop_each_their_own():
    hybrid = replace(CONFIG, mixer=(mixers.Mamba(), mixers.TokenNetwork()), causal=False, layers=2)
    settings = ObjectiveSettings(attention_dropout=0.5)
    found = dropout(jax.random.key(3), hybrid, 3, 6, settings, jnp.float32).layers.pattern
    channels = mixers.Mamba().about(hybrid).heads
    assert found[0].keep.shape == (3, channels, 6, 6) and found[1] is None
    edit = dropout(jax.random.key(3), hybrid, 3, 6, settings, jnp.float32)
    walk(initialize(hybrid, jax.random.key(0)), jnp.zeros((3, 6), jnp.int32), hybrid, edit=edit)
    nothing = replace(hybrid, mixer=mixers.TokenNetwork())
    with pytest.raises(ValueError, match="attention_dropout is 0.5; no layer of this model has an association"):
        dropout(jax.random.key(3), nothing, 3, 6, settings, jnp.float32)


def test_dropout_of_associations_is_one_too_and_none_is_none():
    both = dropout(jax.random.key(3), CONFIG, 3, 6, ObjectiveSettings(attention_dropout=0.5), jnp.float32)
    assert both.layers.pattern.keep.shape == (2, 3, 2, 6, 6)
    assert both.start is None
    assert of(edit=both).loss != of().loss
    assert dropout(jax.random.key(3), CONFIG, 3, 6, ObjectiveSettings(), jnp.float32) is None
