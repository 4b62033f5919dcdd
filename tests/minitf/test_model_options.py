"""What single options of a model do, each against numpy in float64."""

from dataclasses import replace

import jax
import numpy as np
import pytest
from properties.models import BERT, GPT2, LLAMA, compiled, in_float64, random_parameters, random_tokens

from minitf.parameters import named


def run(config, parameters):
    """The walk of some tokens in float64, as numpy arrays."""
    with jax.enable_x64(True):
        return jax.device_get(compiled(config)(in_float64(parameters), random_tokens(config)))


def close(found, expected):
    np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-12)


def test_the_norm_of_queries_and_keys_is_of_each_head_by_itself():
    config = replace(LLAMA, position="none", query_key_norm=True, layers=1)
    parameters = random_parameters(config)
    bare = replace(parameters.layers.attention, query_gain=None, key_gain=None)
    without = replace(parameters, layers=replace(parameters.layers, attention=bare))
    normed, plain = run(config, parameters), run(replace(config, query_key_norm=False), without)
    for name, gain in (("q", "query_gain"), ("k", "key_gain")):
        x = getattr(plain.layers, name)
        scale = np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + config.norm_epsilon)
        gains = np.asarray(getattr(parameters.layers.attention, gain), np.float64)
        close(getattr(normed.layers, name), x / scale * gains)
    close(normed.layers.v, plain.layers.v)


def test_biases_may_be_on_queries_keys_and_values_alone():
    config = replace(LLAMA, position="none", query_key_value_biases=True, layers=1)
    parameters = random_parameters(config)
    names = {name for name in named(parameters) if name.endswith("bias")}
    assert names == {f"layers.attention.{name}_bias" for name in ("query", "key", "value")}
    bare = replace(parameters.layers.attention, query_bias=None, key_bias=None, value_bias=None)
    without = replace(parameters, layers=replace(parameters.layers, attention=bare))
    biased, plain = run(config, parameters), run(replace(config, query_key_value_biases=False), without)
    for name, bias in (("q", "query_bias"), ("k", "key_bias"), ("v", "value_bias")):
        added = np.asarray(getattr(parameters.layers.attention, bias), np.float64)
        close(getattr(biased.layers, name), getattr(plain.layers, name) + added)


@pytest.mark.parametrize("position", ["learned", "sinusoidal"])
def test_the_first_token_type_is_added_to_every_position(position):
    config = replace(GPT2, position=position, token_types=2, layers=1)
    parameters = random_parameters(config)
    found = run(config, parameters)
    without = run(replace(config, token_types=0), replace(parameters, token_type=None))
    kind = np.asarray(parameters.token_type[0], np.float64)
    close(found.position_embedding, without.position_embedding + kind)
    close(found.start, found.token_embedding + found.position_embedding)


def test_the_transform_before_the_unembedding_is_a_map_the_activation_and_a_norm():
    config = replace(BERT, feed_forward="relu", unembedding_transform=True, unembedding_bias=True)
    parameters = random_parameters(config)
    found, w = run(config, parameters), {n: np.asarray(x, np.float64) for n, x in named(parameters).items()}
    x = np.maximum(found.context @ w["unembedding_transform.weight"] + w["unembedding_transform.bias"], 0)
    x = x - x.mean(axis=-1, keepdims=True)
    x = x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + config.norm_epsilon)
    x = x * w["unembedding_transform.norm.gain"] + w["unembedding_transform.norm.offset"]
    close(found.logits, x @ w["unembedding"] + w["unembedding_bias"])
