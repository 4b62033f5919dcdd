import math
import random
from collections import defaultdict

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minitf.analysis.scan_snap import text
from minitf.analysis.scan_snap.text import (
    BATCH,
    LEAST_SEEN,
    LENGTH,
    MOST_SEEN,
    attention_entropy,
    find_keys,
    prepare,
    run_text,
    text_config,
)
from minitf.tokenizer import decode_bytes
from minitf.train.corpus import Corpus

WORDS = (
    "the",
    "a",
    "cat",
    "dog",
    "tree",
    "house",
    "sees",
    "finds",
    "likes",
    "red",
    "old",
    "and",
    "never",
    "often",
)
QUERY, DISTINCT, COMMON, RARE, FREQUENT, A, B = range(7)


def sentences(count, seed):
    """Prose of a sort: words that follow one another at random."""
    chosen = random.Random(seed)
    return tuple(" ".join(chosen.choices(WORDS, k=12)) + ".\n" for _ in range(count))


CORPUS = Corpus("words", sentences(300, 0), sentences(60, 1), "made up")


@pytest.fixture(scope="module")
def data():
    return prepare(CORPUS, 300)


@pytest.fixture(scope="module")
def trained(data):
    return run_text(data, "sgd", [0.5, 5.0], 4, seed=1, records=2)


def stream_with(blocks):
    """Blocks of 34 tokens of context, the query and the next token; other context tokens never come twice."""
    other, stream = 100, []
    for context, following in blocks:
        filler = range(other, other + LENGTH - 1 - len(context))
        other += len(filler)
        stream += [*context, *filler, QUERY, following]
    return np.array([99, *stream, 98], np.int32)


def test_keys_are_told_apart_by_what_follows_them():
    blocks = []
    for i in range(16):
        following = A if i % 2 == 0 else B
        context = [FREQUENT]  # in 16 windows: too often to be compared
        if following == A and i < 8:
            context.append(DISTINCT)  # in 4 windows, always before A
        if i < 6:
            context.append(COMMON)  # in 6 windows, before A and B
        if i in (0, 2):
            context.append(RARE)  # in 2 windows: too seldom to tell
        blocks.append((context, following))
    found = find_keys(stream_with(blocks), queries=1)
    assert LEAST_SEEN <= 4 <= MOST_SEEN < 16
    # Both kinds of key stand in blocks 0, 2 and 4.
    assert found.tokens.shape == (3, LENGTH + 1)
    assert np.all(found.tokens[:, -2] == QUERY)
    assert np.all(found.tokens[:, -1] == A)
    keys = found.tokens[:, :-1]
    np.testing.assert_array_equal(found.distinct, keys == DISTINCT)
    np.testing.assert_array_equal(found.common, keys == COMMON)


@settings(max_examples=25)
@given(st.integers(0, 2**31), st.integers(2, 30), st.integers(36, 400))
def test_keys_are_those_of_the_definition(seed, vocabulary, length):
    stream = np.random.default_rng(seed).integers(0, vocabulary, length).astype(np.int32)
    found = find_keys(stream, queries=3)
    windows = [tuple(stream[i : i + LENGTH + 1].tolist()) for i in range(length - LENGTH)]
    for tokens, distinct, common in zip(found.tokens.tolist(), found.distinct, found.common, strict=True):
        assert tuple(tokens) in windows
        followers, seen = defaultdict(set), defaultdict(int)
        for window in windows:
            if window[-2] == tokens[-2]:
                for key in set(window[:-2]):
                    followers[key].add(window[-1])
                    seen[key] += 1
        comparable = [LEAST_SEEN <= seen[k] <= MOST_SEEN for k in tokens[:-2]] + [False]
        alone = [len(followers[k]) == 1 for k in tokens[:-1]]
        np.testing.assert_array_equal(distinct, np.array(comparable) & np.array(alone))
        np.testing.assert_array_equal(common, np.array(comparable) & ~np.array(alone))
        assert distinct.any()
        assert common.any()


def test_a_stream_too_short_for_a_window_has_no_keys():
    found = find_keys(np.arange(10, dtype=np.int32))
    assert found.tokens.shape == (0, LENGTH + 1)
    assert found.distinct.shape == found.common.shape == (0, LENGTH)


def test_the_training_text_is_read_in_parallel_tracks(data):
    assert data.tracks.shape[0] == BATCH
    assert data.encoding.n_vocab == 300
    start = decode_bytes(data.encoding, np.asarray(data.tracks)[0, :40]).decode()
    assert "\n\n".join(CORPUS.train).startswith(start)


def test_validation_windows_come_from_the_validation_text(data):
    whole = "\n\n".join(CORPUS.validation)
    assert all(decode_bytes(data.encoding, window).decode() in whole for window in data.validation)


@pytest.mark.parametrize("sides", [(3, 60), (300, 1)])
def test_too_little_text_is_refused_with_what_there_is_and_what_is_needed(sides):
    corpus = Corpus("words", sentences(sides[0], 0), sentences(sides[1], 1), "made up")
    with pytest.raises(ValueError, match=r"too short: it has \d+ tokens, and one window .* needs \d+"):
        prepare(corpus, 300)


def test_the_model_is_that_of_the_tutorial():
    config = text_config(300)
    parameters = text.initialize_text(config, jax.random.key(0))
    assert (config.width, config.heads, config.norm_placement, config.length) == (200, 1, "post", 35)
    for table in (parameters.embedding, parameters.unembedding):
        assert 0.099 < float(jnp.abs(table).max()) <= 0.1 + 1e-7


def test_entropy_of_attention_is_that_of_its_rows():
    uniform = np.tril(np.ones((5, 5))) / np.arange(1, 6)[:, None]
    pattern = jnp.asarray(np.stack([uniform, np.eye(5)])[:, None, None], jnp.float32)
    expected = np.mean(np.log(np.arange(1, 6)))
    np.testing.assert_allclose(attention_entropy(pattern), [expected, 0.0], atol=1e-6)


def test_a_run_on_text_records_what_the_report_shows(trained, data):
    runs, history = trained
    assert [(r.name, r.learning_rate, r.layers) for r in runs] == [
        ("SGD 0.5, 1 layer", 0.5, 1),
        ("SGD 5, 1 layer", 5.0, 1),
    ]
    assert history.finished
    for run in runs:
        assert run.record_steps.tolist() == [0, 2, 4]
        assert run.train_loss.shape == (4,)
        assert run.validation_loss.shape == run.distinct_lift.shape == run.common_lift.shape == (3,)
        assert run.entropy.shape == (3, 1)
        assert run.snapshot_pattern.shape == (len(run.snapshot_steps), LENGTH, LENGTH)
        assert len(run.snapshot_tokens) == LENGTH
        np.testing.assert_allclose(run.snapshot_pattern.sum(axis=-1), 1.0, rtol=1e-5)
        assert np.all(np.triu(run.snapshot_pattern, k=1) == 0)


def test_an_untrained_model_knows_nothing_and_attends_to_all_it_can(trained):
    run = trained[0][0]
    # Logits of a normalized vector (squared norm 200) on rows uniform within .1 have variance 200 * .01 / 3, and
    # cost half of that more than equal ones.
    assert run.validation_loss[0] == pytest.approx(math.log(300) + 1 / 3, abs=0.15)
    uniform = np.mean(np.log(np.arange(1, LENGTH + 1)))
    assert 0.9 * uniform < run.entropy[0, 0] <= uniform + 1e-4


def test_learning_rates_start_alike_and_part(trained):
    slow, fast = trained[0]
    assert slow.train_loss[0] == fast.train_loss[0]
    assert slow.train_loss[3] != fast.train_loss[3]
    assert slow.train_loss[3] < slow.train_loss[0]


def test_the_same_seed_repeats_bit_for_bit(trained, data):
    again, _ = run_text(data, "sgd", [0.5, 5.0], 4, seed=1, records=2)
    for run, same in zip(trained[0], again, strict=True):
        for name, value in vars(run).items():
            np.testing.assert_array_equal(value, getattr(same, name))
