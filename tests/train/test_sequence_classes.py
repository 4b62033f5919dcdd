from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from minitf.train.sequence_classes import (
    SYN_SMALL,
    SequenceClasses,
    population,
    sample_counts,
    sample_tokens,
    syn_medium,
)

few_examples = settings(max_examples=20, deadline=None)
shapes = st.builds(
    SequenceClasses,
    queries=st.integers(1, 3),
    next_per_query=st.integers(2, 3),
    common=st.integers(0, 4),
    distinct=st.integers(1, 5),
    length=st.integers(2, 9),
)


def test_the_weights_are_those_of_the_paper():
    # Ten weights of 1 and ten of 0.1, 0.2 ... 1 sum to 15.5.
    for data in (SYN_SMALL, syn_medium(10)):
        assert data.weights[:10] == pytest.approx(np.full(10, 1 / 15.5), rel=1e-14)
        assert data.weights[10:] == pytest.approx(np.arange(1, 11) / 155, rel=1e-14)
    # As the specification prints them.
    assert data.weights[0] == pytest.approx(0.06452, abs=5e-6)
    assert data.weights[10:] == pytest.approx(0.006452 * np.arange(1, 11), abs=5e-6)
    assert data.weights[:10].sum() == pytest.approx(0.645, abs=5e-4)


def test_the_vocabulary_is_common_then_distinct_then_queries_then_next_tokens():
    data = syn_medium(3)
    assert (data.classes, data.contextual, data.vocabulary) == (6, 70, 79)
    for n in range(6):
        assert data.support[n].tolist() == [*range(10), *range(10 + 10 * n, 20 + 10 * n)]
    assert data.class_queries.tolist() == [70, 70, 71, 71, 72, 72]
    assert data.class_labels.tolist() == [73, 74, 75, 76, 77, 78]


def test_the_vocabularies_have_the_sizes_of_the_paper():
    assert SYN_SMALL.vocabulary == 34
    assert [syn_medium(q).vocabulary for q in (1, 3, 5, 10)] == [33, 79, 125, 240]
    assert [syn_medium(q).classes for q in (1, 3, 5, 10)] == [2, 6, 10, 20]


@few_examples
@given(shapes)
def test_a_class_has_probability_on_its_support_alone(data):
    table = data.probability
    assert table.shape == (data.classes, data.contextual)
    assert table.sum(axis=1) == pytest.approx(np.ones(data.classes), rel=1e-12)
    for n in range(data.classes):
        assert set(np.flatnonzero(table[n])) == set(data.support[n])


@few_examples
@given(shapes)
def test_a_token_is_distinct_when_one_class_alone_holds_it(data):
    owners = (data.probability > 0).sum(axis=0)
    assert np.array_equal(data.is_distinct, (data.probability > 0) & (owners == 1))


# Drawing is compiled once per shape, so a few shapes with many keys each.
drawn = [
    SYN_SMALL,
    syn_medium(3),
    SequenceClasses(queries=1, next_per_query=3, common=0, distinct=1, length=2),
    SequenceClasses(queries=3, next_per_query=1, common=3, distinct=2, length=5),
]


@cache
def draw(data, batch, keys=20):
    """Tokens, labels and counts of ``keys`` batches, each with a leading key axis."""

    def both(key):
        return sample_tokens(data, key, batch), sample_counts(data, key, batch)

    seeds = jax.vmap(jax.random.key)(jnp.arange(keys))
    (tokens, labels), counts = jax.tree.map(np.asarray, jax.jit(jax.vmap(both))(seeds))
    return tokens, labels, counts


@pytest.mark.parametrize("data", drawn, ids=str)
def test_counts_are_the_histogram_of_the_tokens_of_the_same_key(data):
    tokens, labels, counts = draw(data, 7)
    assert tokens.shape == (20, 7, data.length)
    histogram = [[np.bincount(row[:-1], minlength=data.contextual) for row in batch] for batch in tokens]
    assert np.array_equal(counts.counts, np.array(histogram, np.float32))
    assert np.array_equal(counts.queries, tokens[..., -1])
    assert np.array_equal(counts.labels, labels)
    assert np.all(counts.counts.sum(axis=-1) == data.length - 1)


@pytest.mark.parametrize("data", drawn, ids=str)
def test_a_sequence_holds_tokens_of_its_class_alone_and_its_query_last(data):
    tokens, labels, _ = draw(data, 7)
    classes = labels - data.class_labels[0]
    assert classes.min() >= 0 and classes.max() < data.classes
    assert np.array_equal(tokens[..., -1], data.class_queries[classes])
    assert np.all(data.probability[classes[..., None], tokens[..., :-1]] > 0)


def test_classes_and_tokens_come_with_their_probabilities():
    data = syn_medium(3)
    tokens, labels, _ = draw(data, 150)
    classes = labels - data.class_labels[0]
    # Under the null each p-value is uniform; the seeds are fixed, so a false alarm cannot come and go.
    assert stats.chisquare(np.bincount(classes.reshape(-1), minlength=6)).pvalue > 1e-3
    for n in range(6):
        held = tokens[classes == n][:, :-1].reshape(-1)
        observed = np.bincount(held, minlength=data.contextual)[data.support[n]]
        assert stats.chisquare(observed, data.weights * len(held)).pvalue > 1e-3


def test_positions_are_independent():
    data = SequenceClasses(queries=1, next_per_query=2, common=1, distinct=1, length=3)
    is_common = draw(data, 200)[0][..., :2].reshape(-1, 2) == 0
    pairs = np.bincount(2 * is_common[:, 0] + is_common[:, 1], minlength=4)
    common = data.weights[0]
    expected = np.outer([1 - common, common], [1 - common, common]).reshape(-1) * len(is_common)
    assert stats.chisquare(pairs, expected).pvalue > 1e-3


def test_a_key_can_be_replayed_and_keys_differ():
    counts = draw(SYN_SMALL, 7)[2].counts
    again = draw.__wrapped__(SYN_SMALL, 7)[2].counts
    assert np.array_equal(counts, again)
    assert len(np.unique(counts.reshape(20, -1), axis=0)) == 20


def test_the_mean_of_many_samples_is_the_population():
    data = syn_medium(3)
    _, labels, batch = draw(data, 150)
    classes = (labels - data.class_labels[0]).reshape(-1)
    frequency = batch.counts.reshape(len(classes), -1) / (data.length - 1)
    for n in range(6):
        of_class = frequency[classes == n]
        p = data.probability[n]
        deviation = np.sqrt(p * (1 - p) / ((data.length - 1) * len(of_class)))
        # 4.5 deviations: one false alarm in a thousand for the 120 numbers that are compared.
        assert np.all(np.abs(of_class.mean(axis=0) - p) <= 4.5 * deviation + 1e-7)


def test_the_population_is_every_class_once_with_its_probabilities():
    data = syn_medium(3)
    everything = population(data)
    assert np.array_equal(np.asarray(everything.queries), data.class_queries)
    assert np.array_equal(np.asarray(everything.labels), data.class_labels)
    assert np.array_equal(np.asarray(everything.counts), data.probability.astype(np.float32))
    with jax.enable_x64(True):
        assert np.array_equal(np.asarray(population(data, jnp.float64).counts), data.probability)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ({"length": 1}, "length is 1; it must be at least 2"),
        ({"queries": 0}, "queries is 0; it must be at least 1"),
        ({"next_per_query": -1}, "next_per_query is -1; it must be at least 1"),
        ({"common": -1}, "common is -1; it must be at least 0"),
        ({"distinct": 0}, "distinct is 0; it must be at least 1"),
        ({"queries": 1, "next_per_query": 1}, "one class only"),
    ],
)
def test_impossible_data_are_refused_by_name(shape, message):
    with pytest.raises(ValueError, match=message):
        SequenceClasses(**shape)
