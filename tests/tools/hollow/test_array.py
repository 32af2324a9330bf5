"""A hollow array has the shape, dtype and strides of NumPy's result, and shares memory where NumPy's does."""
import numpy
import pytest

from minipeft.tools.hollow.array import HollowArray
from minipeft.tools.hollow.ledger import Ledger
from minipeft.tools.hollow.namespace import Hollow

PROGRAMS = {
    "sum": lambda xp, a, b, ids: a + b, "scalar": lambda xp, a, b, ids: 2 * a,
    "numpy scalar": lambda xp, a, b, ids: numpy.float32(2) * a, "float64 scalar": lambda xp, a, b, ids: a * 0.5,
    "transposed": lambda xp, a, b, ids: a.T, "sum of transposed": lambda xp, a, b, ids: a.T * a.T,
    "broadcast": lambda xp, a, b, ids: a[:, None, :] * a[None], "comparison": lambda xp, a, b, ids: a > 0,
    "product": lambda xp, a, b, ids: a @ b.T, "batched": lambda xp, a, b, ids: a[None] @ b.T[None],
    "rows": lambda xp, a, b, ids: a[ids], "pairs": lambda xp, a, b, ids: a[ids, ids],
    "slice": lambda xp, a, b, ids: a[1:, ::2],
    "integer": lambda xp, a, b, ids: a[0], "ellipsis": lambda xp, a, b, ids: a[..., None, 1:],
    "flat": lambda xp, a, b, ids: a.reshape(-1), "flat transposed": lambda xp, a, b, ids: a.T.reshape(-1),
    "heads": lambda xp, a, b, ids: a.reshape(4, 2, 3).swapaxes(1, 2), "axes": lambda xp, a, b, ids: a.transpose(1, 0),
    "reduced": lambda xp, a, b, ids: a.sum(axis=0), "kept": lambda xp, a, b, ids: a.max(axis=-1, keepdims=True),
    "all of it": lambda xp, a, b, ids: xp.asarray(a.sum()), "counted": lambda xp, a, b, ids: (a > 0).sum(axis=0),
    "mean": lambda xp, a, b, ids: a.mean(axis=(0, 1), keepdims=True), "argmax": lambda xp, a, b, ids: a.argmax(axis=1),
    "cast": lambda xp, a, b, ids: a.astype("float64"),
    "same cast": lambda xp, a, b, ids: a.astype("float32", copy=False),
    "copy": lambda xp, a, b, ids: a.copy(), "integers divided": lambda xp, a, b, ids: ids / 2,
    "clipped": lambda xp, a, b, ids: a.clip(0, 1), "negative": lambda xp, a, b, ids: -a,
    "exp": lambda xp, a, b, ids: xp.exp(a), "in place": lambda xp, a, b, ids: xp.exp(a, out=a),
    "finite": lambda xp, a, b, ids: xp.isfinite(a), "where": lambda xp, a, b, ids: xp.where(a > 0, a, b),
    "matmul out": lambda xp, a, b, ids: xp.matmul(a, b.T, out=xp.empty((4, 4), "float32")),
    "einsum": lambda xp, a, b, ids: xp.einsum("...i,...i->...", a, b), "zeros": lambda xp, a, b, ids: xp.zeros((2, 3)),
    "zeros like": lambda xp, a, b, ids: xp.zeros_like(a), "full": lambda xp, a, b, ids: xp.full((2,), 1.5, "float32"),
    "arange": lambda xp, a, b, ids: xp.arange(2, 7), "eye": lambda xp, a, b, ids: xp.eye(3, dtype="float32"),
    "tri": lambda xp, a, b, ids: xp.tri(3, 4, 1, dtype=bool),
    "joined": lambda xp, a, b, ids: xp.concatenate([a, b], axis=1),
    "stacked": lambda xp, a, b, ids: xp.stack([a, b]), "tiled": lambda xp, a, b, ids: xp.tile(ids, (2, 3)),
    "wide": lambda xp, a, b, ids: xp.broadcast_to(a, (5, 4, 6)),
    "laid": lambda xp, a, b, ids: xp.ascontiguousarray(a.T),
    "already laid": lambda xp, a, b, ids: xp.ascontiguousarray(a),
    "cumsum": lambda xp, a, b, ids: xp.cumsum(ids, axis=0),
    "taken": lambda xp, a, b, ids: xp.take_along_axis(a, a.argmax(axis=1, keepdims=True), axis=1),
    "strided": lambda xp, a, b, ids: xp.lib.stride_tricks.as_strided(a, (2, 2, 2), (24, 4, 4)),
    "solved": lambda xp, a, b, ids: xp.linalg.solve(xp.eye(4, dtype="float32"), a),
    "larger of": lambda xp, a, b, ids: xp.maximum(a, 0.5),
    "dtype": lambda xp, a, b, ids: a.astype(xp.result_type(a, b))}


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_result_is_numpys_without_the_numbers(name):
    ledger = Ledger()
    hollow = Hollow(ledger)
    given = numpy.ones((4, 6), "float32"), numpy.ones((4, 6), "float32"), numpy.array([0, 2, 1])
    theirs = PROGRAMS[name](numpy, *given)
    inside = [hollow.asarray(x) for x in given]
    ours = PROGRAMS[name](hollow, *inside)
    assert isinstance(ours, HollowArray)
    assert (ours.shape, ours.dtype, ours.nbytes) == (theirs.shape, theirs.dtype, theirs.nbytes)
    assert [s for n, s in zip(ours.shape, ours.strides) if n > 1] == [
        s for n, s in zip(theirs.shape, theirs.strides) if n > 1]
    assert [ours.memory is x.memory for x in inside] == [numpy.shares_memory(theirs, x) for x in given]


def test_shapes_that_do_not_fit_raise_as_in_numpy():
    hollow = Hollow(Ledger())
    a, b = hollow.empty((2, 3)), hollow.empty((4, 5))
    for wrong in (lambda: a + b, lambda: a @ b, lambda: a.reshape(7)):
        with pytest.raises(ValueError):
            wrong()


def test_an_array_of_the_host_does_not_mix_in_silently():
    a = Hollow(Ledger()).empty((2, 3))
    with pytest.raises(TypeError, match="meets ndarray"):
        a * numpy.ones((2, 3))
    with pytest.raises(TypeError, match="no numbers"):
        numpy.asarray(a)


def test_questions_about_numbers_have_the_answer_of_an_ordinary_step():
    hollow = Hollow(Ledger())
    a = hollow.empty((2, 3), "float32")
    assert hollow.isfinite(a).all() and not (a == 0).any() and int(a.sum()) == 1 and float(a.sum()) == 1
    assert a.item() == 1 and hollow.empty((), "int64").item() == 1


def test_what_leaves_for_the_host_has_the_shape_and_no_memory_and_ids_differ():
    hollow = Hollow(Ledger())
    floats, ids = hollow.empty((1000, 1000, 1000)).get(), hollow.empty((2, 3), "int64").get()
    assert floats.shape == (1000, 1000, 1000) and set(floats.strides) == {0}
    assert ids.shape == (2, 3) and len(set(ids.reshape(-1).tolist())) == 6


def test_a_name_that_the_library_does_not_use_is_refused_by_name():
    hollow = Hollow(Ledger())
    with pytest.raises(AttributeError, match="'median'"):
        hollow.median
    with pytest.raises(ValueError, match="ij,jk->ik"):
        hollow.einsum("ij,jk->ik", hollow.empty((2, 2)), hollow.empty((2, 2)))
