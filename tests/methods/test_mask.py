"""Scores of elements, what is largest among them, and the indices that a mask or rows mean."""
import math
from fractions import Fraction

import numpy
import pytest
from hypothesis import given
from hypothesis import strategies as st

import minipeft
from minipeft.engine import ops
from minipeft.nn.weight import Parameter
from minipeft.methods.mask import check_rows, indices_of_mask
from minipeft.laws.bounds import close_gradients
from tests.models_under_test import Case, bits

U = 2.0 ** -53
CASE = Case(("post-LN", "q and v"), 1, 1, "float64", 0)


# ---- Fisher information


def one_by_one(model, batch):
    """Steps that give the loss of one row each."""
    return [lambda i=i: model.loss(**{key: value[i:i + 1] for key, value in batch.items()}) for i in range(4)]


def test_fisher_is_the_mean_square_of_the_gradients_of_single_examples_by_hand():
    """loss_i = (x_i . w - y_i)^2,  dw_i = 2 (x_i . w - y_i) x_i: three examples of integers, so all is exact."""
    x, y, w = numpy.array([[1., 2.], [3., -1.], [0., 4.]]), numpy.array([1., 2., 3.]), Parameter(numpy.array([2., 1.]))

    def step(i):
        def run():
            e = ops.sub(ops.sum(ops.mul(w, x[i])), y[i])
            return ops.mul(e, e)
        return run

    residuals = x @ w.data - y
    assert residuals.tolist() == [3, 3, 1]
    wanted = [((2 * 3 * 1) ** 2 + (2 * 3 * 3) ** 2 + 0) / 3, ((2 * 3 * 2) ** 2 + (2 * 3 * 1) ** 2 + (2 * 4) ** 2) / 3]
    assert minipeft.fisher([step(i) for i in range(3)], {"w": w})["w"].tolist() == wanted
    assert minipeft.fisher(step(0), {"w": w})["w"].tolist() == [36, 144], "one function is one step"
    whole = minipeft.fisher(lambda: ops.mul(sum((step(i)() for i in range(3)), 0.0), 1 / 3), {"w": w})["w"]
    assert numpy.allclose(whole, [((6 + 18 + 0) / 3) ** 2, ((12 - 6 + 8) / 3) ** 2], rtol=1e-14, atol=0), \
        "a batch gives the square of its mean gradient, another quantity"


def test_fisher_of_a_model_is_the_mean_of_the_squares_that_value_and_grad_gives():
    model, batch = CASE.model(), CASE.batch()
    params = minipeft.select(model, r"attn|embedding|ff_norm")
    gradients = [minipeft.value_and_grad(step, params)[1] for step in one_by_one(model, batch)]
    wanted = {name: sum(g[name] ** 2 for g in gradients) / 4 for name in params}
    before = bits(params)
    found = minipeft.fisher(one_by_one(model, batch), params)
    assert close_gradients(found, wanted, U) is None and list(found) == list(params)
    assert bits(params) == before and all((f >= 0).all() and f.any() for f in found.values())
    whole = minipeft.fisher(lambda: model.loss(**batch), params)
    assert max(abs(whole[name] - found[name]).max() / found[name].max() for name in params) > 0.1


def test_fisher_of_what_the_loss_does_not_reach_is_0_and_its_dtype_is_the_parameters():
    used, unused = Parameter(numpy.ones(3, "float32")), Parameter(numpy.ones((2, 2), "float32"))
    found = minipeft.fisher([lambda: ops.sum(used)] * 2, {"used": used, "unused": unused})
    assert found["used"].tolist() == [1, 1, 1] and found["unused"].tolist() == [[0, 0], [0, 0]]
    assert {f.dtype for f in found.values()} == {numpy.dtype("float32")}


def test_fisher_never_writes_into_a_gradient_that_it_was_given():
    """The two gradients of a + b are one array; squaring it in place would square it twice."""
    a, b = Parameter(numpy.array([2.0])), Parameter(numpy.array([3.0]))
    found = minipeft.fisher([lambda: ops.sum(ops.mul(ops.add(a, b), 3.0))] * 3, {"a": a, "b": b})
    assert found["a"].tolist() == found["b"].tolist() == [9.0]


@pytest.mark.parametrize("steps", [[], ()])
def test_fisher_without_steps_is_refused(steps):
    with pytest.raises(ValueError, match="fisher: no steps; expected a function that returns a loss, or a list"):
        minipeft.fisher(steps, {"w": Parameter(numpy.ones(1))})


def test_magnitude_is_the_absolute_value_and_a_copy():
    w = Parameter(numpy.array([[-2.0, 0.5], [0.0, -0.0]]))
    found = minipeft.magnitude({"w": w})["w"]
    assert found.tolist() == [[2, 0.5], [0, 0]] and not numpy.shares_memory(found, w.data)
    assert not numpy.signbit(found).any()


# ---- the largest


@given(st.integers(0, 999), st.floats(0, 1, exclude_min=True), st.booleans())
def test_top_is_what_sorting_all_numbers_together_gives(seed, share, few):
    """few: scores 0, 1, 2, so that most are equal; of equal ones the first, in the order of names and of elements.
    What exceeds a whole number by less than half a millionth is taken for rounding."""
    rng = numpy.random.default_rng(seed)
    shapes = {"c": (2, 3), "a": (4,), "b": (1, 3, 2)}
    scores = {name: rng.integers(0, 3, shape) * 1.0 if few else rng.standard_normal(shape)
              for name, shape in shapes.items()}
    found = minipeft.top(scores, share)
    n = sum(s.size for s in scores.values())
    ranked = sorted(((-value, order, i) for order, s in enumerate(scores.values())
                     for i, value in enumerate(s.reshape(-1))))
    chosen = ranked[:max(1, math.ceil(Fraction(share) * n - Fraction(1, 2_000_000)))]
    assert sum(mask.sum() for mask in found.values()) == len(chosen) >= 1
    for order, name in enumerate(shapes):
        wanted = sorted(i for _, o, i in chosen if o == order)
        assert (name in found) == bool(wanted), "names of which nothing is chosen are left out"
        if wanted:
            assert found[name].dtype == bool and found[name].shape == shapes[name]
            assert numpy.flatnonzero(found[name]).tolist() == wanted


@given(st.integers(1, 400), st.data())
def test_a_share_that_is_a_fraction_of_n_is_exactly_so_many(n, data):
    """0.07 * 100 is 7.000000000000001 in binary, and not the eighth of anything."""
    p = data.draw(st.integers(1, n))
    assert minipeft.top({"a": numpy.arange(n)}, p / n)["a"].sum() == p
    assert minipeft.top({"a": numpy.arange(n)}, (p - 0.5) / n)["a"].sum() == p, "what is between is rounded up"


def test_seven_percent_of_a_hundred_are_seven():
    assert 0.07 * 100 > 7 and minipeft.top({"a": numpy.arange(100)}, 0.07)["a"].sum() == 7


def test_top_of_the_whole_is_everything_and_of_almost_nothing_the_one_largest():
    scores = {"a": numpy.array([1.0, 5.0]), "b": numpy.array([[5.0, 2.0]])}
    assert {name: mask.all() for name, mask in minipeft.top(scores, 1).items()} == {"a": True, "b": True}
    smallest = minipeft.top(scores, 1e-300)
    assert list(smallest) == ["a"] and smallest["a"].tolist() == [False, True]


def test_a_score_of_0_can_be_chosen_and_negative_scores_are_not_taken_by_their_size():
    assert minipeft.top({"a": numpy.array([-3.0, 0.0, -0.5])}, 2 / 3)["a"].tolist() == [False, True, True]


@pytest.mark.parametrize("dtype", ["uint8", "int64", "float32", "bool"])
def test_scores_may_be_counts_of_any_kind(dtype):
    """The negative of an unsigned number is large."""
    assert minipeft.top({"a": numpy.array([0, 5, 0, 3]).astype(dtype)}, 0.5)["a"].tolist() == [False, True, False, True]


@pytest.mark.parametrize("share", [0, -0.1, 1.0001, 2, math.nan, math.inf])
def test_a_share_outside_0_to_1_is_refused(share):
    with pytest.raises(ValueError, match=r"top: share is .*; expected a number in \(0, 1\]"):
        minipeft.top({"a": numpy.ones(3)}, share)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_scores_that_are_not_finite_or_none_at_all_are_refused(bad):
    with pytest.raises(ValueError, match="top: the scores of b are not finite"):
        minipeft.top({"a": numpy.ones(3), "b": numpy.array([[1.0, bad]])}, 0.5)
    with pytest.raises(ValueError, match=r"top: no scores; expected \{name: array\}"):
        minipeft.top({}, 0.5)


def test_the_elements_of_largest_fisher_information_are_trained_and_lower_the_loss():
    """The whole of it (Sung et al.): score, choose one in fifty, attach, train; nothing else moves."""
    model, batch = CASE.model(), CASE.batch()
    everything = minipeft.select(model, ".")
    masks = minipeft.top(minipeft.fisher(one_by_one(model, batch), everything), 0.02)
    attachment = minipeft.attach(model, minipeft.Selective(mask=masks), numpy.random.default_rng(0), "fish")
    n = sum(p.data.size for p in attachment.parameters.values())
    assert n == math.ceil(0.02 * sum(p.data.size for p in everything.values()))
    before, optimizer, losses = bits(everything), minipeft.AdamW(0.01), []
    for _ in range(5):
        loss, grads = minipeft.value_and_grad(lambda: model.loss(**batch), attachment.parameters)
        optimizer.step(attachment.parameters, grads)
        losses.append(loss)
    assert losses[-1] < losses[0] and bits(everything) == before


# ---- indices


@pytest.mark.parametrize("rows, wanted", [((0,), [0]), ((2, 0), [0, 2]), ((3,), [3])])
def test_rows_come_ascending(rows, wanted):
    assert check_rows("table", (4, 3), rows) == wanted


def test_a_row_that_the_table_lacks_is_refused_with_those_that_it_has():
    with pytest.raises(ValueError, match=r"rows holds 4; table \[4, 3\] has rows 0 to 3"):
        check_rows("table", (4, 3), (4, 1))
    with pytest.raises(ValueError, match="rows holds 9223372036854775808; table"):
        check_rows("table", (4, 3), (1, 2 ** 63))


@pytest.mark.parametrize("mask, wanted", [
    (numpy.array([[False, True, False], [True, False, True]]), [1, 3, 5]), ([[True] * 3] * 2, [0, 1, 2, 3, 4, 5]),
    (numpy.array([5, 0, 3]), [0, 3, 5]), ([2], [2]), (numpy.array([4, 1], "uint8"), [1, 4])])
def test_booleans_of_the_shape_and_distinct_flat_indices_mean_indices_ascending(mask, wanted):
    found = indices_of_mask("w", (2, 3), mask)
    assert found.tolist() == wanted and found.dtype == numpy.int32


def test_the_indices_of_a_mask_do_not_change_when_the_mask_does():
    given_indices = numpy.array([1, 4])
    found = indices_of_mask("w", (2, 3), given_indices)
    given_indices[0] = 0
    assert found.tolist() == [1, 4]


def test_a_mask_that_is_false_everywhere_says_what_to_do():
    with pytest.raises(ValueError) as error:
        indices_of_mask("w", (2, 3), numpy.zeros((2, 3), bool))
    assert str(error.value) == "the mask of w is False everywhere: it chooses nothing; leave the name out"


@pytest.mark.parametrize("size, dtype", [(2 ** 31 - 1, "int32"), (2 ** 31, "int64")])
def test_indices_take_four_bytes_where_four_are_enough(size, dtype):
    found = indices_of_mask("w", (size,), [size - 1, 0])
    assert found.tolist() == [0, size - 1] and found.dtype == dtype


@pytest.mark.parametrize("mask", [
    numpy.zeros((3, 2), bool), numpy.ones((3, 2), bool), numpy.ones(6, bool), numpy.ones((1, 2, 3), bool),
    numpy.ones((2, 3), int), numpy.ones((2, 3)), numpy.array([0.0, 1.0]), [0, 0], [1, 2, 1], [-1], [6], [0, 2 ** 40],
    numpy.array([2 ** 63], "uint64"), [], numpy.zeros(0, int), [[0, 1]], 3, True, None, "w"])
def test_every_other_mask_is_refused_with_what_it_is(mask):
    array = numpy.asarray(mask)
    with pytest.raises(ValueError) as error:
        indices_of_mask("w", (2, 3), mask)
    assert str(error.value) == (f"the mask of w is {array.dtype} {list(array.shape)}; expected booleans [2, 3] (of 0 "
                                f"and 1: mask.astype(bool)), or distinct flat indices from 0 to 5")
