"""Steering: directions that find what was planted, edits that add them, and doses next to their controls."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from properties.models import (
    BERT,
    GPT2,
    LLAMA,
    compiled,
    compiled_logits,
    quick_jit,
    random_parameters,
    random_tokens,
    shapes,
)

from minitf import Walk, walk
from minitf.analysis import steering
from minitf.edits import steer


def planted(pairs=400, width=64, strength=2.0, seed=0):
    """Pairs of states that differ in one direction, beside noise and a large common part."""
    generator = np.random.default_rng(seed)
    direction = generator.normal(size=width)
    direction /= np.linalg.norm(direction)
    common = 3 * generator.normal(size=(pairs, width)) + 5
    noise = lambda: 0.3 * generator.normal(size=(pairs, width))
    positive, negative = common + strength * direction + noise(), common - strength * direction + noise()
    return direction, jnp.asarray(positive, jnp.float32), jnp.asarray(negative, jnp.float32)


def cosine(a, b):
    return np.dot(a, b) / (np.linalg.norm(a) * np.linalg.norm(b))


@pytest.mark.parametrize("seed", range(5))
def test_both_directions_find_a_planted_one_with_its_sign(seed):
    direction, positive, negative = planted(seed=seed)
    difference = steering.mean_difference(positive, negative)
    np.testing.assert_allclose(difference, np.float64(positive).mean(0) - np.float64(negative).mean(0), atol=1e-4)
    assert cosine(difference, direction) > 0.99
    reading = steering.reading_vector(positive, negative, jax.random.key(seed))
    assert cosine(reading.direction, direction) > 0.99
    assert abs(np.linalg.norm(reading.direction) - 1) < 1e-5
    assert reading.agreement == 1.0
    turned = steering.reading_vector(negative, positive, jax.random.key(seed))
    assert cosine(turned.direction, direction) < -0.99


def test_pairs_that_do_not_differ_say_nothing_of_the_sign():
    positive, negative = jnp.ones((5, 2)), jnp.ones((5, 2))
    for sign in (1.0, -1.0):
        reading = steering.reading_vector(positive.at[4, 1].add(sign), negative, jax.random.key(0))
        np.testing.assert_allclose(reading.direction, [0, sign], atol=1e-6)
        np.testing.assert_allclose(reading.agreement, 0.2)
    assert steering.reading_vector(positive, negative, jax.random.key(0)).agreement == 0


def test_differences_in_one_order_would_lose_the_concept_when_centered():
    # What the random order is for: the same computation on positive - negative finds noise.
    direction, positive, negative = planted()
    differences = np.float64(positive - negative)
    trapped = np.linalg.svd(differences - differences.mean(0))[2][0]
    assert abs(cosine(trapped, direction)) < 0.5
    assert abs(cosine(steering.reading_vector(positive, negative, jax.random.key(0)).direction, direction)) > 0.99


def test_the_reading_is_the_principal_component_of_differences_in_half_turned_order():
    # With half of an even number of pairs turned around, noise-free pairs leave only the concept.
    direction, _, _ = planted()
    common = np.random.default_rng(1).normal(size=(10, 64))
    positive, negative = common + direction, common - direction
    reading = steering.reading_vector(
        *(jnp.asarray(x, jnp.float32) for x in (positive, negative)), jax.random.key(0)
    )
    np.testing.assert_allclose(reading.direction, direction, atol=1e-5)
    np.testing.assert_allclose(reading.center, common.mean(0), atol=1e-5)
    found = reading.score(jnp.asarray(positive, jnp.float32))
    np.testing.assert_allclose(found, (common - common.mean(0)) @ direction + 1, atol=1e-5)


def test_readings_of_all_layers_are_one_vmap():
    _, positive, negative = planted(pairs=20)
    layers = [jnp.stack([x, 2 * x[::-1]]) for x in (positive, negative)]
    together = jax.jit(jax.vmap(steering.reading_vector, (0, 0, None)))(*layers, jax.random.key(0))
    alone = steering.reading_vector(positive, negative, jax.random.key(0))
    np.testing.assert_allclose(together.direction[0], alone.direction, atol=1e-4)


def test_last_states_are_those_of_the_last_valid_position():
    passed = compiled(GPT2)(random_parameters(GPT2), random_tokens(GPT2))
    np.testing.assert_array_equal(steering.last_states(passed), passed.layers.resid_post[:, :, 4])
    valid = jnp.array([[1, 1, 1, 0, 0], [0, 1, 1, 1, 1]], bool)
    found = steering.last_states(passed, valid, "layers.attention_step")
    np.testing.assert_array_equal(found[:, 0], passed.layers.attention_step[:, 0, 2])
    np.testing.assert_array_equal(found[:, 1], passed.layers.attention_step[:, 1, 4])


def test_random_directions_are_as_long_as_the_vector_and_point_anywhere():
    vector = jnp.arange(200.0)
    found = steering.random_directions(jax.random.key(0), vector, 300)
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), np.linalg.norm(vector), rtol=1e-5)
    cosines = np.asarray(found) @ np.asarray(vector) / np.linalg.norm(vector) ** 2
    # Cosines of random directions have mean 0 and deviation width ** -0.5.
    assert abs(cosines.mean()) < 4 * 200**-0.5 / np.sqrt(300)
    assert abs(cosines.std() * np.sqrt(200) - 1) < 0.2


@pytest.mark.parametrize("name", ["layers.resid_post", "layers.attention_step", "layers.resid_pre"])
@pytest.mark.parametrize("position", [slice(None), -1, [0, 3]], ids=["all", "last", "some"])
def test_steering_adds_the_dose_where_it_is_told_to_and_nowhere_else(name, position):
    parameters, tokens = random_parameters(GPT2), random_tokens(GPT2)
    vector = jnp.asarray(np.random.default_rng(0).normal(size=12), jnp.float32)
    edit = steer(shapes(GPT2), vector, layer=1, coefficient=1.5, name=name, position=position)
    plain, moved = compiled(GPT2)(parameters, tokens), compiled(GPT2)(parameters, tokens, edit)
    leaf = name.removeprefix("layers.")
    difference = np.asarray(getattr(moved.layers, leaf) - getattr(plain.layers, leaf))
    expected = np.zeros((2, 2, 5, 12))
    expected[1, :, position] = 1.5 * np.asarray(vector)
    np.testing.assert_allclose(difference, expected, atol=1e-5)


@pytest.mark.parametrize("config", [GPT2, LLAMA, BERT], ids=["gpt2", "llama", "bert"])
@pytest.mark.parametrize("layer", [0, 1])
def test_a_dose_response_is_one_steered_walk_for_every_vector_and_dose(config, layer):
    parameters, tokens = random_parameters(config), random_tokens(config)
    vector = jnp.asarray(np.random.default_rng(1).normal(size=config.width), jnp.float32)
    vectors = jnp.concatenate([vector[None], steering.random_directions(jax.random.key(0), vector, 2)])
    doses = jnp.array([-2.0, 0.0, 0.5, 3.0])
    lead = lambda logits: logits[:, -1, 1] - logits[:, -1, 2]
    ask = lambda p, t: steering.dose_response(p, t, vectors, doses, lead, config, layer, position=-1)
    found = quick_jit(ask)(parameters, tokens)
    assert found.shape == (3, 4, 2)
    for i, j in np.ndindex(3, 4):
        edit = steer(shapes(config), vectors[i], layer=layer, coefficient=doses[j], position=-1)
        expected = lead(compiled_logits(config)(parameters, tokens, edit))
        np.testing.assert_allclose(found[i, j], expected, atol=2e-5)
    np.testing.assert_array_equal(found[0, 1], found[2, 1])  # a dose of nothing is the same in every direction
    assert np.ptp(found) > 0.1


def test_padding_stays_hidden_while_steering():
    parameters, tokens = random_parameters(GPT2), random_tokens(GPT2)
    valid = jnp.arange(5)[None, :] >= jnp.array([[2], [0]])
    vector = jnp.ones(12)
    last = lambda logits: logits[:, -1, 3]
    ask = lambda t: steering.dose_response(parameters, t, vector[None], jnp.zeros(1), last, GPT2, 1, valid=valid)
    expected = quick_jit(lambda t: last(walk(parameters, t, GPT2, valid=valid).logits))(tokens)
    np.testing.assert_allclose(quick_jit(ask)(tokens)[0, 0], expected, atol=1e-5)


def bad_calls():
    like, vector = shapes(GPT2), jnp.ones(12)
    states, key = jnp.ones((3, 12)), jax.random.key(0)
    dose = lambda layer: steering.dose_response(
        random_parameters(GPT2), random_tokens(GPT2), vector[None], jnp.ones(1), lambda x: x[0, 0, 0], GPT2, layer
    )
    return {
        "position=7 is outside": lambda: steer(like, vector, layer=0, position=7),
        "no leaf 'layers.nothing'": lambda: steer(like, vector, layer=0, name="layers.nothing"),
        "no layer 2 to steer; this model has layers 0 to 1": lambda: dose(2),
        r"not \(3, 12\) and \(2, 12\)": lambda: steering.reading_vector(states, states[1:], key),
        "at least 2 pairs, not 1": lambda: steering.reading_vector(states[:1], states[:1], key),
        "examples of both kinds, not 3 and 0": lambda: steering.mean_difference(states, states[:0]),
        "that the walk holds, not 'layers.resid_post'": lambda: steering.last_states(Walk()),
    }


def test_what_cannot_be_steered_is_refused_with_a_sentence():
    for sentence, call in bad_calls().items():
        with pytest.raises(ValueError, match=sentence):
            call()
