import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import integrate, optimize

from minitf.analysis.claims import surprises, unmet
from minitf.analysis.scan_snap import attention_claims, decoder_claims, theory, theory_claims
from minitf.analysis.scan_snap.theory_population import (
    Classes,
    common_tokens,
    distinct_tokens,
    of_generator,
    population_run,
)
from minitf.analysis.scan_snap.theory_simulations import (
    closed_system,
    equal_gram,
    frozen_decoder,
    ratio_law_error,
    split_push,
)
from minitf.train.sequence_classes import SYN_SMALL, SequenceClasses, syn_medium

vocabularies = st.integers(4, 5000)
rates = st.floats(0.01, 5.0)
times = st.floats(0.0, 1e5)
counts = st.integers(1, 40)


def agrees(claims):
    assert [c.id for c in unmet(claims)] == []
    assert [c.id for c in surprises(claims)] == []


# The decoder


@given(times, vocabularies, rates)
def test_h_is_the_root_of_its_equation(visits, vocabulary, eta):
    def excess(y):
        return np.expm1(y) + (vocabulary - 1) * y - vocabulary * eta * visits

    y = vocabulary * float(theory.h(visits, vocabulary, eta))
    above = min(eta * visits, np.log1p(vocabulary * eta * visits)) * (1 + 1e-9) + 1e-9
    root = optimize.brentq(excess, 0.0, above, xtol=1e-14, rtol=1e-14)
    assert y == pytest.approx(root, rel=1e-10, abs=1e-12)


@given(st.integers(2, 60), rates)
def test_the_recursion_is_batch_one_sgd_on_a_decoder_row(vocabulary, eta):
    right = np.eye(vocabulary)[0]
    zeta = vocabulary / (vocabulary - 1) * (right - 1 / vocabulary)
    row, h_star = np.zeros(vocabulary), theory.h_star(12, vocabulary, eta)
    for height in h_star[1:]:
        weight = np.exp(row - row.max())
        row = row + eta * (right - weight / weight.sum())
        np.testing.assert_allclose(row, (vocabulary - 1) * height * zeta, atol=1e-11)


@given(st.integers(2, 2000), st.floats(0.01, 4.0))
def test_the_steps_stay_just_above_the_smooth_curve(vocabulary, eta):
    gap = theory.h_star(60, vocabulary, eta) - theory.h(np.arange(61), vocabulary, eta)
    assert np.all(gap >= -1e-15)
    assert np.all(gap <= 2 * eta / vocabulary)


@given(st.floats(0.5, 3000), counts, vocabularies, rates, rates)
def test_the_attention_push_is_the_integral_of_gamma(t, classes, vocabulary, eta_y, eta_z):
    # Gauss-Legendre in the logarithm of time, where the integrand is smooth over all its decades.
    nodes, weights = np.polynomial.legendre.leggauss(400)
    moments = t * np.exp(20 * (nodes - 1))
    total = 20 * eta_z * np.sum(weights * moments * theory.gamma(moments, classes, vocabulary, eta_y))
    push = float(theory.attention_push(t, classes, vocabulary, eta_y, eta_z))
    assert push == pytest.approx(total, rel=1e-8)


@given(counts, st.integers(3, 5000), rates)
def test_at_the_half_time_the_right_token_has_probability_one_half(classes, vocabulary, eta):
    t = theory.half_time(classes, vocabulary, eta)
    assert float(theory.correct_probability(t, classes, vocabulary, eta)) == pytest.approx(0.5, abs=1e-9)


@given(st.integers(4, 10**9))
def test_w1_solves_its_equation_and_t0_follows(vocabulary):
    w, log_m = theory.w1(vocabulary), np.log(vocabulary)
    assert np.exp(w * log_m) == pytest.approx((1 + w) * (1 - 1 / vocabulary) * log_m, rel=1e-10)
    assert theory.t0(10, vocabulary, 0.5) == pytest.approx(2 * (1 + w) * 10 * log_m / 0.5)


@given(st.floats(0, 0.99), st.integers(2, 30))
def test_the_equal_overlap_formula_is_the_inverse_of_the_overlaps(overlap, classes):
    gram = equal_gram(overlap, classes)
    correction = np.eye(classes) - np.linalg.inv(gram)
    assert theory.equal_overlap_correction(overlap, classes) == pytest.approx(correction[0, 1], abs=1e-9)
    # q1 = 1 and q0 = 0 in the limit of a large vocabulary.
    coefficients = theory.theorem1_coefficients(gram, 10**9)
    np.testing.assert_allclose(coefficients, np.linalg.inv(gram), atol=1e-5)


@pytest.mark.parametrize("modified", [True, False])
def test_the_small_decoder_equals_the_full_one(modified):
    classes, vocabulary, eta = 3, 12, 0.7
    generator = np.random.default_rng(0)
    features = np.abs(generator.normal(size=(7, classes)))
    features /= np.linalg.norm(features, axis=0)
    gram = features.T @ features
    order = generator.integers(0, classes, (1, 40))
    y = np.zeros((7, vocabulary))
    for n in order[0]:
        logits = y.T @ features[:, n]
        alpha = np.exp(logits) / np.exp(logits).sum()
        direction = features[:, n]
        if modified:
            direction = direction - features @ (np.eye(classes) - np.linalg.inv(gram))[:, n]
        y += eta * np.outer(direction, np.eye(vocabulary)[n] - alpha)
    states, pushes = frozen_decoder(gram, vocabulary, eta, order, [10, 40], modified=modified)
    columns = np.repeat(np.arange(classes + 1), [1] * classes + [vocabulary - classes])
    np.testing.assert_allclose(features @ states[0, 1][:, columns], y, atol=1e-12)
    logits = y.T @ features
    alpha = np.exp(logits) / np.exp(logits).sum(axis=0)
    np.testing.assert_allclose(features @ pushes[0, 1], y @ (np.eye(vocabulary, classes) - alpha), atol=1e-12)


def test_records_out_of_order_are_refused():
    with pytest.raises(ValueError, match="must increase"):
        frozen_decoder(equal_gram(0.1, 2), 5, 0.5, np.zeros((1, 4), int), [3, 2], modified=False)


def test_a_push_splits_into_its_own_part_and_the_rest():
    iota, beta = split_push(np.array([[2.0, -0.25], [-0.75, 4.0]]))
    assert (float(iota), float(beta)) == (3.0, 0.5)


# Attention


@given(st.integers(0, 2**32 - 1), st.integers(3, 12), st.integers(1, 20))
def test_one_update_keeps_every_row_sum(seed, vocabulary, positions):
    generator = np.random.default_rng(seed)
    context = generator.integers(0, vocabulary, positions)
    y, z = generator.normal(size=(vocabulary, vocabulary)), generator.normal(size=vocabulary)
    dy, dz = theory.lemma1_update(y, z, context, int(generator.integers(0, vocabulary)))
    np.testing.assert_allclose(dy.sum(axis=1), 0, atol=1e-12)
    assert abs(dz.sum()) < 1e-10
    assert not dz[np.setdiff1d(np.arange(vocabulary), context)].any()


@settings(max_examples=30, deadline=None)
@given(st.floats(1e-3, 1e3), st.floats(0.05, 20), st.floats(0.5, 50))
def test_the_exponents_solve_the_equation_of_theorem_4(push, initial, common_rate):
    # dB = eta_Z gamma e^{-4 A B} / C_0 dt, and eta_Z gamma dt is the differential of the push.
    run = integrate.solve_ivp(
        lambda _, b: np.exp(-4 * common_rate * b) / initial, (0, push), [0.0], "LSODA", rtol=1e-9, atol=1e-12
    )
    exact = float(theory.exponent_corrected(push, initial, common_rate))
    assert exact == pytest.approx(run.y[0, -1], rel=1e-5, abs=1e-10)


@given(st.floats(0, 1e6), st.floats(0.01, 100))
def test_the_forms_of_b_differ_as_documented(push, initial):
    printed = float(theory.exponent_printed(push, initial))
    integrated = float(theory.exponent_integrated(push, initial))
    assert printed == pytest.approx(integrated + np.log(initial) / 4, abs=1e-9)
    assert integrated == pytest.approx(float(theory.exponent_corrected(push, initial, 1.0)), abs=1e-12)
    assert float(theory.growth_factor(integrated)) == pytest.approx(np.sqrt(1 + 4 * push / initial), rel=1e-9)


@given(st.floats(0.01, 0.2), st.floats(0.21, 0.9), st.floats(0.01, 1.0))
def test_the_ratio_law_is_the_conservation_law(weak, strong, share):
    # (1 - e^{-2 z}) / P^2 is the same for all distinct tokens; share of what would exhaust the stronger one.
    gain = -np.log1p(-0.99 * share * np.array([strong, weak]) ** 2 / strong**2) / 2
    f = np.array([strong, weak]) * np.exp(gain)
    law = float(theory.ratio_excess(strong, weak, gain[0]))
    assert (f[0] / f[1]) ** 2 - 1 == pytest.approx(law, rel=1e-9)
    assert ratio_law_error(np.array([weak, strong]), gain[None, ::-1]) < 1e-9


def test_frequencies_deviate_no_more_than_the_bound_allows():
    generator, length, failure = np.random.default_rng(1), 128, 0.1
    share = generator.binomial(length - 1, 0.3, 4000) / (length - 1)
    bound = float(theory.frequency_deviation(length, failure))
    assert np.mean(np.abs(share - 0.3) > bound) <= failure
    assert float(theory.frequency_deviation(4 * 127 + 1, failure)) == pytest.approx(bound / 2)


@pytest.mark.parametrize(
    "call",
    [
        lambda: theory.h(-1.0, 10, 0.5),
        lambda: theory.h(1.0, 1, 0.5),
        lambda: theory.h_star(5, 10, 0.0),
        lambda: theory.gamma(1.0, 0, 10, 0.5),
        lambda: theory.w1(3),
        lambda: theory.attention_push(1.0, 2, 10, 0.5, -1.0),
        lambda: theory.exponent_printed(1.0, 0.0),
        lambda: theory.equal_overlap_correction(1.0, 3),
        lambda: theory.frequency_deviation(1, 0.1),
        lambda: theory.frequency_deviation(10, 1.5),
    ],
)
def test_impossible_arguments_are_refused_with_the_number(call):
    with pytest.raises(ValueError, match=r"(is|time is|length is) -?\d.*(must|lie|need)"):
        call()


# Simulated attention


def test_the_closed_system_moves_as_theorem_2_says():
    system = closed_system(0.3, 6, 200, 0.5, 0.1, steps=40)
    f = system.frequency[0] / np.linalg.norm(system.frequency[0])
    # At time 0 gamma is 0; the first move is that of step 1, still from z = 0.
    move, xi = system.z[2] - system.z[1], system.xi[1]
    np.testing.assert_allclose(move[1:6], 0.1 * f[1:6] ** 2 * xi, rtol=1e-10)
    assert move[0] == pytest.approx(-6 * 0.1 * (1 - f[0] ** 2) * xi, rel=1e-10)
    assert f[0] ** 2 == pytest.approx(0.3)
    gamma = float(theory.gamma(1.0, 6, 200, 0.5))
    assert xi == pytest.approx(gamma / system.initial, rel=1e-10)
    assert system.common_rate == pytest.approx(6 * 0.7)


def test_the_shared_output_column_stands_for_every_output_never_seen():
    classes = of_generator(SequenceClasses(1, 2, 2, 3), 9)
    frequency, labels = jnp.asarray(classes.frequency), jnp.arange(2)

    def loss(tables):
        y, z = tables
        weighted = frequency * jnp.exp(z[classes.query])
        f = weighted / jnp.linalg.norm(weighted, axis=1, keepdims=True)
        return -jnp.mean(jax.nn.log_softmax(f @ y)[labels, labels])

    run = population_run(classes, 0.8, 0.6, 6)
    with jax.enable_x64(True):
        tables = (jnp.zeros((8, 9)), jnp.zeros((1, 8)))
        for t in range(6):
            np.testing.assert_allclose(run.z[t], tables[1], atol=1e-13)
            gradient = jax.grad(loss)(tables)
            np.testing.assert_allclose(run.push[t], -gradient[1], atol=1e-13)
            tables = (tables[0] - 0.8 * gradient[0], tables[1] - 0.6 * gradient[1])


def test_a_vocabulary_without_room_is_refused():
    classes = of_generator(SYN_SMALL)
    with pytest.raises(ValueError, match="must be larger"):
        population_run(dataclasses.replace(classes, vocabulary=2), 0.5, 0.5, 3)


def test_distinct_and_common_tokens_are_told_apart():
    classes = Classes(np.array([[0.2, 0.5, 0.3, 0.0], [0.4, 0.0, 0.0, 0.6]]), np.array([0, 0]), 6)
    assert distinct_tokens(classes, 0).tolist() == [2, 1]
    assert distinct_tokens(classes, 1).tolist() == [3]
    assert common_tokens(classes, 0).tolist() == [0]


# Curves and claims


def test_the_curves_are_those_of_the_figures():
    curves = theory.theory_curves()
    reference = {0.5: (11.2, 21.8, 34.6, 38.3, 40.8, 43.1, 45.2), 5.0: (13.7, 15.0, 16.1, 16.6, 17.0, 17.5, 18.0)}
    at = [50, 100, 200, 276, 365, 500, 700]
    for eta, expected in reference.items():
        row = list(curves.fig3_eta_y).index(eta)
        np.testing.assert_allclose(curves.fig3_growth[row, at], expected, atol=0.051)
    assert curves.fig3_growth.shape == (4, 701)
    assert curves.fig8_h.shape == curves.fig8_h_star.shape == (2, 5, 76)
    assert curves.fig9_exponent.shape == (2, 5, 251)
    assert np.all(np.diff(curves.fig3_growth, axis=1) > 0)
    assert np.all(np.diff(curves.fig3_t0) < 0)
    assert all(np.asarray(x).dtype == np.float64 for x in vars(curves).values())


def test_the_closed_form_claims_hold():
    claims = [
        theory_claims.t3_frequencies(seeds=4, samples=300),
        theory_claims.t4_decoder(steps=30),
        theory_claims.t5_gamma(),
        theory_claims.t6_times(),
        theory_claims.t11_ode(),
        theory_claims.t12_snapping(),
        theory_claims.t13_rate_independence(),
        *theory_claims.figure_claims(),
    ]
    agrees(claims)


def test_the_decoder_claims_hold_and_fail_as_known():
    agrees(decoder_claims.decoder_claims())


def test_the_models_gradient_is_lemma_1():
    agrees([attention_claims.t1_lemma1(draws=1, vocabulary=12, length=20)])


def test_the_attention_claims_hold_on_small_runs():
    sets = {"small": of_generator(SYN_SMALL), "medium": of_generator(syn_medium(1))}
    runs = {(name, 0.05): population_run(s, 0.5, 0.05, 300) for name, s in sets.items()}
    systems = [closed_system(0.3125, 10, 1000, 0.5, 0.5, steps=20_000)]
    agrees(
        [
            attention_claims.t8_square_law(),
            attention_claims.t9_signs(runs, sets),
            *attention_claims.t10b_joint(runs, sets),
            attention_claims.t10_ratio_law(systems),
            *attention_claims.theorem4_shared_query(systems, [(0.5, 0.5)]),
        ]
    )
