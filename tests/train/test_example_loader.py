"""Labelled sequences are drawn each once in an epoch, and any step is what it is whenever it is asked for."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minitf.train import example_loader
from minitf.train.example_loader import ExampleLoader, Examples, spread_examples

LABEL, FILLER = 10, 12
sequences = st.lists(
    st.tuples(st.lists(st.integers(0, 9), max_size=6), st.integers(LABEL, LABEL + 1)), min_size=1, max_size=12
)


def examples(rows, length=8):
    ids = [token for tokens, label in rows for token in (*tokens, label)]
    return Examples(np.array(ids), LABEL, length, FILLER)


@given(rows=sequences)
def test_rows_are_the_sequences_filled_up_or_cut(rows):
    made = examples(rows, length=4)
    assert len(made) == len(rows)
    assert made.longest == max(len(tokens) for tokens, _ in rows)
    assert made.labels.tolist() == [label - LABEL for _, label in rows]
    for row, (tokens, label) in zip(made.rows(np.arange(len(rows))).tolist(), rows, strict=True):
        assert row == [*tokens[:4], *[FILLER] * (4 - len(tokens[:4])), label]


@given(rows=sequences, size=st.integers(1, 5), seed=st.integers(0, 9))
def test_an_epoch_has_each_once_and_processes_share_a_batch(rows, size, seed):
    made = examples(rows)
    loader = ExampleLoader(made, size, seed)
    steps = [loader.batch(step) for step in range(2 * len(rows))]
    drawn = np.concatenate(steps)[: 2 * len(rows)]
    once = sorted(made.rows(np.arange(len(rows))).tolist())
    assert sorted(drawn[: len(rows)].tolist()) == sorted(drawn[len(rows) :].tolist()) == once
    parts = [ExampleLoader(made, 2 * size, seed, part, 2).batch(1) for part in range(2)]
    np.testing.assert_array_equal(np.concatenate(parts), ExampleLoader(made, 2 * size, seed).batch(1))


def test_a_long_file_is_looked_through_in_parts(monkeypatch):
    rows = [([n % 9] * (n % 4), LABEL + n % 2) for n in range(50)]
    whole = examples(rows).ends
    monkeypatch.setattr(example_loader, "READ_AT_A_TIME", 7)
    np.testing.assert_array_equal(examples(rows).ends, whole)


@pytest.mark.parametrize("most", [3, 100])
def test_those_for_validation_are_spread_and_always_the_same(most):
    rows = [([n % 9], LABEL) for n in range(9)]
    found = spread_examples(examples(rows), most)
    assert found[:, 0].tolist() == ([0, 3, 6] if most == 3 else list(range(9)))


def test_numbers_stand_in_place_of_labels_to_the_bit():
    rows = [([n % 9] * (n % 4), LABEL) for n in range(20)]
    numbers = np.random.default_rng(0).normal(size=20).astype(np.float32)
    made = replace(examples(rows), numbers=numbers)
    found = made.rows(np.arange(20))
    np.testing.assert_array_equal(found[:, -1].view(np.float32), numbers)
    np.testing.assert_array_equal(found[:, :-1], examples(rows).rows(np.arange(20))[:, :-1])
    with pytest.raises(ValueError, match="there are 20 sequences, and numbers of 19"):
        replace(made, numbers=numbers[1:])


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"batch_size": 0}, "batch_size is 0"),
        ({"seed": -1}, "seed is -1"),
        ({"process_index": 2, "process_count": 2}, "process_index is 2; with 2 processes it goes from 0 to 1"),
        ({"process_count": 3}, "batch_size is 4; 3 processes cannot take equal parts"),
    ],
)
def test_what_cannot_be_shared_is_told_by_name(changed, message):
    with pytest.raises(ValueError, match=message):
        ExampleLoader(**{"examples": examples([([1], LABEL)] * 8), "batch_size": 4, **changed})
