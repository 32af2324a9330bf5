"""The tree: names follow attributes, each object once; state in and out; copies."""
import sys
import threading

import numpy
import pytest

from minipeft.nn.layers import Embedding, Linear
from minipeft.nn.module import Module
from minipeft.nn.site import Site
from minipeft.nn.weight import Fixed, Parameter, Piece
from tests.models_under_test import FAMILIES, Case, bits, logits


class Leafy(Module):
    def __init__(self, seed=0):
        rng = numpy.random.default_rng(seed)
        self.table = Embedding(rng.standard_normal((5, 3)))
        self.layers = [Linear(rng.standard_normal((3, 3)), rng.standard_normal(3)) for _ in range(2)]
        self.number, self.text, self.nothing, self.mixed = 7, "text", None, [1, "two"]
        self.site = Site("sublayer", 2, "float64")
        self.tied = Linear(self.table.weight)
        self.attachments = {}


def test_names_follow_attributes_a_list_adds_its_index_alone_and_a_tied_place_has_its_first_name():
    model = Leafy()
    assert [name for name, _ in model.named_places()] == [
        "table.weight", "0.weight", "0.bias", "1.weight", "1.bias", "site", "tied.bias"]
    assert list(model.slots) == ["table.weight", "0.weight", "0.bias", "1.weight", "1.bias"]
    assert list(model.sites) == ["site"]
    assert model.tied.weight is model.table.weight
    assert list(model.base_parameters) == list(model.slots) == list(model.state())


@pytest.mark.parametrize("family", FAMILIES)
def test_every_array_of_a_model_is_reached_once(family):
    model = Case((family, "q and v"), 1, 1, "float64", 0).model()
    arrays = list(model.state().values())
    assert len({id(a) for a in arrays}) == len(arrays) == len(model.slots)
    assert all(model.state()[name] is p.data for name, p in model.base_parameters.items()), "the arrays, not copies"


def test_a_state_that_is_loaded_is_copied_and_takes_the_dtype_of_the_model():
    model, other = Leafy(), Leafy(1)
    state = other.state()
    model.load_state({name: a.astype("float32") for name, a in state.items()})
    assert all(a.dtype == numpy.float64 and numpy.array_equal(a, state[name].astype("float32"))
               for name, a in model.state().items())
    same = other.state()
    model.load_state(same)
    assert not any(numpy.shares_memory(a, same[name]) for name, a in model.state().items())


@pytest.mark.parametrize("change, message", [
    (lambda s: s.pop("0.bias"), "1 missing: 0.bias"), (lambda s: s.update(x=numpy.zeros(1)), "1 unexpected: x"),
    (lambda s: (s.pop("0.bias"), s.update(x=numpy.zeros(1))), "1 missing: 0.bias; 1 unexpected: x"),
    (lambda s: s.clear(), r"5 missing: table.weight, 0.weight, 0.bias, 1.weight, 1.bias"),
    (lambda s: s.update({"1.bias": numpy.zeros(4)}), r"1.bias has shape \[4\]; expected \[3\]"),
    (lambda s: s.update({"1.bias": numpy.zeros(3, int)}), "1.bias has dtype int64")])
def test_a_state_that_does_not_fit_is_refused_before_anything_is_replaced(change, message):
    model, state = Leafy(), dict(Leafy(1).state())
    before = bits(model.state())
    change(state)
    with pytest.raises(ValueError, match=message):
        model.load_state(state)
    assert bits(model.state()) == before


def test_many_missing_names_are_counted_and_five_are_shown():
    model = Case(("t5 v1.0", "q and v"), 1, 1, "float64", 0).model()
    with pytest.raises(ValueError, match=r"39 missing: (\S+, ){4}\S+ \.\.\.$"):
        model.load_state({})


def test_a_base_under_a_merged_attachment_is_not_replaced():
    """The constant that the attachment was merged into would keep the old base, and nobody would see it."""
    case = Case(("post-LN", "q and v"), 2, 3, "float64", 0)
    model, state = case.model(), Case(("post-LN", "q and v"), 2, 3, "float64", 1).model().state()
    attachment = case.attach(model)
    attachment.merge()
    before, output = bits(model.state()), logits(model, case.batch())
    with pytest.raises(ValueError, match="encoder.0.attn.q.weight cannot be replaced while 'lora' is merged: unmerge"):
        model.load_state(state)
    assert bits(model.state()) == before and logits(model, case.batch()).tobytes() == output.tobytes()
    attachment.unmerge()
    model.load_state(state)
    assert bits(model.state()) == bits(state) and logits(model, case.batch()).tobytes() != output.tobytes()


def test_a_plugged_attachment_follows_a_replaced_base():
    case = Case(("post-LN", "q and v"), 2, 3, "float64", 0)
    model, fresh = case.model(), Case(("post-LN", "q and v"), 2, 3, "float64", 1).model()
    case.attach(model)
    model.load_state(fresh.state())
    case.attach(fresh)
    assert logits(model, case.batch()).tobytes() == logits(fresh, case.batch()).tobytes()


def test_a_clone_keeps_ties_and_shares_no_array():
    model = Leafy()
    copy = model.clone()
    assert copy.tied.weight is copy.table.weight is not model.table.weight
    assert bits(copy.state()) == bits(model.state())
    assert not any(numpy.shares_memory(a, b) for a, b in zip(copy.state().values(), model.state().values()))


def test_moving_to_numpy_is_the_identity_and_returns_the_module():
    model = Leafy()
    arrays = list(model.state().values())
    assert model.to("numpy") is model
    assert all(a is b for a, b in zip(model.state().values(), arrays))


def test_the_own_arrays_of_a_piece_are_its_parameters_and_fixed_arrays_but_the_base():
    """Not plain arrays beside them, which are made anew from the method's fields."""
    piece = Piece(base=Parameter(numpy.zeros(1)), u=Parameter(numpy.ones(1)), v=Parameter(numpy.ones(2)), s=5,
                  indices=Fixed(numpy.arange(3)), table=numpy.arange(4))
    assert piece.arrays == {"u": piece.u, "v": piece.v, "indices": piece.indices}
    piece.base = Fixed(numpy.zeros(1))
    assert piece.arrays == {"u": piece.u, "v": piece.v, "indices": piece.indices}


def test_a_model_that_is_asked_for_its_host_by_several_threads_at_once_has_one():
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        for _ in range(30):
            model, hosts = FAMILIES["t5 v1.0"](numpy.random.default_rng(0), "float32"), []
            threads = [threading.Thread(target=lambda: hosts.append(model.host)) for _ in range(4)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            assert len(hosts) == 4 and len({id(host) for host in hosts}) == 1
            assert all(place.host is model.host for _, place in model.named_places())
    finally:
        sys.setswitchinterval(interval)


def test_a_model_whose_first_host_was_interrupted_gets_it_whole_the_next_time():
    model = FAMILIES["t5 v1.0"](numpy.random.default_rng(0), "float32")
    known = model.host
    known.is_known = False
    next(iter(model.slots.values())).host = None
    assert model.host is known and all(place.host is known for _, place in model.named_places())
