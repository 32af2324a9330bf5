"""Places: the fold of a list, and a routing that gives each row of a batch its own entries."""
import numpy
import pytest
from hypothesis import given
from hypothesis import strategies as st

import minipeft
from minipeft.engine import ops
from minipeft.nn.layers import LayerNorm, Linear, RMSNorm
from minipeft.nn.place import Place
from minipeft.nn.positions import Learned, RelativeBuckets
from minipeft.nn.routing import _view, by_row, per_row, routed
from minipeft.nn.state import Host
from minipeft.nn.slot import Slot
from minipeft.nn.weight import Parameter, Reparam
from minipeft.laws.bounds import close, tau, within
from tests.by_hand import put, replug


class Plus(Reparam):
    """W + d, d a Parameter of the same shape: the smallest reparametrization, with the default project and rows."""

    def dense(self):
        return ops.add(self.base.dense(), self.d)


def slot(kind, shape, seed=0):
    """A slot with Plus a and b attached, not plugged; c is attached elsewhere."""
    rng = numpy.random.default_rng(seed)
    made = Slot(kind, rng.standard_normal(shape))
    return put(made, {**{n: Plus(d=Parameter(rng.standard_normal(shape))) for n in "ab"}, "c": None}, plugged=())


def rows_seen():
    """The names that each row of the forward under way sees, or None."""
    return _view.get() and _view.get().rows


def entries():
    return st.lists(st.sampled_from([None, "a", "b", ("a", "b"), "c", ("c", "b")]), min_size=1, max_size=5)


def seen_by(entry, made):
    """W plus the d of what an entry names here."""
    names = () if entry is None else (entry,) if isinstance(entry, str) else entry
    total = made.base.data
    for n in names:
        total = total + made.attached[n].d.data if n in made.attached else total
    return total


# ---- the fold


def test_a_slot_is_its_base_until_something_is_plugged_and_then_a_fold_in_order():
    made = slot("bias", (3,))
    assert made.fold() is made.base and made.vector() is made.base
    replug(made, "b", "a")
    wanted = made.base.data + made.attached["b"].d.data + made.attached["a"].d.data
    assert numpy.array_equal(made.fold().dense().data, wanted)
    assert made.fold().shape == (3,) and made.fold().dtype == numpy.float64


def test_a_merged_entry_is_a_constant_that_hides_what_lies_below():
    made = slot("bias", (3,))
    constant = Parameter(numpy.array([1.0, 2.0, 3.0]))
    put(made, {"d": Plus(d=Parameter(numpy.ones(3)))}, plugged=())
    replug(made, "b", "a", a=constant)
    assert made.fold() is constant and [e.name for e in made.merged] == ["a"]
    replug(made, "a", "b", a=constant)
    assert numpy.array_equal(made.fold().dense().data, constant.data + made.attached["b"].d.data)


def test_a_fold_of_names_ignores_the_list_and_changes_nothing():
    made = slot("bias", (3,))
    replug(made, "b")
    piece = made.attached["a"]
    assert numpy.array_equal(made.fold(("a",)).dense().data, made.base.data + piece.d.data)
    assert made.fold(()) is made.base
    made.fold(("b", "a"))
    assert not hasattr(piece, "base") and [e.name for e in made.entries] == ["b"]


def test_the_default_product_and_rows_go_through_dense_and_dense_must_be_written():
    made = slot("linear", (5, 4))
    weight, x = made.fold(("a",)), numpy.ones((2, 3, 4))
    dense = made.base.data + made.attached["a"].d.data
    assert within(weight.project(x).data, x @ dense.T, 2 * tau(abs(x) @ abs(dense).T, 4, 0, 2 ** -53))
    assert numpy.array_equal(weight.rows(numpy.array([[4, 0]])).data, dense[[[4, 0]]])

    class Nothing(Reparam):
        base = made.base

    with pytest.raises(TypeError, match="Nothing does not define dense"):
        Nothing().dense()


# ---- row by row: each kind of use


@given(entries(), st.integers(0, 99))
def test_a_product_row_by_row(routing, seed):
    made, n = slot("linear", (5, 4), seed), len(routing)
    x = numpy.random.default_rng(seed).integers(-4, 5, (n, 3, 4)) * 1.0
    for piece in (made.base, made.attached["a"].d, made.attached["b"].d):
        piece.data = numpy.round(piece.data * 4)  # integers: products and sums are exact in every order
    with routed(made.host, routing, n):
        y = made.project(x).data
    assert all(numpy.array_equal(y[i], x[i] @ seen_by(e, made).T) for i, e in enumerate(routing))


@given(entries(), st.integers(0, 99))
def test_a_lookup_row_by_row(routing, seed):
    made, n = slot("embedding", (7, 4), seed), len(routing)
    ids = numpy.random.default_rng(seed).integers(0, 7, (n, 3))
    with routed(made.host, routing, n):
        y = made.rows(ids).data
    assert all(numpy.array_equal(y[i], seen_by(e, made)[ids[i]]) for i, e in enumerate(routing))


@given(entries(), st.integers(0, 99))
def test_a_vector_and_a_shared_table_row_by_row(routing, seed):
    """[d] becomes [batch, 1, d], and a table [.., d] becomes [batch, .., d], where rows differ."""
    bias, table, n = slot("bias", (4,), seed), slot("position", (6, 4), seed), len(routing)
    ids = numpy.array([[0, 5, 5], [1, 2, 3]])
    with routed(bias.host, routing, n):
        v = bias.vector().data
    with routed(table.host, routing, n):
        t = table.table(ids).data
    if len({tuple(x for x in ((e,) if isinstance(e, str) else e or ()) if x != "c") for e in routing}) == 1:
        assert v.shape == (4,) and t.shape == (2, 3, 4)  # one group: nothing is stacked
        v, t = numpy.broadcast_to(v, (n, 1, 4)), numpy.broadcast_to(t, (n, 2, 3, 4))
    assert v.shape == (n, 1, 4) and t.shape == (n, 2, 3, 4)
    for i, e in enumerate(routing):
        assert numpy.array_equal(v[i, 0], seen_by(e, bias)) and numpy.array_equal(t[i], seen_by(e, table)[ids])


def test_layers_take_routed_biases_norm_scales_and_positions():
    """The shapes that a routing gives them broadcast to the stream [batch, time, d], and to scores."""
    rng, routing = numpy.random.default_rng(0), ["a", None, "b"]
    x = rng.standard_normal((3, 5, 4))
    layer, norm, rms = Linear(rng.standard_normal((4, 4)), rng.standard_normal(4)), LayerNorm(
        numpy.ones(4), numpy.zeros(4), 1e-5), RMSNorm(numpy.ones(4), 1e-6)
    learned, buckets = Learned(rng.standard_normal((5, 4))), RelativeBuckets(rng.standard_normal((8, 4)), 20, True)
    host = Host()
    for made in (layer.bias, norm.weight, norm.bias, rms.weight, learned.weight, buckets.weight):
        made.host = host
        put(made, {n: Plus(d=Parameter(rng.standard_normal(made.base.shape))) for n in "ab"}, plugged=())
    layer.weight.host = host

    def outputs(x, adapter):
        with routed(host, adapter, len(x)):
            found = [layer(x), norm(x), rms(x), ops.add(x, learned.embed(numpy.arange(5)))]
            scores = ops.add(numpy.zeros((len(x), 4, 5, 5)), buckets.bias(5, 5, 0))
            return [y.data for y in (*found, scores)]

    mixed = outputs(x, routing)
    for i, entry in enumerate(routing):
        for whole, row in zip(mixed, outputs(x[i:i + 1], [entry]), strict=True):
            assert whole.shape[0] == 3 and close(whole[i], row[0], 2 ** -53)


def test_gradients_of_a_routed_batch_go_to_what_each_row_saw():
    made, x = slot("bias", (4,)), numpy.ones((3, 2, 4))
    leaves = {"W": made.base, "a": made.attached["a"].d, "b": made.attached["b"].d}

    def step():
        with routed(made.host, ["a", None, ("a", "b")], 3):
            return ops.sum(ops.mul(made.vector(), x * numpy.array([1.0, 10.0, 100.0])[:, None, None]))

    _, grads = minipeft.value_and_grad(step, leaves)
    assert {name: set(g) for name, g in grads.items()} == {"W": {222.0}, "a": {202.0}, "b": {200.0}}


# ---- the routing itself


def test_rows_that_see_the_same_here_are_run_together_and_put_back_in_order():
    place, calls = Place("sublayer"), []
    put(place, {"a": "A", "b": "B", "c": None}, plugged=())

    def run(pieces, x):
        calls.append((pieces, x.shape[0]))
        return ops.mul(x, float(1 + len(pieces)))

    x = numpy.arange(5.0)[:, None]
    with routed(place.host, ["a", None, ("c", "a"), "c", ("a", "b")], 5):
        y = by_row(place, run, x).data
    assert calls == [(("A",), 2), ((), 2), (("A", "B"), 1)]
    assert y[:, 0].tolist() == [0.0, 1.0, 4.0, 3.0, 12.0]


def test_without_a_routing_everything_runs_once_with_what_is_plugged():
    place, calls = Place("sublayer"), []
    by_row(place, lambda names, x, absent: calls.append((names, x, absent)) or x, "x", None)
    per_row(place, lambda names: calls.append(names))
    assert calls == [((), "x", None), ()]


def test_absent_streams_stay_absent_row_by_row():
    place = Place("sublayer")
    put(place, {"a": "A"}, plugged=())
    seen = []
    with routed(place.host, ["a", None], 2):
        by_row(place, lambda names, x, absent: seen.append(absent) or x, numpy.ones((2, 1)), None)
    assert seen == [None, None]


@pytest.mark.parametrize("adapter, rows", [
    ("a", [(("a", 1),)] * 3), (("a", "b"), [(("a", 1), ("b", 1))] * 3), ((), [()] * 3), ({}, [()] * 3),
    (["a", None, ("b", "a")], [(("a", 1),), (), (("b", 1), ("a", 1))]),
    (["a", {"b": numpy.float32(0.5), "a": -2}, {"a": 1.0}], [(("a", 1),), (("b", 0.5), ("a", -2)), (("a", 1),)])])
def test_what_an_adapter_argument_means(adapter, rows):
    with routed(slot("bias", (3,)).host, adapter, 3):
        assert rows_seen() == rows
    assert rows_seen() is None


def test_a_routing_is_restored_when_the_block_ends_however_it_ends():
    host = slot("bias", (3,)).host
    with routed(host, "a", 1):
        with pytest.raises(ZeroDivisionError):
            with routed(host, ["b"], 1):
                raise ZeroDivisionError
        assert rows_seen() == [(("a", 1),)]
        with pytest.raises(ValueError), routed(host, "nobody", 1):
            pass
        assert rows_seen() == [(("a", 1),)]


def test_a_model_without_attachments_says_that_there_are_none():
    with pytest.raises(ValueError, match="adapter 'a' is not attached to this model; attached: none"):
        with routed(Host(), "a", 1):
            pass


def test_a_forward_goes_on_with_the_state_that_it_began_with():
    made = slot("bias", (3,))
    replug(made, "a")
    before = made.vector().data
    with routed(made.host):
        replug(made)
        assert numpy.array_equal(made.vector().data, before)
    assert made.vector() is made.base


def test_a_view_of_one_model_is_none_of_another():
    made, other = slot("bias", (3,)), slot("bias", (3,), 1)
    replug(other, "b")
    with routed(made.host, "a", 1):
        assert numpy.array_equal(other.vector().data, other.base.data + other.attached["b"].d.data)
