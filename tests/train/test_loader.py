import itertools
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minitf.train.loader import FEW, Loader, chunk, shuffled, spread_windows

# With tokens 0, 1, 2, ... a window shows where it was cut.
lengths = st.integers(1, 9)
few_examples = settings(max_examples=25)


@few_examples
@given(tokens=st.integers(2, 300), length=lengths, seed=st.integers(0, 2**40), epoch=st.integers(0, 3))
def test_every_window_of_an_epoch_is_read_once(tokens, length, seed, epoch):
    if tokens < length + 1:
        return
    loader = Loader(np.arange(tokens), length, 1, seed)
    seen = np.stack([loader.batch(epoch * loader.windows + step)[0] for step in range(loader.windows)])
    assert seen.dtype == np.int32
    assert np.array_equal(seen, seen[:, :1] + np.arange(length + 1))
    # They follow each other without a gap; a token that is the last target of one begins the next.
    starts = np.sort(seen[:, 0])
    assert np.array_equal(np.diff(starts), np.full(loader.windows - 1, length))
    assert 0 <= starts[0] < length and seen.max() < tokens
    # At most two windows' worth of tokens is left out.
    assert tokens - loader.windows * length <= 2 * length


@few_examples
@given(
    tokens=st.integers(60, 200),
    length=lengths,
    processes=st.integers(1, 4),
    part=st.integers(1, 3),
    step=st.integers(0, 300),
)
def test_the_parts_of_all_processes_are_the_whole_batch(tokens, length, processes, part, step):
    ids = np.arange(tokens)
    whole = Loader(ids, length, processes * part, seed=3)
    parts = [Loader(ids, length, processes * part, 3, index, processes) for index in range(processes)]
    assert np.array_equal(np.concatenate([one.batch(step) for one in parts]), whole.batch(step))


def test_a_loader_made_anew_goes_on_as_if_it_had_never_stopped():
    make = lambda: Loader(np.arange(1000), 9, 8, seed=5)
    loader = make()
    without = [loader.batch(step) for step in range(40)]
    for step in (17, 3, 39):
        assert np.array_equal(make().batch(step), without[step])
    assert np.array_equal(chunk(make(), 17, 23), without[17:])


def test_epochs_and_seeds_have_other_orders_and_other_offsets():
    ids = np.arange(3000)
    epochs = [
        Loader(ids, 29, 1, seed).starts(np.arange(102 * epoch, 102 * (epoch + 1)))
        for seed in range(3)
        for epoch in range(4)
    ]
    assert Loader(ids, 29, 1).windows == 102
    for one, other in itertools.combinations(epochs, 2):
        assert not np.array_equal((one - one.min()) // 29, (other - other.min()) // 29)
    # Twelve of 29 offsets: that three or fewer are different has a probability below 1e-8.
    assert len({one.min() for one in epochs}) > 3


def test_every_window_comes_first_equally_often():
    loader = Loader(np.arange(9), 1, 1)
    firsts = loader.starts(np.arange(0, 8 * 2000, 8))
    counts = np.bincount(firsts, minlength=8)
    assert loader.windows == len(counts) == 8
    # Each of the 8 is binomial(2000, 1/8): 250, standard deviation 14.8; five of those are allowed.
    assert np.abs(counts - 250).max() < 5 * 14.8


@pytest.mark.parametrize("size", [1, 2, 7, FEW, FEW + 1])
def test_few_and_many_windows_are_each_in_the_order_once_and_places_have_it_one_by_one(size):
    rng = lambda: np.random.default_rng(5)
    order = shuffled(np.arange(size), size, rng())
    assert np.array_equal(np.sort(order), np.arange(size))
    some = np.array([size - 1, 0, size // 2])
    assert np.array_equal(shuffled(some, size, rng()), order[some])
    if size > 100:
        # Of a random order the correlation with the places has a standard deviation of 1 / sqrt(size).
        assert abs(np.corrcoef(order, np.arange(size))[0, 1]) < 5 / np.sqrt(size)
        assert not np.array_equal(order, shuffled(np.arange(size), size, np.random.default_rng(6)))


def test_tokens_on_disk_are_read_only_where_windows_are(tmp_path):
    (np.arange(5000) % 1000).astype("<u2").tofile(tmp_path / "ids")
    ids = np.memmap(tmp_path / "ids", "<u2", "r")
    batch = Loader(ids, 7, 4).batch(2)
    assert type(batch) is np.ndarray and batch.dtype == np.int32
    assert np.array_equal(batch, Loader(np.arange(5000) % 1000, 7, 4).batch(2))


@few_examples
@given(tokens=st.integers(2, 300), length=lengths, most=st.integers(1, 400))
def test_validation_windows_are_spread_evenly_and_never_share_a_target(tokens, length, most):
    if tokens < length + 1:
        return
    found = spread_windows(np.arange(tokens), length, most)
    every = (tokens - 1) // length
    assert found.shape == (min(most, every), length + 1)
    assert np.array_equal(found, found[:, :1] + np.arange(length + 1)) and found.max() < tokens
    gaps = np.diff(found[:, 0])
    assert np.all(gaps >= length) and np.ptp([*gaps, gaps[0]] if gaps.size else [0]) <= length
    if most >= every:
        assert np.array_equal(found[:, 1:].ravel(), np.arange(1, 1 + every * length))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"length": 0}, "length is 0; it must be at least 1"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"seed": -1}, "seed is -1"),
        ({"process_count": 0}, "process_count is 0"),
        ({"process_index": 1}, "process_index is 1; with 1 processes it goes from 0 to 0"),
        ({"process_count": 3}, "batch_size is 4; 3 processes cannot take equal parts"),
        ({"length": 10}, "has 10 tokens, and one window of length 10 .* needs 11"),
    ],
)
def test_numbers_that_make_no_batch_are_refused_by_name(settings, message):
    with pytest.raises(ValueError, match=message):
        Loader(np.arange(10), **{"length": 3, "batch_size": 4, **settings})


def test_too_little_for_a_validation_window_is_refused():
    with pytest.raises(ValueError, match="has 3 tokens.*needs 4"):
        spread_windows(np.arange(3), 3, 1)
    with pytest.raises(ValueError, match="most is 0"):
        spread_windows(np.arange(9), 3, 0)


def test_grain_is_not_loaded_for_nothing():
    program = "import sys, minitf.train.symbols, minitf.train.loader; print('grain' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
