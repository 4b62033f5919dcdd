"""The logits alone cost what a plain forward costs: XLA removes what the caller drops.

It does so before it makes machine code: with little optimization of that, the same is counted, much sooner.
"""

import importlib.util
from pathlib import Path

import jax
import numpy as np
import pytest
from properties.models import random_parameters, random_tokens

from minitf import Edit, ModelConfig, walk

PLAIN = Path(__file__).parents[1] / "minitf" / "plain.py"
# Every norm and placement, in a loop and without one.
CASES = [
    (("layer", "pre"), 1, True),
    (("rms", "pre"), True, True),
    (("layer", "post"), True, True),
    (("rms", "post"), 1, True),
    (("layer", "pre"), True, False),
]


def plainly():
    specification = importlib.util.spec_from_file_location("plain", PLAIN)
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


def costs(run, parameters, tokens):
    """Operations and bytes of the compiled program, and what it computes."""
    compiled = jax.jit(run).lower(parameters, tokens).compile()
    analysis = compiled.cost_analysis()
    return analysis["flops"], analysis["bytes accessed"], compiled(parameters, tokens)


@pytest.mark.parametrize(("norm", "unroll", "biases"), CASES, ids=str)
def test_logits_alone_cost_what_a_plain_forward_costs(norm, unroll, biases):
    kind, placement = norm
    config = ModelConfig(
        vocabulary=101,
        layers=2,
        width=64,
        heads=4,
        length=32,
        biases=biases,
        feed_forward="relu",
        norm=kind,
        norm_placement=placement,
    )
    parameters, tokens = random_parameters(config), random_tokens(config, length=32, batch=4)
    ours = lambda p, t: walk(p, t, config, unroll=unroll).logits
    plain = lambda p, t: plainly().logits(p, t, config, unroll=unroll)
    flops, moved, logits = costs(ours, parameters, tokens)
    plain_flops, plain_moved, plain_logits = costs(plain, parameters, tokens)
    np.testing.assert_allclose(logits, plain_logits, rtol=0, atol=2e-5)
    assert flops / plain_flops <= 1.001
    assert moved / plain_moved <= 1.005


def test_layers_after_the_last_one_used_are_dropped_from_an_unrolled_model():
    config = ModelConfig(vocabulary=31, layers=4, width=32, heads=2, length=16)
    parameters, tokens = random_parameters(config), random_tokens(config)
    first = lambda p, t: walk(p, t, config, unroll=True).layers.resid_post[0]
    last = lambda p, t: walk(p, t, config, unroll=True).layers.resid_post[3]
    assert costs(first, parameters, tokens)[0] < 0.3 * costs(last, parameters, tokens)[0]


def test_an_absent_edit_costs_nothing():
    config = ModelConfig(vocabulary=31, layers=2, width=32, heads=2, length=16)
    parameters, tokens = random_parameters(config), random_tokens(config)
    without = costs(lambda p, t: walk(p, t, config).logits, parameters, tokens)
    empty = costs(lambda p, t: walk(p, t, config, edit=Edit()).logits, parameters, tokens)
    assert without[:2] == empty[:2]
