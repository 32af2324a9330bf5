"""Ids and masks: what a model takes, checked before anything is computed."""
import numpy
import pytest

from minipeft.nn.inputs import check_ids, check_mask, host_ids


@pytest.mark.parametrize("ids", [[[0, 4], [3, 1]], ((0, 4), (3, 1)), numpy.array([[0, 4], [3, 1]], "int32"),
                                 numpy.array([[0, 4], [3, 1]], "uint8"), [range(2)], [(0,)]])
def test_integers_of_the_vocabulary_in_rows_are_taken_as_they_are(ids):
    found = check_ids(ids, 5, "ids")
    assert isinstance(found, numpy.ndarray) and found.tolist() == [list(row) for row in numpy.asarray(ids).tolist()]


def test_an_array_is_not_copied():
    ids, mask = numpy.array([[1, 2]]), numpy.array([[True, False]])
    assert check_ids(ids, 3, "ids") is ids and host_ids(ids, "ids") is ids
    assert check_mask(mask, (1, 2), "mask").dtype == bool


@pytest.mark.parametrize("ids, message", [
    ([1, 2], r"shape \[2\]; expected \[batch, time\]"), ([[[1]]], r"shape \[1, 1, 1\]"), (3, r"shape \[\]"),
    ([], r"shape \[0\]"), ([[]], r"shape \[1, 0\]; expected \[batch, time\], neither of them 0"),
    (numpy.zeros((0, 2), int), r"shape \[0, 2\]"), ([[1.0]], "dtype float64; expected integers"),
    ([[True]], "dtype bool; expected integers"), ([["a"]], "dtype <U1; expected integers"),
    ([[1, -1]], "holds -1; expected ids from 0 to 4"), ([[1, 5]], "holds 5; expected ids from 0 to 4"),
    ([[-2, 9]], "holds -2"), (numpy.array([[2 ** 63]], "uint64"), "holds 9223372036854775808"),
    ([[1, 2], [3]], r"rows of different length; pad them \(minipeft.batch_of does\)")])
def test_other_ids_are_refused_under_the_name_that_they_were_given_by(ids, message):
    with pytest.raises(ValueError, match=f"labels has {message}|labels {message}"):
        check_ids(ids, 5, "labels")


@pytest.mark.parametrize("mask", [[[1, 0]], numpy.array([[1.0, 0.0]]), [[True, False]], numpy.array([[1, 0]], "uint8")])
def test_a_mask_of_ones_and_zeros_is_boolean_afterwards(mask):
    found = check_mask(mask, (1, 2), "mask")
    assert found.dtype == bool and found.tolist() == [[True, False]]


def test_no_mask_stays_none():
    assert check_mask(None, (1, 2), "mask") is None


@pytest.mark.parametrize("mask, message", [
    ([[1, 0, 1]], r"shape \[1, 3\]; expected \[1, 2\], as the ids it masks"), ([1, 0], r"shape \[2\]"),
    ([[2, 0]], "values other than 0 and 1"), ([[0.5, 1]], "values other"), ([[numpy.nan, 1]], "values other"),
    ([[-1, 1]], "values other")])
def test_another_mask_is_refused(mask, message):
    with pytest.raises(ValueError, match=f"attention_mask (has|holds) {message}"):
        check_mask(mask, (1, 2), "attention_mask")
