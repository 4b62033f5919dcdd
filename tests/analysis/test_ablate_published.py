import numpy as np
import pytest

from minitf.analysis.ablate.published import NEXT, published


def found(asked, intact, half, every, margin):
    """As ``ablate.json`` has it, of one measure at half of the heads and at all of them."""
    name, value = intact
    ends = {name: [value, 0, half, 0, every]}
    order = {**ends, "margins": {name: [0, 0, margin, 0, margin]}}
    return {
        "asked": asked,
        "windows": 16,
        "fractions": [0, 0.25, 0.5, 0.75, 1],
        "intact": {name: value},
        "replacements": {"mean over data": {"orders": {"least important first": order}}},
    }


def test_a_language_model_is_asked_by_its_perplexity_and_half_by_its_loss():
    constant, half = published(found(NEXT, ("loss", 2.0), 2.03, 2.5, 0.01))
    assert constant.value == pytest.approx(np.exp(0.5) - 1) and constant.holds and constant.n == 16
    assert constant.ci95 == pytest.approx((np.exp(0.49) - 1, np.exp(0.51) - 1))
    assert half.value == pytest.approx(0.015) and half.holds
    assert half.ci95 == pytest.approx((0.01, 0.02))
    assert not published(found(NEXT, ("loss", 2.0), 2.05, 2.01, 0.01))[0].holds


def test_an_encoder_is_asked_by_its_accuracy():
    constant, half = published(found("masked tokens", ("accuracy", 0.5), 0.48, 0.45, 0.02))
    assert constant.value == pytest.approx(0.1) and constant.holds
    assert constant.ci95 == pytest.approx((0.06, 0.14))
    assert half.value == pytest.approx(0.04) and not half.holds


def test_a_single_head_has_no_half():
    of_one = found(NEXT, ("loss", 2.0), 2.03, 2.5, 0.01) | {"fractions": [0, 0, 1, 1, 1]}
    assert [one.id for one in published(of_one)] == ["ablate.constant"]


def test_of_one_window_nothing_is_known_of_how_sure_it_is():
    assert [one.ci95 for one in published(found(NEXT, ("loss", 2.0), 2.03, 2.5, None))] == [None, None]


@pytest.mark.parametrize(("intact", "every"), [(0.0, 0.1), (0.5, None)])
def test_what_is_no_number_does_not_hold(intact, every):
    constant, _ = published(found("masked tokens", ("accuracy", intact), 0.1, every, 0.01))
    assert np.isnan(constant.value) and not constant.holds and constant.ci95 is None
