"""Direct logit attribution: the parts are what they are called, and sum to the logit."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from properties.models import (
    BERT,
    GPT2,
    LLAMA,
    NEOX,
    compiled,
    configs,
    examples,
    in_float64,
    quick_jit,
    random_parameters,
    random_tokens,
)

from minitf import Walk, change, walk
from minitf.analysis.attribution import by_head, by_neuron, by_step, chosen_logit, direction
from minitf.walk import put

UNIT = 2.0**-24


def run(config):
    parameters, tokens = random_parameters(config), random_tokens(config)
    target, against = random_tokens(config, 1), random_tokens(config, 2)
    return parameters, compiled(config)(parameters, tokens), target, against


def sizes(parameters, passed, config, target, against):
    """Sum of the magnitudes of all products in a logit: what roundings are relative to."""
    toward, bias = direction(parameters, passed, config, target, against)
    magnitude = lambda x: np.einsum("...w,...w->...", np.abs(np.float64(x)), np.abs(np.float64(toward)))
    total = magnitude(passed.start) + magnitude(passed.layers.attention_step).sum(0) + np.abs(bias)
    if passed.layers.feed_forward_step is not None:
        total = total + magnitude(passed.layers.feed_forward_step).sum(0)
    return total


@examples(10)
@given(config=configs(norm_placement="pre", residual=True), lead=st.booleans())
def test_the_parts_and_the_bias_sum_to_the_logit(config, lead):
    parameters, passed, target, against = run(config)
    against = against if lead else None
    found = np.float64(by_step(parameters, passed, config, target, against).total)
    expected = np.float64(chosen_logit(passed.logits, target, against))
    # Inner products of `width` terms, twice (the parts' and the logit's), the walk's sum of two steps a layer, the
    # centering and the norm: at most so many roundings, each of at most a unit of the sum of magnitudes.
    roundings = 3 * config.width + 4 * config.layers + 20
    assert (
        np.abs(found - expected) <= roundings * UNIT * sizes(parameters, passed, config, target, against)
    ).all()


@examples(6)
@given(config=configs(norm_placement="pre", residual=True))
def test_in_float64_all_three_ways_of_splitting_sum_exactly(config):
    with jax.enable_x64(True):
        parameters = in_float64(random_parameters(config))
        tokens, target, against = (random_tokens(config, seed) for seed in range(3))
        passed = quick_jit(lambda p: walk(p, tokens, config))(parameters)
        steps = by_step(parameters, passed, config, target, against)
        difference = np.asarray(steps.total - chosen_logit(passed.logits, target, against))
        assert np.abs(difference).max() < 1e-10
        heads = by_head(parameters, passed, config, target, against)
        np.testing.assert_allclose(heads.parts.sum(-1) + heads.bias, steps.attention, atol=1e-10)
        if config.feed_forward != "none":
            neurons = by_neuron(parameters, passed, config, target, against)
            np.testing.assert_allclose(neurons.parts.sum(-1) + neurons.bias, steps.feed_forward, atol=1e-10)


@pytest.mark.parametrize("config", [GPT2, LLAMA, NEOX], ids=["gpt2", "llama", "neox"])
def test_a_part_is_what_the_logit_loses_when_it_is_taken_out_under_the_frozen_scale(config):
    with jax.enable_x64(True):
        parameters, tokens = in_float64(random_parameters(config)), random_tokens(config)
        target, against = random_tokens(config, 1), random_tokens(config, 2)
        shapes = jax.eval_shape(lambda p: walk(p, tokens, config), parameters)
        forward = quick_jit(lambda edit: walk(parameters, tokens, config, edit=edit))
        plain = forward(None)
        lead = lambda w: np.asarray(chosen_logit(w.logits, target, against))

        def without(part):
            end = change(shapes, "end", put=-part)
            frozen = change(shapes, "final_norm_scale", keep=0.0, put=plain.final_norm_scale)
            return lead(plain) - lead(forward(end.replace(final_norm_scale=frozen.final_norm_scale)))

        steps = by_step(parameters, plain, config, target, against)
        np.testing.assert_allclose(steps.start, without(plain.start), atol=1e-10)
        np.testing.assert_allclose(steps.attention[1], without(plain.layers.attention_step[1]), atol=1e-10)
        np.testing.assert_allclose(steps.feed_forward[0], without(plain.layers.feed_forward_step[0]), atol=1e-10)
        heads = by_head(parameters, plain, config, target, against)
        np.testing.assert_allclose(
            heads.parts[0, :, :, 1], without(plain.layers.head_steps[0, :, :, 1]), atol=1e-10
        )
        neurons = by_neuron(parameters, plain, config, target, against)
        row = plain.layers.post[1, :, :, 3, None] * parameters.layers.feed_forward.out[1, 3]
        np.testing.assert_allclose(neurons.parts[1, :, :, 3], without(row), atol=1e-10)


def test_a_difference_of_logits_is_the_difference_of_their_attributions():
    parameters, passed, target, against = run(GPT2)
    both = by_step(parameters, passed, GPT2, target, against)
    one, other = (by_step(parameters, passed, GPT2, t) for t in (target, against))
    for a, b, c in zip(*map(jax.tree.leaves, (both, one, other)), strict=True):
        np.testing.assert_allclose(a, b - c, atol=1e-5)


def test_a_constant_added_to_every_component_counts_for_nothing_under_a_centering_norm():
    parameters, passed, target, _ = run(GPT2)
    moved = passed.replace(start=passed.start + 3.0)
    found, plain = (by_step(parameters, w, GPT2, target).start for w in (moved, passed))
    np.testing.assert_allclose(found, plain, atol=1e-4)
    parameters, passed, target, _ = run(LLAMA)
    moved = passed.replace(start=passed.start + 3.0)
    found, plain = (by_step(parameters, w, LLAMA, target).start for w in (moved, passed))
    assert np.abs(found - plain).max() > 0.1


def test_attribution_runs_compiled_and_batched_by_vmap_over_targets():
    parameters, passed, target, _ = run(LLAMA)
    many = jnp.stack([target, target[::-1]])
    together = jax.jit(jax.vmap(lambda t: by_head(parameters, passed, LLAMA, t).parts))(many)
    np.testing.assert_allclose(together[0], by_head(parameters, passed, LLAMA, target).parts, atol=1e-5)


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        (BERT, "needs norm_placement='pre'"),
        (replace(GPT2, residual=False), "needs residual=True"),
    ],
)
def test_a_model_whose_end_is_no_sum_of_steps_is_refused(config, sentence):
    parameters, passed, target, _ = run(config)
    for question in (by_step, by_head, by_neuron):
        with pytest.raises(ValueError, match=sentence):
            question(parameters, passed, config, target)


def test_targets_of_another_shape_and_missing_leaves_are_refused():
    parameters, passed, target, _ = run(GPT2)
    with pytest.raises(ValueError, match=r"target of shape \(2, 4\) will not do: one token is needed"):
        by_step(parameters, passed, GPT2, target[:, 1:])
    with pytest.raises(ValueError, match="there is no token 20; the vocabulary is 0 to 12"):
        by_step(parameters, passed, GPT2, target, target.at[1, 2].set(20))
    with pytest.raises(ValueError, match="'start', which this walk does not hold"):
        by_step(parameters, Walk(), GPT2, target)
    for question, name in (
        (by_step, "layers.attention_step"),
        (by_step, "layers.feed_forward_step"),
        (by_step, "final_norm_scale"),
        (by_head, "layers.head_steps"),
        (by_neuron, "final_norm_scale"),
    ):
        with pytest.raises(ValueError, match=f"'{name}', which this walk does not hold"):
            question(parameters, put(passed, name, None), GPT2, target)
    with pytest.raises(ValueError, match="no neurons"):
        by_neuron(parameters, passed.replace(layers=passed.layers.replace(post=None)), GPT2, target)
