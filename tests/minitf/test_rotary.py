import dataclasses
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from properties.models import LLAMA, SCALINGS, examples
from properties.oracle import pace

from minitf import ModelConfig, filter
from minitf.config import from_plain
from minitf.rotary import RotaryScaling, frequencies

ROTARY = {"vocabulary": 10, "width": 12, "heads": 3, "position": "rotary"}


def refused(match, **fields):
    # Users have no type checker that runs: past the one of the tests, each field is set behind its back.
    scaling = RotaryScaling("yarn", 2.0, 64)
    for name, value in fields.items():
        object.__setattr__(scaling, name, value)
    with pytest.raises(ValueError, match=match):
        scaling.__post_init__()


def with_scaling(scaling, rotated=8, base=10000.0):
    return dataclasses.replace(LLAMA, head_width=rotated, rotary_base=base, rotary_scaling=scaling)


scalings = st.builds(
    RotaryScaling,
    rule=st.sampled_from(["linear", "llama3", "yarn"]),
    factor=st.floats(1, 40),
    original_length=st.integers(16, 100_000),
    slow_turns=st.floats(0.5, 2),
    fast_turns=st.floats(2.5, 50),
    attention_factor=st.floats(0.5, 2),
)


@given(scaling=scalings, pairs=st.integers(1, 64), base=st.sampled_from([1e4, 5e5, 1e6]))
def test_every_rule_is_the_formula_pair_by_pair(scaling, pairs, base):
    config = with_scaling(scaling, 2 * pairs, base)
    plain, found = frequencies(2 * pairs, base), frequencies(2 * pairs, base, scaling)
    np.testing.assert_allclose(plain, [base ** (-j / pairs) for j in range(pairs)], rtol=1e-12)
    expected = [plain[j] * pace(j, 2 * pairs, config) for j in range(pairs)]
    np.testing.assert_allclose(found, expected, rtol=1e-9)


@given(scaling=scalings, pairs=st.integers(1, 64))
def test_no_pair_turns_faster_than_before_or_slower_than_by_the_factor(scaling, pairs):
    share = frequencies(2 * pairs, 1e4, scaling) / frequencies(2 * pairs, 1e4)
    assert np.all(share <= 1 + 1e-12) and np.all(share >= 1 / scaling.factor - 1e-12)
    # Fast pairs keep more of their speed than slow ones.
    assert np.all(np.diff(share) <= 1e-12)


def test_llama_3_1_slows_its_slow_pairs_alone():
    # Numbers of the published 8B model: 64 pairs, base 500000, from 8192 to 131072 positions.
    scaling = RotaryScaling("llama3", 8.0, 8192, 1.0, 4.0)
    share = frequencies(128, 500000.0, scaling) / frequencies(128, 500000.0)
    wavelength = 2 * math.pi / frequencies(128, 500000.0)
    np.testing.assert_array_equal(share[wavelength < 8192 / 4], 1.0)
    np.testing.assert_allclose(share[wavelength > 8192], 1 / 8, rtol=1e-12)
    between = share[(wavelength > 8192 / 4) & (wavelength < 8192)]
    assert len(between) and np.all((between > 1 / 8) & (between < 1))


@pytest.mark.parametrize("interleaved", [False, True])
def test_stretched_positions_are_positions_between(interleaved):
    with jax.enable_x64(True):
        x = jnp.asarray(np.random.default_rng(0).normal(size=(5, 2, 6)))
        turn = lambda positions, scaling: filter.rotate(x, positions, 4, 1e4, interleaved, scaling)
        found = turn(3 * jnp.arange(5), RotaryScaling("linear", 3.0))
        np.testing.assert_allclose(found, turn(jnp.arange(5), None), atol=1e-12)


def test_the_attention_factor_lengthens_what_turns_and_nothing_else():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(5, 2, 6)), jnp.float32)
    plain, grown = (
        filter.rotate(x, jnp.arange(5), 4, 1e4, False, RotaryScaling("linear", 3.0, attention_factor=growth))
        for growth in (1.0, 1.5)
    )
    np.testing.assert_allclose(grown[..., :4], 1.5 * plain[..., :4], rtol=1e-5)
    np.testing.assert_array_equal(grown[..., 4:], x[..., 4:])


@pytest.mark.parametrize("scaling", SCALINGS, ids=lambda scaling: scaling.rule)
def test_a_configuration_with_scaling_is_plain_data(scaling):
    config = ModelConfig(**ROTARY, rotary_scaling=scaling)
    assert hash(config) == hash(ModelConfig(**ROTARY, rotary_scaling=scaling))
    assert config == from_plain(json.loads(json.dumps(dataclasses.asdict(config))))
    assert config != ModelConfig(**ROTARY) == from_plain(dataclasses.asdict(ModelConfig(**ROTARY)))


def test_numbers_without_meaning_are_refused():
    refused("^the rule of rotary_scaling is 'ntk'; choose one of linear, llama3, yarn$", rule="ntk")
    refused("^factor of rotary_scaling is 0.0; it must be a positive number$", factor=0.0)
    refused("^attention_factor of rotary_scaling is inf; it must be", attention_factor=math.inf)
    refused("^original_length of rotary_scaling is 0; it must be at least 1$", original_length=0)
    refused("^slow_turns of rotary_scaling is 4.0, which must be less than its fast_turns, 4.0$", slow_turns=4.0)
    assert RotaryScaling("linear", 2.0).original_length == 0


def test_a_model_that_yarn_cannot_slow_is_refused_when_it_is_made():
    yarn = RotaryScaling("yarn", 2.0, 6, 1.0, 32.0)
    with pytest.raises(ValueError, match="^the rule yarn cannot slow 4 components of base 10000.0: with an orig"):
        ModelConfig(**ROTARY, rotary_scaling=yarn)
    with pytest.raises(ValueError, match="^rotary_base is 1.0; the rule yarn needs one above 1$"):
        ModelConfig(**ROTARY, rotary_scaling=dataclasses.replace(yarn, original_length=64), rotary_base=1.0)
    assert ModelConfig(**ROTARY | {"position": "learned"}, rotary_scaling=yarn).rotary_scaling == yarn


def test_bounds_that_are_not_rounded_lie_within_those_that_are():
    scaling = RotaryScaling("yarn", 4.0, 4096, 1.0, 32.0)
    exact = dataclasses.replace(scaling, whole_pairs=False)
    plain, rounded, found = (frequencies(64, 1e4, s) for s in (None, scaling, exact))
    # The pairs of 1 and of 32 turns, as real numbers.
    first, last = (32 * math.log(4096 / (2 * math.pi * turns)) / math.log(1e4) for turns in (32, 1))
    slowed = np.clip((np.arange(32) - first) / (last - first), 0, 1)
    np.testing.assert_allclose(found, plain * (1 - slowed + slowed / 4), rtol=1e-12)
    assert not np.array_equal(found, rounded)


@examples(3)
@given(scaling=st.sampled_from(SCALINGS))
def test_scores_still_depend_on_distance_alone(scaling):
    q, k = np.random.default_rng(0).normal(size=(2, 1, 1, 8)).astype(np.float32)
    turn = lambda x, at: filter.rotate(jnp.asarray(x), jnp.array([at]), 8, 100.0, False, scaling)
    score = lambda t, s: float(jnp.sum(turn(q, t) * turn(k, s)))
    assert score(40, 33) == pytest.approx(score(12, 5), abs=1e-4)
    assert abs(score(40, 33) - score(40, 34)) > 1e-3
