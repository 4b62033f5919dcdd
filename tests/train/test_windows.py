import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minitf.tokenizer import byte_encoding, decode_bytes
from minitf.train.windows import (
    on_device,
    random_batch,
    sequential_batch,
    steps_per_epoch,
    token_stream,
    tracks,
    windows,
)

# With tokens 0, 1, 2, ... a window shows where it was cut.
few_examples = settings(max_examples=15, deadline=None)


@few_examples
@given(extra=st.integers(1, 40), length=st.integers(1, 9), batch=st.integers(1, 8), step=st.integers(0, 1000))
def test_every_random_window_is_a_stretch_of_the_stream(extra, length, batch, step):
    tokens = on_device(np.arange(length + extra), length)
    window = np.asarray(random_batch(tokens, jax.random.key(0), step, batch=batch, length=length))
    assert window.shape == (batch, length + 1) and window.dtype == np.int32
    assert np.array_equal(window, window[:, :1] + np.arange(length + 1))
    assert window.min() >= 0 and window.max() < length + extra


def test_every_place_of_the_stream_is_drawn_equally_often():
    tokens = on_device(np.arange(8), 4)
    starts = np.asarray(random_batch(tokens, jax.random.key(1), 0, batch=4000, length=4))[:, 0]
    counts = np.bincount(starts, minlength=4)
    assert len(counts) == 4
    # Each of the 4 places is binomial(4000, 1/4): 1000, standard deviation 27.4; five of those are allowed.
    assert np.abs(counts - 1000).max() < 5 * 27.4


def test_a_step_can_be_replayed_and_steps_and_keys_differ():
    tokens = on_device(np.arange(10_000), 5)

    def draw(seed, step):
        return np.asarray(random_batch(tokens, jax.random.key(seed), step, batch=6, length=5))

    assert np.array_equal(draw(0, 3), draw(0, 3))
    assert not np.array_equal(draw(0, 3), draw(0, 4))
    assert not np.array_equal(draw(0, 3), draw(1, 3))


def test_inside_a_scan_and_a_vmap_the_batches_are_the_same():
    tokens = on_device(np.arange(500), 5)
    keys = jax.random.split(jax.random.key(2), 3)

    def run(key):
        return jax.lax.scan(
            lambda carry, step: (carry, random_batch(tokens, key, step, batch=2, length=5)), 0, jnp.arange(4)
        )[1]

    together = jax.jit(jax.vmap(run))(keys)
    for seed, key in enumerate(keys):
        for step in range(4):
            assert np.array_equal(together[seed, step], random_batch(tokens, key, step, batch=2, length=5))


@few_examples
@given(tokens=st.integers(2, 200), length=st.integers(1, 12), batch=st.integers(1, 5))
def test_sequential_batches_read_each_track_once_and_start_again(tokens, length, batch):
    if tokens < batch * (length + 1):
        return
    cut = tracks(np.arange(tokens), batch, length)
    assert np.array_equal(cut, np.arange(batch * (tokens // batch)).reshape(batch, -1))
    steps = steps_per_epoch(cut.shape[1], length)
    seen = [np.asarray(sequential_batch(cut, step, length=length)) for step in range(steps)]
    targets = np.concatenate([window[:, 1:] for window in seen], axis=1)
    assert np.array_equal(targets, np.asarray(cut)[:, 1 : 1 + steps * length])
    assert cut.shape[1] - 1 - steps * length < length
    assert np.array_equal(sequential_batch(cut, steps, length=length), seen[0])
    assert np.array_equal(jax.jit(lambda step: sequential_batch(cut, step, length=length))(steps - 1), seen[-1])


@given(tokens=st.integers(2, 200), length=st.integers(1, 12))
def test_windows_make_every_token_but_the_first_a_target_once(tokens, length):
    if tokens < length + 1:
        return
    cut = windows(np.arange(tokens), length)
    assert cut.dtype == np.int32 and cut.shape == ((tokens - 1) // length, length + 1)
    assert np.array_equal(cut[:, 1:].ravel(), np.arange(1, 1 + cut.shape[0] * length))
    assert np.array_equal(cut[:, 0], cut[:, 1] - 1)


def test_a_text_just_long_enough_gives_one_window():
    assert windows(np.arange(6), 5).shape == (1, 6)
    assert sequential_batch(tracks(np.arange(12), 2, 5), 7, length=5).shape == (2, 6)
    assert np.array_equal(
        random_batch(on_device(np.arange(6), 5), jax.random.key(0), 0, batch=1, length=5),
        [[0, 1, 2, 3, 4, 5]],
    )


@pytest.mark.parametrize(
    "cut",
    [
        lambda ids: windows(ids, 5),
        lambda ids: on_device(ids, 5),
        lambda ids: tracks(ids, 1, 5),
        lambda ids: random_batch(jnp.asarray(ids), jax.random.key(0), 0, batch=1, length=5),
        lambda ids: sequential_batch(jnp.asarray(ids)[None], 0, length=5),
    ],
)
def test_too_little_text_for_a_window_is_refused_with_both_numbers(cut):
    with pytest.raises(ValueError, match="has 5 tokens.*needs 6"):
        cut(np.arange(5))


def test_too_little_text_for_all_tracks_is_refused_with_both_numbers():
    with pytest.raises(ValueError, match="has 23 tokens.*each of 4 tracks of length 5.*needs 24"):
        tracks(np.arange(23), 4, 5)


def test_windows_and_batches_of_nothing_are_refused():
    for length in (0, -3):
        with pytest.raises(ValueError, match=f"window length is {length}"):
            windows(np.arange(9), length)
    with pytest.raises(ValueError, match="batch size is 0"):
        tracks(np.arange(9), 0, 2)


@given(st.lists(st.text()))
def test_the_stream_is_the_documents_with_separators_between(documents):
    encoding = byte_encoding()
    assert decode_bytes(encoding, token_stream(encoding, documents)) == "\n\n".join(documents).encode()
    assert token_stream(encoding, documents).dtype == np.int32
