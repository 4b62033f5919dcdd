import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from report_example import example_results

from minitf.analysis.scan_snap import measures, reference, theory

DISTINCT = np.array([[False, True, True, True, False, False], [False, False, False, False, True, True]])
COMMON = np.array([True, False, False, False, False, False])
PROBABILITY = np.array([[0.4, 0.1, 0.2, 0.3, 0.0, 0.0], [0.5, 0.0, 0.0, 0.0, 0.1, 0.4]])

# In floating point, sums of six terms of size one err by a few of the last digits.
ROUNDING = 1e-12


def logits(largest: float = 5.0) -> st.SearchStrategy[np.ndarray]:
    return arrays(np.float64, (2, 6), elements=st.floats(-largest, largest))


@given(logits())
def test_association_is_frequency_times_exponential_normalized(z):
    c = measures.association(z, PROBABILITY)
    for n in range(2):
        weights = [p * math.exp(x) for p, x in zip(PROBABILITY[n], z[n], strict=True)]
        assert c[n] == pytest.approx([w / math.fsum(weights) for w in weights], rel=ROUNDING)


@given(logits(), st.floats(-300, 300))
def test_association_does_not_change_when_a_constant_is_added_to_the_logits(z, constant):
    moved = measures.association(z + constant, PROBABILITY)
    # adding a constant of size 300 rounds the logits by 300 eps
    assert np.allclose(moved, measures.association(z, PROBABILITY), rtol=1e-12, atol=0)


def test_association_at_zero_logits_is_the_frequency():
    assert measures.association(np.zeros((2, 6)), PROBABILITY) == pytest.approx(PROBABILITY)


def test_a_class_in_which_nothing_occurs_is_refused():
    with pytest.raises(ValueError, match="class 1 has no token"):
        measures.association(np.zeros((2, 6)), np.stack([PROBABILITY[0], np.zeros(6)]))


@given(logits())
def test_entropy_of_the_distinct_part_is_that_of_the_renormalized_masses(z):
    c = measures.association(z, PROBABILITY)
    for n, entropy in enumerate(measures.distinct_entropy(c, DISTINCT)):
        own = [float(x) for x, inside in zip(c[n], DISTINCT[n], strict=True) if inside]
        shares = [x / math.fsum(own) for x in own]
        assert entropy == pytest.approx(-math.fsum(s * math.log(s) for s in shares), abs=ROUNDING)
        assert -ROUNDING <= entropy <= math.log(len(own)) + ROUNDING


def test_equal_masses_have_the_largest_entropy_and_a_single_one_has_none():
    c = np.array([[0.4, 0.2, 0.2, 0.2, 0.0, 0.0], [0.5, 0.0, 0.0, 0.0, 0.0, 0.5]])
    assert measures.distinct_entropy(c, DISTINCT) == pytest.approx([math.log(3), 0.0])


def test_a_class_without_distinct_tokens_is_refused():
    with pytest.raises(ValueError, match="class 0 has no distinct token"):
        measures.distinct_shares(PROBABILITY, np.zeros_like(DISTINCT))


def test_distinct_tokens_without_mass_are_refused():
    with pytest.raises(ValueError, match="mass 0"):
        measures.distinct_shares(np.zeros((2, 6)), DISTINCT)


@given(logits())
def test_common_mass_and_distinct_masses_are_all_there_is(z):
    c = measures.association(z, PROBABILITY)
    distinct = np.where(DISTINCT, c, 0).sum(axis=-1)
    assert measures.common_mass(c, COMMON) + distinct == pytest.approx(np.ones(2), abs=ROUNDING)


@given(logits())
def test_the_strongest_share_is_that_of_the_most_frequent_token_not_of_the_most_attended(z):
    c = measures.association(z, PROBABILITY)
    expected = [c[0, 3] / c[0, 1:4].sum(), c[1, 5] / c[1, 4:].sum()]
    assert measures.strongest_share(c, PROBABILITY, DISTINCT) == pytest.approx(expected)
    assert measures.strongest_mass(c, PROBABILITY, DISTINCT) == pytest.approx([c[0, 3], c[1, 5]])


@given(logits(2.0))
def test_the_ratio_of_normalized_features_is_that_of_the_associations(z):
    c = measures.association(z, PROBABILITY)
    f = c / np.linalg.norm(c, axis=-1, keepdims=True)
    expected = f[:1, 3] ** 2 / f[:1, 1] ** 2 - 1
    # both square ratios lie below (3 e^4)^2, some 3e4
    assert measures.ratio_excess(c[:1, 3], c[:1, 1]) == pytest.approx(expected, abs=1e-10)


@given(arrays(np.float64, 4, elements=st.floats(0.05, 1)), st.floats(0, 3))
def test_logits_that_follow_the_conservation_law_follow_the_ratio_law(probability, gain):
    """Two forms of Theorem 3: (1 - e^{-2z}) / P^2 is shared, and r grows by e^{2z} of the stronger token."""
    gains = np.array([gain])
    z = measures.law_logits(probability, gains)[0]
    top = int(probability.argmax())
    assert z[top] == pytest.approx(gain, abs=1e-9)
    invariant = -np.expm1(-2 * z) / probability**2
    assert np.allclose(invariant, invariant[top], rtol=1e-6, atol=1e-12)
    mass = probability * np.exp(z)
    growth = measures.ratio_growth(gains, np.zeros(1))
    for other in range(4):
        start = measures.ratio_excess(probability[top : top + 1], probability[other : other + 1])
        now = measures.ratio_excess(mass[top : top + 1], mass[other : other + 1])
        # both are differences of squares up to (e^3 / .05)^2, some 2e5
        assert now == pytest.approx(start * growth, rel=1e-6, abs=1e-8)


def test_without_any_gain_the_law_leaves_the_entropy_of_the_frequencies():
    probability = np.linspace(0.1, 1, 10)
    share = probability / probability.sum()
    expected = -np.sum(share * np.log(share))
    assert measures.law_entropy(probability, np.zeros(1)) == pytest.approx([expected])
    assert expected == pytest.approx(2.1513, abs=5e-5)  # the spec's value at the start


@given(st.floats(0.01, 3), st.floats(0.01, 1))
def test_the_law_makes_attention_sparser_as_the_strongest_token_gains(gain, more):
    probability = np.linspace(0.1, 1, 10)
    before, after = measures.law_entropy(probability, np.array([gain, gain + more]))
    assert after < before


@given(arrays(np.float64, (3, 2, 6), elements=st.floats(0, 1)), arrays(np.float64, 4, elements=st.floats(0, 1)))
def test_recall_counts_the_distinct_tokens_above_each_threshold(attention, thresholds):
    counted = measures.recall(attention, DISTINCT, thresholds)
    for run in range(3):
        for i, threshold in enumerate(thresholds):
            own = [attention[run, n, t] for n in range(2) for t in range(6) if DISTINCT[n, t]]
            assert counted[run, i] == pytest.approx(sum(x > threshold for x in own) / 5)


@given(arrays(np.float64, 8, elements=st.floats(0, 1)), st.floats(0, 1))
def test_the_first_step_below_a_level_is_the_first_or_never(loss, level):
    below = [step for step, x in enumerate(loss) if x < level]
    assert measures.first_below(loss, level) == (below[0] if below else math.inf)


def test_syn_small_starts_where_the_spec_says_and_scans():
    run = example_results().small[0]
    curves = measures.progress(run)
    assert curves.entropy[:, 0] == pytest.approx(2.1513, abs=5e-5)
    assert curves.law[:, 0] == pytest.approx(curves.entropy[:, 0])
    assert curves.common[:, 0] == pytest.approx(20 / 31)  # ten of weight 1 against .1 + .2 + ... + 1
    assert np.all(curves.common[:, -1] < curves.common[:, 0])
    assert np.all(curves.strongest[:, -1] > curves.strongest[:, 0])


def test_snapping_is_marked_at_the_theorys_time_with_and_without_momentum():
    sgd, fast, adam = example_results().small[:3]
    assert measures.vocabulary(sgd) == 34
    with_momentum, without = measures.snapping_time(sgd)
    assert without == theory.t0(2, 34, 1.0)
    assert with_momentum == pytest.approx(theory.t0(2, 34, 10.0))
    assert measures.snapping_time(fast)[1] == pytest.approx(with_momentum)
    assert measures.snapping_time(adam) is None


def test_the_records_nearest_to_the_wanted_steps_are_chosen_once_and_the_last_always():
    steps = np.array([0, 3, 6, 50, 100])
    assert measures.nearest_records(steps, (0, 2, 4, 6, 1000)) == [0, 1, 2, 4]
    assert measures.nearest_records(np.array([0]), (0, 2)) == [0]


def test_published_panels_are_known_for_two_of_four_and_absent_otherwise():
    assert reference.published_panel(1, 2).mean[3, 0] == 1.551
    assert reference.published_panel(3, 6).sd[3, 3] == 0.1
    assert reference.published_panel(5, 10) is None
    assert reference.published_panel(10, 20) is None
    for panel in reference.FIG6:
        assert panel.mean.shape == panel.sd.shape == (4, 4)


def test_the_published_loss_starts_at_the_logarithm_of_the_vocabulary():
    assert pytest.approx(math.log(34), abs=5e-5) == reference.FIG4_LOSS[0]
    assert len(reference.FIG4_LOSS) == len(reference.FIG4_LOSS_STEP)
    assert np.all(np.diff(reference.FIG4_LOSS) < 0)
