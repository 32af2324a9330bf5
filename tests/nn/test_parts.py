"""Parts of a model: the component, type and layer of every name, and what conditions on them choose."""
import numpy
import pytest

from minipeft.nn.parts import COMPONENTS, TYPES, component, layer, parameter_type, slots_having
from minipeft.nn.slot import Slot
from tests.models_under_test import FAMILIES

every_family = pytest.mark.parametrize("family", FAMILIES)


def slots_of(family):
    return FAMILIES[family](numpy.random.default_rng(0), "float32").slots


def slots(*names):
    """Slots of these names, [2, 3] matrices."""
    return {name: Slot("linear", numpy.zeros((2, 3))) for name in names}


DEEP = slots("embedding.weight", *(f"{stack}.{i}.ff.wi.weight" for stack, n in (("encoder", 12), ("decoder", 3))
                                   for i in range(n)), "head.weight")


@pytest.mark.parametrize("name, part", [
    ("embedding.weight", "embedding"), ("head.weight", "head"), ("encoder.position.weight", "position"),
    ("decoder.position.weight", "position"), ("encoder.0.attn.q.weight", "attention"),
    ("decoder.11.cross.o.weight", "attention"), ("encoder.0.attn.q.bias", "attention"),
    ("encoder.0.ff.wi.weight", "feed-forward"), ("encoder.0.ff.wi_0.weight", "feed-forward"),
    ("decoder.0.ff.wo.bias", "feed-forward"), ("encoder.0.attn_norm.weight", "norm"),
    ("decoder.0.cross_norm.weight", "norm"), ("encoder.0.ff_norm.bias", "norm"), ("decoder.norm.weight", "norm")])
def test_the_component_of_a_name(name, part):
    assert component(name) == part


@pytest.mark.parametrize("kind, part", [("linear", "matrix"), ("embedding", "matrix"), ("position", "matrix"),
                                        ("bias", "bias"), ("norm", "norm weight")])
def test_the_type_of_a_slot(kind, part):
    assert parameter_type(Slot(kind, numpy.zeros(2))) == part


@pytest.mark.parametrize("name, place", [
    ("encoder.3.attn.q.bias", ("encoder", 3)), ("decoder.10.ff_norm.weight", ("decoder", 10)),
    ("encoder.norm.weight", None), ("encoder.position.weight", None), ("embedding.weight", None),
    ("head.weight", None)])
def test_the_layer_of_a_name(name, place):
    assert layer(name) == place


@every_family
def test_components_and_types_divide_a_model_and_a_type_agrees_with_the_shape(family):
    found = slots_of(family)
    for conditions, of in ((COMPONENTS, lambda n: component(n)), (TYPES, lambda n: parameter_type(found[n]))):
        parts = {c: [n for n in found if of(n) == c] for c in conditions}
        assert sorted(n for names in parts.values() for n in names) == sorted(found)
    for name, slot in found.items():
        assert (parameter_type(slot) == "matrix") == (len(slot.base.shape) == 2)
        assert (parameter_type(slot) == "bias") == name.endswith(".bias")


@every_family
def test_every_component_that_a_family_has_is_found_by_its_name(family):
    found, tied = slots_of(family), family in ("t5 v1.0", "post-LN")
    for c in COMPONENTS:
        wanted = [n for n in found if {
            "attention": ".attn." in n or ".cross." in n, "feed-forward": ".ff." in n, "norm": "norm." in n,
            "position": "position" in n, "embedding": n.startswith("embedding"), "head": n.startswith("head")}[c]]
        if not wanted:
            assert c == "head" and tied or c == "position" and family == "post-LN"
            has = ", ".join(dict.fromkeys(map(component, found)))
            why = "; its head is tied to the embedding" if c == "head" else ""
            with pytest.raises(ValueError) as error:
                slots_having(found, ["norm", c])
            assert str(error.value) == f"component {c!r}: the model has none{why}; it has {has}"
        else:
            assert list(slots_having(found, [c])) == wanted


def blocks(**conditions):
    """{stack: indices} of the blocks that are chosen, of 12 + 3."""
    chosen: dict = {"encoder": [], "decoder": []}
    for name in slots_having(DEEP, **conditions):
        stack, i = layer(name)
        chosen[stack].append(i)
    return chosen["encoder"], chosen["decoder"]


@pytest.mark.parametrize("conditions, encoder, decoder", [
    ({"layers": [0]}, [0], [0]), ({"layers": [-1]}, [11], [2]), ({"layers": [5]}, [5], []),
    ({"layers": [-3]}, [9], [0]), ({"layers": [-4]}, [8], []), ({"layers": [1, -1]}, [1, 11], [1, 2]),
    ({"layers": [11, -12]}, [0, 11], []), ({"first": 2}, [0, 1], [0, 1]), ({"last": 2}, [10, 11], [1, 2]),
    ({"first": 1, "last": 1}, [0, 11], [0, 2]), ({"first": 3}, [0, 1, 2], [0, 1, 2]),
    ({"first": 12}, list(range(12)), [0, 1, 2]), ({"last": 12}, list(range(12)), [0, 1, 2]),
    ({"layers": [4], "last": 1}, [4, 11], [2])])
def test_layers_count_in_each_stack_from_either_end(conditions, encoder, decoder):
    assert blocks(**conditions) == (encoder, decoder)


@pytest.mark.parametrize("conditions, said", [
    ({"layers": [12]}, "layers 12"), ({"layers": [-13]}, "layers -13"), ({"layers": [0, 99]}, "layers 0 or 99"),
    ({"layers": [-1, -99], "last": 1}, "layers -1 or -99, last 1"), ({"first": 13}, "first 13"),
    ({"first": 1, "last": 13}, "first 1, last 13"), ({"layers": [0], "first": 99}, "layers 0, first 99")])
def test_a_layer_that_no_stack_has_raises_even_beside_one_that_is_there(conditions, said):
    with pytest.raises(ValueError) as error:
        slots_having(DEEP, **conditions)
    assert str(error.value) == f"{said}: the model has no such block; it has encoder 0 to 11, decoder 0 to 2"


def test_a_model_without_blocks_has_no_layer():
    with pytest.raises(ValueError, match="^layers 0: the model has no such block; it has none$"):
        slots_having(slots("embedding.weight"), layers=[0])


def test_what_stands_in_no_block_is_in_no_layer():
    found = slots_of("pre-LN")
    outside = {"embedding.weight", "head.weight", "encoder.position.weight", "decoder.position.weight",
               "encoder.norm.weight", "encoder.norm.bias", "decoder.norm.weight", "decoder.norm.bias"}
    assert set(found) - set(slots_having(found, first=2)) == outside


@every_family
def test_several_of_a_condition_are_united_and_several_conditions_intersected(family):
    found = slots_of(family)
    attention, norms = slots_having(found, ["attention"]), slots_having(found, ["norm"])
    both = slots_having(found, ["norm", "attention"])
    assert list(both) == [n for n in found if n in attention or n in norms], "in model order"
    last, matrices = slots_having(found, last=1), slots_having(found, types=["matrix"])
    chosen = slots_having(found, ["attention"], ["matrix"], last=1)
    assert list(chosen) == [n for n in found if n in attention and n in last and n in matrices]
    assert len(chosen) == 12 and all(chosen[n] is found[n] for n in chosen)


def test_nothing_asked_chooses_everything():
    assert list(slots_having(DEEP)) == list(DEEP) and slots_having(DEEP) is not DEEP


@pytest.mark.parametrize("family, conditions, message", [
    ("t5 v1.0", {"types": ["bias"]}, "type 'bias': the model has none; it has matrix, norm weight"),
    ("t5 v1.0", {"types": ["matrix", "bias"]}, "type 'bias': the model has none; it has matrix, norm weight"),
    ("t5 v1.0", {"components": ["norm"], "types": ["matrix"]},
     "component 'norm', type 'matrix': no parameter of the model meets all of these"),
    ("post-LN", {"components": ["embedding"], "layers": [0, 1]},
     "component 'embedding', layers 0 or 1: no parameter of the model meets all of these"),
    ("post-LN", {"components": []}, "component none: no parameter of the model meets this"),
    ("post-LN", {"layers": []}, "layers none: no parameter of the model meets this")])
def test_what_the_model_lacks_and_an_intersection_that_is_empty_are_named(family, conditions, message):
    with pytest.raises(ValueError) as error:
        slots_having(slots_of(family), **conditions)
    assert str(error.value) == message


@pytest.mark.parametrize("family", ["post-LN", "pre-LN"])
def test_a_component_that_is_there_is_found_beside_the_types_that_it_has(family):
    """A type is asked of the model, not of what the component left: norms have no matrix, and the model has some."""
    found = slots_of(family)
    assert set(slots_having(found, ["norm", "attention"], ["matrix"])) == {
        n for n in found if (".attn." in n or ".cross." in n) and n.endswith("weight")}
