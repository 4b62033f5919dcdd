"""A step is the optimizer's on the mean gradient; models together are models alone; a stop changes nothing."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from minitf import ModelConfig, initialize
from minitf.train import sharding, trainer
from minitf.train.batch import Batch, next_token
from minitf.train.config import SWEPT, MeshSettings, TrainConfig
from minitf.train.settings import as_config
from minitf.train.step import Program

MODEL = ModelConfig(vocabulary=11, layers=1, width=8, heads=2, length=6)
MESH = sharding.mesh_of(MeshSettings())
OF_PLACES = jax.random.randint(jax.random.key(9), (11,), 0, 11)


def draw(key, count):
    """The next token is a fixed function of the last."""
    first = jax.random.randint(key, (count, 1), 0, 11)
    tokens = [first]
    for _ in range(6):
        tokens.append(OF_PLACES[tokens[-1]])
    return next_token(jnp.concatenate(tokens, axis=1))


def config_of(**groups) -> TrainConfig:
    groups["training"] = {"steps": 12, "batch": 8, "steps_per_call": 5, **groups.get("training", {})}
    groups["optimizer"] = {"rate": 0.01, "warm_up": 3, **groups.get("optimizer", {})}
    return as_config(groups)


def program_of(**groups) -> Program:
    return Program(config_of(**groups), MODEL, "next_token", draw=draw)


def trained(program, stops=(12,), done=0, state=None):
    """The state after the last stop, and every step's loss."""
    programs = trainer.compiled(program, MESH, 1.0, 6)
    state = programs.start() if state is None else state
    measures = []
    for taken in trainer.run(programs, state, done, stops, None, MESH):
        state = taken.state
        measures.append(np.asarray(taken.measures.loss)[..., : taken.done - taken.first])
    return state, np.concatenate(measures, axis=-1)


@functools.cache
def plain():
    return trained(program_of())


def assert_alike(one, other, **tolerance):
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_allclose(np.asarray(a), np.asarray(b), **tolerance)


def test_the_steps_are_those_of_a_plain_loop_with_optax():
    program = program_of(optimizer={"clip": 0.5, "weight_decay": 0.3})
    state, losses = trained(program)
    key = jax.random.key(0)
    parameters = initialize(MODEL, jax.random.fold_in(key, 0))
    decays = jax.tree.map(lambda x: x.ndim >= 2, parameters)
    decays = decays.replace(layers=jax.tree.map(lambda x: x.ndim >= 3, parameters.layers))
    schedule = lambda n: (
        0.01 * min((n + 1) / 3, 1) * (1 - 0.9 * (1 - np.cos(np.pi * np.clip((n - 3) / 9, 0, 1))) / 2)
    )
    rates = jnp.array([schedule(n) for n in range(12)])
    optimizer = optax.chain(
        optax.clip_by_global_norm(0.5),
        optax.adamw(lambda n: rates[n], 0.9, 0.95, weight_decay=0.3, mask=decays),
    )
    moments = optimizer.init(parameters)

    @jax.jit
    def step(parameters, moments, n):
        batch = draw(jax.random.fold_in(jax.random.fold_in(key, 1), n), 8)

        def mean(p):
            total, count = program.loss(p, batch, {}, key)
            return total / count

        loss, gradient = jax.value_and_grad(mean)(parameters)
        update, moments = optimizer.update(gradient, moments, parameters)
        return optax.apply_updates(parameters, update), moments, loss

    for n in range(12):
        parameters, moments, loss = step(parameters, moments, n)
        np.testing.assert_allclose(losses[n], loss, rtol=1e-4)
    assert_alike(state.parameters, parameters, rtol=1e-3, atol=1e-5)
    assert state.step == 12


@pytest.mark.parametrize("name", SWEPT)
def test_every_number_that_may_be_swept_can_be(name):
    optimizer = "muon" if name == "optimizer.muon_rate" else "adamw"
    program = program_of(sweep={name: [0.5, 0.25]}, optimizer={"name": optimizer})
    state, _, numbers, key = program.shapes()
    after, _ = jax.eval_shape(lambda state: program.take(state, key, numbers, jnp.int32(0), None), state)
    assert after.step.shape == ()


def test_models_that_train_together_are_those_that_train_alone():
    together, losses = trained(program_of(training={"seeds": 2}, sweep={"optimizer.rate": [0.01, 0.003]}))
    assert losses.shape == (4, 12)
    # The second and the third: each differs from the first in one thing alone.
    for number, seed, rate in [(1, 0, 0.003), (2, 1, 0.01)]:
        alone, loss = trained(program_of(training={"seed": seed}, optimizer={"rate": rate}))
        np.testing.assert_allclose(losses[number], loss, rtol=1e-5)
        assert_alike(jax.tree.map(lambda x: x[number], together), alone, rtol=1e-4, atol=1e-5)  # noqa: B023


def test_every_model_rounds_at_random_by_its_own_seed():
    wide = dataclasses.replace(MODEL, width=64, hidden=128)
    optimizer = {"name": "adamw_4bit", "stochastic": True}

    def codes(**training):
        config = config_of(training={"steps": 2, **training}, optimizer=optimizer)
        state, _ = trained(Program(config, wide, "next_token", draw=draw), (2,))
        return [np.asarray(x) for x in jax.tree.leaves(state.moments) if x.dtype == jnp.uint8]

    together, alone = codes(seeds=2), codes(seed=1)
    assert sum(x.size for x in alone) > 10_000
    for (_, second), other in zip(together, alone, strict=True):
        # Sums in another order round a few otherwise.
        assert np.mean(second == other) > 0.99
    # The same moments are rounded otherwise under another key.
    key = jax.random.key
    program = Program(config_of(optimizer=optimizer), wide, "next_token", draw=draw)
    parameters = initialize(wide, key(0))
    of = lambda key: program.optimizer({}, key).update(
        parameters, program.optimizer({}, key).init(parameters), parameters
    )
    one, same, other = (jax.tree.leaves(jax.jit(of)(key(seed))[1]) for seed in (0, 0, 1))
    equal = lambda a, b: np.mean([np.mean(x == y) for x, y in zip(a, b, strict=True) if x.dtype == jnp.uint8])
    assert equal(one, same) == 1 and equal(one, other) < 0.9


def test_it_does_not_matter_how_many_models_are_side_by_side():
    some = program_of(training={"seeds": 3, "at_once": 2, "steps": 5})
    every = program_of(training={"seeds": 3, "at_once": 3, "steps": 5})
    assert_alike(trained(some, (5,)), trained(every, (5,)), rtol=1e-4, atol=1e-6)


def test_where_memory_is_short_fewer_models_run_side_by_side():
    program = program_of(training={"seeds": 4, "steps": 5})
    plenty = trainer.compiled(program, MESH, 1.0, 6, memory=10**12)
    needed = plenty.temporary_bytes + plenty.argument_bytes
    short = trainer.compiled(program, MESH, 1.0, 6, memory=needed - 1)
    assert (plenty.at_once, short.at_once) == (4, 2)
    assert short.temporary_bytes < plenty.temporary_bytes
    asked = trainer.compiled(program_of(training={"seeds": 4, "at_once": 4, "steps": 5}), MESH, 1.0, 6, memory=1)
    assert asked.at_once == 4


def test_a_run_that_stops_and_goes_on_has_the_same_bits():
    program = program_of(optimizer={"average": 0.9}, objective={"dropout": 0.2})
    whole, losses = trained(program)
    programs = trainer.compiled(program, MESH, 1.0, 6)
    state = programs.start()
    for taken in trainer.run(programs, state, 0, (7,), None, MESH):
        state = taken.state
    kept = jax.tree.map(np.asarray, state)
    again, rest = trained(program, done=7, state=jax.tree.map(jnp.asarray, kept))
    assert jax.tree.all(jax.tree.map(lambda a, b: bool(jnp.all(a == b)), whole, again))
    np.testing.assert_array_equal(losses[7:], rest)


def test_a_batch_in_parts_is_the_batch():
    whole, losses = plain()
    parts, in_parts = trained(program_of(training={"accumulate": 4}))
    np.testing.assert_allclose(losses, in_parts, rtol=1e-5)
    assert_alike(whole.parameters, parts.parameters, rtol=1e-3, atol=1e-5)


def test_parts_with_different_numbers_of_targets_count_by_their_targets():
    program = program_of(training={"accumulate": 2})
    targets = jnp.where(jnp.arange(8)[:, None] % 2 == 0, draw(jax.random.key(0), 8).targets, -1)
    batch = Batch(draw(jax.random.key(0), 8).tokens, targets.at[0].set(-1))
    parameters = initialize(MODEL, jax.random.key(0))
    whole = program_of().gradient(parameters, batch, {}, jax.random.key(0))
    parts = program.gradient(parameters, batch, {}, jax.random.key(0))
    assert_alike(whole, parts, rtol=1e-5, atol=1e-7)


def test_a_step_that_is_not_finite_changes_nothing_but_the_counts():
    program = program_of(optimizer={"average": 0.9}, training={"when_not_finite": "skip"})
    state = program.start(jax.random.key(0), {})
    broken = dataclasses.replace(program, draw=lambda key, count: _poisoned(draw(key, count)))
    after, measured = jax.jit(broken.take, static_argnames=())(state, jax.random.key(0), {}, jnp.int32(0), None)
    assert not np.isfinite(measured.loss)
    assert after.skipped == 1
    assert after.step == 1
    for name in ("parameters", "moments", "average"):
        assert_alike(getattr(after, name), getattr(state, name), rtol=0)


def _poisoned(batch):
    inputs = jax.nn.one_hot(batch.tokens, 11).at[0, 0, 0].set(jnp.nan)
    return Batch(batch.tokens, batch.targets, inputs)


def test_the_running_mean_of_weights_is_the_mean_at_first_and_fades_later():
    program = program_of(optimizer={"average": 0.5}, training={"steps": 3, "steps_per_call": 1})
    programs = trainer.compiled(program, MESH, 1.0, 6)
    points = []
    for taken in trainer.run(programs, programs.start(), 0, (1, 2, 3), None, MESH):
        points.append(np.asarray(taken.state.parameters.unembedding))
        average = np.asarray(taken.state.average.unembedding)
    expected = 0.5 * (0.5 * points[0] + 0.5 * points[1]) + 0.5 * points[2]
    np.testing.assert_allclose(average, expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", ["sgd", "adam", "lion", "muon", "adafactor", "adamw_4bit", "adamw_8bit"])
def test_every_optimizer_learns(name):
    rates = {"sgd": 0.5, "lion": 0.003}
    optimizer = {"name": name, "rate": rates.get(name, 0.02), "weight_decay": 0.0}
    _, losses = trained(program_of(optimizer=optimizer, training={"steps": 60, "steps_per_call": 60}), (60,))
    assert losses[-1] < 0.8 * losses[0]


def test_half_precision_computes_in_half_and_keeps_whole_weights():
    program = program_of(training={"precision": "bfloat16"})
    state, losses = trained(program)
    _, exact = plain()
    assert {x.dtype.name for x in jax.tree.leaves(state.parameters)} == {"float32"}
    # Eight bits of mantissa: some 1 in 256 of the loss.
    np.testing.assert_allclose(losses, exact, rtol=0.02)
    assert not np.array_equal(losses, exact)
