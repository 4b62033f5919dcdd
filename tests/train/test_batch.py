import jax
import jax.numpy as jnp
import numpy as np
import pytest

from minitf.train.batch import NO_TARGET, masked, next_token

MASK = 50
tokens = jax.random.randint(jax.random.key(0), (64, 500), 0, MASK)


def test_every_token_but_the_last_is_asked_for_the_one_after_it():
    batch = next_token(jnp.arange(12).reshape(2, 6))
    assert np.array_equal(batch.tokens, [[0, 1, 2, 3, 4], [6, 7, 8, 9, 10]])
    assert np.array_equal(batch.targets, np.asarray(batch.tokens) + 1)
    assert batch.inputs is None and batch.tokens.dtype == batch.targets.dtype == jnp.int32


def test_targets_are_the_true_tokens_and_what_was_not_chosen_is_shown():
    batch = masked(tokens, jax.random.key(1), 0.15, MASK)
    asked = np.asarray(batch.targets) != NO_TARGET
    assert np.array_equal(np.asarray(batch.targets)[asked], np.asarray(tokens)[asked])
    assert np.array_equal(np.asarray(batch.tokens)[~asked], np.asarray(tokens)[~asked])


def test_every_sequence_is_asked_for_something_and_chance_decides_the_rest():
    short = tokens.reshape(-1, 4)
    asked = np.asarray(masked(short, jax.random.key(1), 0.15, MASK).targets) != NO_TARGET
    many = asked.sum(axis=1)
    # Of four positions, chance would choose none in .85^4 of the sequences, and one in 4 x .15 x .85^3.
    shares = np.array([0.0, 0.85**4 + 4 * 0.15 * 0.85**3, 6 * 0.15**2 * 0.85**2])
    np.testing.assert_allclose(np.bincount(many, minlength=5)[:3] / len(many), shares, atol=0.02)
    np.testing.assert_allclose(asked.mean(axis=0), asked.mean(), atol=0.03)


def test_of_the_chosen_80_percent_are_masked_10_random_and_10_as_they_were():
    batch = masked(tokens, jax.random.key(2), 0.15, MASK)
    shown, true = np.asarray(batch.tokens), np.asarray(tokens)
    asked = np.asarray(batch.targets) != NO_TARGET
    n = asked.sum()
    # A random token is by chance the true one once in 50 times. Five standard deviations of binomials are allowed.
    for found, of, share in (
        (n, asked.size, 0.15),
        ((shown == MASK)[asked].sum(), n, 0.8),
        ((shown == true)[asked].sum(), n, 0.1 + 0.1 / MASK),
    ):
        assert abs(found - share * of) < 5 * np.sqrt(of * share * (1 - share))
    replaced = shown[asked & (shown != MASK) & (shown != true)]
    assert np.bincount(replaced, minlength=MASK).min() > 0 and replaced.max() < MASK


def test_masking_is_one_program_whatever_the_share_and_depends_on_the_key():
    program = jax.jit(lambda key, share: masked(tokens[:, :50], key, share, MASK))
    few, many, other = (program(jax.random.key(k), share) for k, share in ((0, 0.1), (0, 1.0), (1, 0.1)))
    assert np.all(np.asarray(many.targets) == np.asarray(tokens[:, :50]))
    assert not np.array_equal(few.targets, other.targets)
    assert program._cache_size() == 1


@pytest.mark.parametrize("share", [0.0, -0.1, 1.5, float("nan")])
def test_a_share_that_is_none_is_refused(share):
    with pytest.raises(ValueError, match="share is .*above 0 and at most 1"):
        masked(tokens, jax.random.key(0), share, MASK)


def test_a_mask_below_the_tokens_is_refused():
    with pytest.raises(ValueError, match="mask_token is 0"):
        masked(tokens, jax.random.key(0), 0.1, 0)
