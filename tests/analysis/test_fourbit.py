import math

import jax.numpy as jnp
import numpy as np
import optax
import pytest

from minitf.analysis.fourbit import bench, claims, moments, probes, training
from minitf.analysis.train_bench.sizes import Size
from minitf.train.fourbit import adamw_4bit


def test_memory_and_what_is_coded_once_are_as_the_papers_say():
    found = [*claims.memory_claims(), *claims.first_moment_claims(), *claims.second_moment_claims()]
    assert len({c.id for c in found}) == len(found)
    assert {c.id for c in found if not c.expected} == {"fourbit.rank1_always", "fourbit.linear_is_best"}
    for c in found:
        assert c.holds == c.expected, c


def test_sign_claim_holds_and_its_value_is_that_of_the_recurrence():
    (found,) = claims.sign_claims()
    assert found.holds and found.value[0] == pytest.approx(0.1 / (1 - 0.9 * 0.8875), abs=1e-5)
    # The positive momentum, and the mended negative one, lose nothing but .9 ** 200.
    assert found.value[1:3] == pytest.approx((1.0, 1.0), abs=1e-5)


def test_codes_freeze_with_linear_levels_and_go_on_with_others():
    frozen, changing = claims.frozen_claims()
    assert frozen.holds and changing.holds
    assert frozen.note.startswith("log10 of the coded over the exact moment: block_linear +")


def test_exact_moments_of_the_drift_are_those_of_float32():
    drifted = moments.drift(30, b2=0.9, second="block_de", bits=8)
    # Eight bits are off by some percent only, and by no more where all is seen.
    assert abs(drifted.bias) < 0.05 and drifted.spread < 0.2


def test_probes_find_nothing_off_in_what_is_coded_exactly():
    exact = probes.Coding(probes.SECOND["B128/linear"].codebook)
    x = np.tile(np.arange(1, 17) / 16, (2, 8))
    assert np.array_equal(exact.there_and_back(x), x.astype(np.float32))


def test_each_side_by_side_optimizer_sees_its_own_part_alone():
    optimizer = training.side_by_side([optax.sgd(1.0), optax.sgd(2.0), adamw_4bit(0.1, smallest=0)])
    weights = {"w": jnp.ones((3, 4, 6))}
    update, state = optimizer.update({"w": jnp.full((3, 4, 6), 0.5)}, optimizer.init(weights), weights)
    assert np.all(np.asarray(update["w"][0]) == -0.5) and np.all(np.asarray(update["w"][1]) == -1.0)
    assert np.asarray(update["w"][2]) == pytest.approx(-0.1 * 1.01, rel=1e-4)
    assert len(state) == 3


def test_texts_follow_the_chain():
    tokens = np.asarray(training.texts(training.jax.random.key(0), 400))
    assert tokens.shape == (400, training.CONFIG.length + 1)
    found = np.zeros((training.CONFIG.vocabulary,) * 2)
    np.add.at(found, (tokens[:, :-1], tokens[:, 1:]), 1)
    expected = np.asarray(training.jax.nn.softmax(training.chain()))
    counts = found.sum(axis=1, keepdims=True)
    # Six deviations of a share, in each of 256 places.
    assert np.all(
        np.abs(found / counts - expected) <= 6 * np.sqrt(expected * (1 - expected) / counts) + 1 / counts
    )


def test_a_model_trained_with_few_bits_is_as_good_and_with_zeros_diverges():
    for c in claims.training_claims():
        assert c.holds, c


def test_benchmark_has_time_and_bytes_of_every_optimizer():
    rows = list(
        bench.bench_fourbit(
            rounds=1,
            shapes=((64, 128),),
            optimizers={"4 bit": adamw_4bit(1e-3)},
            trained=Size("small", 1, 8, 2, 16, 4, 2, 3),
        )
    )
    trained = [f"training step: adamw_{kind}" for kind in ("4bit", "4bit_factor", "8bit")]
    assert [row.name for row in rows] == ["AdamW update: 4 bit", *trained, "AdamW state: 4 bit"]
    assert all(math.isfinite(row.ours) and "adamw" in row.peer for row in rows)
    assert rows[-1].ratio > 7
