"""Steps over a stream of batches are a loop, in however many programs they run and however it ends."""

import jax.numpy as jnp
import numpy as np
import pytest

from minitf.analysis import stream as module
from minitf.analysis.stream import stream

BATCHES = np.arange(14.0, dtype=np.float32).reshape(7, 2)


def follow(rate, mean, batch):
    """A running mean; keeps what it was, twice."""
    return mean + rate * (batch.sum() - mean), {"before": mean, "pair": jnp.stack([mean, batch[0]])}


def by_hand(batches, rate=0.5, mean=0.0):
    seen = []
    for batch in batches:
        seen.append(mean)
        mean += rate * (batch.sum() - mean)
    return mean, seen


def run(batches, steps_per_program=3, **how):
    return stream(follow, jnp.float32(0.5), jnp.float32(0), batches, steps_per_program=steps_per_program, **how)


@pytest.mark.parametrize("steps_per_program", [1, 3, 7, 10])
def test_a_stream_is_a_loop_over_its_batches_in_programs_of_any_length(steps_per_program):
    done = run(BATCHES, steps_per_program)
    mean, seen = by_hand(BATCHES)
    assert done.finished
    # Halves of whole numbers: nothing is rounded.
    assert float(done.state) == mean
    assert done.records["before"].tolist() == seen
    assert done.records["pair"].tolist() == [[a, b[0]] for a, b in zip(seen, BATCHES.tolist(), strict=True)]


def test_a_stream_that_does_not_fill_its_last_program_is_still_one_program():
    before = module._program._cache_size()
    run(BATCHES, 4)
    run(iter(BATCHES[:2]), 4)
    assert module._program._cache_size() == before + 1


def interrupted_after(count):
    yield from BATCHES[:count]
    raise KeyboardInterrupt


def test_an_interruption_keeps_what_whole_programs_did():
    done = run(interrupted_after(5), 2)
    mean, seen = by_hand(BATCHES[:4])
    assert not done.finished
    assert (float(done.state), done.records["before"].tolist()) == (mean, seen)
    with pytest.raises(KeyboardInterrupt):
        run(interrupted_after(1), 2)


def test_progress_sees_every_batch():
    seen = []
    run(BATCHES, progress=lambda batches: (seen.append(len(seen)) or batch for batch in batches))
    assert seen == list(range(7))


@pytest.mark.parametrize("step", [0, 2, 5])
def test_a_number_that_is_not_finite_is_an_error_that_names_the_step(step):
    batches = BATCHES.copy()
    batches[step, 0] = np.inf
    with pytest.raises(
        ValueError, match=rf"^the loss at step {step} \(the first is 0\) is not finite; choose a sma"
    ):
        run(batches)


def test_a_last_step_that_leads_nowhere_finite_is_an_error_too():
    batches = BATCHES.copy()
    batches[6, 1] = np.inf
    with pytest.raises(ValueError, match="^what the last step, 6, led to is not finite; choose a smaller"):
        run(batches)


def test_streams_that_cannot_be_are_refused():
    with pytest.raises(ValueError, match="^there is no batch to take a step on; the stream is empty, or was read"):
        run([])
    with pytest.raises(ValueError, match=r"^all batches must have one shape; one has \(3,\), the first \(2,\)$"):
        run([*BATCHES, np.zeros(3, np.float32)])
    with pytest.raises(ValueError, match="^steps_per_program is 0; it must be at least 1$"):
        run(BATCHES, 0)
