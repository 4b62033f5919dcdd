"""Edges: what chosen receivers read of a sender's step differs, and nothing else does."""

import functools
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
    NEOX,
    bits,
    configs,
    examples,
    in_float64,
    quick_jit,
    random_parameters,
    random_tokens,
    relative_error,
    shapes,
)

from minitf import Walk, change, walk
from minitf.analysis.edges import Receivers, end_along, join, to_end, to_feed_forwards, to_heads
from minitf.parameters import named

DEEP = replace(GPT2, layers=3)
UNIT = 2.0**-24


def everything(like):
    return join(to_heads(like), to_feed_forwards(like), to_end(like))


def random_difference(like, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=like.end.shape), like.end.dtype)


def edge_by_edge(weights, start, difference, config, layer, written_by, receivers, through):
    """The same run in numpy: every step twice, for those that read the difference and for those that do not."""
    w = {name: np.asarray(value, np.float64) for name, value in weights.items()}
    added = lambda half, number: difference if (half, number) == (written_by, layer) else 0.0
    plain, other = [start], [start + added("feed_forward", -1)]
    for number in range(config.layers):
        part = {name[7:]: value[number] for name, value in w.items() if name.startswith("layers.")}
        before = sum(plain), sum(other)
        step = attention_step(*before, part, config, receivers, number)
        plain, other = [*plain, step], [*other, step + added("attention", number)]
        x, y = before if config.parallel else (sum(plain), sum(other))
        step = feed_forward_step(np.where(receivers.feed_forward[number], y, x), part, config)
        on_the_way = feed_forward_step(y, part, config) if through else step
        plain, other = [*plain, step], [*other, on_the_way + added("feed_forward", number)]
    return np.where(receivers.end, sum(other), sum(plain))


def attention_step(x, y, part, config, receivers, number):
    step = part.get("attention.output_bias", 0.0)
    x, y = (oracle.norm(stream, part, "attention_norm", config) for stream in (x, y))
    for head in range(config.heads):
        group = head // (config.heads // config.groups)
        read = lambda mask, head=head: np.where(mask[number][:, :, head], y, x)
        q = oracle.project(read(receivers.q), part, "query", head)
        k = oracle.project(read(receivers.k), part, "key", group)
        v = oracle.project(read(receivers.v), part, "value", group)
        if config.position == "rotary":
            q, k = oracle.rotate(q, config), oracle.rotate(k, config)
        scores = np.einsum("bqc,bkc->bqk", q, k) / np.sqrt(q.shape[-1])
        scores = np.where(np.tril(np.ones(scores.shape[1:], bool)), scores, -np.inf)
        weight = np.exp(scores - scores.max(-1, keepdims=True))
        step = step + weight / weight.sum(-1, keepdims=True) @ v @ part["attention.output"][head]
    return step


def feed_forward_step(x, part, config):
    return oracle.feed_forward(oracle.norm(x, part, "feed_forward_norm", config), part, config)


def random_receivers(like, seed):
    """Some inputs of every kind, at some positions; for odd seeds none in the last layer, but some at the end."""
    generator = np.random.default_rng(seed)
    some = lambda **sizes: {axis: generator.random(size) < 0.6 for axis, size in sizes.items()}
    layers, _, length, heads, _ = like.layers.q.shape
    in_layers = lambda **sizes: (
        some(**sizes) | {"layer": np.append(generator.random(layers - 1) < 0.6, seed % 2 == 0)}
    )
    return join(
        *(to_heads(like, one, **in_layers(position=length, head=heads)) for one in "qkv"),
        to_feed_forwards(like, **in_layers(position=length)),
        to_end(like, **some(position=length)),
    )


@pytest.mark.parametrize(
    ("config", "written_by", "through"),
    [
        (DEEP, "attention", False),
        (replace(LLAMA, layers=3), "attention", True),
        (replace(NEOX, layers=3), "feed_forward", True),
    ],
    ids=["gpt2", "llama-through-feed-forwards", "neox-feed-forwards-through-feed-forwards"],
)
def test_receivers_read_the_difference_and_nothing_else_does(config, written_by, through):
    with jax.enable_x64(True):
        parameters, tokens = in_float64(random_parameters(config)), random_tokens(config)
        how = {"written_by": written_by, "through_feed_forwards": through}

        @quick_jit
        def run(difference, layer, receivers):
            base = walk(parameters, tokens, config)
            return base.start, end_along(parameters, base, difference, layer, receivers, config, **how)

        like = shapes(config, parameters, tokens)
        difference = random_difference(like)
        for layer in range(-1 if written_by == "feed_forward" else 0, config.layers):
            receivers = random_receivers(like, layer + 1)
            start, found = run(difference, layer, receivers)
            given = [np.asarray(x) for x in (start, difference)]
            expected = edge_by_edge(named(parameters), *given, config, layer, written_by, receivers, through)
            # Some hundred products follow one another; the unit of a double is 1e-16.
            assert relative_error(found, expected) < 1e-12
            nothing = edge_by_edge(named(parameters), given[0], 0.0, config, 0, written_by, receivers, through)
            assert relative_error(expected, nothing) > 1e-3


@examples(3)
@given(config=configs(norm_placement="pre", residual=True, attention="query_key", layers=2), through=st.booleans())
def test_the_edges_to_all_receivers_are_the_change_of_the_sender_also_under_padding(config, through):
    parameters, tokens, like = random_parameters(config), random_tokens(config), shapes(config)
    valid = jnp.arange(5)[None, :] >= jnp.array([[2], [0]])
    difference = random_difference(like)
    # Where feed-forwards on the way answer too, they need not be named.
    receivers = join(to_heads(like), to_end(like))
    if not through and config.feed_forward != "none":
        receivers = join(receivers, to_feed_forwards(like))

    @quick_jit
    def run(layer):
        base = walk(parameters, tokens, config, valid=valid)
        edit = change(like, "layers.attention_step", layer=layer, put=difference)
        return (
            walk(parameters, tokens, config, edit=edit, valid=valid).end,
            end_along(
                parameters,
                base,
                difference,
                layer,
                receivers,
                config,
                through_feed_forwards=through,
                valid=valid,
            ),
        )

    for layer in range(config.layers):
        expected, found = run(layer)
        assert relative_error(found, expected) < 1000 * UNIT


def test_in_a_linear_model_the_effects_of_disjoint_paths_add_up_to_the_whole():
    # Frozen associations (uniform, as there are no queries and keys), no norm, no feed-forward.
    config = replace(DEEP, norm="none", feed_forward="none", position="none")
    with jax.enable_x64(True):
        parameters = in_float64(random_parameters(config))
        attention = parameters.layers.attention
        nothing = {name: 0 * getattr(attention, name) for name in ("query", "key", "query_bias", "key_bias")}
        parameters = parameters.replace(layers=parameters.layers.replace(attention=attention.replace(**nothing)))
        base = quick_jit(lambda p: walk(p, random_tokens(config), config))(parameters)
        difference = random_difference(base)
        # One edge each: from head to head, to the values, and from head to the end.
        paths = [to_heads(base, "v", layer=layer, head=head) for layer in (1, 2) for head in range(3)]
        nowhere, end = np.zeros_like(paths[0].v), np.ones_like(to_end(base).end)
        masks = Receivers(
            v=np.stack([*(path.v for path in paths), nowhere, nowhere | True]),
            end=np.stack([*(~end for _ in paths), end, end]),
        )
        one = lambda receivers: end_along(parameters, base, difference, 0, receivers, config) - base.end
        effects = quick_jit(jax.vmap(one))(masks)
        assert relative_error(effects[:-1].sum(axis=0), effects[-1]) < 1e-13
        np.testing.assert_allclose(effects[-2], difference, atol=1e-14)
        assert all(relative_error(effect, effects[-1]) > 1e-2 for effect in effects[:-1])


def test_nobody_before_the_sender_reads_it_and_nothing_changes_nothing():
    config = replace(NEOX, layers=3)  # where the feed-forward of a layer does not read its attention
    parameters, tokens, like = random_parameters(config), random_tokens(config), shapes(config)
    before = join(to_heads(like, layer=[0, 1]), to_feed_forwards(like, layer=[0, 1]))

    @quick_jit
    def run(layer, difference):
        base = walk(parameters, tokens, config)
        return base.end, end_along(parameters, base, difference, layer, before, config)

    difference = random_difference(like)
    end, later = run(1, difference)
    assert bits(later) == bits(run(2, 1e30 * difference)[1]) == bits(end)
    assert relative_error(run(0, 0 * difference)[1], end) < 400 * UNIT
    assert relative_error(run(0, difference)[1], end) > 1e-2


def test_receivers_are_masks_of_the_named_places():
    like = shapes(LLAMA)
    queries = to_heads(like, "q", layer=1, head=[0, -1], position=slice(3, None))
    expected = np.zeros((2, 1, 5, 4, 1), bool)
    expected[1, :, 3:, 0] = expected[1, :, 3:, 3] = True
    np.testing.assert_array_equal(queries.q, expected)
    assert queries.k is queries.v is queries.feed_forward is queries.end is None
    np.testing.assert_array_equal(to_heads(like, "kv", head=1).v, [[[[[0], [1], [0], [0]]]]] * 2)
    both = join(queries, to_heads(like, layer=1, head=2), to_end(like, position=-1))
    expected[1, :, :, 2] = True
    np.testing.assert_array_equal(both.q, expected)
    assert both.k.sum() == both.v.sum() == 1
    np.testing.assert_array_equal(both.end[0, :, 0], [0, 0, 0, 0, 1])
    np.testing.assert_array_equal(to_feed_forwards(like, layer=[True, False]).feed_forward[:, 0, 0, 0], [1, 0])


@functools.cache
def bad_calls():
    like = shapes(GPT2)

    def run(receivers, config=GPT2, base=None, layer=0, **how):
        base = shapes(config) if base is None else base
        zeros = jnp.zeros((2, 5, config.width))
        return lambda: end_along(random_parameters(config), base, zeros, layer, receivers, config, **how)

    no_residual = replace(GPT2, residual=False)
    table = replace(GPT2, attention="table", width=12, heads=1)
    attention_alone = replace(GPT2, feed_forward="none")
    other = shapes(replace(GPT2, heads=4))
    return {
        "norm_placement='pre'": run(to_end(shapes(BERT)), BERT),
        "residual=True": run(to_end(like), no_residual),
        "attention='query_key'": run(to_end(like), table),
        "base walk holds no 'layers.resid_pre'": run(to_end(like), base=Walk()),
        "base walk holds no 'end'": run(to_end(like), base=like.replace(end=None)),
        "has 2 layers; the model has 3": run(to_end(like), DEEP, base=like),
        "there are no receivers": run(Receivers()),
        "no attention -1 writes a step": run(to_end(like), layer=-1),
        "no feed_forward 2 .* layers -1 to 1": run(to_end(like), layer=2, written_by="feed_forward"),
        "no feed-forward to receive": run(to_feed_forwards(like), attention_alone),
        r"q is of shape \(2, 1, 1, 4, 1\) and must broadcast to \(2, 2, 5, 3, 4\)": run(
            to_heads(other, "q", head=1)
        ),
        r"end is of shape \(1, 4, 1\)": run(
            to_end(shapes(GPT2, tokens=random_tokens(GPT2, length=4)), position=0)
        ),
        "'w' does not choose among them": lambda: to_heads(like, "w"),
        "'' does not choose among them": lambda: to_heads(like, ""),
        "head=3 is outside 'layers.q', which has 3": lambda: to_heads(like, head=3),
        r"layer=\[0, 2\] is outside": lambda: to_feed_forwards(like, layer=[0, 2]),
        "no axis 'head'; choose from": lambda: to_end(like, head=0),
        "this walk has no 'layers.feed_forward_step'": lambda: to_feed_forwards(shapes(attention_alone)),
    }


def test_what_cannot_be_is_refused_with_a_sentence():
    for sentence, call in bad_calls().items():
        with pytest.raises(ValueError, match=sentence):
            call()
