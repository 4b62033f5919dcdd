import dataclasses
import logging
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minitf.config import token_tables
from minitf.declaration import initialize
from minitf.tables import count_walk
from minitf.train.loop import Task, every, first_non_finite, log_spaced, train
from minitf.train.optimizers import Rates, by_part, sgd
from minitf.train.sequence_classes import SequenceClasses, sample_counts

# A line fitted to noisy points: small enough to compile at once, with momentum so that there is a state.
regression = Task(
    initialize=lambda key: {"weight": jax.random.uniform(key, (3,)), "offset": jnp.zeros(())},
    batch=lambda key, step: jax.random.uniform(key, (4, 4)),
    loss=lambda p, batch: jnp.mean((batch[:, :3] @ p["weight"] + p["offset"] - batch[:, 3] - 1.0) ** 2),
    optimizer=lambda rate: sgd(rate, 0.9),
    record=lambda p: {"weight": p["weight"], "square": p["offset"] ** 2},
)
RATES = jnp.array([0.01, 0.03])


def keys_of(*seeds):
    return jax.vmap(jax.random.key)(jnp.array(seeds))


def python_loop(task, key, hyper, record_steps):
    """What ``train`` must do for one run, step by step: losses, records, final parameters."""
    optimizer = task.optimizer(hyper)
    parameters = task.initialize(jax.random.fold_in(key, 0))
    state, losses, records = optimizer.init(parameters), [], []
    for step in range(max(record_steps) + 1):
        if step in record_steps:
            records.append(task.record(parameters))
        batch = task.batch(jax.random.fold_in(jax.random.fold_in(key, 1), step), step)
        loss, gradient = jax.value_and_grad(task.loss)(parameters, batch)
        if step < max(record_steps):
            losses.append(float(loss))
            update, state = optimizer.update(gradient, state, parameters)
            parameters = optax.apply_updates(parameters, update)
    return np.array(losses), jax.tree.map(lambda *x: np.array(x), *records), parameters


def assert_same(a, b, relative=0.0):
    """Two pytrees hold the same numbers, to the bit or to a relative error of each array's largest entry."""
    jax.tree.map(lambda x, y: _same(np.asarray(x), np.asarray(y), relative), a, b)


def _same(x, y, relative):
    assert x.shape == y.shape and x.dtype == y.dtype
    if x.size:
        largest = np.abs(np.nan_to_num(y)).max()
        np.testing.assert_allclose(x, y, rtol=0, atol=relative * largest)


def one_run(history, seed, rate):
    return jax.tree.map(lambda x: np.asarray(x)[seed, rate], (history.loss, history.records, history.parameters))


@pytest.mark.parametrize("record_steps", [[0, *log_spaced(17, 6)[2:]], [3, 4, 11]], ids=str)
def test_losses_records_and_parameters_are_those_of_a_plain_python_loop(record_steps):
    history = train(regression, keys_of(5), RATES, record_steps, records_per_chunk=2)
    assert history.record_steps.tolist() == record_steps
    assert history.finished
    for i, rate in enumerate(RATES):
        expected = python_loop(regression, jax.random.key(5), rate, record_steps)
        # The same float32 operations in another order, some 20 steps of them: 20 times 2e-7 of the largest entry.
        assert_same(one_run(history, 0, i), jax.tree.map(lambda x: np.asarray(x, np.float32), expected), 4e-6)


def test_the_loss_of_every_step_is_kept_however_rarely_one_records():
    history = train(regression, keys_of(0, 1, 2), RATES, [0, 13, 29], records_per_chunk=2)
    assert history.loss.shape == (3, 2, 29) and history.loss.dtype == np.float32
    assert np.all(np.isfinite(history.loss))
    assert history.records["weight"].shape == (3, 2, 3, 3)
    assert history.records["square"].shape == (3, 2, 3)
    assert np.all(history.diverged == -1)


@cache
def reference(how="vmap"):
    """Three seeds at two rates."""
    return train(regression, keys_of(3, 1, 4), RATES, [0, 1, 4, 5, 12], records_per_chunk=5, how=how)


def test_the_first_record_is_the_start_and_the_last_the_end():
    history = reference()
    start = regression.initialize(jax.random.fold_in(jax.random.key(4), 0))
    assert_same(history.records["weight"][2, 0, 0], np.asarray(start["weight"]))
    assert_same(history.records["weight"][:, :, -1], np.asarray(history.parameters["weight"]))


@pytest.mark.parametrize("how", ["vmap", "map"])
def test_seeds_trained_together_are_the_seeds_trained_one_by_one(how):
    alone = train(regression, keys_of(4), RATES, [0, 1, 4, 5, 12], how=how)
    for j in range(2):
        # A batched and a single product may add in another order: twelve steps of float32 rounding.
        assert_same(one_run(reference(how), 2, j), one_run(alone, 0, j), 2e-6)


def test_a_grid_of_rates_is_the_rates_trained_one_by_one():
    alone = train(regression, keys_of(3, 1, 4), RATES[1:], [0, 1, 4, 5, 12])
    for i in range(3):
        assert_same(one_run(reference(), i, 1), one_run(alone, i, 0), 2e-6)


def test_all_rates_of_a_seed_start_alike_and_see_the_same_batches():
    history = reference()
    assert np.array_equal(history.records["weight"][:, 0, 0], history.records["weight"][:, 1, 0])
    assert np.array_equal(history.loss[:, 0, 0], history.loss[:, 1, 0])
    assert len(np.unique(history.loss[:, 0, 0])) == 3


def test_side_by_side_and_one_after_another_are_the_same():
    for i in range(3):
        for j in range(2):
            assert_same(one_run(reference("map"), i, j), one_run(reference("vmap"), i, j), 2e-6)


@pytest.mark.parametrize("records_per_chunk", [1, 2, 50])
def test_the_size_of_a_chunk_changes_nothing(records_per_chunk):
    chunked = train(regression, keys_of(3, 1, 4), RATES, [0, 1, 4, 5, 12], records_per_chunk=records_per_chunk)
    for field in dataclasses.fields(chunked):
        assert_same(getattr(chunked, field.name), getattr(reference(), field.name))


@cache
def tables():
    data = SequenceClasses(queries=2, next_per_query=2, common=2, distinct=3, length=9)

    def loss(parameters, batch):
        logits = count_walk(parameters, batch.queries, batch.counts).logits[:, 0]
        return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, batch.labels))

    return Task(
        initialize=lambda key: initialize(token_tables(data.vocabulary, "fan_in"), key),
        batch=lambda key, step: sample_counts(data, key, 16),
        loss=loss,
        optimizer=lambda rates: by_part(lambda rate: sgd(rate, 0.9), rates),
        record=lambda parameters: parameters.layers.attention.table,
    )


GRID = Rates(decoder=jnp.array([1.0, 2.0]), attention=jnp.array([1.0, 0.3]))


@pytest.mark.parametrize("how", ["vmap", "map"])
def test_the_papers_model_trains_alike_alone_and_in_a_grid(how):
    together = train(tables(), keys_of(0, 1), GRID, [0, 5, 10], how=how)
    alone = train(
        tables(),
        keys_of(1),
        Rates(decoder=GRID.decoder[1:], attention=GRID.attention[1:]),
        [0, 5, 10],
        how=how,
    )
    assert_same(one_run(together, 1, 1), one_run(alone, 0, 0), 1e-5)
    assert together.loss[..., -1].mean() < 0.8 * together.loss[..., 0].mean()


def test_a_schedule_is_a_rate_in_the_loop():
    schedule = optax.cosine_decay_schedule(0.05, 8)
    task = dataclasses.replace(regression, optimizer=lambda scale: sgd(lambda step: scale * schedule(step)))
    history = train(task, keys_of(2), jnp.array([0.5, 1.0]), [0, 3, 10], records_per_chunk=1)
    losses, records, _ = python_loop(task, jax.random.key(2), 1.0, [0, 3, 10])
    assert_same(history.loss[0, 1], losses.astype(np.float32), 4e-6)
    assert_same(history.records["weight"][0, 1], records["weight"], 4e-6)
    # The cosine ends at step 8, and with it the learning.
    ended = train(task, keys_of(2), jnp.array([1.0]), [8, 10])
    assert np.array_equal(ended.records["weight"][:, :, 0], ended.records["weight"][:, :, 1])


def test_all_chunks_run_one_program(caplog):
    caplog.set_level(logging.WARNING)
    with jax.log_compiles(True):
        train(tables(), keys_of(0, 1), GRID, [0, 1, 2, 5, 9, 14, 20], records_per_chunk=2)
    compiled = [m for m in caplog.messages if m.startswith("Finished XLA compilation")]
    chunks = [m for m in compiled if "jit(side_by_side)" in m]
    assert len(chunks) == 1, compiled


def test_a_task_is_traced_once_for_all_chunks():
    traces = []

    def batch(key, step):
        traces.append(step)
        return regression.batch(key, step)

    task = dataclasses.replace(regression, batch=batch)
    train(task, keys_of(0), RATES, every(20, 1), records_per_chunk=1)
    few = len(traces)
    train(task, keys_of(0), RATES, every(5, 1), records_per_chunk=10)
    assert few == len(traces) - few


def explosive(last_good):
    """Weights that count steps; the loss of step ``last_good + 1`` and after is not finite."""
    return Task(
        initialize=lambda key: jnp.zeros(()),
        batch=lambda key, step: step,
        loss=lambda p, step: jnp.where(step > last_good, jnp.nan, 1.0) + 0.0 * p,
        optimizer=lambda rate: optax.sgd(rate),
        record=lambda p: p,
    )


@pytest.mark.parametrize("last_good", [-1, 7, 8, 9])
def test_divergence_is_found_at_its_step_and_later_chunks_do_not_run(last_good):
    reported = []
    history = train(
        explosive(last_good),
        keys_of(0),
        RATES,
        every(30, 3),
        records_per_chunk=2,
        report=lambda step, loss: reported.append(step),
    )
    assert np.all(history.diverged == last_good + 1)
    assert not history.finished
    # Chunks end after records 0 and 3, 6 and 9, 12 and 15 ...: the one that holds the bad step is the last.
    last = next(end for end in (3, 9, 15) if end > last_good + 1)
    assert reported[-1] == last == history.record_steps[-1] == history.loss.shape[-1]
    assert history.records.shape[-1] == len(history.record_steps)


def test_divergence_of_one_run_is_told_from_the_others():
    task = dataclasses.replace(regression, optimizer=lambda rate: sgd(rate))
    history = train(task, keys_of(0, 1), jnp.array([0.01, 1e30]), every(20, 2), records_per_chunk=20)
    assert np.all(history.diverged[:, 0] == -1)
    first = history.diverged[:, 1]
    assert np.all(first > 0)
    for i in range(2):
        assert np.all(np.isfinite(history.loss[i, 1, : first[i]])) and not np.isfinite(
            history.loss[i, 1, first[i]]
        )


def test_one_may_go_on_after_divergence():
    history = train(explosive(4), keys_of(0), RATES, every(30, 3), records_per_chunk=2, stop_on_divergence=False)
    assert history.finished and history.loss.shape[-1] == 30
    assert np.all(history.diverged == 5)


def test_interrupting_keeps_what_was_done():
    def report(step, loss):
        if step >= 6:
            raise KeyboardInterrupt

    stopped = train(regression, keys_of(0, 1), RATES, every(20, 2), records_per_chunk=2, report=report)
    whole = train(regression, keys_of(0, 1), RATES, [0, 2, 4, 6], records_per_chunk=2)
    assert not stopped.finished and whole.finished
    assert stopped.record_steps.tolist() == [0, 2, 4, 6]
    for name in ("loss", "records", "parameters"):
        assert_same(getattr(stopped, name), getattr(whole, name))


def test_interrupting_after_the_last_chunk_loses_nothing():
    def report(step, loss):
        if step == 4:
            raise KeyboardInterrupt

    assert train(regression, keys_of(0), RATES, [0, 2, 4], report=report).finished


def test_interrupting_before_anything_was_done_is_passed_on():
    def batch(key, step):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(dataclasses.replace(regression, batch=batch), keys_of(0), RATES, [0, 2])


def test_progress_tells_steps_and_the_mean_of_the_last_losses():
    reported = []
    history = train(
        regression,
        keys_of(0, 1),
        RATES,
        [0, 1, 5, 8],
        records_per_chunk=1,
        report=lambda step, loss: reported.append((step, loss)),
    )
    assert [step for step, _ in reported] == [0, 1, 5, 8]
    assert np.isnan(reported[0][1])
    for step, loss in reported[1:]:
        assert loss == pytest.approx(history.loss[..., step - 1].mean(), rel=1e-6)


def test_no_step_at_all_leaves_the_start():
    history = train(regression, keys_of(0), RATES, [0])
    assert history.finished and history.loss.shape == (1, 2, 0) and np.all(history.diverged == -1)
    assert history.records["weight"].shape == (1, 2, 1, 3)


@pytest.mark.parametrize("steps", [[], [0, 0], [0, 2, 1], [-1, 2], [3, 3]], ids=str)
def test_record_steps_that_do_not_increase_are_refused(steps):
    with pytest.raises(ValueError, match="record steps must increase from at least 0"):
        train(regression, keys_of(0), RATES, steps)


@pytest.mark.parametrize("records_per_chunk", [0, -1])
def test_a_chunk_without_records_is_refused(records_per_chunk):
    with pytest.raises(ValueError, match="records_per_chunk is .*; it must be at least 1"):
        train(regression, keys_of(0), RATES, [0, 1], records_per_chunk=records_per_chunk)


@given(st.integers(0, 200), st.integers(1, 50))
def test_every_lists_multiples_and_the_end(steps, interval):
    listed = every(steps, interval)
    assert listed[0] == 0 and listed[-1] == steps and listed == sorted(set(listed))
    assert all(step % interval == 0 for step in listed[:-1])
    assert max(np.diff(listed), default=0) <= interval


@given(st.integers(0, 10_000), st.integers(1, 60))
def test_log_spaced_steps_increase_from_start_to_end_with_growing_gaps(steps, count):
    listed = log_spaced(steps, count)
    assert listed[0] == 0 and listed[-1] == steps and listed == sorted(set(listed))
    assert len(listed) <= count + 2
    # Gaps grow by a constant factor up to rounding, which moves each end by at most a half.
    assert np.all(np.diff(np.diff(listed)[1:-1]) >= -2)


def test_the_first_non_finite_loss_of_each_run_is_found():
    loss = np.array([[1.0, 2.0, 3.0], [1.0, np.nan, 2.0], [np.inf, 0.0, np.nan]])
    assert first_non_finite(loss).tolist() == [-1, 1, 0]
    assert first_non_finite(np.zeros((2, 0))).tolist() == [-1, -1]
