import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import integrate, special

from minitf.analysis.claims import surprises, unmet
from minitf.analysis.scan_snap import joma
from minitf.analysis.scan_snap.joma_claims import joma_claims


@pytest.fixture(scope="module")
def results():
    return joma.run_joma(seeds=3)


def test_what_is_expected_holds_and_what_is_known_to_fail_fails(results):
    claims = joma_claims(results)
    assert [c.id for c in unmet(claims)] == []
    assert [c.id for c in surprises(claims)] == []
    assert len({c.id for c in claims}) == len(claims)
    assert all(c.id.startswith("joma.") for c in claims)
    assert {c.id for c in claims if not c.expected} == {
        "joma.invariant_three_queries",
        "joma.invariant_softmax_unstructured",
    }


def test_results_are_float64_arrays_of_the_documented_shapes(results):
    arrays = vars(results)
    assert all(isinstance(x, np.ndarray) and x.dtype == np.float64 for x in arrays.values())
    assert results.invariant_error.shape == (len(joma.INVARIANT_CASES), 3, 3)
    for name in ("fig2_full", "fig2_first", "fig2_second"):
        assert arrays[name].shape == (2, 3, joma.FIG2_STEPS)
        assert np.all(np.abs(arrays[name]) <= 1 + 1e-12)
    assert results.fig3_v_start.shape == results.fig3_v_end.shape == (21, 20)
    assert results.fig3_component.shape == (joma.FIG2_STEPS, 4)
    assert results.fig4_v.shape == (2, 50, 10)
    assert results.fig4_entropy.shape == (2, joma.FIG4_STEPS)
    assert results.winner_v.shape == results.winner_z.shape == (5, len(results.winner_time))
    assert results.salience_log.shape == (3, len(results.salience_time))


def test_the_first_seed_does_not_depend_on_how_many_there_are(results):
    case = joma.INVARIANT_CASES[0]
    alone = joma.invariant_errors(case, 0, 1, 0.02)
    np.testing.assert_allclose(alone[0], results.invariant_error[0, 0, 0], rtol=1e-6)
    other = joma.invariant_errors(case, 1, 1, 0.02)
    assert abs(other[0] - alone[0]) > 1e-6


def test_an_invariant_is_exact_up_to_the_step_and_a_broken_one_is_not(results):
    error = results.invariant_error
    halves = error[:, :-1] / error[:, 1:]
    for i, case in enumerate(joma.INVARIANT_CASES):
        expected = 1.0 if "three queries" in case.name and not case.summed else 2.0
        if case.attention == "softmax":
            expected = 1.0
        np.testing.assert_allclose(halves[i], expected, rtol=0.05, err_msg=case.name)


def test_the_prediction_is_perfect_at_the_start(results):
    np.testing.assert_allclose(results.fig2_full[:, :, 0], 1, atol=1e-12)
    np.testing.assert_allclose(results.fig2_x.sum(axis=1), 1, atol=1e-12)
    token, label = 3, 8
    gaussian = results.fig2_x[0, :10, label]
    assert gaussian[token] / gaussian[4] == pytest.approx(np.exp(-1 / 30))


def test_figure_3_starts_where_figure_3_says(results):
    np.testing.assert_allclose(results.fig3_component[0], results.fig3_v_start[:4, 0])
    assert np.abs(results.fig3_v_end).max() > 10 * np.abs(results.fig3_v_start).max()


@settings(max_examples=10, deadline=None)
@given(st.lists(st.floats(0.05, 2.0), min_size=2, max_size=6))
def test_the_winner_runs_away_at_the_predicted_time(drives):
    time, v, z = joma.winner_takes_all(tuple(drives))
    drive = np.array(drives)
    blow_up = np.sqrt(np.pi / 2) / drive.max()
    assert time[-1] == pytest.approx(blow_up, rel=1e-7)
    np.testing.assert_allclose(
        special.erf(v[:, -1] / np.sqrt(2)), drive * time[-1] / np.sqrt(np.pi / 2), rtol=1e-8
    )
    np.testing.assert_allclose(z, v**2 / 2, atol=1e-8)


def test_salience_agrees_with_the_flow_of_v_itself():
    mu, times = np.array([1.0, 1.5, 2.0]), np.linspace(0.1, 1.5, 8)
    run = integrate.solve_ivp(
        lambda _, v: (mu - v) * np.exp(v**2 / 2), (0, 1.5), np.zeros(3), t_eval=times, rtol=1e-11, atol=1e-12
    )
    np.testing.assert_allclose(joma.salience_logs(times), -np.log1p(-run.y / mu[:, None]), rtol=1e-6)


def test_figure_4_is_its_recursion():
    mu, v = np.array([1.0, 2.0, 3.5]), np.full(3, 0.05)
    path, entropy = joma.fig4(mu, 50)
    for t in range(50):
        np.testing.assert_allclose(path[t], v, rtol=1e-12)
        weight = np.exp(v**2 / 3)
        share = weight / weight.sum()
        assert entropy[t] == pytest.approx(-np.sum(share * np.log(share)))
        v = v + 0.02 * (mu - v) * share


def test_claims_of_other_numbers_do_not_hold(results):
    spoilt = dataclasses.replace(
        results,
        invariant_error=results.invariant_error[:, [0, 0, 0]],
        winner_v=results.winner_v * np.linspace(0.9, 1.0, 5)[:, None],
        fig2_full=results.fig2_first,
        fig4_entropy=results.fig4_entropy + 3e-3,
        salience_log=results.salience_log**1.01,
    )
    broken = {c.id for c in unmet(joma_claims(spoilt))}
    assert broken >= {
        "joma.invariant_exp",
        "joma.invariant_linear",
        "joma.theorem2_erf",
        "joma.theorem4_limit",
        "joma.fig2_terms",
        "joma.fig4_authors",
        "joma.fig4_uniform",
    }


def test_no_seed_and_too_short_a_run_are_refused():
    with pytest.raises(ValueError, match="seeds is 0"):
        joma.run_joma(seeds=0)
    with pytest.raises(ValueError, match="late_steps is 10"):
        joma.run_joma(late_steps=10)
