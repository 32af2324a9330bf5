"""The search for the largest batch and rank, and sizes as a person writes them."""
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minipeft.tools.planning.budget import MOST, answer, in_bytes, search


@given(st.lists(st.tuples(st.integers(0, 1000), st.integers(1, 50)), min_size=1, max_size=3), st.integers(1, 1000),
       st.integers(1, 300))
def test_the_search_finds_the_largest_that_fits_of_any_maximum_of_lines(lines, limit, known):
    def peak(n):
        return max(a + b * n for a, b in lines)
    wanted = max((n for n in range(1, 1001) if peak(n) <= limit), default=0)
    assert search(limit, peak, {known: peak(known)}) == wanted


@given(st.lists(st.integers(0, 30), min_size=1, max_size=60), st.integers(0, 1000))
def test_it_needs_no_line_and_finds_the_largest_of_any_peak_that_never_falls(steps, limit):
    def peak(n):
        return sum(steps[:n]) + max(0, n - len(steps)) * 40
    wanted = max((n for n in range(1, 200) if peak(n) <= limit), default=0)
    assert search(limit, peak, {1: peak(1)}) == wanted


def test_few_plans_are_made():
    asked = []

    def peak(n):
        asked.append(n)
        return 10 ** 9 + 37 * 10 ** 6 * n
    assert search(24 * 10 ** 9, peak, {8: peak(8)}) == 621 and len(asked) <= 6


def test_a_wall_behind_a_nearly_flat_line_is_found_in_few_plans():
    asked = []

    def peak(n):
        asked.append(n)
        return 10 ** 6 - 10 + n // 1000 if n <= 512 else 2 * 10 ** 6
    assert search(10 ** 6, peak, {8: peak(8)}) == 512 and len(asked) <= 30


def test_a_peak_that_does_not_grow_ends_the_search():
    assert search(10, lambda n: 5, {1: 5}) == MOST


@given(st.integers(1, MOST + 9), st.sampled_from([1, 10, MOST - 1, MOST]), st.booleans())
def test_a_search_without_a_bound_in_sight_ends_from_wherever_it_starts(known, wall, grows):
    """From 8, guesses of 16 times as much pass MOST without meeting it."""
    def peak(n):
        assert n <= max(MOST, known)
        return (n if grows else 0) if n <= wall else 10 ** 12
    assert search(10 ** 9, peak, {known: peak(known)}) == wall


def test_no_batch_beyond_the_most_is_tried():
    tried = []
    found = answer(10 ** 9, 1, 8, None, lambda batch, rank: tried.append(batch) or 1, most=1000)
    assert found.batch == 1000 and max(tried) <= 1000


def test_a_rank_that_no_matrix_can_have_bounds_the_rank():
    def peak(batch, rank):
        if rank > 48:
            raise ValueError("rank exceeds 48")
        return 100 * batch + rank
    found = answer(1000, peak(2, 8), 2, 8, peak)
    assert (found.fits, found.batch, found.rank, found.rank_is_bound) == (True, 9, 48, True)
    assert answer(230, peak(2, 8), 2, 8, peak) == type(found)(230, True, 2, 30, False)
    assert answer(50, peak(2, 8), 2, 8, peak) == type(found)(50, False, 0, 0, False)
    assert answer(1000, peak(2, 8), 2, None, lambda batch, rank: 100 * batch).rank is None


@pytest.mark.parametrize("text, size", [("24GB", 24 * 10 ** 9), ("1.5 GiB", 3 * 2 ** 29), ("512mib", 2 ** 29),
                                        ("1000", 1000), (7, 7), ("2TB", 2 * 10 ** 12)])
def test_a_budget_is_read_as_it_is_written(text, size):
    assert in_bytes(text) == size


@pytest.mark.parametrize("text", ["", "GB", "24 cards", "-3GB", "0GB", 0, 1.5, True, "1e3GB"])
def test_another_budget_is_refused(text):
    with pytest.raises(ValueError, match="budget is"):
        in_bytes(text)
