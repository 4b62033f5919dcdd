"""The outer loop: calls that end at every stop, data that is ready in time, measures of any size of data."""

import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minitf import ModelConfig, initialize
from minitf.train.batch import Batch, next_token
from minitf.train.config import MeshSettings
from minitf.train.settings import as_config
from minitf.train.sharding import mesh_of
from minitf.train.step import Measures, Program, State
from minitf.train.trainer import Compiled, _calls, evaluator, in_parts, models_of, run, steps_per_call


@given(st.integers(0, 50), st.lists(st.integers(1, 100), min_size=1, max_size=6, unique=True), st.integers(1, 30))
def test_calls_follow_each_other_and_end_at_every_stop(done, stops, most):
    stops = sorted(stops)
    calls = list(_calls(done, stops, most))
    places = [done, *(to for _, to in calls)]
    assert [first for first, _ in calls] == places[:-1]
    assert all(0 < to - first <= most for first, to in calls)
    assert {stop for stop in stops if stop > done} <= set(places)
    assert places[-1] == max(done, stops[-1])


@given(st.integers(1, 20), st.integers(1, 7))
def test_data_in_parts_is_all_of_it_and_what_fills_up_does_not_count(many, size):
    batch = Batch(np.arange(many * 2).reshape(many, 2), np.ones((many, 2), np.int32))
    parts = in_parts(batch, size)
    assert parts.tokens.shape[1:] == (size, 2)
    np.testing.assert_array_equal(np.asarray(parts.tokens).reshape(-1, 2)[:many], batch.tokens)
    assert int(np.sum(parts.targets != -1)) == 2 * many
    real = in_parts(Batch(batch.tokens, np.ones((many, 2)), np.ones((many, 2, 3))), size)
    assert int(np.sum(~np.isnan(real.targets))) == 2 * many


def test_every_seed_trains_with_every_combination_of_swept_numbers():
    tables = {
        "training": {"seed": 5, "seeds": 2},
        "sweep": {"optimizer.rate": [1.0, 2.0], "optimizer.weight_decay": [0.0, 0.5, 1.0]},
    }
    models = models_of(as_config(tables))
    assert models.seeds == (5,) * 6 + (6,) * 6
    assert models.different_seeds == (5, 6)
    assert models.batched
    pairs = list(zip(models.hyper["optimizer.rate"], models.hyper["optimizer.weight_decay"], strict=True))
    assert len(set(pairs[:6])) == 6
    assert pairs[:6] == pairs[6:]
    alone = models_of(as_config({}))
    assert alone.seeds == (0,)
    assert not alone.batched


def test_models_are_evaluated_side_by_side_as_one_after_another():
    model = ModelConfig(vocabulary=9, layers=1, width=8, heads=2, length=6)
    program = Program(as_config({"training": {"seeds": 3, "batch": 2}}), model, "next_token")
    models = jax.vmap(lambda key: initialize(model, key))(jax.random.split(jax.random.key(0), 3))
    batches = in_parts(next_token(jnp.arange(35).reshape(5, 7) % 9), 2)
    mesh = mesh_of(MeshSettings())
    one_by_one, together = (evaluator(program, mesh, True, n)(models, batches) for n in (None, 2))
    assert one_by_one.loss.shape == (3,)
    np.testing.assert_allclose(together.loss, one_by_one.loss, rtol=1e-6)
    np.testing.assert_array_equal(together.accuracy, one_by_one.accuracy)


def test_a_call_takes_about_a_second_of_work_and_no_more_steps_than_there_are():
    config = as_config({"training": {"steps": 40}})
    assert steps_per_call(config, 1e15) == 1
    assert steps_per_call(config, 1.0) == 40
    assert steps_per_call(as_config({"training": {"steps": 40, "steps_per_call": 7}}), 1.0) == 7


NOTHING = State(0, None, None, None, 0)


def test_data_of_the_next_call_is_made_by_another_thread_while_one_runs():
    made, used = [], []

    def windows(first, steps):
        made.append((first, threading.current_thread() is threading.main_thread()))
        return np.full((1, steps, 2, 3), first, np.int32)

    def advance(state, tokens, done, to):
        used.append((int(tokens[0, 0, 0, 0]), done, to))
        return state.replace(step=state.step + 1), Measures(np.zeros(2), np.zeros(2))

    programs = Compiled(lambda: NOTHING, advance, NOTHING, 2, 2, 0, 0)
    taken = list(run(programs, NOTHING, 3, (6, 8), windows, mesh_of(MeshSettings())))
    assert used == [(3, 3, 5), (5, 5, 6), (6, 6, 8)]
    assert made == [(3, False), (5, False), (6, False)]
    assert [one.done for one in taken] == [5, 6, 8]
    assert taken[-1].state.step == 3


def test_what_goes_wrong_while_data_is_made_is_raised_where_it_is_used():
    def windows(first, steps):
        raise ValueError("the file is gone")

    programs = Compiled(lambda: NOTHING, lambda *given: given, NOTHING, 2, 2, 0, 0)
    with pytest.raises(ValueError, match="the file is gone"):
        next(run(programs, NOTHING, 0, (2,), windows, mesh_of(MeshSettings())))
