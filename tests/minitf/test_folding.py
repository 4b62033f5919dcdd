from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from properties import oracle
from properties.models import (
    BERT,
    GPT2,
    LLAMA,
    bits,
    configs,
    examples,
    in_float64,
    largest,
    quick_jit,
    random_parameters,
    random_tokens,
)

from minitf import ModelConfig, mixers, walk
from minitf.declaration import declare
from minitf.folding import fold
from minitf.parameters import named

# Sizes of one kind only: what differs are the parts, and few shapes are compiled.
SIZES = {"width": 8, "layers": 2, "length": 8, "embedding": "learned", "attention": "query_key", "head_width": 4}
pre_norm = st.sampled_from(["layer", "rms"]).flatmap(
    lambda norm: configs(**SIZES, norm=norm, norm_placement="pre")
)
layer_norm = configs(**SIZES, norm="layer", norm_placement="pre", embedding_norm=False).filter(
    lambda config: config.position != "sinusoidal"
)
with_value_biases = configs(**SIZES, attend_self=True, biases=True)
any_model = configs(**SIZES)
GROUPED = replace(LLAMA, norm="layer", biases=True, unembedding_bias=True)
RARE = replace(
    GPT2, layers=1, unembedding_transform=True, unembedding_bias=True, token_types=2, query_key_norm=True
)
QWEN3, QWEN2 = replace(LLAMA, query_key_norm=True), replace(LLAMA, query_key_value_biases=True)


def forward(parameters, config):
    """The model in plain float64 numpy, and what its words are."""
    found = oracle.forward(named(parameters), np.asarray(random_tokens(config)), config)
    logits = found["logits"] - found["logits"].max(-1, keepdims=True)
    return found | {"words": logits - np.log(np.exp(logits).sum(-1, keepdims=True))}


def run(parameters, config):
    """The same from the walk, for what the plain formula does not have."""
    found = quick_jit(lambda p, t: walk(p, t, config))(parameters, random_tokens(config))
    words = jax.nn.log_softmax(found.logits)
    return {"logits": found.logits, "words": words, "layers.pattern": found.layers.pattern, "end": found.end}


def folded(config, forward=forward, **asked):
    """What a model computes before and after, the weights after, and their configuration."""
    with jax.enable_x64(True):
        parameters = in_float64(random_parameters(config))
        kept = bits(parameters)
        new, new_config = fold(parameters, config, **asked)
        assert bits(parameters) == kept
        shapes = {name: weight.shape for name, weight in named(new).items()}
        assert shapes == {name: declared.shape for name, declared in named(declare(new_config)).items()}
        assert {weight.dtype for weight in named(new).values()} == {jnp.dtype(jnp.float64)}
        return forward(parameters, config), forward(new, new_config), named(new), new_config


def assert_same(before, after, *names):
    for name in names:
        assert largest(np.asarray(after[name]) - np.asarray(before[name])) < 1e-10 * max(
            1, largest(before[name])
        ), name


def assert_plain(weights, config):
    norms = [name for name in weights if "norm." in name and not name.startswith("embedding_norm")]
    assert norms
    for name in norms:
        np.testing.assert_array_equal(weights[name], 1.0 if name.endswith("gain") else 0.0, err_msg=name)


@examples(15)
@given(config=pre_norm)
def test_folded_norms_only_divide_and_nothing_else_changes(config):
    before, after, weights, now = folded(config, norms=True)
    assert_same(before, after, *(before.keys() - {"context"}))
    assert_plain(weights, now)
    assert not now.tied


@examples(12)
@given(config=with_value_biases)
def test_values_without_biases_take_the_same_steps(config):
    before, after, weights, now = folded(config, value_biases=True)
    assert_same(before, after, *before)
    assert now == config and not np.any(weights["layers.attention.value_bias"])


@examples(12)
@given(config=layer_norm)
def test_with_centered_writers_the_stream_has_no_mean_and_the_words_are_the_same(config):
    before, after, _, _ = folded(config, center_writers=True)
    assert_same(before, after, "logits", "layers.pattern", "context")
    for name in ("start", "layers.resid_pre", "layers.attention_step", "layers.resid_mid", "end"):
        mean = before[name].mean(-1, keepdims=True)
        assert largest(after[name] - (before[name] - mean)) < 1e-10 * max(1, largest(before[name]))
        assert largest(mean) > 1e-3


@examples(15)
@given(config=any_model)
def test_a_centered_unembedding_moves_all_logits_of_a_position_alike(config):
    before, after, _, now = folded(config, center_unembedding=True)
    assert_same(before, after, "words", "layers.pattern", "end")
    moved = after["logits"] - before["logits"]
    assert largest(moved - moved[..., :1]) < 1e-10 and largest(moved) > 1e-3
    assert largest(after["logits"].mean(-1)) < 1e-10
    assert not now.tied


@examples(10)
@given(config=layer_norm)
def test_everything_at_once_leaves_words_and_associations(config):
    options = {"norms": True, "value_biases": True, "center_writers": True, "center_unembedding": True}
    if not config.attend_self:
        del options["value_biases"]
    before, after, weights, now = folded(config, **options)
    assert_same(before, after, "words", "layers.pattern")
    assert_plain(weights, now)


@pytest.mark.parametrize(
    ("config", "forward", "options"),
    [
        (RARE, run, {"norms": True, "value_biases": True, "center_writers": True}),
        (QWEN2, forward, {"norms": True, "value_biases": True}),
    ],
    ids=["transform, token types, norms of queries and keys", "biases of queries, keys and values alone"],
)
def test_models_of_less_common_parts_say_the_same(config, forward, options):
    before, after, weights, now = folded(config, forward, **options)
    assert_same(before, after, "logits", "words", "layers.pattern")
    assert_plain({name: weight for name, weight in weights.items() if "query_gain" not in name}, now)
    end = np.asarray(before["end"])
    mean = end.mean(-1, keepdims=True) if "center_writers" in options else 0.0
    assert_same({"end": end - mean}, after, "end")


def test_gains_of_queries_and_keys_are_left_as_they_are():
    parameters = random_parameters(QWEN3)
    new, _ = fold(parameters, QWEN3, norms=True)
    np.testing.assert_array_equal(new.layers.attention.query_gain, parameters.layers.attention.query_gain)
    np.testing.assert_array_equal(new.layers.attention.key_gain, parameters.layers.attention.key_gain)


# Mistakes that other tools have made.


def test_the_final_norm_of_a_tied_model_changes_its_unembedding_but_not_its_embedding():
    before, after, weights, now = folded(GPT2, norms=True)
    assert_same(before, after, "logits", "start")
    with jax.enable_x64(True):
        parameters = in_float64(random_parameters(GPT2))
        np.testing.assert_array_equal(weights["embedding"], parameters.embedding)
        gain = np.asarray(parameters.final_norm.gain)
        np.testing.assert_allclose(weights["unembedding"], gain[:, None] * np.asarray(parameters.embedding).T)
        # The mistake: one table for both.
        wrong = {**weights, "embedding": weights["unembedding"].T}
        assert (
            largest(oracle.forward(wrong, np.asarray(random_tokens(now)), now)["logits"] - before["logits"]) > 0.1
        )


def test_biases_of_grouped_values_reach_every_head_of_the_group():
    assert (GROUPED.heads, GROUPED.groups) == (4, 2)
    before, after, _, _ = folded(GROUPED, norms=True, value_biases=True)
    assert_same(before, after, "logits", "layers.pattern", "end")
    parameters = random_parameters(GROUPED)
    w = {name: np.asarray(weight, np.float64) for name, weight in named(parameters).items()}
    found = fold(parameters, GROUPED, value_biases=True)[0].layers.attention.output_bias
    for layer in range(GROUPED.layers):
        expected = w["layers.attention.output_bias"][layer].copy()
        for head in range(4):
            bias = w["layers.attention.value_bias"][layer, head // 2]
            expected += bias @ w["layers.attention.output"][layer, head]
        np.testing.assert_allclose(found[layer], expected, atol=1e-5)


def test_an_offset_gets_a_bias_where_the_model_has_none():
    config = replace(GPT2, biases=False, query_key_value_biases=True)
    before, after, weights, now = folded(config, norms=True)
    assert_same(before, after, *(before.keys() - {"context"}))
    assert now.biases and now.unembedding_bias and not np.any(weights["layers.feed_forward.out_bias"])
    # Without offsets nothing is added.
    assert fold(random_parameters(LLAMA), LLAMA, norms=True)[1] == LLAMA


# How it is asked for.


@pytest.mark.parametrize("options", [{"norms": True}, {"value_biases": True}, {"center_unembedding": True}])
def test_a_second_time_changes_nothing(options):
    once, config = fold(random_parameters(GPT2), GPT2, **options)
    twice, again = fold(once, config, **options)
    assert again == config
    for name, weight in named(twice).items():
        np.testing.assert_allclose(weight, named(once)[name], atol=1e-6, err_msg=name)


def test_folding_is_compiled_and_keeps_half_precision():
    parameters = random_parameters(GPT2, dtype=jnp.bfloat16)
    found = quick_jit(lambda p: fold(p, GPT2, norms=True, center_writers=True)[0])(parameters)
    assert {weight.dtype for weight in named(found).values()} == {jnp.dtype(jnp.bfloat16)}
    exact, _ = fold(random_parameters(GPT2), GPT2, norms=True, center_writers=True)
    for name, weight in named(found).items():
        # Three roundings of the unit 2^-8: of the weight, of the gain, of the product.
        expected = named(exact)[name]
        assert largest(weight.astype(jnp.float32) - expected) <= 3 * 2**-8 * max(1, largest(expected)), name


@pytest.mark.parametrize(
    ("changes", "asked", "said"),
    [
        ({}, {}, "^nothing is asked for: set norms, value_biases, center_writers or center_unembedding$"),
        ({"norm": "none"}, {"norms": True}, "^norm is 'none', which has no gain or offset to fold$"),
        ({"norm": "l2"}, {"norms": True}, "^norm is 'l2', which has no gain or offset to fold$"),
        ({"norm_placement": "post"}, {"norms": True}, "^norm_placement is 'post': what such a norm gives is the"),
        (
            {"norm": "rms"},
            {"center_writers": True},
            "^norm is 'rms'; only LayerNorm takes the stream's mean away$",
        ),
        ({"norm": "none"}, {"center_writers": True}, "^norm is 'none'; only LayerNorm"),
        ({"norm_placement": "post"}, {"center_writers": True}, "^norm_placement is 'post': the norms write"),
        ({"embedding_norm": True}, {"center_writers": True}, "^the norm of the embedding writes to the stream"),
        ({"position": "sinusoidal"}, {"center_writers": True}, "^sinusoidal positions are no weights"),
        ({"biases": False}, {"value_biases": True}, "^this model has no value biases to fold$"),
        ({"attend_self": False}, {"value_biases": True}, "^attend_self is False: the first query sees no key"),
        ({"mixer": mixers.Retention()}, {"norms": True}, "^folding knows the weights of softmax attention alone"),
    ],
    ids=str,
)
def test_what_would_change_the_model_is_refused(changes, asked, said):
    config = replace(GPT2, **changes)
    with pytest.raises(ValueError, match=said):
        fold(random_parameters(config), config, **asked)


def test_tables_have_no_maps_to_fold_into():
    config = ModelConfig(vocabulary=7, width=7, embedding="one_hot", attention="table", position="none")
    parameters = random_parameters(config)
    for asked, said in (
        ("norms", "^table attention has no maps to fold a gain into: its values are what the norm gives$"),
        ("value_biases", "^this model has no value biases to fold$"),
        ("center_writers", "^one-hot embeddings are no weights"),
    ):
        with pytest.raises(ValueError, match=said):
            fold(parameters, config, **{asked: True})


def test_parameters_of_another_model_are_refused():
    with pytest.raises(ValueError, match="^the parameters are not of this model: they lack unembedding$"):
        fold(random_parameters(GPT2), replace(GPT2, tied=False), norms=True)


def test_an_encoder_folds_what_it_can():
    before, after, _, _ = folded(BERT, value_biases=True, center_unembedding=True)
    assert_same(before, after, "words", "layers.pattern", "end")
