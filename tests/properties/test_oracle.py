"""The main oracle: a plain float64 numpy forward, for models of every architecture."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from properties import oracle
from properties.models import (
    NAMED,
    compiled,
    configs,
    examples,
    in_float64,
    largest,
    quick_jit,
    random_parameters,
    random_tokens,
)

from minitf import walk
from minitf.parameters import named
from minitf.walk import get


def assert_rounding_alone(config, seed):
    """Against the oracle float32 errs by rounding, and float64 a million times less."""
    parameters, tokens = random_parameters(config, seed), random_tokens(config, seed)
    truth = oracle.forward(named(parameters), np.asarray(tokens), config)
    single = compiled(config)(parameters, tokens)
    with jax.enable_x64(True):
        double = quick_jit(lambda p, t: walk(p, t, config))(in_float64(parameters), tokens)
    for name, expected in truth.items():
        scale = max(largest(expected), 1.0)
        error32 = largest(np.asarray(get(single, name)) - expected) / scale
        error64 = largest(np.asarray(get(double, name)) - expected) / scale
        assert get(double, name).dtype == jnp.float64
        # 100 roundings of the unit 2^-24, one after another, in a net of three layers and widths below 32.
        assert error32 < 100 * 2**-24, name
        # By luck float32 may be right to the last bit; it cannot promise more than its unit.
        assert error64 < 1e-6 * max(error32, 2**-24), name


@pytest.mark.parametrize("name", NAMED)
def test_a_model_of_a_known_family_is_the_plain_formula(name):
    assert_rounding_alone(NAMED[name], seed=1)


@examples(15)
@given(config=configs(), seed=st.integers(0, 99))
def test_every_model_is_the_plain_formula(config, seed):
    assert_rounding_alone(config, seed)


@examples(6)
@given(config=configs(layers=1), keep=st.lists(st.booleans(), min_size=10, max_size=10))
def test_padding_is_seen_by_no_query(config, keep):
    parameters, tokens = random_parameters(config), random_tokens(config)
    valid = np.array(keep).reshape(tokens.shape)
    truth = oracle.forward(named(parameters), np.asarray(tokens), config, valid)
    found = quick_jit(lambda p, t, v: walk(p, t, config, valid=v))(parameters, tokens, valid)
    for name in ("layers.pattern", "logits"):
        scale = max(largest(truth[name]), 1.0)
        assert largest(np.asarray(get(found, name)) - truth[name]) / scale < 100 * 2**-24
