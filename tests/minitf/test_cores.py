import pytest
from hypothesis import given
from hypothesis import strategies as st

from minitf.cores import few_at_a_time, largest_divisor

few = st.integers(1, 200)


@given(few, few)
def test_the_largest_divisor_divides_and_fits_and_no_larger_one_does(number, most):
    found = largest_divisor(number, most)
    assert number % found == 0
    assert found <= most
    assert not [n for n in range(found + 1, most + 1) if number % n == 0]


@given(few, few)
def test_as_many_fit_as_there_is_room_for_or_at_least_half_of_them_in_equal_shares(number, most):
    found = few_at_a_time(number, most)
    assert found <= most
    assert found == most or number % found == 0
    assert 2 * found >= min(number, most)


@pytest.mark.parametrize(("number", "most", "found"), [(64, 20, 16), (31, 20, 20), (8, 100, 8), (1, 1, 1)])
def test_shares_are_equal_where_that_costs_little(number, most, found):
    assert few_at_a_time(number, most) == found
