import jax.numpy as jnp
import numpy as np
from properties.models import GPT2, compiled, random_parameters, random_tokens
from scipy import stats

from minitf.analysis.prediction_quality import margin, next_tokens, quality, quality_by_window

TOKENS = random_tokens(GPT2, batch=3, length=7)
LOGITS, OTHERS = (
    compiled(GPT2)(random_parameters(GPT2), random_tokens(GPT2, seed=seed, batch=3, length=7)).logits
    for seed in (0, 1)
)


def test_quality_is_that_of_numpy():
    logits, other = np.asarray(LOGITS, np.float64), np.asarray(OTHERS, np.float64)
    found = quality(LOGITS, next_tokens(TOKENS), OTHERS)
    log = lambda x: (x - np.log(np.exp(x).sum(axis=-1, keepdims=True)))[:, :-1]
    target = np.asarray(TOKENS)[:, 1:]
    expected = -np.take_along_axis(log(logits), target[..., None], axis=-1).mean()
    np.testing.assert_allclose(found.loss, expected, rtol=1e-5)
    np.testing.assert_allclose(found.accuracy, np.mean(log(logits).argmax(axis=-1) == target))
    divergence = (np.exp(log(other)) * (log(other) - log(logits))).sum(axis=-1).mean()
    np.testing.assert_allclose(found.divergence, divergence, rtol=1e-4)
    np.testing.assert_allclose(quality(LOGITS, next_tokens(TOKENS), LOGITS).divergence, 0, atol=1e-6)


def test_the_margin_is_students_and_counts_windows_by_their_targets():
    rng = np.random.default_rng(0)
    growth, whole = rng.normal(size=(2, 12)), np.zeros((12, 5), int)
    for each, found in zip(growth, margin(growth, whole), strict=True):
        low, high = stats.t.interval(0.95, 11, loc=each.mean(), scale=stats.sem(each))
        np.testing.assert_allclose(found, (high - low) / 2, rtol=1e-12)
    assert np.isnan(margin(growth[:, :1], whole[:1])).all()
    # Every target costs the same: however they lie, nothing is uncertain.
    targets = np.where(np.arange(5) < rng.integers(1, 6, size=(12, 1)), 3, -1)
    counts = (targets >= 0).sum(axis=1)
    np.testing.assert_allclose(margin(0.3 * counts / counts.mean(), targets), 0, atol=1e-12)
    # A mean over targets drawn again and again, window by window, deviates as much as is said.
    sums = np.array([np.sum(rng.normal(size=count)) for count in counts]) + 0.3 * counts
    drawn = rng.integers(12, size=(20_000, 12))
    spread = np.std(sums[drawn].sum(axis=1) / counts[drawn].sum(axis=1))
    expected = spread * stats.t.ppf(0.975, 11) * np.sqrt(12 / 11)
    np.testing.assert_allclose(margin(sums / counts.mean(), targets), expected, rtol=0.1)


def test_what_windows_add_is_the_quality():
    logits, targets = LOGITS, jnp.asarray(next_tokens(TOKENS)).at[0, :3].set(-1)
    of = logits, targets, OTHERS
    whole, each = quality(*of), quality_by_window(*of)
    for name, value in vars(each).items():
        np.testing.assert_allclose(np.mean(value), getattr(whole, name), rtol=1e-6)
    own = quality(logits[:1], targets[:1], logits[:1]).loss
    counts = np.sum(np.asarray(targets) >= 0, axis=1)
    np.testing.assert_allclose(each.loss[0], own * counts[0] / counts.mean(), rtol=1e-5)
