"""`solve`: its value, its gradient, its dtype, broadcasting, layouts, empty arrays, and exactness on Fractions."""
from __future__ import annotations

from fractions import Fraction
from typing import Any

import numpy
import pytest
from hypothesis import given
from hypothesis import strategies as st

import minipeft
from minipeft.engine import ops
from minipeft.engine.ops import linalg
from minipeft.engine.tensor import Leaf, value_and_grad
from tests.strategies import FRACTION, broadcastable, draw_array, dtypes, fractions, layouts, seeds, sizes
from tests.strict_namespace import strict


@st.composite
def systems(draw: Any, dtype: str = "float64") -> tuple[Any, Any, int]:
    """a [..., n, n] with a heavy diagonal whose rows are exchanged, so that it needs pivots; b [..., n, m]; a seed."""
    n, m, *lead = draw(sizes(4))
    lead = tuple(lead)[:draw(st.integers(0, 2))]
    left, right = (lead, draw(broadcastable(lead))) if draw(st.booleans()) else (draw(broadcastable(lead)), lead)
    seed = draw(seeds())
    heavy = fractions(numpy.eye(n, dtype=int) * 9, 1) if dtype == FRACTION else 5 * numpy.eye(n, dtype=dtype)
    numbers = (draw_array(seed, (*left, n, n), dtype) + heavy)[..., numpy.random.default_rng(seed).permutation(n), :]
    a, b = draw_array(0, (*left, n, n), dtype, draw(layouts())), draw_array(seed + 1, (*right, n, m), dtype)
    a[...] = numbers
    return a, b, seed


def through(a: Any, b: Any, g: Any) -> tuple[Any, dict]:
    """The value of solve, and the gradients of <value, g>."""
    p = {"a": Leaf(a), "b": Leaf(b)}
    seen: list[Any] = []

    def step() -> Any:
        seen.append(ops.solve(p["a"], p["b"]))
        return ops.sum(seen[0] * g)

    return seen, value_and_grad(step, p)[1]


@given(systems())
def test_the_solution_solves_the_system(system):
    """|a x - b| within a few roundings of |a| |x|: the matrices are far from singular."""
    a, b, _ = system
    x = ops.solve(a, b).data
    assert x.shape == (a @ b).shape
    assert (abs(a @ x - b) <= 50 * a.shape[-1] * 2.0 ** -53 * (abs(a) @ abs(x))).all()


@given(systems())
def test_the_gradient_is_that_of_central_differences(system):
    a, b, seed = system
    p = {"a": Leaf(a), "b": Leaf(b)}
    weights = draw_array(seed + 2, (a @ b).shape)
    minipeft.check_gradients(lambda: ops.sum(ops.solve(*p.values()) * weights), p, numpy.random.default_rng(seed))


@given(systems(FRACTION))
def test_on_fractions_the_system_is_solved_and_the_gradient_is_the_derivative_exactly(system):
    """x' = a^-1 (b' - a' x) along any direction (a', b')."""
    a, b, seed = system
    g, da, db = (draw_array(seed + 2 + i, shape, FRACTION) for i, shape in enumerate(((a @ b).shape, a.shape, b.shape)))
    (x,), grads = through(a, b, g)
    assert (a @ x.data == b).all() and all(type(v) is Fraction for v in x.data.reshape(-1))
    slope = ops.solve(a, db - da @ x.data).data
    assert (grads["a"] * da).sum() + (grads["b"] * db).sum() == (g * slope).sum()


@given(systems("float32"))
def test_float32_in_float32_out(system):
    a, b, seed = system
    (x,), grads = through(a, b, draw_array(seed, (a @ b).shape, "float32"))
    assert x.dtype == grads["a"].dtype == grads["b"].dtype == numpy.float32
    assert grads["a"].shape == a.shape and grads["b"].shape == b.shape


@given(dtypes().flatmap(systems))
def test_the_strict_namespace_gives_the_same_bits(system):
    a, b, seed = system
    g = draw_array(seed + 2, (a @ b).shape, str(a.dtype))
    (x,), grads = through(a, b, g)
    with minipeft.use(strict):
        (y,), strict_grads = through(*(strict.asarray(array) for array in (a, b, g)))
        found = [y.data.get(), *(strict_grads[name].get() for name in "ab")]
    assert [array.tobytes() for array in found] == [array.tobytes() for array in (x.data, grads["a"], grads["b"])]


@given(systems())
def test_neither_inputs_nor_g_are_written_into_and_a_vjp_gives_the_same_twice(system):
    a, b, seed = system
    g = numpy.array(draw_array(seed + 2, (a @ b).shape))
    before = [x.tobytes() for x in (a, b, g)]
    for x in (a, b, g):
        x.flags.writeable = False
    _, vjps = linalg.solve.__wrapped__(a, b)  # type: ignore[attr-defined]
    for vjp in vjps:
        assert vjp(g).tobytes() == vjp(g).tobytes()
    assert before == [x.tobytes() for x in (a, b, g)]


def test_the_system_for_g_is_solved_once_for_both_gradients_and_never_where_nothing_is_watched(monkeypatch):
    solved = []
    plain = linalg._solution
    monkeypatch.setattr(linalg, "_solution", lambda a, b: (solved.append(b.shape), plain(a, b))[1])
    a, b = Leaf(numpy.eye(3) * 2), Leaf(numpy.ones((3, 2)))
    value_and_grad(lambda: ops.sum(ops.solve(a, b)), {"a": a, "b": b})
    assert len(solved) == 2
    ops.solve(a, b)
    assert len(solved) == 3


@pytest.mark.parametrize("a, b", [((0, 0), (0, 3)), ((2, 2), (2, 0)), ((0, 2, 2), (2, 3)), ((4, 0, 0), (1, 0, 3))])
def test_empty_systems_have_empty_solutions_and_zero_gradients(a, b):
    left = numpy.broadcast_to(numpy.eye(a[-1], dtype="float32"), a).copy()
    (x,), grads = through(left, numpy.ones(b, "float32"), numpy.float32(1))
    assert x.shape == (left @ numpy.ones(b)).shape and x.dtype == numpy.float32
    assert grads["a"].shape == a and grads["b"].shape == b and not grads["a"].any()


@pytest.mark.parametrize("library", [numpy, strict], ids=["numpy", "strict"])
@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_a_singular_matrix_among_others_is_refused_with_the_shape(library, dtype):
    a = numpy.stack([numpy.eye(2), numpy.ones((2, 2))]).astype(dtype)
    with minipeft.use(library), pytest.raises(ValueError, match=r"solve: a \[2, 2, 2\] holds a matrix .* singular"):
        ops.solve(library.asarray(a), library.asarray(numpy.ones((2, 1), dtype)))


def test_a_singular_matrix_of_fractions_is_refused_and_a_small_pivot_is_none():
    with pytest.raises(ValueError, match="singular"):
        ops.solve(fractions([[1, 2], [2, 4]], 3), fractions([[1], [1]], 1))
    tiny = fractions([[1, 10 ** 40], [10 ** 40, 1]], 10 ** 40)
    assert (tiny @ ops.solve(tiny, fractions([[1], [2]], 1)).data == [[1], [2]]).all()


def test_numbers_that_are_not_finite_are_not_called_a_singular_matrix():
    assert numpy.isnan(ops.solve(numpy.eye(2), numpy.full((2, 1), numpy.nan)).data).all()


@pytest.mark.parametrize("a, b", [((3,), (3, 1)), ((3, 3), (3,)), ((2, 3), (2, 1)), ((3, 3), (2, 1))])
def test_shapes_that_do_not_fit_are_refused(a, b):
    with pytest.raises(ValueError, match=r"solve: shapes \[.*\]; expected \[..., n, n\] and \[..., n, m\]"):
        ops.solve(numpy.ones(a), numpy.ones(b))
