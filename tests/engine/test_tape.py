"""How the tape says numbers: three digits of FLOPs, two decimals of bytes, in a unit of which there is one."""
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minipeft.engine.tape import count, size


@pytest.mark.parametrize("n, text", [
    (0, "-"), (7, "7"), (999, "999"), (1000, "1.00 k"), (1234, "1.23 k"), (999_499, "999 k"), (999_500, "1.00 M"),
    (999_999, "1.00 M"), (10 ** 6, "1.00 M"), (12_345_678, "12.3 M"), (999_999_999, "1.00 G"),
    (10 ** 12 - 1, "1.00 T"), (123 * 10 ** 12, "123 T")])
def test_a_count_has_three_digits_and_never_a_thousand_of_a_unit(n, text):
    assert count(n) == text


@pytest.mark.parametrize("n, text", [
    (0, "-"), (1, "1 B"), (1023, "1023 B"), (1024, "1.00 KiB"), (1536, "1.50 KiB"), (1024 ** 2 - 6, "1023.99 KiB"),
    (1024 ** 2 - 1, "1.00 MiB"), (1024 ** 2, "1.00 MiB"), (1024 ** 3 - 1, "1.00 GiB"), (5 * 2 ** 29, "2.50 GiB")])
def test_a_size_has_two_decimals_and_never_1024_of_a_unit(n, text):
    assert size(n) == text


@given(st.integers(1, 999_499_999_999_999), st.integers(1, 2 ** 39))
def test_what_is_printed_is_the_number_within_its_last_digit_and_below_the_next_unit(flops, n):
    """Half a unit in the third digit is at most 1 / 200 of the number; half a hundredth of a unit of bytes, of which
    there is one, as well. (The number is below 1000, and below 1024, of its unit.)"""
    for text, units, most, true in (
            (count(flops), {"k": 10 ** 3, "M": 10 ** 6, "G": 10 ** 9, "T": 10 ** 12}, 1000, flops),
            (size(n), {"B": 1, "KiB": 2 ** 10, "MiB": 2 ** 20, "GiB": 2 ** 30}, 1024, n)):
        number, _, unit = text.partition(" ")
        assert float(number) < most and "e" not in number
        assert abs(float(number) * units.get(unit, 1) - true) <= true / 200 * (1 + 1e-9)
