"""The walk from a layer on is the rest of the whole walk."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from properties.models import (
    BERT,
    GPT2,
    LLAMA,
    compiled,
    configs,
    examples,
    largest,
    quick_jit,
    random_parameters,
    random_tokens,
    relative_error,
    shapes,
)

from minitf import change, walk
from minitf.changes import put_change
from minitf.resume import end_from, last_layer_at, layer_walk, walk_from
from minitf.walk import leaves

UNIT = 2.0**-24


def close(found, expected):
    """Equal but for the last bits, which depend on how XLA fuses each of the two programs."""
    found, expected = np.asarray(found), np.asarray(expected)
    np.testing.assert_array_equal(np.isneginf(found), np.isneginf(expected))
    finite = np.isfinite(expected)
    assert relative_error(found[finite], expected[finite]) < 400 * UNIT


@examples(4)
@given(config=configs())
def test_the_walk_from_each_layer_is_the_rest_of_the_walk(config):
    parameters, tokens = random_parameters(config), random_tokens(config)
    whole = compiled(config)(parameters, tokens)
    for layer in range(config.layers):
        stream = whole.layers.resid_pre[layer]
        rest = quick_jit(lambda p, s, i=layer: walk_from(p, s, config, i))(parameters, stream)
        expected = whole.replace(
            token_embedding=None,
            position_embedding=None,
            start=stream,
            layers=jax.tree.map(lambda x, i=layer: x[i:], whole.layers),
        )
        assert [name for name, _ in leaves(rest)] == [name for name, _ in leaves(expected)]
        for (_, a), (_, b) in zip(leaves(rest), leaves(expected), strict=True):
            close(a, b)
    ended = walk_from(parameters, whole.layers.resid_post[-1], config, config.layers)
    close(ended.logits, whole.logits)


@pytest.mark.parametrize("config", [GPT2, LLAMA, BERT], ids=["gpt2", "llama", "bert"])
def test_one_layer_and_the_end_by_a_traced_number_are_those_of_the_walk(config):
    parameters, tokens = random_parameters(config), random_tokens(config)
    whole = compiled(config)(parameters, tokens)
    one = jax.jit(
        lambda i, stream: (layer_walk(parameters, stream, config, i), end_from(parameters, stream, config, i))
    )
    for layer in range(config.layers):
        passed, end = one(layer, whole.layers.resid_pre[layer])
        for found, expected in zip(jax.tree.leaves(passed), jax.tree.leaves(whole.layers), strict=True):
            close(found, expected[layer])
        close(end, whole.end)
    assert one._cache_size() == 1


@pytest.mark.parametrize("config", [GPT2, BERT], ids=["gpt2", "bert"])
def test_padding_stays_hidden_in_a_resumed_walk(config):
    parameters, tokens = random_parameters(config), random_tokens(config)
    valid = jnp.arange(5)[None, :] < jnp.array([[3], [5]])
    whole = walk(parameters, tokens, config, valid=valid)
    stream = whole.layers.resid_pre[1]
    close(walk_from(parameters, stream, config, 1, valid=valid).logits, whole.logits)
    close(end_from(parameters, stream, config, 1, valid=valid), whole.end)
    assert largest(walk_from(parameters, stream, config, 1).logits - whole.logits) > 1e-3


def test_an_edit_of_the_layers_that_run_is_the_edit_of_those_layers_in_the_whole():
    parameters, tokens = random_parameters(GPT2), random_tokens(GPT2)
    like = shapes(GPT2)
    whole = compiled(GPT2)(parameters, tokens, change(like, "layers.z", layer=1, head=2, keep=0.0, put=0.5))
    rest_like = jax.eval_shape(lambda p, s: walk_from(p, s, GPT2, 1), parameters, whole.start)
    edit = change(rest_like, "layers.z", layer=0, head=2, keep=0.0, put=0.5)
    stream = whole.layers.resid_pre[1]
    found = quick_jit(lambda e: walk_from(parameters, stream, GPT2, 1, edit=e))(edit)
    close(found.logits, whole.logits)
    unedited = walk_from(parameters, stream, GPT2, 1)
    assert largest(found.logits - unedited.logits) > 1e-3
    moved = walk_from(parameters, stream, GPT2, 1, edit=change(rest_like, "start", put=1e-3))
    np.testing.assert_array_equal(moved.start, stream + jnp.float32(1e-3))


def bad_calls():
    parameters, stream = random_parameters(GPT2), jnp.zeros((2, 5, 12))
    one = change(shapes(GPT2), "layers.z", keep=0.0)
    return {
        "layer 3; this model has layers 0 to 1": lambda: walk_from(parameters, stream, GPT2, 3),
        "no layer 2; this model has layers 0 to 1": lambda: layer_walk(parameters, stream, GPT2, 2),
        "stream is 11 wide; this model's is 12": lambda: walk_from(parameters, stream[..., 1:], GPT2, 1),
        "9 positions are more than": lambda: end_from(parameters, jnp.zeros((1, 9, 12)), GPT2, 1),
        "2 layers on its first axis; the model has 1": lambda: walk_from(parameters, stream, GPT2, 1, edit=one),
        "no layer is left to run": lambda: walk_from(parameters, stream, GPT2, 2, edit=one),
        "no embeddings to edit": lambda: walk_from(
            parameters, stream, GPT2, 0, edit=put_change("token_embedding", one.layers.z)
        ),
    }


def test_what_cannot_run_is_refused_with_a_sentence():
    for sentence, call in bad_calls().items():
        with pytest.raises(ValueError, match=sentence):
            call()


@pytest.mark.parametrize("config", [GPT2, LLAMA, BERT], ids=["gpt2", "llama", "bert"])
def test_the_end_at_some_positions_is_a_part_of_the_end(config):
    parameters, tokens = random_parameters(config), random_tokens(config)
    valid = jnp.arange(tokens.shape[1])[None] >= jnp.array([[0], [2]])
    streams = quick_jit(lambda p, t: walk(p, t, config, valid=valid))(parameters, tokens).layers.resid_pre
    end = quick_jit(lambda p, s, i, at=None: end_from(p, s, config, i, valid=valid, at=at))
    some = quick_jit(lambda p, s, i: end_from(p, s, config, i, valid=valid, at=(-1, 2)))
    for number in range(config.layers):
        whole = end(parameters, streams[number], jnp.int32(number))
        close(some(parameters, streams[number], jnp.int32(number)), whole[:, [-1, 2]])
        close(end_from(parameters, streams[number], config, number, valid=valid, at=(-1, 2)), whole[:, [-1, 2]])
    past = some(parameters, streams[0], jnp.int32(config.layers))
    np.testing.assert_array_equal(past, streams[0][:, [-1, 2]])


def test_positions_that_are_not_there_are_refused():
    parameters, tokens = random_parameters(GPT2), random_tokens(GPT2)
    stream = walk(parameters, tokens, GPT2).layers.resid_pre[0]
    with pytest.raises(ValueError, match=r"^at=\[5\] leaves the 5 positions of the stream$"):
        end_from(parameters, stream, GPT2, 0, at=(5,))
    edit = change(jax.eval_shape(lambda: walk(parameters, tokens, GPT2)), "layers.v", keep=0.0, layer=0)
    with pytest.raises(ValueError, match="^an edit of 'v' changes what all positions read; run the whole layer$"):
        last_layer_at(parameters, stream, GPT2, (-1,), edit=edit.layers)
