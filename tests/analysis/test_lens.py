"""The logit lens, compared with norms and products written out position by position."""

from dataclasses import replace

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
    random_parameters,
    random_tokens,
    relative_error,
)

from minitf import LayerWalk, Walk
from minitf.analysis.lens import divergence, lens, logit_lens, output_vectors, read, station_names, stations


def run(config):
    parameters, tokens = random_parameters(config), random_tokens(config)
    return parameters, tokens, compiled(config)(parameters, tokens)


def read_by_hand(parameters, config, point):
    """Final norm and unembedding of one point, in float64."""
    x = np.float64(point)
    if config.pre_norm:
        x = x - x.mean() if config.norm == "layer" else x
        if config.norm == "l2":
            x = x / (np.sqrt((x * x).sum()) or 1.0)
        else:
            x = x / np.sqrt((x * x).mean() + config.norm_epsilon)
        norm = parameters.final_norm
        x = x if norm.gain is None else x * np.float64(norm.gain)
        x = x if norm.offset is None else x + np.float64(norm.offset)
    table = np.float64(parameters.embedding.T if config.tied else parameters.unembedding)
    bias = 0.0 if parameters.unembedding_bias is None else np.float64(parameters.unembedding_bias)
    return np.array([sum(x[i] * table[i, j] for i in range(len(x))) for j in range(config.vocabulary)]) + bias


@examples(6)
@given(config=configs())
def test_the_lens_is_the_final_norm_and_the_unembedding_at_every_station(config):
    parameters, _, walk = run(config)
    found = np.asarray(logit_lens(parameters, walk, config))
    points = [walk.layers.resid_pre[0]]
    for layer in range(config.layers):
        points += [walk.layers.resid_mid[layer], walk.layers.resid_post[layer]]
    assert len(found) == len(points) == len(station_names(config)) == 2 * config.layers + 1
    expected = np.array(
        [[[read_by_hand(parameters, config, p) for p in row] for row in np.asarray(point)] for point in points]
    )
    # A norm and a sum of width products: some width roundings, several times larger for a point near its mean.
    assert relative_error(found, expected) < 8 * config.width * 2.0**-24


@pytest.mark.parametrize("config", [GPT2, LLAMA, BERT], ids=["gpt2", "llama", "bert"])
def test_at_the_last_station_the_lens_reads_what_the_model_says(config):
    parameters, tokens, walk = run(config)
    assert relative_error(logit_lens(parameters, walk, config)[-1], walk.logits) < 40 * 2.0**-24
    reading = lens(parameters, walk, tokens, config)
    np.testing.assert_allclose(reading.divergence[-1], 0, atol=1e-6)
    assert (np.asarray(reading.divergence[0]) > 1e-4).all()


@pytest.mark.parametrize("config", [GPT2, BERT], ids=["gpt2", "bert"])
def test_rank_log_probability_and_divergence_are_those_of_the_lens_logits(config):
    parameters, tokens, walk = run(config)
    targets = jnp.roll(tokens, -1, axis=1)
    reading = jax.jit(lambda p, w, t: lens(p, w, t, config))(parameters, walk, targets)
    logits = np.float64(logit_lens(parameters, walk, config))
    final = np.float64(walk.logits)
    for place in np.ndindex(logits.shape[:3]):
        target = int(targets[place[1:]])
        says = np.exp(logits[place]) / np.exp(logits[place]).sum()
        truth = np.exp(final[place[1:]]) / np.exp(final[place[1:]]).sum()
        order = np.argsort(-logits[place])
        assert reading.rank[place] == list(order).index(target)
        # A few hundred roundings at most of logits around ten: some 1e-5.
        assert abs(reading.log_probability[place] - np.log(says[target])) < 1e-5
        assert abs(reading.divergence[place] - sum(truth * np.log(truth / says))) < 1e-5


def test_the_prediction_has_rank_zero_and_a_tie_counts_for_the_target():
    config = replace(GPT2, tied=False)
    parameters, tokens, walk = run(config)
    predicted = jnp.argmax(walk.logits, axis=-1).astype(jnp.int32)
    assert not np.asarray(lens(parameters, walk, predicted, config).rank[-1]).any()
    level = parameters.replace(unembedding=jnp.zeros_like(parameters.unembedding))
    assert not np.asarray(lens(level, compiled(config)(level, tokens), tokens, config).rank).any()


def test_a_sequence_is_read_alike_alone_and_in_a_batch_and_by_vmap():
    parameters, _, walk = run(GPT2)
    points = stations(walk)
    together = jax.vmap(lambda x: read(parameters, x, GPT2))(points)
    assert relative_error(together, logit_lens(parameters, walk, GPT2)) < 40 * 2.0**-24
    assert relative_error(read(parameters, points[2][:1], GPT2), together[2][:1]) < 40 * 2.0**-24


def test_divergence_of_known_distributions_is_the_textbook_number():
    first, second = jnp.log(jnp.array([0.5, 0.5, 0.0])), jnp.log(jnp.array([0.25, 0.25, 0.5]))
    np.testing.assert_allclose(divergence(first, second), np.log(2), rtol=1e-6)


def test_the_output_vectors_are_the_logits_gradient():
    for config in (GPT2, LLAMA):
        parameters = random_parameters(config)
        assert output_vectors(parameters, config).shape == (config.width, config.vocabulary)


def test_a_walk_without_stations_and_targets_of_another_shape_are_refused():
    parameters, tokens, walk = run(GPT2)
    with pytest.raises(ValueError, match="'layers.resid_pre', which this walk does not hold"):
        logit_lens(parameters, Walk(layers=LayerWalk()), GPT2)
    with pytest.raises(ValueError, match=r"targets of shape \(2, 4\) will not do: .* the \(2, 5\) positions"):
        lens(parameters, walk, tokens[:, 1:], GPT2)
