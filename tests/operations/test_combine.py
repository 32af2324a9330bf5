"""combine: the weighted sum of several adapters, as one."""
from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy
import pytest

import minipeft
from minipeft import LoRA, Selective, attach, combine
from minipeft.laws.models import moved
from minipeft.nn.wide import relative_error, wide_base, wide_piece
from tests.foreign_methods import ForeignDoRA, ForeignIA3
from tests.models_under_test import Case, bits, logits, same_values
from tests.operations.golden import adapted, off, ours
from tests.operations.golden import logits as golden_logits

RNG = numpy.random.default_rng
Q, V = r"\.q\.weight$", r"\.v\.weight$"
CASE = Case(("t5 v1.0", "q and v"), 1, 1, "float64", 0)
METHODS: dict[str, Any] = {
    "LoRA": LoRA(2, 3), "on tables": LoRA(3, 5, where="^embedding"), "fixed scale": LoRA(2, 3, scaling="alpha"),
    "rsLoRA": LoRA(3, 4, scaling="alpha/sqrt(r)"),
    "patterns": LoRA(3, 4, rank_pattern={r"decoder": 2, r"\.v\.": 1}, alpha_pattern={r"cross": -7}),
    "pissa": LoRA(2, 3, init="pissa"), "merged q, k and v": LoRA(2, 3, enable=(True, False, True))}
OTHERS: dict[str, Any] = {"DoRA": ForeignDoRA(), "(IA)3": ForeignIA3(), "Selective": Selective(where=Q),
                          "a mask": Selective(mask={"encoder.0.attn.q.weight": numpy.arange(5)})}


def model_with(*methods: Any, dtype: str = "float64") -> tuple[Any, list]:
    model = dataclasses.replace(CASE, dtype=dtype).model()
    made = [moved(attach(model, method, RNG(i), "abcd"[i]), RNG([i, 1])) for i, method in enumerate(methods)]
    return model, made


def change(attachment: Any, name: str) -> numpy.ndarray:
    """f(W0) - W0 at a place."""
    place = attachment.places[name]
    base = wide_base(place)
    return wide_piece(attachment.at[place]).over(base).dense().data - base.data


def the_sum(inputs: list, weights: list) -> dict[str, numpy.ndarray]:
    wanted: dict[str, Any] = {}
    for a, w in zip(inputs, weights):
        for name in a.places:
            wanted[name] = wanted.get(name, 0) + w * change(a, name)
    return wanted


def test_qa_loras_are_combined_as_loras_with_repeated_columns():
    """By "cat", so with the same change, whatever the groups and the pooling are."""
    model, inputs = model_with(minipeft.QALoRA(2, 3, 4), minipeft.QALoRA(1, -5, 3, pooling="mean"))
    wanted = the_sum(inputs, [0.5, 2])
    made = combine(inputs, [0.5, 2], "cat")
    assert isinstance(made.method, LoRA)
    for name, d in wanted.items():
        assert abs(change(made, name) - d).max() < 1e-14 and made.parameters[f"{name}@combined.A"].shape == (3, 12)


# ---- peft's numbers


def test_cat_and_svd_give_pefts_logits_and_changes():
    for how, rank, key in (("cat", None, "logits_cat"), ("svd", 3, "logits_svd"), ("svd", 5, "logits_svd_full"),
                           ("svd", None, "logits_svd_full")):
        model, g = adapted("weighted")
        assert int(g["svd_rank"]) == 3
        for name in "ab":
            assert off(golden_logits(model, g, name), g[f"logits_{name}"]) < 1e-13
        c = combine(list(model.attachments.values()), g["weights"].tolist(), how, rank)
        assert off(golden_logits(model, g), g[key]) < 1e-12, (how, rank)
        assert c.method.rank == (rank or 5) and (max(c.errors.values()) < 1e-14) == (rank != 3)
        if rank == 3:
            for module in (key.partition("/")[2] for key in g if key.startswith("delta_svd/")):
                assert off(change(c, ours(module)), g[f"delta_svd/{module}"]) < 1e-12
            a, b = (model.attachments[n] for n in "ab")
            name = next(iter(c.places))
            wanted = the_sum([a, b], g["weights"].tolist())[name]
            s = numpy.linalg.svd(wanted, compute_uv=False)
            assert abs(c.errors[name] - math.sqrt((s[3:] ** 2).sum() / (s ** 2).sum())) < 1e-14


# ---- the sum, whatever it is made of


@pytest.mark.parametrize("how", ["cat", "svd"])
@pytest.mark.parametrize("second", METHODS)
@pytest.mark.parametrize("first", ["LoRA", "patterns"])
def test_the_change_of_the_combination_is_the_weighted_sum_on_all_places_together(first, second, how):
    model, inputs = model_with(METHODS[first], METHODS[second])
    weights, wanted = [0.75, -0.5], the_sum(inputs, [0.75, -0.5])
    c = combine(inputs, weights, how)
    assert list(c.places) == [n for n in model.slots if n in wanted] and isinstance(c.method, LoRA)
    for name, d in wanted.items():
        assert relative_error(change(c, name), d) < 1e-14, name
    assert set(c.errors) == set(wanted) and max(c.errors.values()) < 1e-14


@pytest.mark.parametrize("second", OTHERS)
def test_svd_takes_every_method_that_acts_on_matrices(second):
    model, inputs = model_with(METHODS["LoRA"], OTHERS[second])
    wanted = the_sum(inputs, [2, -1.5])
    c = combine(inputs, [2, -1.5], "svd")
    for name, d in wanted.items():
        assert relative_error(change(c, name), d) < 1e-13, name
    low = combine(inputs, [2, -1.5], "svd", 2, "low")
    for name, d in wanted.items():
        s = numpy.linalg.svd(d, compute_uv=False)
        assert abs(low.errors[name] - math.sqrt((s[2:] ** 2).sum() / (s ** 2).sum())) < 1e-12
        assert low.places[name].shape == d.shape and low.at[low.places[name]].A.shape[0] == min(2, len(s))


def test_a_combination_in_float32_says_what_its_rounding_costs():
    model, inputs = model_with(METHODS["LoRA"], METHODS["rsLoRA"], dtype="float32")
    c = combine(inputs, [0.7, 0.3])
    assert all(p.data.dtype == numpy.float32 for p in c.parameters.values())
    assert 1e-9 < max(c.errors.values()) < 1e-6
    for name, d in the_sum(inputs, [0.7, 0.3]).items():
        assert abs(c.errors[name] - relative_error(change(c, name), d)) < 1e-12
    even = combine([inputs[0]], [2], name="even")
    assert max(even.errors.values()) == 0


def test_where_the_scales_agree_cat_keeps_every_number():
    model, (a, b) = model_with(LoRA(2, 3, where=Q), LoRA(4, 6, where=Q), dtype="float32")
    c = combine([a, b], [1, 1])
    for name in c.places:
        first, second = a.tensors[f"{name}.A"], b.tensors[f"{name}.A"]
        assert c.tensors[f"{name}.A"].tobytes() == first.tobytes() + second.tobytes()
        assert c.tensors[f"{name}.B"].tolist() == numpy.concatenate(
            [a.tensors[f"{name}.B"], b.tensors[f"{name}.B"]], axis=1).tolist()
    assert c.method == LoRA(6, 1.5, where=c.method.where, scaling="alpha")


@pytest.mark.parametrize("method", [*METHODS, *OTHERS, "Bottleneck", "PromptTuning"])
def test_one_adapter_at_weight_1_is_itself_bit_for_bit(method):
    """For every method: a copy, with arrays of its own."""
    made = {"Bottleneck": minipeft.Bottleneck(), "PromptTuning": minipeft.PromptTuning(2)}
    model, (a,) = model_with({**METHODS, **OTHERS, **made}[method])
    before = logits(model, CASE.batch()).tobytes()
    c = combine([a], [1])
    assert logits(model, CASE.batch()).tobytes() == before and c.method == a.method
    assert (a.state, c.state, c.name, set(c.errors.values())) == ("off", "plugged", "combined", {0.0})
    assert bits(c.tensors) == bits(a.tensors) and not any(
        numpy.shares_memory(p.data, q.data) for p, q in zip(c.arrays.values(), a.arrays.values()))
    assert {p.data.tobytes() for p in c.parameters.values()} == {p.data.tobytes() for p in a.parameters.values()}


def test_one_lora_at_another_weight_has_another_scale_and_the_same_arrays():
    model, (a,) = model_with(METHODS["rsLoRA"])
    wanted = logits(model, CASE.batch(), adapter={"a": -0.5})
    c = combine([a], [-0.5])
    assert bits(c.tensors) == bits(a.tensors)
    assert abs(logits(model, CASE.batch()) - wanted).max() < 1e-13 * abs(wanted).max()


def test_factor_linear_is_pefts_formula_with_its_cross_terms():
    model, (a, b) = model_with(LoRA(2, 3, where=Q), LoRA(2, -5, where=Q))
    c = combine([a, b], [0.7, 0.3], "factor-linear")
    for name in c.places:
        (A1, B1), (A2, B2) = ((x.tensors[f"{name}.A"], x.tensors[f"{name}.B"]) for x in (a, b))
        r1, r2 = math.sqrt(0.7 * 1.5), math.sqrt(0.3 * 2.5)
        assert numpy.allclose(c.tensors[f"{name}.A"], r1 * A1 - r2 * A2, rtol=1e-14, atol=1e-15)
        assert numpy.allclose(c.tensors[f"{name}.B"], r1 * B1 + r2 * B2, rtol=1e-14, atol=1e-15)
        cross = r1 * r2 * (B2 @ A1 - B1 @ A2)
        d = 0.7 * change(a, name) + 0.3 * change(b, name)
        assert abs(c.errors[name] - numpy.linalg.norm(cross) / numpy.linalg.norm(d)) < 1e-13
    assert c.method.scale_at(name, c.places[name]) == 1


# ---- the model


def test_the_combination_takes_the_place_of_the_lowest_plugged_one_and_the_others_go_off():
    model, (a, b, c, d) = model_with(*[LoRA(1, where=Q)] * 4)
    c.unplug()
    made = combine([d, b], [1, 1])
    assert model.plugged == ("a", "combined") and (b.state, d.state, made.state) == ("off", "off", "plugged")
    above = attach(model, LoRA(1, where=Q), RNG(9), "above")
    assert combine([c], [0.5], name="top").state == "plugged"
    assert model.plugged == ("a", "combined", "above", "top")
    combine([a, c], [1, 1], name="low")
    assert model.plugged == ("low", "combined", "above", "top") and above.state == "plugged"


def test_switched_back_everything_is_as_it_was():
    model, inputs = model_with(METHODS["LoRA"], METHODS["patterns"])
    before, own = logits(model, CASE.batch()), bits({**inputs[0].tensors, **model.state()})
    c = combine(inputs, [2, 3])
    c.remove()
    for a in inputs:
        a.plug()
    assert logits(model, CASE.batch()).tobytes() == before.tobytes()
    assert bits({**inputs[0].tensors, **model.state()}) == own


def test_a_combination_is_an_attachment_like_any_other(tmp_path):
    model, inputs = model_with(METHODS["patterns"], METHODS["pissa"])
    c = combine(inputs, [0.5, 2])
    wanted = logits(model, CASE.batch())
    c.save(tmp_path / "c.safetensors")
    fresh = CASE.model()
    minipeft.load(fresh, tmp_path / "c.safetensors")
    assert logits(fresh, CASE.batch()).tobytes() == wanted.tobytes()
    c.merge()
    assert abs(logits(model, CASE.batch()) - wanted).max() < 1e-12 * abs(wanted).max()
    c.unmerge()
    minipeft.value_and_grad(lambda: model.loss(**CASE.batch()), c.parameters)
    assert c.trained_on.below == () and logits(model, CASE.batch()).tobytes() == wanted.tobytes()


def test_the_file_of_a_combination_names_the_base_that_its_parts_were_trained_on():
    model, (a, b) = model_with(LoRA(1, where=Q), LoRA(2, where=Q))
    minipeft.value_and_grad(lambda: model.loss(**CASE.batch()), b.parameters)        # b on top of a
    c = combine([a, b], [1, 1])
    assert c.trained_on.base == minipeft.attaching.trained_on.content_of_base(model) and c.trained_on.below == ()
    with pytest.raises(ValueError, match="'b': it was trained on top of or together with attachment 'a', which is not"):
        combine([b], [2], name="alone")
    copied = combine([b], [1], name="copied")
    assert copied.trained_on == b.trained_on
    a.model.attachments["a"].parameters[next(iter(a.parameters))].data += 1
    with pytest.raises(ValueError, match="'a', which is not combined with it .or has other numbers by now."):
        combine([a, b], [1, 1], name="later")


def test_what_depends_on_the_weight_below_is_not_taken_from_there():
    model, (a, b) = model_with(LoRA(1, where=Q), ForeignDoRA(where=Q))
    minipeft.value_and_grad(lambda: model.loss(**CASE.batch()), b.parameters)
    with pytest.raises(ValueError, match="'b': it was trained on top of attachment 'a', and the change that "
                                         "ForeignDoRA makes depends on the weight below it"):
        combine([a, b], [1, 1], "svd")


def test_parts_of_different_bases_are_not_combined(tmp_path):
    model, (a, b) = model_with(LoRA(1, where=Q), LoRA(2, where=Q))
    b.unplug()
    minipeft.value_and_grad(lambda: model.loss(**CASE.batch()), a.parameters)
    a.trained_on = dataclasses.replace(a.trained_on, base="another")
    with pytest.raises(ValueError, match="'a', 'b' were trained on different bases; expected one"):
        combine([a, b], [1, 1])
    assert combine([a], [2]).trained_on.base == "another"


def test_a_change_that_depends_on_the_base_is_not_computed_on_another_one_than_it_was_trained_on():
    model, (a, b) = model_with(LoRA(1, where=Q), ForeignDoRA(where=Q))
    a.unplug()
    minipeft.value_and_grad(lambda: model.loss(**CASE.batch()), b.parameters)
    slot = next(iter(b.places.values()))
    slot.base.data = slot.base.data + 1
    unchanged(model, lambda: combine([b], [1], "svd"),
              "'b': it was trained on another base than the model has now, and the change that ForeignDoRA makes")
    assert combine([b], [1]).trained_on == b.trained_on


# ---- what is refused


REFUSED: dict[str, tuple] = {
    "nothing": (lambda a, b, c: ([], []), {}, "attachments is empty"),
    "few weights": (lambda a, b, c: ([a, b], [1]), {}, r"weights is \[1\]; expected 2 numbers"),
    "one number": (lambda a, b, c: ([a, b], 1), {}, "weights is 1; expected 2 numbers"),
    "a NaN": (lambda a, b, c: ([a, b], [1, math.nan]), {}, "a weight is nan; expected a finite number"),
    "a boolean": (lambda a, b, c: ([a, b], [1, True]), {}, "a weight is True; expected a finite number"),
    "an infinity": (lambda a, b, c: ([a], [math.inf]), {}, "a weight is inf"),
    "twice": (lambda a, b, c: ([a, b, a], [1, 1, 1]), {}, "'a' is given twice"),
    "a way": (lambda a, b, c: ([a], [1]), {"how": "linear"}, "how is 'linear'; expected one of 'cat', 'svd', "),
    "a rank": (lambda a, b, c: ([a], [1]), {"rank": 2}, "rank is 2 with how='cat'"),
    "rank 0": (lambda a, b, c: ([a], [1]), {"how": "svd", "rank": 0}, "rank is 0; expected an integer >= 1"),
    "a name": (lambda a, b, c: ([a], [1]), {"name": "b"}, "an attachment named 'b' is already on this model"),
    "a bad name": (lambda a, b, c: ([a], [1]), {"name": "x y"}, "name is 'x y'"),
    "ranks": (lambda a, b, c: ([a, b], [1, 1]), {"how": "factor-linear"}, "the ranks at .* are 2, 7; how='factor"),
    "too many": (lambda a, b, c: ([a, b, c], [1, 1, 1]), {},
                 "add up to 14, and no matrix of its shape has more than 12; use how='svd'")}


@pytest.mark.parametrize("case", REFUSED)
def test_a_combination_that_cannot_be_is_refused_before_anything_changes(case):
    pick, options, message = REFUSED[case]
    model, inputs = model_with(LoRA(2, where=Q), LoRA(7, where=Q), LoRA(5, where=Q))
    unchanged(model, lambda: combine(*pick(*inputs), **options), message)


def unchanged(model: Any, run: Any, message: str, error: type = ValueError) -> None:
    state = model.host.now
    with pytest.raises(error, match=message):
        run()
    assert model.host.now is state


def test_merged_removed_and_foreign_attachments_are_refused():
    model, (a, b, c) = model_with(LoRA(2, where=Q), LoRA(2, where=Q), LoRA(2, where=V))
    other, (d,) = model_with(LoRA(2, where=Q))
    unchanged(model, lambda: combine([a, d], [1, 1]), "'a' and 'a' are on different models")
    unchanged(model, lambda: combine([a, "b"], [1, 1]), "attachments holds 'b'; expected attachments", TypeError)
    a.merge(), b.merge()
    unchanged(model, lambda: combine([b, c], [1, 1]), "cannot combine 'b': it is merged; expected off or plugged")
    b.unmerge()
    c.remove()
    unchanged(model, lambda: combine([c], [1]), "cannot combine 'c': it is removed")
    a.unmerge(), a.unplug(), b.merge()
    state = model.host.now
    assert combine([a], [1]).state == "plugged" and model.host.now is not state


def test_what_lies_below_a_merged_one_is_refused():
    model, (a, b) = model_with(LoRA(2, where=Q), LoRA(2, where=Q))
    a.merge(), b.merge()
    unchanged(model, lambda: combine([a], [2]), "'a': it is merged")


@pytest.mark.parametrize("first", [LoRA(2, where=Q), LoRA(2, where=[r"\.k\.weight$"])])
def test_nothing_is_combined_below_a_constant_that_would_hide_it(first):
    """b is merged between a and c, at a place that c alone shares with it."""
    model, (a, b, c) = model_with(first, LoRA(2, where=V), LoRA(2, where=V))
    b.merge()
    unchanged(model, lambda: combine([a, c], [1, 1]), "cannot plug 'combined': 'b' was merged on top of it at")
    wanted = logits(model, CASE.batch(), adapter={"b": 1, "a": 1, "c": 2})
    combine([c], [2])
    assert model.plugged == ("a", "b", "combined")
    assert abs(logits(model, CASE.batch()) - wanted).max() < 1e-12 * abs(wanted).max()


@pytest.mark.parametrize("how", ["cat", "svd", "factor-linear"])
def test_numbers_that_are_not_finite_are_refused_before_anything_changes(how):
    for dtype, weight, message in (("float64", 1e308, "cannot combine 'a': at .* weight 1e\\+308 times its scale 4 "),
                                   ("float32", 1e307, "at .* are not finite in float32|alpha is 4e\\+307"),
                                   ("float64", 1, "the sum of the changes at .*0.attn.q.weight is not finite")):
        model, (a, b) = model_with(LoRA(2, 8, where=Q), LoRA(2, 8, where=Q), dtype=dtype)
        if weight == 1:
            a.at[next(iter(a.places.values()))].A.data[0, 0] = math.nan
        unchanged(model, lambda: combine([a, b], [weight, 1], how), message)
        unchanged(model, lambda: combine([a, b], [weight, weight], how), message)


@pytest.mark.parametrize("size", [1e-300, 1e-170, 1e170])
def test_errors_of_tiny_and_huge_changes_are_told_as_those_of_others(size):
    model, (a, b) = model_with(LoRA(2, 2, where=Q), LoRA(2, 2, where=Q))
    errors = combine([a, b], [1, 1], "svd", 1).errors.values()
    scaled = combine([a, b], [size, size], "svd", 1, "scaled").errors.values()
    assert numpy.allclose(list(scaled), list(errors), rtol=1e-9) and min(errors) > 0.01


@pytest.mark.parametrize("how", ["cat", "factor-linear"])
@pytest.mark.parametrize("method", OTHERS)
def test_a_method_without_two_factors_is_refused_by_its_name_with_what_to_do(method, how):
    model, (a, b) = model_with(LoRA(2, where=Q), OTHERS[method])
    kind = type(b.method).__name__
    message = (f"cannot combine 'b' by how='{how}': the change that {kind} makes is no product of two factors; use "
               "how='svd', or adapter={'b': 1, ...} at inference")
    unchanged(model, lambda: combine([a, b], [1, 1], how), message)
    unchanged(model, lambda: combine([b], [1.5], how), message.replace("1, ", "1.5, "))


@pytest.mark.parametrize("method, kind", [(minipeft.Bottleneck(), "sublayer"), (minipeft.PromptTuning(2), "input"),
                                          (Selective(component="norm"), "norm"),
                                          (Selective(component="position"), "position")])
def test_what_is_no_matrix_is_refused_by_its_place(method, kind):
    model, (a, b) = model_with(LoRA(2, where=Q), method)
    unchanged(model, lambda: combine([a, b], [1, 1], "svd"), f"cannot combine 'b': at .* of kind '{kind}")


def test_an_adapter_that_changes_nothing_adds_nothing():
    model, (a,) = model_with(LoRA(2, where=Q))
    b = attach(model, LoRA(2, where=V), RNG(0), "b")                       # B is 0
    c = combine([a, b], [1, 3], "svd")
    assert {c.errors[name] for name in b.places} == {0.0} and list(c.places) != list(a.places)
    zero = combine([a], [0], name="zero")
    c.unplug()
    assert same_values(logits(model, CASE.batch()), logits(model, CASE.batch(), adapter=[None] * 4))
    assert zero.method.alpha == 1
