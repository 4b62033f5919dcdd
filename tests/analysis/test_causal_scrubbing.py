"""Causal scrubbing, where the truth is known, and where resamples can be written out example by example."""

import functools
import itertools
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from properties.models import GPT2, quick_jit, random_parameters, random_tokens, shapes

from minitf import Change, ModelConfig, identity_edit, walk
from minitf.analysis.causal_scrubbing import Node, Scrubbed, scrub
from minitf.walk import get, leaf_axes, put

KEY = jax.random.key(0)


# A model made by hand. A token has a sign and a colour. The one head looks at the first position alone and writes
# the sign it finds there into the logit of token 1; nothing else matters. All numbers are exact.
ROUTER = ModelConfig(
    vocabulary=4, width=4, heads=1, head_width=1, length=3, biases=True, norm="none", feed_forward="none"
)
SEQUENCES = jnp.asarray(list(itertools.product(range(4), repeat=3)), jnp.int32)


def sign(tokens):
    return tokens % 2


def colour(tokens):
    return tokens // 2


@functools.cache
def router():
    parameters = jax.tree.map(jnp.zeros_like, random_parameters(ROUTER))
    attention = parameters.layers.attention.replace(
        query_bias=jnp.ones((1, 1, 1)),
        key=jnp.zeros((1, 4, 1, 1)).at[0, 2].set(1000.0),  # where dimension 2 says "first position"
        value=jnp.zeros((1, 4, 1, 1)).at[0, 0].set(1.0),  # the sign
        output=jnp.zeros((1, 1, 1, 4)).at[0, 0, 0, 3].set(1.0),
    )
    embedding = [[2.0 * sign(token) - 1, 2.0 * colour(token) - 1, 0.0, 0.0] for token in range(4)]
    return parameters.replace(
        embedding=jnp.asarray(embedding),
        position=jnp.zeros((3, 4)).at[0, 2].set(1.0),
        layers=parameters.layers.replace(attention=attention),
        unembedding=jnp.zeros((4, 4)).at[3, 1].set(1.0),
    )


def right_sign(logits):
    """1 where the logit at the last position has the sign of the first token, -1 where it has the other."""
    return logits[:, -1, 1] * (2.0 * sign(SEQUENCES[:, 0]) - 1)


def scrub_router(*inputs, **how):
    return scrub(router(), SEQUENCES, right_sign, ROUTER, inputs, KEY, **{"resamples": 100} | how)


def at_last(labels, *inputs):
    return Node("layers.z", labels, {"layer": 0, "position": -1}, inputs)


def first_sign(tokens):
    return sign(tokens[:, 0])


@pytest.mark.parametrize("labels", [first_sign, np.where(SEQUENCES[:, 0] % 2, "odd", "even"), SEQUENCES[:, 0]])
def test_the_true_hypothesis_recovers_all_exactly(labels):
    found = scrub_router(at_last(labels))
    assert found.model == found.recovered == 1
    assert found.standard_error < 1e-15
    assert found.alone == (0,)
    assert np.mean(found.random) < 0.5


@pytest.mark.parametrize("wrong", [lambda tokens: sign(tokens[:, 1]), lambda tokens: colour(tokens[:, 0])])
def test_a_wrong_hypothesis_recovers_nothing(wrong):
    found = scrub_router(at_last(wrong))
    # Of the 31 others of a class 15 have the same sign, of all 63 others 31: a little less than half each.
    share = lambda same, others: 2 * same / others - 1
    expected = (share(15, 31) - share(31, 63)) / (1 - share(31, 63))
    assert abs(found.recovered - expected) < 5 * found.standard_error < 0.15
    assert abs(np.mean(found.random) - share(31, 63)) < 5 * np.std(found.random) / np.sqrt(100)


def test_no_classes_recover_exactly_nothing_and_classes_of_one_all():
    nothing = scrub_router(at_last(np.zeros(64)))
    assert nothing.recovered == nothing.standard_error == 0
    everything = scrub_router(at_last(np.arange(64)))
    assert everything.recovered == 1
    assert everything.alone == (64,)


def test_labels_may_be_those_of_positions():
    assert scrub_router(Node("start", sign)).recovered == 1
    assert abs(scrub_router(Node("start", colour)).recovered) < 0.15
    later = scrub_router(Node("start", np.arange(64 * 3).reshape(64, 3), {"position": [1, 2]}))
    assert later.alone == (64 * 2,)


@pytest.mark.parametrize("at_random", [False, True])
def test_what_a_part_is_made_of_is_tested_as_well(at_random):
    made_of = lambda position: Node("layers.v", first_sign, {"layer": 0, "position": position})
    right = scrub_router(at_last(first_sign, made_of(0)), rest_at_random=at_random)
    wrong = scrub_router(at_last(first_sign, made_of(1)), rest_at_random=at_random)
    assert right.recovered == 1
    # It is true that the part depends on the sign: with a rest of the same sign, that is enough.
    assert abs(wrong.recovered) < 0.15 if at_random else wrong.recovered == 1


def lead(logits):
    """The lead of one token over another at the last position, by sequence; no sequence counts like another."""
    return (logits[:, -1, 1] - logits[:, -1, 2]) * jnp.arange(1.0, 1.0 + len(logits))


# Four examples in classes of two: what is drawn is always the other one, so that every resample is the same.
PAIRS, CROSSED = np.array([0, 1, 0, 1]), np.array([0, 1, 1, 0])
BY_POSITION = np.stack([PAIRS, CROSSED, PAIRS, CROSSED, PAIRS], axis=1)
VALID = jnp.array([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]] * 2, bool)


def parts(one, another, by_position):
    return [
        Node("layers.z", one, {"layer": 0, "head": [0, 2]}),
        Node("layers.feed_forward_step", another, {"layer": 0, "position": slice(1, 4)}),
        Node("layers.pattern", by_position, {"layer": 1, "head": 1}),
    ]


# The parts, how they are tested, and how many examples stand for themselves.
HYPOTHESES = {
    "parts-and-positions": (parts(PAIRS, CROSSED, BY_POSITION), {"at": [-1]}, (0, 0, 0)),
    "made-of": (
        [
            Node(
                "layers.attention_step",
                PAIRS,
                {"layer": 1},
                (Node("layers.resid_mid", CROSSED, {"layer": 0}, (Node("token_embedding", BY_POSITION),)),),
            ),
            Node("layers.z", CROSSED, {"layer": 1, "head": 1}),
        ],
        {},
        (0, 0, 0, 0),
    ),
    "rest-at-random": (
        [
            Node(
                "layers.resid_mid",
                np.zeros(4),
                {"layer": 0, "position": [2, 3]},
                (Node("layers.k", np.arange(4), {"layer": 0, "position": 2}),),
            )
        ],
        {"rest_at_random": True, "valid": VALID},
        (0, 4),
    ),
}


def scrub_four(inputs, **how):
    tokens = random_tokens(GPT2, batch=4)
    return scrub(random_parameters(GPT2), tokens, lead, GPT2, inputs, KEY, resamples=3, **how)


@functools.cache
def edited():
    """The walk of one example, with an edit of every leaf."""
    parameters = random_parameters(GPT2)
    return quick_jit(lambda tokens, valid, edit: walk(parameters, tokens, GPT2, edit=edit, valid=valid))


@dataclass
class OneByOne:
    """The same for one example after another, where each has one partner in its class."""

    tokens: Any
    valid: Any
    rest_at_random: bool = False
    at: Any = None

    def partner(self, labels, example):
        alike = lambda i: labels[i] == labels[example] and (self.valid[i] == self.valid[example]).all()
        (found,) = [i for i in range(4) if i != example and alike(i)] or [example]
        return found

    def walk(self, example, inputs=()):
        edit = jax.tree.map(np.asarray, identity_edit(shapes(GPT2, tokens=self.tokens[:1])))
        for node in inputs:
            whole = get(edit, node.name)
            where = np.zeros(whole.put.shape, bool)
            where[tuple(node.place.get(axis, slice(None)) for axis in leaf_axes()[node.name])] = True
            value = np.where(where, self.value(node, example), whole.put)
            edit = put(edit, node.name, Change(np.where(where, np.float32(0.0), whole.keep), value))
        if inputs and self.rest_at_random:
            example = self.partner(np.zeros(4), example)
        here = slice(example, example + 1)
        return edited()(self.tokens[here], self.valid[here], edit)

    def value(self, node, example):
        if np.ndim(node.labels) == 1:
            return get(self.walk(self.partner(node.labels, example), node.inputs), node.name)
        axis = {"layers.pattern": 3, "token_embedding": 1}[node.name]
        partners = [self.partner(labels, example) for labels in np.transpose(node.labels)]
        values = [np.asarray(get(self.walk(partner), node.name)) for partner in partners]
        return np.stack([np.take(value, i, axis=axis) for i, value in enumerate(values)], axis=axis)


@pytest.mark.parametrize("which", HYPOTHESES)
def test_a_resample_is_one_edited_walk_for_every_example(which):
    inputs, how, alone = HYPOTHESES[which]
    found = scrub_four(inputs, **how)
    one_by_one = OneByOne(random_tokens(GPT2, batch=4), **({"valid": VALID | True} | how))
    logits = lambda inputs: np.concatenate([one_by_one.walk(example, inputs).logits for example in range(4)])
    expected, model = np.mean(lead(logits(inputs))), np.mean(lead(logits(())))
    np.testing.assert_allclose(found.scrubbed, [expected] * 3, atol=1e-5)
    np.testing.assert_allclose(found.model, model, atol=1e-5)
    assert abs(expected - model) > 1e-2
    assert found.alone == alone


def test_the_memory_bound_sets_how_many_run_together_and_nothing_else():
    inputs, seen = parts(np.zeros(4), [0, 0, 0, 1], lambda tokens: tokens % 2), []
    progress = lambda numbers: (seen.append(i) or i for i in numbers)
    whole, parted = (scrub_four(inputs, at=[-1], progress=progress, **how) for how in ({}, {"memory": 80_000}))
    assert seen == [*range(3), *range(5)]  # the model; then one or two batches, with classes and without
    assert parted.scrubbed.shape == parted.random.shape == (3,)
    np.testing.assert_allclose(parted.scrubbed, whole.scrubbed, atol=1e-5)
    np.testing.assert_allclose(parted.random, whole.random, atol=1e-5)
    assert np.ptp(whole.scrubbed) > 1e-2


@pytest.fixture
def _as_it_is_used():
    jax.config.update("jax_disable_most_optimizations", False)
    jax.clear_caches()
    yield
    jax.config.update("jax_disable_most_optimizations", True)


@pytest.mark.usefixtures("_as_it_is_used")
def test_classes_of_one_leave_any_model_as_it_is_to_the_last_bit():
    found = scrub_four(parts(np.arange(4), np.arange(4), np.arange(20).reshape(4, 5)), at=[-1])
    assert found.recovered == 1
    assert set(found.scrubbed) == {found.model}
    assert found.alone == (4, 4, 20)


def test_the_standard_error_is_that_of_leaving_out_one_resample_after_another():
    generator = np.random.default_rng(0)
    common = generator.normal(size=400)
    scrubbed = 3 + common + 0.5 * generator.normal(size=400)
    random = 1 + common + 0.5 * generator.normal(size=400)
    of = lambda keep: Scrubbed(model=np.float64(5.0), scrubbed=scrubbed[keep], random=random[keep])
    without = np.array([of(np.arange(400) != i).recovered for i in range(400)])
    jackknife = np.sqrt(399 / 400 * np.sum((without - without.mean()) ** 2))
    # They differ in the next order of 1 / 400.
    np.testing.assert_allclose(of(slice(None)).standard_error, jackknife, rtol=0.01)


@functools.cache
def bad_calls():
    parameters, tokens = random_parameters(GPT2), random_tokens(GPT2, batch=4)
    same = np.zeros(4)

    def run(*inputs, tokens=tokens, **how):
        return lambda: scrub(parameters, tokens, lead, GPT2, inputs, KEY, **how)

    z = lambda labels=same, *inputs, **place: Node("layers.z", labels, place, inputs)
    return {
        "there are no inputs": run(),
        "1 examples; another one": run(z(), tokens=tokens[:1]),
        "resamples is 1": run(z(), resamples=1),
        r"at=\[5\] leaves the 5 positions": run(z(), at=[5]),
        "no leaf 'layers.zz'": run(Node("layers.zz", same)),
        "walk has no 'layers.gated' to resample": run(Node("layers.gated", same)),
        "'position_embedding' at {} is not what all examples have one of": run(Node("position_embedding", same)),
        "'logits' at {} is not": run(Node("logits", same)),
        r"'layers.z' at {'batch': 0} is not": run(z(batch=0)),
        "head=3 is outside 'layers.z'": run(z(head=3)),
        "is no place at all": run(z(head=slice(3, None))),
        r"labels of 'layers.z' have the shape \(3,\)": run(z(np.zeros(3))),
        "needs one label for each": run(z(np.zeros((4, 5)), z(layer=0), layer=1)),
        "'layers.z' is not computed before 'layers.v'": run(Node("layers.v", same, {"layer": 0}, (z(layer=0),))),
        "'end' is not computed before 'layers.z'": run(z(same, Node("end", same), layer=1)),
        "the metric is 0.0, resampled at random or not": lambda: (
            Scrubbed(np.zeros(()), np.ones(2), np.zeros(2)).recovered
        ),
    }


def test_what_cannot_be_scrubbed_is_refused_with_a_sentence():
    for sentence, call in bad_calls().items():
        with pytest.raises(ValueError, match=sentence):
            call()
