import dataclasses
import json
import math
import os

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from minitf.analysis.claims import (
    Claim,
    as_json,
    claim,
    is_settled,
    mean_ci95,
    save_claims,
    surprises,
    unmet,
    verdict,
)

KEYS = [
    "id",
    "statement",
    "source",
    "statistic",
    "value",
    "threshold",
    "direction",
    "holds",
    "n",
    "ci95",
    "note",
    "expected",
]
finite = st.floats(-1e6, 1e6)


def made(id="a", value=1.0, direction="<", threshold=2.0, **more):
    return claim(
        id,
        "One is small.",
        source="s",
        statistic="x",
        value=value,
        direction=direction,
        threshold=threshold,
        **more,
    )


def strict(text):
    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    return json.loads(text, parse_constant=refuse)


@given(finite, finite)
def test_a_verdict_is_what_the_numbers_say(value, threshold):
    assert verdict(value, threshold, "<") == (value < threshold)
    assert verdict(value, threshold, ">") == (value > threshold)
    assert verdict(value, threshold, "==") == (value == threshold)
    low, high = min(value, threshold), max(value, threshold)
    assert verdict(value, [low, high], "within")
    assert verdict(value, [threshold, threshold], "within") == (value == threshold)


@given(st.lists(finite, min_size=1, max_size=5), finite)
def test_every_one_of_several_values_must_meet_the_threshold(values, threshold):
    assert verdict(values, threshold, "<") == all(x < threshold for x in values)
    each = [[x, x] for x in values]
    assert verdict(values, each, "within")
    each[-1] = [values[-1] + 1, values[-1] + 2]
    assert not verdict(values, each, "within")


@given(st.sampled_from([math.nan, math.inf, -math.inf]), st.sampled_from(["<", ">", "=="]))
def test_a_value_that_is_not_finite_meets_nothing(value, direction):
    for number in (value, [0.0, value]):
        broken = made(value=number, direction=direction, threshold=0.0)
        assert not broken.holds
        written = strict(as_json([broken]))[0]
        assert written["holds"] is False
        assert written["value"] == (None if number is value else [0.0, None])


@pytest.mark.parametrize(
    ("value", "threshold", "direction", "message"),
    [
        (1.0, 2.0, "<=", "direction is '<='"),
        (1.0, 2.0, "within", "threshold has shape"),
        ([1.0, 2.0], [1.0, 2.0, 3.0], "<", "threshold has shape"),
        ([], 1.0, "<", "value has shape"),
        ([[1.0]], 1.0, "<", "value has shape"),
        (1.0, math.nan, "<", "not finite"),
        (1.0, [0.0, math.inf], "within", "not finite"),
    ],
)
def test_what_cannot_be_compared_is_refused(value, threshold, direction, message):
    with pytest.raises(ValueError, match=message):
        verdict(value, threshold, direction)


def test_nobody_can_write_a_verdict_by_hand():
    good = made()
    assert good.holds
    with pytest.raises(ValueError, match="verdict must follow"):
        dataclasses.replace(good, holds=False)
    with pytest.raises(ValueError, match="at least one sample"):
        dataclasses.replace(good, n=0)


def test_a_claims_file_is_strict_json_with_exactly_the_agreed_keys(tmp_path):
    samples = np.array([1.0, 2.0, 4.0])
    mean, ci95 = mean_ci95(samples)
    several = made("b", np.array([1, 2]), "within", [[0, 1], [1, 2]], ci95=[[0.5, 1.5], [1, 3]], n=3)
    save_claims(tmp_path / "claims.json", [made(value=mean, ci95=ci95, n=3, threshold=9), several])
    first, second = strict((tmp_path / "claims.json").read_text())
    assert list(first) == list(second) == KEYS
    assert (first["value"], first["ci95"], first["n"], first["expected"]) == (mean, list(ci95), 3, True)
    assert (second["value"], second["threshold"]) == ([1, 2], [[0, 1], [1, 2]])
    assert second["ci95"] == [[0.5, 1.5], [1, 3]]


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "claims.json"
    save_claims(path, [made()])
    before = path.read_text()

    def broken(*_):
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", broken)
    with pytest.raises(OSError, match="disk full"):
        save_claims(path, [made("other")])
    assert path.read_text() == before
    assert os.listdir(tmp_path) == ["claims.json"]


def test_two_claims_cannot_share_an_id(tmp_path):
    with pytest.raises(ValueError, match="ids a occur more than once"):
        save_claims(tmp_path / "claims.json", [made(), made()])


def test_claims_that_disappoint_and_claims_that_surprise_are_told_apart():
    claims = [
        made("kept"),
        made("broken", value=3.0),
        made("known to fail", value=3.0, expected=False),
        made("surprise", expected=False),
    ]
    assert [c.id for c in unmet(claims)] == ["broken"]
    assert [c.id for c in surprises(claims)] == ["surprise"]


@given(st.lists(st.floats(-100, 100), min_size=2, max_size=20))
def test_the_interval_is_students(samples):
    mean, (low, high) = mean_ci95(samples)
    spread = stats.sem(samples)
    assert mean == pytest.approx(np.mean(samples), abs=1e-12)
    if spread > 1e-9:
        assert (low, high) == pytest.approx(stats.t(len(samples) - 1, mean, spread).interval(0.95))
    else:
        assert low <= mean <= high


def test_one_sample_has_no_interval_and_none_is_an_error():
    assert mean_ci95([2.5]) == (2.5, None)
    with pytest.raises(ValueError, match="non-empty"):
        mean_ci95([])


def test_a_claim_is_plain_data():
    values = vars(made(value=np.float32(0.5), threshold=np.array(2.0)))
    assert list(values) == KEYS == [f.name for f in dataclasses.fields(Claim)]
    assert type(values["value"]) is float


@pytest.mark.parametrize(
    ("value", "interval", "direction", "threshold", "settled"),
    [
        (1.0, (0.8, 1.2), ">", 0.5, True),
        (1.0, (0.4, 1.6), ">", 0.5, False),
        (0.1, (0.0, 0.2), ">", 0.5, True),
        (0.4, (0.2, 0.6), "<", 0.5, False),
        (0.4, (0.2, 0.6), "within", (0.0, 1.0), True),
        (0.4, (-0.2, 1.0), "within", (0.0, 1.0), False),
        ([1.0, 2.0], [(0.9, 1.1), (1.9, 2.1)], ">", 0.5, True),
        ([1.0, 2.0], [(0.4, 1.6), (1.9, 2.1)], ">", 0.5, False),
        (1.0, None, ">", 0.5, True),
    ],
)
def test_a_claim_is_open_where_its_interval_reaches_across(value, interval, direction, threshold, settled):
    one = claim(
        "x.y",
        "It is.",
        source="s",
        statistic="t",
        value=value,
        direction=direction,
        threshold=threshold,
        n=3,
        ci95=interval,
    )
    assert is_settled(one) == settled


def test_nothing_has_no_sign():
    nothing = claim(
        "a.b", "s", source="x", statistic="y", value=-0.0, direction="<", threshold=1, ci95=(-0.0, -0.0)
    )
    assert "-0" not in repr((nothing.value, nothing.ci95))
