"""References and their bounds: what underflows is in them, nothing divides aloud, and no case gets another's."""
import itertools

import numpy
import pytest

from minipeft.conformance.arithmetic import Arithmetic, arithmetic
from minipeft.conformance.case import Case, remembered
from minipeft.conformance.methods import all_methods
from minipeft.conformance.outputs import ABSENCE, REFUSALS, property_named
from minipeft.conformance.running import FUNCTION_ROUNDINGS, Bounded, erf, exp, softmax, sqrt, tanh
from minipeft.conformance.tolerance import Value, tau

F32 = arithmetic("float32")
FLUSHED = Arithmetic("float32", "float32", "float32", ftz=True)
ETA, TINY = 2.0 ** -149, 2.0 ** -126  # the smallest subnormal and the smallest normal float32


def one_by_one(x, w, arith, fused=False):
    """sum of x_i w_i as a plain loop in float32 computes it, with FMA or without, flushed to zero or not. (A product
    of two float32 and a sum of two subnormals are exact in float64.)"""
    def kept(value):
        value = float(numpy.float32(value))
        return 0.0 if arith.ftz and abs(value) < TINY else value

    total = 0.0
    for a, b in zip(x.tolist(), w.tolist()):
        total = kept(a * b + total) if fused else kept(kept(a * b) + total)
    return total


def products(kind, n, rng):
    """Two vectors whose n products lie about the smallest number that there is."""
    if kind == "all alike":
        return numpy.full(n, 2.0 ** -75), numpy.full(n, 1.5 * 2.0 ** -75)  # 3/4 of eta, stored as eta
    if kind == "just lost":
        return numpy.full(n, 2.0 ** -75), numpy.full(n, 2.0 ** -75)        # half of eta, stored as 0
    if kind == "flushed":
        return numpy.full(n, 2.0 ** -63), numpy.full(n, 2.0 ** -63 - 2.0 ** -86)  # tiny - eta
    if kind == "sums flushed":                                             # 1.75 tiny - tiny, 1.75 tiny - tiny, ..
        return numpy.full(n, 2.0 ** -63), numpy.resize([1.75, -1.0], n) * 2.0 ** -63
    size = 2.0 ** rng.uniform(-76, -73, (2, n)) if kind == "subnormal" else 2.0 ** rng.uniform(-64, -62, (2, n))
    return (size * rng.choice([-1, 1], (2, n))).astype(numpy.float32).astype(numpy.float64)


KINDS = ("all alike", "just lost", "flushed", "sums flushed", "subnormal", "about the smallest normal")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("arith", [F32, FLUSHED], ids=["gradual", "flushed"])
@pytest.mark.parametrize("n", [1, 2, 7, 64])
def test_a_sum_of_products_that_underflow_is_within_its_bound(kind, arith, n):
    """In `running.py`, and in `tolerance.py`, which has n eta too."""
    rng = numpy.random.default_rng(n)
    for _ in range(20):
        x, w = products(kind, n, rng)
        bounded = Bounded.of(x[None], arith) @ Bounded.of(w[:, None], arith)
        polynomial = Value(bounded.value, abs(x[None]) @ abs(w[:, None]), 1, n)
        for fused in (False, True):
            error = abs(one_by_one(x, w, arith, fused) - bounded.value)
            assert (error <= bounded.error).all(), (float(error[0, 0]), fused)
            assert (error <= tau(polynomial, arith)).all(), (float(error[0, 0]), fused)


@pytest.mark.parametrize("kind, arith, lost", [("just lost", F32, 64 * ETA / 2), ("flushed", FLUSHED, 63 * TINY),
                                               ("sums flushed", FLUSHED, 32 * 0.7 * TINY)])
def test_as_much_as_n_products_can_lose_is_lost_here(kind, arith, lost):
    """So that one eta for all of them would be too little, and n eta is not too much by more than 3."""
    x, w = products(kind, 64, numpy.random.default_rng(0))
    bounded = Bounded.of(x[None], arith) @ Bounded.of(w[:, None], arith)
    error = abs(one_by_one(x, w, arith) - bounded.value).item()
    assert lost <= error <= bounded.error <= 3 * error and error > 2 * arith.eta


def test_a_sum_underflows_only_where_it_is_flushed():
    rng = numpy.random.default_rng(0)
    for _ in range(100):
        x = rng.integers(-2 ** 20, 2 ** 20, 50) * ETA
        assert one_by_one(x, numpy.ones(50), F32) == x.sum(), "a subnormal sum is exact"
        normal = numpy.where(abs(x) >= TINY, x, numpy.sign(x) * TINY) * rng.uniform(1, 2, 50).astype(numpy.float32)
        normal = normal.astype(numpy.float32).astype(numpy.float64)
        bounded = Bounded.of(normal, FLUSHED).sum()
        assert abs(one_by_one(normal, numpy.ones(50), FLUSHED) - bounded.value) <= bounded.error
    x = numpy.resize([1.75, -1.0], 50) * TINY
    bounded = Bounded.of(x, FLUSHED).sum()
    assert 2 * TINY < abs(one_by_one(x, numpy.ones(50), FLUSHED) - bounded.value) <= bounded.error
    assert Bounded.of(x, F32).sum().error < 2 * TINY


def test_probabilities_that_underflow_are_within_their_bound():
    x = numpy.array([0.0, -103.3, -103.9, -96.0, -88.0] + [-103.6] * 40)
    for arith in (F32, FLUSHED):
        shifted = numpy.exp(x.astype(numpy.float32))
        got = shifted / shifted.sum()
        if arith.ftz:
            got = numpy.where(got < TINY, 0, got)
        bounded = softmax(Bounded.of(x, arith))
        assert (abs(got - bounded.value) <= bounded.error).all()
    two_ulps = 2 * ETA  # as a library may have it, in each exp, and half of one in what is stored
    assert (softmax(Bounded.of(x, F32)).error[1:] > two_ulps + ETA / 2).all()
    assert (exp(Bounded.of(x, F32)).error[1:] > two_ulps).all()


def test_a_division_is_quiet_and_has_no_bound_where_the_divisor_may_be_zero():
    with numpy.errstate(all="raise"):
        divisor = Bounded([0.0, 0.0, 2.0, 3.0], [0.0, 0.0, 2.0, 0.0], F32)
        c = Bounded.of([1.0, 0.0, 1.0, 3.0], F32) / divisor
    assert not numpy.isfinite(c.error[:2]).any() and c.error[2] == numpy.inf
    assert c.value[3] == 1 and 0 < c.error[3] < 2 ** -23


@pytest.mark.parametrize("name, f", [("exp", exp), ("tanh", tanh)])
def test_functions_of_numpy_are_within_what_one_may_cost_and_need_more_than_a_correct_rounding(name, f):
    """Every 1001st float32 at which the function is neither 0 nor infinite."""
    x = numpy.arange(0, 0x7F800000, 1001, dtype=numpy.uint32).view(numpy.float32)
    x = numpy.concatenate([-x[x < 87], x[x < 88]])
    got = getattr(numpy, name)(x).astype(numpy.longdouble)
    bounded = f(Bounded.of(x, F32))
    error = abs(got - bounded.value)
    assert (error <= bounded.error).all()
    assert (error > 1.1 * F32.u_s * abs(bounded.value) + ETA).any()


@pytest.mark.parametrize("f, roundings", [(exp, FUNCTION_ROUNDINGS), (tanh, FUNCTION_ROUNDINGS),
                                          (erf, FUNCTION_ROUNDINGS), (sqrt, 1)])
def test_a_function_of_an_exact_number_costs_its_own_roundings_and_that_of_storage(f, roundings):
    bounded = f(Bounded.of([0.5, 1.0, 2.0], F32))
    numpy.testing.assert_allclose((bounded.error / bounded.value).astype(float), (roundings + 1) * F32.u_s, rtol=1e-5)


def case(number):
    return Case("lora_linear", "float64", True, {"i": number}, {"x": numpy.zeros(1)})


def test_cases_of_one_published_id_keep_their_own_references():
    """Eight digits are 32 bits: these two were found among the first 90,000."""
    one, other = case(64970), case(89706)
    assert one.id == other.id == "lora_linear-efdf0482" and one.digest != other.digest
    reference = remembered(lambda case: {"i": case.params["i"]})
    assert [reference(c)["i"] for c in (one, other, one)] == [64970, 89706, 64970]


def test_a_reference_is_computed_once_for_a_case_and_an_arithmetic():
    asked = []
    reference = remembered(lambda case: asked.append(case) or {})
    for _, declared in itertools.product(range(3), ({}, {"ftz": True})):
        reference(case(1).but(declared=declared, label="another"))
    assert len(asked) == 2


@pytest.mark.parametrize("method", all_methods().values(), ids=lambda m: m.name)
def test_a_property_that_is_not_known_is_an_error_that_lists_every_one_that_is(method):
    with pytest.raises(ValueError, match="has no property 'L0'; it has ") as error:
        property_named(method, "L0")
    listed = str(error.value).split("it has ")[1].split(", ")
    assert {ABSENCE, REFUSALS, *(f"V {name}" for name in method.outputs)} <= set(listed)
    assert [property_named(method, id).id for id in listed] == listed
