"""The law of filters and aggregates: with associations and norm scales frozen, attention is linear."""

import itertools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from properties.models import (
    configs,
    examples,
    in_float64,
    largest,
    quick_jit,
    random_parameters,
    random_tokens,
)

from minitf import Change, ModelConfig, walk
from minitf.parameters import named
from minitf.walk import Edit, get, put

FROZEN = ("layers.pattern", "layers.attention_norm_scale", "final_norm_scale")


def freeze(found):
    """The edit that holds every association and norm scale where this walk had them."""
    edit = Edit()
    for name in FROZEN:
        if get(found, name) is not None:
            edit = put(edit, name, Change(jnp.zeros(()), get(found, name)))
    return edit


def from_start(parameters, tokens, config, edit):
    """The map from the start of the walk to its logits, everything else frozen."""

    def logits(start):
        at_start = put(edit, "start", Change(jnp.zeros(()), start))
        return walk(parameters, tokens, config, edit=at_start).logits

    return quick_jit(logits)


@examples(7)
@given(
    config=configs(feed_forward="none", biases=False, unembedding_bias=False, attention="query_key"),
    a=st.floats(-2, 2),
    b=st.floats(-2, 2),
)
def test_frozen_attention_is_linear_in_the_start(config, a, b):
    # LayerNorm's offset and gain: an offset is added whatever comes in, so it is off like the biases.
    with jax.enable_x64(True):
        parameters, tokens = without_offsets(in_float64(random_parameters(config))), random_tokens(config)
        found = quick_jit(lambda p, t: walk(p, t, config))(parameters, tokens)
        logits = from_start(parameters, tokens, config, freeze(found))
        one, other = np.random.default_rng(0).normal(size=(2, *found.start.shape))
        together = logits(a * one + b * other)
        apart = a * logits(one) + b * logits(other)
        scale = max(largest(logits(one)), largest(logits(other)), 1.0)
        assert largest(together - apart) <= 1e-12 * scale
        # And it is the model: at the model's own start the frozen map gives the model's own logits.
        assert largest(logits(found.start) - found.logits) <= 1e-12 * max(largest(found.logits), 1.0)


def without_offsets(parameters):
    off = lambda norm: norm if norm.offset is None else norm.replace(offset=0 * norm.offset)
    layers = parameters.layers.replace(attention_norm=off(parameters.layers.attention_norm))
    return parameters.replace(layers=layers, final_norm=off(parameters.final_norm))


def test_without_freezing_it_is_not_linear():
    config = ModelConfig(vocabulary=11, width=8, heads=2, length=8, feed_forward="none")
    with jax.enable_x64(True):
        parameters, tokens = without_offsets(in_float64(random_parameters(config))), random_tokens(config)
        logits = from_start(parameters, tokens, config, Edit())
        one, other = np.random.default_rng(0).normal(size=(2, 2, 5, 8))
        assert largest(logits(one + other) - logits(one) - logits(other)) > 0.1


@pytest.mark.parametrize("norm", ["none", "rms", "layer"])
def test_the_expansion_over_paths_sums_to_the_logits(norm):
    # Elhage et al. 2021: a product of (identity + heads) over the layers is a sum over paths through heads.
    config = ModelConfig(
        vocabulary=11, layers=2, width=12, heads=3, key_value_heads=1, length=8, feed_forward="none", norm=norm
    )
    config = replace(config, position="rotary")
    with jax.enable_x64(True):
        parameters, tokens = without_offsets(in_float64(random_parameters(config))), random_tokens(config)
        found = quick_jit(lambda p, t: walk(p, t, config))(parameters, tokens)
        w = {name: np.asarray(x) for name, x in named(parameters).items()}
        start, pattern = np.asarray(found.start), np.asarray(found.layers.pattern)
        gain = lambda name, *at: w[name][at] if name in w else 1.0
        scale = lambda leaf, *at: 1.0 if leaf is None else np.asarray(leaf)[at][..., None]

        def norm_filter(x, weight, by):
            x = x - x.mean(-1, keepdims=True) if norm == "layer" else x
            return x / by * weight

        def head(layer, h, x):
            """One head: a frozen aggregate after the filter W_V W_O."""
            ov = w["layers.attention.value"][layer, :, 0] @ w["layers.attention.output"][layer, h]
            scaled = norm_filter(
                x,
                gain("layers.attention_norm.gain", layer),
                scale(found.layers.attention_norm_scale, layer),
            )
            return np.einsum("bqk,bkw,wv->bqv", pattern[layer, :, h], scaled, ov)

        paths = 0
        total = np.zeros_like(start)
        for first, second in itertools.product([None, 0, 1, 2], repeat=2):
            x = start if first is None else head(0, first, start)
            total += x if second is None else head(1, second, x)
            paths += 1
        context = norm_filter(total, gain("final_norm.gain"), scale(found.final_norm_scale))
        assert paths == (1 + config.heads) ** config.layers
        logits = context @ w["unembedding"]
        assert largest(logits - found.logits) <= 1e-12 * largest(found.logits)
