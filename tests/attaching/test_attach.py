"""Attaching: names, generators, moves, stacks, copies, and methods that act in the stream."""
import dataclasses
import pickle

import numpy
import pytest

import minipeft
from minipeft.engine import ops
from tests.models_under_test import FAMILIES, Case, bits, logits

CASE = Case(("t5 v1.0", "q and v"), 2, 3, "float64", 0)
RNG = numpy.random.default_rng


class Added(minipeft.Piece):
    """F + v: a piece for a sublayer site."""

    def __call__(self, x, n, f):
        return ops.add(f, self.v)


@minipeft.register
@dataclasses.dataclass(frozen=True)
class Steering(minipeft.Method):
    """A method that acts in the stream: it adds a trained vector to the output of every feed-forward."""

    kinds = ("sublayer",)
    where: str = r"ff\.out$"

    def arrays(self, name, site, model):
        return {"v": minipeft.trained((site.width,))}

    def make(self, name, site, arrays):
        return Added(**arrays)


# ---- attach


def test_the_default_name_is_the_methods_in_lower_case_and_the_attachment_is_plugged():
    model = CASE.model()
    attachment = minipeft.attach(model, minipeft.LoRA(), RNG(0))
    assert (attachment.name, attachment.state, model.attachments) == ("lora", "plugged", {"lora": attachment})
    assert attachment.method == minipeft.LoRA() and attachment.model is model
    assert repr(attachment) == "Attachment('lora', LoRA, plugged, 10 places)"


def test_a_taken_name_is_refused_with_the_state_of_what_has_it():
    model = CASE.model()
    CASE.attach(model, "mine").merge()
    with pytest.raises(ValueError, match=r"'mine' is already on this model \(merged\); pass another name, or remove"):
        minipeft.attach(model, CASE.method, RNG(0), "mine")


@pytest.mark.parametrize("name", ["", "a b", "a.b", "a@b", "a/b", "naïve", "a\n", ".", "a:"])
def test_a_malformed_name_is_refused(name):
    with pytest.raises(ValueError, match="expected letters, digits, '_' and '-'"):
        minipeft.attach(CASE.model(), CASE.method, RNG(0), name)


@pytest.mark.parametrize("rng", [None, 0, numpy.random, numpy.random.RandomState(0), RNG])
def test_a_generator_of_another_type_is_refused_with_the_remedy(rng):
    model = CASE.model()
    with pytest.raises(TypeError, match=r"expected a numpy.random.Generator, as numpy.random.default_rng\(seed\)"):
        minipeft.attach(model, CASE.method, rng)
    assert not model.attachments


@pytest.mark.parametrize("name, change", [
    ("taken", {}), ("a b", {}), ("new", {"rank": 99}), ("new", {"where": "nothing like this"}), ("new", {"where": []}),
    ("new", {"where": "("}), ("new", {"where": ["q", "nothing like this"]}), ("new", {"where": 5})])
def test_when_attach_raises_nothing_was_drawn_and_nothing_is_attached(name, change):
    model, rng = CASE.model(), RNG(0)
    CASE.attach(model, "taken")
    state, before = rng.bit_generator.state, bits(minipeft.select(model, "."))
    with pytest.raises((ValueError, TypeError)):
        minipeft.attach(model, dataclasses.replace(CASE.method, **change), rng, name)
    assert rng.bit_generator.state == state
    assert list(model.attachments) == ["taken"] and bits(minipeft.select(model, ".")) == before
    assert {n for _, place in model.named_places() for n in place.attached} == {"taken"}


def test_a_pattern_that_matches_nothing_names_the_nearest():
    with pytest.raises(ValueError, match=r"where='encoder.0.atn.q.weight' matches none of the \d+ matrix names; "
                                         r"nearest: encoder.0.attn.q.weight"):
        minipeft.attach(CASE.model(), minipeft.LoRA(where="encoder.0.atn.q.weight"), RNG(0))


@pytest.mark.parametrize("family", FAMILIES)
def test_two_on_the_same_places_stack_and_each_can_be_undone(family):
    case = Case((family, "q and v"), 2, 3, "float64", 1)
    model, batch = case.model(), case.batch()
    base = logits(model, batch)
    lower = case.attach(model, "lower", 2)
    one = logits(model, batch)
    upper = case.attach(model, "upper", 3)
    both = logits(model, batch)
    assert [e.name for e in model.slots["encoder.0.attn.q.weight"].entries] == ["lower", "upper"]
    upper.unplug()
    assert logits(model, batch).tobytes() == one.tobytes() != both.tobytes()
    upper.plug()
    assert logits(model, batch).tobytes() == both.tobytes()
    lower.unplug()
    upper.unplug()
    assert logits(model, batch).tobytes() == base.tobytes()


# ---- moves


@pytest.mark.parametrize("state, moves, message", [
    ("off", ("unplug", "merge"), "it is off; expected plugged"), ("off", ("unmerge",), "it is off; expected merged"),
    ("plugged", ("plug",), "it is plugged; expected off"), ("plugged", ("unmerge",), "it is plugged; expected merged"),
    ("merged", ("plug",), "it is merged; expected off"), ("merged", ("unplug", "merge"), "is merged; expected plugged"),
    ("merged", ("remove",), "it is merged; expected off or plugged")])
def test_an_illegal_move_names_the_state_and_the_one_expected(state, moves, message):
    attachment = CASE.attach(CASE.model())
    {"off": attachment.unplug, "plugged": lambda: None, "merged": attachment.merge}[state]()
    for move in moves:
        with pytest.raises(ValueError, match=f"cannot {move} 'lora': .*{message}"):
            getattr(attachment, move)()
        assert attachment.state == state


@pytest.mark.parametrize("before", ["plug", "unplug"])
def test_a_removed_attachment_refuses_every_move_and_frees_its_name(before, tmp_path):
    model = CASE.model()
    attachment = CASE.attach(model)
    if before == "unplug":
        attachment.unplug()
    attachment.remove()
    assert attachment.state == "removed" and attachment.parameters == {} and not model.attachments
    assert repr(attachment) == "Attachment('lora', LoRA, removed, 0 places)"
    for move in ("plug", "unplug", "merge", "unmerge", "remove"):
        with pytest.raises(ValueError, match=f"cannot {move} 'lora': it was removed from its model"):
            getattr(attachment, move)()
    with pytest.raises(ValueError, match="cannot save 'lora': it was removed from its model"):
        attachment.save(tmp_path / "x")
    assert not list(tmp_path.iterdir())
    assert not any(place.attached or place.entries for _, place in model.named_places())
    assert CASE.attach(model).state == "plugged"


def test_merging_above_an_unmerged_one_is_refused_and_names_it_and_the_place():
    model = CASE.model()
    lower, upper = CASE.attach(model, "lower"), CASE.attach(model, "upper", 3)
    with pytest.raises(ValueError, match="merge 'lower' first: at encoder.0.attn.q.weight it lies unmerged below"):
        upper.merge()
    lower.merge()
    upper.merge()
    with pytest.raises(ValueError, match="cannot unmerge 'lower': 'upper' was merged on top of it at encoder.0.attn.q"):
        lower.unmerge()
    assert (lower.state, upper.state) == ("merged", "merged")


def test_a_merge_that_is_refused_at_its_last_place_has_merged_none():
    model = CASE.model()
    CASE.attach(model, "lower", where=r"decoder\.1\.cross\.v")
    upper = CASE.attach(model, "upper", 3)
    with pytest.raises(ValueError, match="merge 'lower' first: at decoder.1.cross.v.weight"):
        upper.merge()
    assert all(e.merged is None for place in upper.places.values() for e in place.entries)


def test_what_shares_no_place_with_it_does_not_hinder_a_merge():
    model = CASE.model()
    lower, upper = CASE.attach(model, "lower", where="encoder"), CASE.attach(model, "upper", 3, where="decoder")
    upper.merge()
    assert (lower.state, upper.state) == ("plugged", "merged")
    lower.unplug()


def test_a_hundred_cycles_of_merging_do_not_drift():
    case = Case(("post-LN", "every linear"), 3, 5, "float32", 2)
    model, batch = case.model(), case.batch()
    attachment = case.attach(model)
    before, base = logits(model, batch).tobytes(), bits(model.state())
    for _ in range(100):
        attachment.merge()
        attachment.unmerge()
    assert logits(model, batch).tobytes() == before and bits(model.state()) == base


def test_a_method_that_acts_in_the_stream_cannot_be_merged_and_says_where():
    model, batch = CASE.model(), CASE.batch()
    base = logits(model, batch)
    attachment = minipeft.attach(model, Steering(), RNG(0))
    assert (attachment.name, list(attachment.parameters)[0]) == ("steering", "encoder.0.ff.out@steering.v")
    assert numpy.array_equal(logits(model, batch), base)
    _, grads = minipeft.value_and_grad(lambda: model.loss(**batch), minipeft.select(model, "@steering"))
    assert len(grads) == 3 and all(g.any() for g in grads.values())
    with pytest.raises(ValueError, match="'steering' cannot be merged: at encoder.0.ff.out it acts on hidden states"):
        attachment.merge()
    assert attachment.state == "plugged"


# ---- copies


@pytest.mark.parametrize("state", ["off", "plugged", "merged"])
def test_a_clone_has_its_own_arrays_and_its_own_attachments(state):
    model, batch = CASE.model(), CASE.batch()
    attachment = CASE.attach(model)
    {"off": attachment.unplug, "plugged": lambda: None, "merged": attachment.merge}[state]()
    before, output = bits(model.state() | attachment.parameters), logits(model, batch)
    copy = model.clone()
    twin = copy.attachments["lora"]
    assert twin.model is copy and twin.state == state and twin.places.keys() == attachment.places.keys()
    assert all(twin.places[n] is copy.slots[n] for n in twin.places)
    assert copy.head.weight is copy.embedding.weight, "the tie"
    assert logits(copy, batch).tobytes() == output.tobytes()
    arrays = [p.data for p in [*model.base_parameters.values(), *attachment.parameters.values()]]
    for p in [*copy.base_parameters.values(), *twin.parameters.values()]:
        assert not any(numpy.shares_memory(p.data, a) for a in arrays)
        p.data += 1
    if state == "merged":
        twin.unmerge()
    twin.remove()
    assert attachment.state == state and bits(model.state() | attachment.parameters) == before
    assert logits(model, batch).tobytes() == output.tobytes()


def test_moving_to_the_backend_it_is_on_changes_no_object_and_no_bit():
    model = CASE.model()
    CASE.attach(model).merge()
    off = CASE.attach(model, "off", 3)
    off.unplug()
    held = [*model.base_parameters.values(), *off.parameters.values()]
    arrays, before = [p.data for p in held], logits(model, CASE.batch())
    assert model.to("numpy") is model and model.to(numpy) is model
    assert all(p.data is a for p, a in zip(held, arrays, strict=True))
    assert logits(model, CASE.batch()).tobytes() == before.tobytes()


def test_moving_reaches_bases_merged_constants_and_all_attachments_once():
    """To a namespace with an array type of its own: every array that the model holds has it afterwards."""
    class Moved(numpy.ndarray):
        pass

    class Namespace:
        ndarray = Moved

        @staticmethod
        def asarray(a):
            return numpy.asarray(a).view(Moved)

    model = CASE.model()
    lower, upper, off = (CASE.attach(model, name, at) for at, name in enumerate(("lower", "upper", "off"), 2))
    off.unplug()
    lower.merge()
    model.to(Namespace)
    pieces = [piece for _, place in model.named_places() for piece in place.attached.values()]
    held = [*model.base_parameters.values(), *(p for piece in pieces for p in piece.arrays.values()),
            *(e.merged for slot in model.slots.values() for e in slot.merged)]
    assert len(held) == len(model.slots) + 3 * 2 * 10 + 10 and {type(p.data) for p in held} == {Moved}


def test_a_part_of_a_model_is_not_attached_to_and_the_error_says_what_to_do():
    rng = numpy.random.default_rng(0)
    with pytest.raises(TypeError, match="whole model"):
        minipeft.attach(FAMILIES["t5 v1.0"](rng, "float32").encoder, minipeft.LoRA(1), rng)


@pytest.mark.parametrize("method", ["lora", minipeft.LoRA, None, 8])
def test_what_is_no_method_is_refused_with_an_example_of_one(method):
    rng = numpy.random.default_rng(0)
    with pytest.raises(TypeError, match=r"expected (one such as LoRA\(rank=8\)|an object of it, LoRA\(...\))"):
        minipeft.attach(FAMILIES["t5 v1.0"](rng, "float32"), method, rng)


@pytest.mark.parametrize("ask", [lambda part: minipeft.select(part, ""), minipeft.report])
def test_a_part_of_a_model_is_not_asked_for_its_attachments(ask):
    with pytest.raises(TypeError, match="not a whole model"):
        ask(FAMILIES["t5 v1.0"](numpy.random.default_rng(0), "float32").encoder)


# ---- off and on again


def three(state="plugged"):
    """a, b, c on the same slots, b in that state."""
    model = CASE.model()
    a, b, c = (CASE.attach(model, name, at) for at, name in enumerate("abc", 2))
    if state == "merged":
        c.unplug()
        a.merge()
        b.merge()
        c.plug()
    return model, a, b, c


def test_off_and_on_again_is_where_it_was():
    model, a, b, c = three()
    output = logits(model, CASE.batch())
    for attachment in (a, b, c):
        attachment.unplug()
        attachment.plug()
        assert model.plugged == ("a", "b", "c")
    for attachment in (c, a, b):
        attachment.unplug()
    for attachment in (b, c, a):
        attachment.plug()
    assert model.plugged == ("a", "b", "c") and logits(model, CASE.batch()).tobytes() == output.tobytes()


def test_what_never_lay_below_anything_goes_on_top():
    model, a, b, c = three()
    for attachment in (c, b, a):
        attachment.unplug()
    for attachment in (b, a, c):
        attachment.plug()
    assert model.plugged == ("b", "a", "c"), "nothing lay above b and c when they were unplugged, nor above a"


@pytest.mark.parametrize("state", ["plugged", "merged"])
def test_with_off_computes_what_is_left_and_returns_it_to_its_place_however_the_block_ends(state):
    model, a, b, c = three(state)
    before, output = model.host.now, logits(model, CASE.batch())
    bare = CASE.model()
    CASE.attach(bare, "a", 2)
    CASE.attach(bare, "c", 4)
    with b.off() as off:
        assert off is b and b.state == "off" and model.plugged == ("a", "c")
        close = abs(logits(model, CASE.batch()) - logits(bare, CASE.batch())).max()
        assert close == 0 if state == "plugged" else close < 1e-12, "merging a is rounded"
    assert model.host.now is before and logits(model, CASE.batch()).tobytes() == output.tobytes()
    with pytest.raises(ZeroDivisionError), b.off():
        raise ZeroDivisionError
    assert model.host.now is before


def test_with_off_inside_with_off_and_moves_inside_it():
    model, a, b, c = three()
    with b.off():
        with a.off(), b.off():
            assert model.plugged == ("c",)
        assert model.plugged == ("a", "c") and b.state == "off"
        a.unplug()
    assert model.plugged == ("b", "c")
    with b.off():
        c.remove()
    assert model.plugged == ("b",)
    with b.off():
        b.plug()
    assert b.state == "plugged"
    with b.off():
        b.remove()
    assert b.state == "removed"
    with pytest.raises(ValueError, match="cannot switch off 'b': it was removed"), b.off():
        pass
    a.plug()
    a.unplug()
    with a.off():
        assert a.state == "off"
    assert a.state == "off", "it was off before"


def test_with_off_is_refused_below_a_merged_one_and_a_merged_one_stays_off_where_its_ground_has_moved():
    model, a, b, c = three("merged")
    with pytest.raises(ValueError, match="cannot switch off 'a': 'b' was merged on top of it"), a.off():
        pass
    with pytest.raises(ValueError, match="'b' stays off: it was merged into weights that changed while it was off"):
        with b.off():
            a.unmerge()
    assert b.state == "off" and a.state == "plugged"


def test_below_one_that_was_merged_meanwhile_nothing_is_plugged_because_the_constant_would_hide_it():
    model, a, b, c = three()
    a.unplug()
    b.merge()
    before, state = logits(model, CASE.batch()), model.host.now
    with pytest.raises(ValueError, match="cannot plug 'a': 'b' was merged on top of it at .*; unmerge 'b' first"):
        a.plug()
    assert model.host.now is state
    b.unmerge()
    a.plug()
    assert logits(model, CASE.batch()).tobytes() != before.tobytes() and model.plugged == ("a", "b", "c")
    with pytest.raises(ValueError, match="cannot switch on 'a': 'b' was merged on top of it at"), a.off():
        b.merge()
    assert a.state == "off" and b.state == "merged"


def test_a_move_replaces_the_state_once_and_never_changes_the_one_before():
    model, a, b, c = three()
    seen = [model.host.now]
    for move in (c.unplug, c.plug, c.unplug, a.merge, a.unmerge, c.remove):
        known = [(dict(s.attached), dict(s.plugged), dict(s.entries)) for s in seen]
        move()
        assert known == [(dict(s.attached), dict(s.plugged), dict(s.entries)) for s in seen]
        assert model.host.now is not seen[-1]
        seen.append(model.host.now)


def test_the_attachments_of_a_model_are_listed_and_not_changed_through_the_list():
    model, a, b, c = three()
    assert list(model.attachments) == ["a", "b", "c"] and model.plugged == ("a", "b", "c")
    with pytest.raises(TypeError):
        del model.attachments["a"]
    b.unplug()
    assert list(model.attachments) == ["a", "b", "c"] and model.plugged == ("a", "c")


@pytest.mark.parametrize("method", [minipeft.LoRA(2), minipeft.Selective(component="norm"), minipeft.PromptTuning(2),
                                    minipeft.Bottleneck("pfeiffer", size=2), minipeft.Bottleneck("parallel", size=2),
                                    minipeft.PrefixTuning(2, bias="earlier", mlp=3)])
def test_a_model_with_any_method_can_be_pickled_and_copied(method):
    model = CASE.model()
    minipeft.attach(model, method, RNG(0))
    wanted = logits(model, CASE.batch())
    for copy in (pickle.loads(pickle.dumps(model)), model.clone()):
        assert logits(copy, CASE.batch()).tobytes() == wanted.tobytes()
        (attachment,) = copy.attachments.values()
        assert attachment.model is copy and attachment.state == "plugged"
        attachment.remove()
