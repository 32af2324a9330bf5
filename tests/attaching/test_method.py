"""The contract of a method, on four methods from outside of the package: what they get for it, and what is refused."""
import dataclasses
import inspect
import pickle
import re
import textwrap
from dataclasses import dataclass

import numpy
import pytest

import minipeft
from minipeft.attaching.method import METHODS
from minipeft.backend import to_host
from minipeft.files import read_tensors
from tests.foreign_methods import ForeignDoRA, ForeignIA3, ForeignPrefix, ForeignVeRA, Prefix, Rescaled
from tests.models_under_test import FAMILIES, Case, bits, logits
from tests.strict_namespace import strict

RNG = numpy.random.default_rng
FOREIGN = [ForeignIA3(), ForeignVeRA(), ForeignDoRA(), ForeignPrefix()]
ON_WEIGHTS = FOREIGN[:3]
PAIRS = [([1, 2, 3], [4, 5]), ([3, 4], [5, 6, 7]), ([8], [2, 9]), ([5, 6, 2], [1])]
PLACE = "encoder.0.attn.q.weight"


def case(family="t5 v1.0", dtype="float64"):
    return Case((family, "q and v"), 2, 3, dtype, 0)


def of(method):
    return type(method).__name__


def fit(model, attachment, steps=3, **options):
    minipeft.fit(model, attachment, minipeft.Batches(PAIRS, 2), steps=steps, optimizer=minipeft.AdamW(0.05),
                 progress=False, **options)
    return attachment


def taught(method, family="t5 v1.0", dtype="float64"):
    """A model, and the method on it, trained for three steps."""
    model = case(family, dtype).model()
    return model, fit(model, minipeft.attach(model, method, RNG(1)))


@pytest.fixture
def methods():
    """A test registers what it likes; afterwards none of it is known."""
    before = dict(METHODS)
    yield METHODS
    METHODS.clear()
    METHODS.update(before)


# ---- what a method from outside gets


def test_the_method_in_the_docstring_of_the_contract_runs_as_it_is_written(methods):
    doc, names = inspect.getdoc(minipeft.Method), {"__name__": __name__}
    exec(textwrap.dedent(re.search(r"^    from dataclasses.*?(?=^[A-Z])", doc, re.DOTALL | re.MULTILINE)[0]), names)
    model = case().model()
    before = logits(model, case().batch())
    attachment = minipeft.attach(model, names["Rescale"](), RNG(1))
    assert logits(model, case().batch()).tobytes() == before.tobytes()
    fit(model, attachment)
    assert {name.rpartition(".")[2] for name in attachment.parameters} == {"l"}
    assert abs(logits(model, case().batch()) - before).max() > 1e-4


@pytest.mark.parametrize("method", FOREIGN, ids=of)
@pytest.mark.parametrize("family", FAMILIES)
def test_it_trains_its_own_arrays_and_nothing_else(method, family):
    model = case(family).model()
    base, before = bits(model.state()), logits(model, case().batch())
    attachment = minipeft.attach(model, method, RNG(1))
    started = bits(attachment.arrays)
    gap = abs(logits(model, case().batch()) - before).max()
    assert gap == 0 if method.transparent else gap < 1e-12 or of(method) == "ForeignPrefix"
    fit(model, attachment)
    moved = {name for name, value in bits(attachment.arrays).items() if value != started[name]}
    assert moved == set(attachment.parameters) and bits(model.state()) == base
    assert abs(logits(model, case().batch()) - before).max() > 1e-4


@pytest.mark.parametrize("method", ON_WEIGHTS, ids=of)
def test_on_weights_it_merges_and_comes_apart_again_bit_for_bit(method):
    model, attachment = taught(method)
    unmerged = logits(model, case().batch())
    attachment.merge()
    numpy.testing.assert_allclose(logits(model, case().batch()), unmerged, rtol=1e-9, atol=1e-12)
    attachment.unmerge()
    assert logits(model, case().batch()).tobytes() == unmerged.tobytes()


def test_on_hidden_states_it_refuses_to_merge_and_stays_plugged():
    model, attachment = taught(ForeignPrefix())
    with pytest.raises(ValueError, match="cannot be merged: at .*keys_values it acts on hidden states"):
        attachment.merge()
    assert attachment.state == "plugged"


@pytest.mark.parametrize("method", ON_WEIGHTS, ids=of)
def test_rows_of_one_batch_see_it_or_not_as_they_ask(method):
    model, attachment = taught(method)
    batch, name = case().batch(), attachment.name
    plugged, base = logits(model, batch), logits(model, batch, adapter=[None] * 4)
    mixed = logits(model, batch, adapter=[name, None, None, name])
    for row, wanted in enumerate([plugged, base, base, plugged]):
        numpy.testing.assert_allclose(mixed[row], wanted[row], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("method", FOREIGN, ids=of)
def test_switched_off_the_model_is_the_base_bit_for_bit_and_back_on_it_is_not(method):
    model, attachment = taught(method)
    base, plugged = logits(case().model(), case().batch()), logits(model, case().batch())
    with attachment.off():
        assert logits(model, case().batch()).tobytes() == base.tobytes()
    assert logits(model, case().batch()).tobytes() == plugged.tobytes() != base.tobytes()


@pytest.mark.parametrize("method", FOREIGN, ids=of)
@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_a_file_gives_it_back_bit_for_bit_on_a_fresh_model_and_nothing_is_drawn(method, dtype, tmp_path, monkeypatch):
    model, attachment = taught(method, dtype=dtype)
    attachment.save(tmp_path / "file")
    fresh = case(dtype=dtype).model()
    monkeypatch.setattr(numpy.random, "default_rng", None)  # nobody can make a generator
    monkeypatch.setattr(minipeft.attaching.build, "drawn", None)
    again = minipeft.load(fresh, tmp_path / "file")
    assert bits(again.arrays) == bits(attachment.arrays) and again.state == "plugged"
    assert again.method.fields() == method.fields() and list(again.places) == list(attachment.places)
    monkeypatch.undo()
    assert logits(fresh, case().batch()).tobytes() == logits(model, case().batch()).tobytes()


@pytest.mark.parametrize("method", FOREIGN, ids=of)
def test_load_calls_no_init(method, tmp_path, methods):
    """It may be a minute's work, as of a decomposition, or read a weight that is another by now."""
    model, attachment = taught(method)
    attachment.save(tmp_path / "file")

    def arrays(self, name, place, model):
        return {leaf: dataclasses.replace(d, init=never) for leaf, d in type(method).arrays(
            method, name, place, model).items()}

    def never(shape, dtype, rng):
        raise AssertionError("an init was called")

    methods[of(method)] = type(of(method), (type(method),), {"arrays": arrays})
    assert bits(minipeft.load(case().model(), tmp_path / "file").arrays) == bits(attachment.arrays)


@pytest.mark.parametrize("method", FOREIGN, ids=of)
def test_a_run_that_is_resumed_has_the_bits_of_one_that_was_never_stopped(method, tmp_path):
    wanted = taught(method)[1]
    stopped, resumed = case().model(), case().model()
    fit(stopped, minipeft.attach(stopped, method, RNG(1)), steps=2, checkpoint=tmp_path / "run")
    found = fit(resumed, minipeft.attach(resumed, method, RNG(1)), steps=3, checkpoint=tmp_path / "run")
    assert bits(found.arrays) == bits(wanted.arrays)


@pytest.mark.parametrize("method", FOREIGN, ids=of)
@pytest.mark.parametrize("copy", [lambda m: m.clone(), lambda m: pickle.loads(pickle.dumps(m))],
                         ids=["clone", "pickle"])
def test_a_copy_computes_the_same_with_arrays_of_its_own(method, copy):
    model, attachment = taught(method)
    twin = copy(model)
    assert logits(twin, case().batch()).tobytes() == logits(model, case().batch()).tobytes()
    theirs = twin.attachments[attachment.name]
    assert not {id(p) for p in theirs.arrays.values()} & {id(p) for p in attachment.arrays.values()}
    for place, piece in theirs.at.items():  # the pieces of the copy are made of the arrays of the copy
        assert {id(p) for p in piece.arrays.values()} <= {id(p) for p in theirs.arrays.values()}
    before = logits(model, case().batch())
    fit(twin, theirs)
    assert logits(model, case().batch()).tobytes() == before.tobytes() != logits(twin, case().batch()).tobytes()


@pytest.mark.parametrize("method", FOREIGN, ids=of)
def test_its_arrays_go_to_another_backend_with_the_model_and_it_computes_the_same_there(method):
    model, attachment = taught(method)
    batch, before = case().batch(), bits(attachment.arrays)
    expected, loss = logits(model, batch), model.loss(**batch).data.item()
    model.to(strict)
    assert all(isinstance(p.data, strict.ndarray) for p in attachment.arrays.values())
    with minipeft.use(strict):
        numpy.testing.assert_allclose(to_host(logits(model, batch)), expected, rtol=1e-9, atol=1e-12)
        found, grads = minipeft.value_and_grad(lambda: model.loss(**batch), attachment.parameters)
        assert abs(found - loss) < 1e-12 and all(isinstance(g, strict.ndarray) for g in grads.values())
        minipeft.attach(model, dataclasses.replace(method), RNG(2), "made_there")
    model.to("numpy")
    assert bits(attachment.arrays) == before


@pytest.mark.parametrize("method", FOREIGN, ids=of)
def test_the_laws_hold_for_it(method):
    verdicts = minipeft.laws.check(method, case("pre-LN").model())
    verdicts.raise_for_failures()
    skipped = {verdict.law.split()[0] for verdict in verdicts.all if verdict.outcome == "does not apply"}
    assert len(verdicts.all) == 11 and skipped == ({"3", "14"} if of(method) == "ForeignPrefix" else set())


# ---- arrays that several places share


def test_a_shared_array_has_one_name_among_the_arrays_and_in_the_file_and_is_no_parameter_if_it_is_fixed(tmp_path):
    model, attachment = taught(ForeignVeRA())
    shared = {"15x12@foreignvera.A", "15x12@foreignvera.B"}
    assert {name for name in attachment.arrays if name.rpartition(".")[2] in "AB"} == shared
    assert not shared & set(attachment.parameters)
    held = {id(piece.A) for piece in attachment.at.values()}
    assert len(attachment.at) == 10 and held == {id(attachment.arrays["15x12@foreignvera.A"])}
    attachment.save(tmp_path / "file")
    tensors, _ = read_tensors(tmp_path / "file")
    assert set(tensors) == {"15x12.A", "15x12.B"} | {f"{place}.{leaf}" for place in attachment.places for leaf in "bd"}


def shares_a_vector(methods):
    """A method with one trained vector for all places."""
    @minipeft.register
    @dataclass(frozen=True)
    class Tied(minipeft.Method):
        where: str = r"\.(q|v)\.weight$"

        def arrays(self, name, slot, model):
            return {"l": minipeft.trained((slot.shape[0], 1), minipeft.ones, "all")}

        def make(self, name, slot, arrays):
            return Rescaled(**arrays)

    return Tied()


def test_a_shared_array_that_is_trained_is_one_parameter_with_the_sum_of_all_gradients(methods):
    model = case().model()
    tied = minipeft.attach(model, shares_a_vector(methods), RNG(0))
    assert set(tied.parameters) == {"all@tied.l"}
    _, together = minipeft.value_and_grad(lambda: model.loss(**case().batch()), tied.parameters)
    tied.remove()
    alone = minipeft.attach(model, ForeignIA3(where=tied.method.where), RNG(0))
    _, apart = minipeft.value_and_grad(lambda: model.loss(**case().batch()), alone.parameters)
    assert len(apart) == 10
    numpy.testing.assert_allclose(together["all@tied.l"], sum(apart.values()), rtol=1e-9, atol=1e-12)


def test_the_report_counts_shared_arrays_once_under_their_own_heading(methods):
    model = case().model()
    base = minipeft.report(model).all
    tied = minipeft.attach(model, shares_a_vector(methods), RNG(0))
    counts = minipeft.report(model)
    assert (counts.trainable, counts.all, counts.methods) == (15, base + 15, {"tied": {"shared": 15}})
    assert re.search(r"shared +0 +0.0 % +15|shared", str(counts))
    tied.remove()
    vera = minipeft.attach(model, ForeignVeRA(rank=4), RNG(0))
    counts = minipeft.report(model)
    assert counts.trainable == 10 * (4 + 15) and counts.methods == {"foreignvera": {"attention": 190}}
    fixed = sum(p.data.nbytes for name, p in vera.arrays.items() if name not in vera.parameters)
    vera.unplug()
    assert fixed == 8 * 4 * (12 + 15) and minipeft.report(model).weight_bytes == counts.weight_bytes


# ---- what `register` refuses


def test_register_refuses_a_class_that_could_not_be_attached_saved_or_loaded(methods):
    known = dict(methods)
    body = {"arrays": lambda self, name, place, model: {}, "make": lambda self, name, place, arrays: None}
    where = {"where": "q", "__annotations__": {"where": str}}

    def made(frozen=True, **contents):
        cls = type("Odd", (minipeft.Method,), contents)
        return cls if frozen is None else dataclass(frozen=frozen)(cls)

    for cls, message in [
            (object, "<class 'object'> is not a method; expected a subclass of minipeft.Method"),
            (ForeignIA3(), r"ForeignIA3\(.*\) is not a method; expected a subclass of minipeft.Method"),
            (made(None, **body, **where), r"Odd is not a frozen dataclass; write @minipeft.register above "
                                          r"@dataclass\(frozen=True\)"),
            (made(False, **body, **where), "Odd is not a frozen dataclass"),
            (type("Odd", (ForeignIA3,), {}), "Odd is not a frozen dataclass"),
            (made(**body), r'Odd has no field `where`; expected one, such as where: Where = r"'),
            (made(**{**body, "arrays": minipeft.Method.arrays}, **where), r"Odd does not define arrays\(\)"),
            (made(**{**body, "make": minipeft.Method.make}, **where), r"Odd does not define make\(\)")]:
        with pytest.raises(TypeError, match=message):
            minipeft.register(cls)
    assert dict(methods) == known


def test_two_classes_of_one_name_are_refused_but_one_that_is_defined_again_takes_the_place_of_the_old(methods):
    model = case().model()
    old = shares_a_vector(methods)
    new = shares_a_vector(methods)
    assert methods["Tied"] is type(new) is not type(old)
    with pytest.raises(TypeError, match="Tied is not registered.*make the method anew"):
        minipeft.attach(model, old, RNG(0))
    other = dataclass(frozen=True)(type("LoRA", (ForeignIA3,), {"where": "q", "__annotations__": {"where": str}}))
    with pytest.raises(ValueError, match="a method named LoRA is registered already, from minipeft.methods.lora; "
                                         "expected another name"):
        minipeft.register(other)
    assert methods["LoRA"] is minipeft.LoRA


# ---- what `attach` refuses


def refused(method, error, message):
    """attach raises it, before the model or the generator changes."""
    model, rng = case().model(), RNG(3)
    now, before, state = model.host.now, bits(model.state()), rng.bit_generator.state
    with pytest.raises(error, match=message):
        minipeft.attach(model, method, rng)
    assert model.host.now is now and bits(model.state()) == before and rng.bit_generator.state == state
    assert not any(place.attached for _, place in model.named_places())


def odd(fields=(), where=rf"^{PLACE}$", **contents):
    """An object of a registered method that is right but for `contents` and `fields`, [(name, type, default)]."""
    body = {"where": where, "__module__": __name__,
            "__annotations__": {"where": object} | {name: kind for name, kind, _ in fields},
            "arrays": lambda self, name, slot, model: {"l": minipeft.trained((slot.shape[0], 1), minipeft.ones)},
            "make": lambda self, name, slot, arrays: Rescaled(**arrays),
            **{name: default for name, _, default in fields}, **contents}
    return minipeft.register(dataclass(frozen=True)(type("Odd", (minipeft.Method,), body)))()


def test_the_method_that_the_refusals_start_from_is_accepted(methods):
    model = case().model()
    assert list(minipeft.attach(model, odd(), RNG(0)).places) == [PLACE]
    assert minipeft.attach(model, odd([("sizes", tuple, (1, (2.5, None))), ("flag", bool, True), ("word", str, "a")]),
                           RNG(0), "fields").state == "plugged"


def test_a_method_with_a_list_of_patterns_has_a_hash_and_keeps_the_patterns_it_was_given():
    where = ["q", "v"]
    method = minipeft.LoRA(2, where=where)
    assert hash(method) == hash(minipeft.LoRA(2, where=("q", "v"))) and method == minipeft.LoRA(2, where=["q", "v"])
    where.append("k")
    assert method.where == ("q", "v")


def test_something_else_than_a_registered_method_is_refused():
    @dataclass(frozen=True)
    class Unregistered(ForeignIA3):
        pass

    @dataclass(frozen=True)
    class Plain:
        where: str = "q"

    refused(Unregistered(), TypeError, "Unregistered is not registered, so that load.. could not make it; write "
                                       "@minipeft.register above its class")
    refused(ForeignIA3, TypeError, r"method is <class .*ForeignIA3'>; expected an object of it, ForeignIA3\(...\)")
    refused(Plain(), TypeError, r"method is .*Plain\(where='q'\); expected one such as LoRA\(rank=8\); a method of "
                                r"your own is a subclass of minipeft.Method")
    for wrong in (None, "LoRA", Plain, Rescaled):
        refused(wrong, TypeError, "method is .*; expected one such as LoRA")


def twice(value):
    return value


NO_FILE = [
    (twice, "is <function twice at .*>, which a file cannot hold"), (numpy.array([1, twice], object), "which a file"),
    ({"a": 1}, "is {'a': 1}, which a file cannot hold"), ({1: 2}, "which a file"), (float("nan"), "is nan, which"),
    (float("inf"), "is inf, which"), (1j, "is 1j, which"), (b"text", "which a file"), ((1, (2, {3})), "which a file"),
    (numpy.dtype("float32"), "which a file"), (ForeignIA3(), "which a file")]


@pytest.mark.parametrize("value, message", NO_FILE, ids=[str(i) for i in range(len(NO_FILE))])
def test_a_field_that_a_file_cannot_hold_is_refused_with_what_is_expected(value, message, methods):
    method = odd([("field", object, None)])
    refused(dataclasses.replace(method, field=value), ValueError, f"Odd: field .*{message}")
    refused(dataclasses.replace(method, field=value), ValueError, "expected numbers, strings, booleans, None, or tu")


@pytest.mark.parametrize("value", [[1, 2], (1, 2), numpy.int64(3), numpy.array([1, 2]), [(1, [2])]], ids=str)
def test_a_post_init_that_does_not_call_the_contracts_is_refused_where_that_makes_a_difference(value, methods):
    fields = [("field", object, None)]
    refused(dataclasses.replace(odd(fields, __post_init__=lambda self: None), field=value), ValueError,
            r"Odd: field is .*; expected .* \(lists and arrays become tuples in Method.__post_init__: a __post_init__ "
            r"of your own calls it by super\(\)\)")
    minipeft.attach(case().model(), dataclasses.replace(odd(fields), field=value), RNG(0))


def test_a_setting_is_checked_with_and_without_the_contracts_post_init(methods):
    ranks = minipeft.setting(2, lambda v: v >= 1, "an integer >= 1")
    for wrong in (0, "8", None):
        with pytest.raises(ValueError, match=f"Odd: rank is {wrong!r}; expected an integer >= 1"):
            dataclasses.replace(odd([("rank", int, ranks)]), rank=wrong)
        method = dataclasses.replace(odd([("rank", int, ranks)], __post_init__=lambda self: None), rank=wrong)
        refused(method, ValueError, f"Odd: rank is {wrong!r}; expected an integer >= 1")


def gives(declared):
    return lambda self, name, slot, model: declared


def init_of(array):
    return minipeft.trained((15, 1), lambda shape, dtype, rng: (rng.random(), array)[1])


ARRAYS = [
    (None, TypeError, r"arrays\(\) at encoder.0.attn.q.weight gives None; expected arrays {leaf: trained\(shape\) or"),
    ([minipeft.trained((15, 1))], TypeError, r"gives \[Declared\(.*; expected arrays"),
    ({}, ValueError, "declares nothing at encoder.0.attn.q.weight; expected at least one array"),
    ({"l": numpy.ones((15, 1))}, ValueError, r"'l' is ndarray; expected trained\(shape\) or fixed\(shape, init\)"),
    ({"l": (15, 1)}, ValueError, r"'l' is tuple; expected trained\(shape\)"),
    ({"base": minipeft.trained((15, 1))}, ValueError, "'base' is no name of an array; expected an identifier other"),
    ({"l.b": minipeft.trained((15, 1))}, ValueError, "'l.b' is no name of an array; expected an identifier"),
    ({"": minipeft.trained((15, 1))}, ValueError, "'' is no name of an array; expected an identifier"),
    ({1: minipeft.trained((15, 1))}, ValueError, "1 is no name of an array; expected an identifier"),
    ({"l": minipeft.trained((15, 1.0))}, ValueError, r"'l' has shape \(15, 1.0\); expected a tuple of integers"),
    ({"l": minipeft.trained((15, True))}, ValueError, r"'l' has shape \(15, True\); expected a tuple of integers"),
    ({"l": minipeft.trained((-1,))}, ValueError, r"'l' has shape \(-1,\); expected a tuple of integers"),
    ({"l": minipeft.trained(15)}, ValueError, "'l' has shape 15; expected a tuple of integers"),
    ({"l": minipeft.trained("15")}, ValueError, "'l' has shape '15'; expected a tuple of integers"),
    ({"l": minipeft.trained((15, 1), 0)}, ValueError, r"the init of 'l' is 0; expected a function of \(shape, dtype, "),
    ({"l": minipeft.trained((15, 1), shared="a@b")}, ValueError, "'l' is shared as 'a@b'; expected a name without"),
    ({"l": minipeft.trained((15, 1), shared="")}, ValueError, "'l' is shared as ''; expected a name without"),
    ({"l": minipeft.trained((15, 1), shared=(15, 1))}, ValueError, r"'l' is shared as \(15, 1\); expected a name"),
    ({"l": minipeft.trained((15, 1), shared=PLACE)}, ValueError,
     f"'l' is shared as '{PLACE}', which is the name of a place; expected another name"),
    ({"l": init_of(numpy.ones(15))}, ValueError, rf"the init of {PLACE}.l gives float64 \[15\]; expected float64"),
    ({"l": init_of(numpy.ones((15, 1), "float32"))}, ValueError, r"gives float32 \[15, 1\]; expected float64 \[15, "),
    ({"l": init_of([[1.0]] * 15)}, ValueError, r"gives list; expected float64 \[15, 1\]"),
    ({"l": init_of(None)}, ValueError, r"gives NoneType; expected float64 \[15, 1\]")]


@pytest.mark.parametrize("declared, error, message", ARRAYS, ids=[str(i) for i in range(len(ARRAYS))])
def test_arrays_that_are_declared_wrongly_are_refused(declared, error, message, methods):
    refused(odd(arrays=gives(declared)), error, "Odd.*" + message)


def test_an_init_that_raises_leaves_the_generator_where_it_was(methods):
    def fails(shape, dtype, rng):
        rng.random(7)
        raise KeyError("what the author of the method did wrong")

    refused(odd(arrays=gives({"l": minipeft.trained((15, 1), fails)})), TypeError, "the author of the method")


def test_a_shared_array_that_two_places_declare_differently_is_refused(methods):
    def by_place(first, other):
        return lambda self, name, slot, model: {"l": first if name.startswith("encoder") else other}

    two, shape = rf"^{PLACE}$|^decoder.0.attn.q.weight$", (15, 1)
    for other, said in [(minipeft.trained((1, 12), shared="l"), r"Parameter \[1, 12\]"),
                        (minipeft.fixed(shape, minipeft.ones, "l"), r"Fixed \[15, 1\]")]:
        refused(odd(where=two, arrays=by_place(minipeft.trained(shape, shared="l"), other)), ValueError,
                rf"Odd.arrays\(\) at decoder.0.attn.q.weight: 'l' is shared as 'l' and declared as {said}; another "
                r"place declares Parameter \[15, 1\]; expected one shape and dtype")


def test_places_that_are_none_of_this_model_are_refused(methods):
    elsewhere = case().model().slots[PLACE]
    for found, error, message in [
            ({}, ValueError, r"Odd.places\(\) chooses nothing on this model; expected at least one place"),
            (None, TypeError, r"Odd.places\(\) gives None; expected places {name: place}"),
            ([PLACE], TypeError, r"Odd.places\(\) gives \['encoder.*; expected places {name: place}"),
            ({PLACE: elsewhere}, ValueError, rf"Odd.places\(\) gives '{PLACE}', which is no place of this model under"),
            ({"nowhere": elsewhere}, ValueError, r"Odd.places\(\) gives 'nowhere', which is no place of this model")]:
        refused(odd(places=lambda self, model, found=found: found), error, message)


class Hidden:
    """An object that holds something."""

    def __init__(self, value):
        self.value = value


def another():
    return minipeft.Parameter(numpy.zeros((15, 1)))


@pytest.mark.parametrize("hide, path", [
    (lambda: another(), "Rescaled.more"), (lambda: [another()], r"Rescaled.more\[0\]"),
    (lambda: {"a": another()}, r"Rescaled.more\['a'\]"), (lambda: Hidden((0, another())), r"Rescaled.more.value\[1\]"),
    (lambda: Hidden(Hidden(another())), "Rescaled.more.value.value"),
    (lambda: {minipeft.Fixed(numpy.zeros(2))}, r"Rescaled.more\[0\]"),
    (lambda: [[[[[[[[[[another()]]]]]]]]]], r"Rescaled.more(\[0\])+")])
def test_an_array_that_is_not_declared_is_found_wherever_the_piece_hides_it(hide, path, methods):
    refused(odd(make=lambda self, name, slot, arrays: Rescaled(**arrays, more=hide())), ValueError,
            f"Odd at {PLACE}: {path} is a (Parameter|Fixed) that arrays.. does not declare: it would be neither "
            f"trained nor saved")


def test_a_piece_may_hold_the_declared_arrays_in_a_list_beside_and_what_points_back_to_itself(methods):
    def make(self, name, slot, arrays):
        piece = Rescaled(**arrays, all=list(arrays.values()), library=numpy)
        piece.me = [piece]
        return piece

    minipeft.attach(case().model(), odd(make=make), RNG(0))


def test_a_declared_array_that_the_piece_lacks_or_hides_is_refused(methods):
    refused(odd(make=lambda self, name, slot, arrays: Rescaled(l=None)), ValueError,
            f"Odd at {PLACE}: arrays.. declares 'l', which is no attribute of the Rescaled that make.. gives")
    refused(odd(make=lambda self, name, slot, arrays: Rescaled(l=[arrays["l"]])), ValueError, "declares 'l', which is")
    refused(odd(make=lambda self, name, slot, arrays: Rescaled(shape=arrays["l"])), ValueError,
            f"Odd at {PLACE}: the array 'shape' is hidden by Rescaled.shape; expected another name")


def test_a_piece_of_the_wrong_kind_is_refused_with_the_right_one(methods):
    site = {"kinds": ("sublayer",), "where": r"^encoder.0.ff.out$",
            "arrays": lambda self, name, site, model: {"l": minipeft.trained((site.width,))}}
    refused(odd(make=lambda self, name, slot, arrays: Rescaled), TypeError,
            rf"Odd at {PLACE}: make.. gives the class Rescaled; expected an object of it, Rescaled\(\*\*arrays\)")
    for made in (Prefix(), None, numpy.ones(3)):
        refused(odd(make=lambda self, name, slot, arrays, made=made: made), TypeError,
                rf"Odd at {PLACE}: make.. gives \w+; a slot takes a Reparam \(write a class below minipeft.Reparam")
    for made in (Rescaled(), None, lambda x, n, F: F, minipeft.Piece()):
        refused(odd(**site, make=lambda self, name, site, arrays, made=made: made), TypeError,
                r"Odd at encoder.0.ff.out: make.. gives \w+; a site takes a Piece \(write a class below minipeft.Piece")


def dense_as(function):
    """make() of a Reparam whose dense() is `function` of it."""
    kind = type("Wrong", (minipeft.Reparam,), {"dense": function})
    return {"make": lambda self, name, slot, arrays: kind(**arrays)}


DENSE = [
    (lambda piece: piece.base.dense().mT, ValueError, r"its Wrong gives float64 \[12, 15\] for dense\(\); expected "),
    (lambda piece: minipeft.Tensor(piece.base.dense().data.astype("float32")), ValueError,
     r"its Wrong gives float32 \[15, 12\] for dense\(\); expected float64 \[15, 12\]"),
    (lambda piece: piece.base.dense().data, TypeError, r"its Wrong: dense\(\) gives ndarray; expected a Tensor"),
    (lambda piece: None, TypeError, r"its Wrong: dense\(\) gives NoneType; expected a Tensor"),
    (lambda piece: piece.base.dense() * piece.m, TypeError, "its Wrong: AttributeError: .* has no attribute 'm'"),
    (lambda piece: piece.base.dense() @ piece.l, ValueError, "its Wrong: .*"),
    (lambda piece: 1 // 0, TypeError, "its Wrong: ZeroDivisionError")]


@pytest.mark.parametrize("function, error, message", DENSE, ids=[str(i) for i in range(len(DENSE))])
def test_a_dense_that_fails_or_gives_something_else_is_refused(function, error, message, methods):
    refused(odd(**dense_as(function)), error, f"Odd at {PLACE}: {message}")


def test_a_piece_without_dense_is_refused(methods):
    refused(odd(make=lambda self, name, slot, arrays: minipeft.Reparam(**arrays)), TypeError,
            rf"Odd at {PLACE}: its Reparam: Reparam does not define dense\(\)")


def test_a_product_or_lookup_that_gives_something_else_than_dense_would_is_refused(methods):
    for what, function, found in [("project", lambda self, x, rng=None: x, r"\[3, 12\] for project\(x\); .* \[3, 15\]"),
                                  ("rows", lambda self, ids: self.dense(), r"\[15, 12\] for rows\(ids\); .* \[2, 3, ")]:
        kind = type("Wrong", (Rescaled,), {what: function})
        refused(odd(make=lambda self, name, slot, arrays, kind=kind: kind(**arrays)), ValueError,
                f"Odd at {PLACE}: its Wrong gives float64 {found}")


def test_make_that_fails_is_refused_with_its_error(methods):
    def make(self, name, slot, arrays):
        return Rescaled(l=arrays["l"] * Rescaled(**arrays).base)

    refused(odd(make=make), TypeError, rf"Odd at {PLACE}: make\(\): AttributeError: .* has no attribute 'base'")


KV = "encoder.0.attn.keys_values"
SITES = [
    ("sublayer", "encoder.0.ff.out", lambda x, n, F: None, "its Wrong: it gives NoneType; expected a Tensor"),
    ("sublayer", "encoder.0.ff.out", lambda x, n, F: F[:, :1], r"\[2, 1, 12\] for the output; expected .* \[2, 3, "),
    ("input", "encoder.input", lambda x, mask: x, r"it gives Tensor; expected \(embeddings, mask\)"),
    ("input", "encoder.input", lambda x, mask: (x[:, :1], mask), r"bool \[2, 3\] for the mask; expected bool \[2, 1\]"),
    ("input", "encoder.input", lambda x, mask: (x, None), r"gives None for the mask; expected bool \[2, 3\]"),
    ("keys_values", KV, lambda k, v, bias: (k, v), r"it gives tuple; expected \(keys, values, bias\)"),
    ("keys_values", KV, lambda k, v, bias: (k, v[:, :1], bias), r"gives float64 \[2, 1, 15\] for the values; expected"),
    ("keys_values", KV, lambda k, v, bias: (k[:, :1], v[:, :1], bias),
     r"gives float64 \[1, 1, 3, 3\] for the bias; expected float64 \[1, 1, 3, 1\]"),
    ("keys_values", KV, lambda k, v, bias: (k, v, None), r"gives None for the bias; expected .* \[1, 1, 3, 3\]")]


@pytest.mark.parametrize("kind, where, function, message", SITES, ids=[str(i) for i in range(len(SITES))])
def test_a_piece_for_a_site_that_gives_something_else_than_the_site_takes_is_refused(kind, where, function, message,
                                                                                     methods):
    piece = type("Wrong", (minipeft.Piece,), {"__call__": lambda self, *stream: function(*stream)})
    refused(odd(kinds=(kind,), where=f"^{where}$", make=lambda self, name, site, arrays: piece(**arrays),
                arrays=lambda self, name, site, model: {"l": minipeft.trained((site.width,))}),
            (TypeError, ValueError), f"Odd at {where}: .*{message}")


def test_each_shape_of_arrays_is_tried_not_only_the_first_of_a_shape_of_weight(methods):
    def arrays(self, name, slot, model):
        return {"l": minipeft.trained((15, 1) if name.startswith("encoder") else (7, 1))}

    refused(odd(where=rf"^{PLACE}$|^decoder.0.attn.q.weight$", arrays=arrays), ValueError,
            "Odd at decoder.0.attn.q.weight: its Rescaled: ")


# ---- what `load` says of a method that it does not know


def test_a_file_of_a_method_that_nobody_registered_is_refused_with_what_to_do(tmp_path, methods):
    taught(ForeignIA3())[1].save(tmp_path / "file")
    del methods["ForeignIA3"]
    with pytest.raises(ValueError, match="method 'ForeignIA3' is not known; known are .*LoRA.* is known once its "
                                         "module was imported, with @minipeft.register above its class"):
        minipeft.load(case().model(), tmp_path / "file")


def test_a_file_whose_method_fails_by_now_is_refused_with_the_place(tmp_path, methods):
    model = case().model()
    minipeft.attach(model, odd(), RNG(0)).save(tmp_path / "file")
    odd(**dense_as(lambda piece: piece.gone))
    fresh = case().model()
    with pytest.raises(ValueError, match=f"file: does not fit this model: Odd at {PLACE}: its Wrong: AttributeError"):
        minipeft.load(fresh, tmp_path / "file")
    assert not fresh.attachments


def test_an_init_that_takes_other_arguments_is_named(methods):
    refused(odd(arrays=lambda self, name, slot, model: {"l": minipeft.trained((slot.shape[0], 1), lambda shape: 1)}),
            TypeError, rf"Odd: the init of {PLACE}.l, a function of \(shape, dtype, rng\), fails")


def test_a_product_that_takes_no_generator_is_refused(methods):
    kind = type("Deaf", (Rescaled,), {"project": lambda self, x: self.base.project(x) * self.l.reshape(-1)})
    refused(odd(make=lambda self, name, slot, arrays: kind(**arrays)), TypeError, "positional argument")
