"""A failure is named after the planted bug that behaves like it; where none does, numbers are described."""
from __future__ import annotations

import types

import numpy
import pytest

from minipeft.conformance.diagnose import explain, suspects, witness, words
from minipeft.conformance.emulated import Emulated
from minipeft.conformance.hints import hints, proportion
from minipeft.conformance.look import fails
from minipeft.conformance.methods.lora_linear import METHOD
from minipeft.conformance.methods.lora_linear.plain import LoraLinear
from minipeft.conformance.observe import Observation
from minipeft.conformance.outputs import output_property
from minipeft.conformance.plugin import Plugin

MUTANTS = {mutant.id: mutant for mutant in METHOD.mutants}
LAWS = {prop.id: prop for prop in METHOD.properties}
SIZES = ({"N": 3, "in": 12, "out": 7, "r": 3}, {"N": 4, "in": 4, "out": 4, "r": 4})


class OtherOrder(Emulated):
    """Sums products one by one from the last: other roundings than the planted bugs have."""

    def mm(self, a, b):
        a, b = numpy.asarray(a, self.wide), numpy.asarray(b, self.wide)
        total = numpy.zeros((len(a), b.shape[1]), self.wide)
        for i in reversed(range(a.shape[1])):
            total = total + a[:, i:i + 1] * b[i:i + 1]
        return self.r(total)


def implementation(build, **declared):
    def factory(*args, **kwargs):
        layer = build(*args, **kwargs)
        layer.e = OtherOrder(layer.e.dtype)
        return layer
    capabilities = {"name": "mine", "dtypes": ("float64", "float32", "bfloat16"), **declared}
    return Plugin(types.SimpleNamespace(capabilities=capabilities, lora_linear=factory))


def cases(plugin, dtype="float64"):
    for seed, sizes in enumerate(SIZES):
        for exact in (False, True):
            yield plugin.settle(METHOD.draw(numpy.random.default_rng(seed), dtype, exact, sizes), METHOD)


def failures(plugin, dtype="float64"):
    """The first failure of each property."""
    found, make = {}, plugin.make(METHOD)
    for case in cases(plugin, dtype):
        for prop in METHOD.properties:
            if prop.applies(case) and prop.id not in found:
                seen = witness(prop, case, make)
                if fails(seen):
                    found[prop.id] = prop, case, seen
    return list(found.values())


@pytest.mark.parametrize("id, dtype", [
    ("lora.scale_sqrt", "float64"), ("lora.scale_sqrt", "bfloat16"), ("lora.alpha_int", "float32"),
    ("lora.grad_x_stopped", "bfloat16"), ("lora.merges_twice", "float32"), ("lora.unknown_ignored", "float64"),
    ("lora.frozen_zeros", "float64"), ("lora.save_drops_alpha", "bfloat16")])
def test_a_planted_bug_that_rounds_otherwise_is_named_and_no_other(id, dtype):
    plugin = implementation(MUTANTS[id].build)
    assert [mutant.id for mutant in explain(METHOD, failures(plugin, dtype), plugin.make(METHOD))] == [id]


def test_a_correct_implementation_leaves_nothing_to_explain():
    assert failures(implementation(LoraLinear)) == [] and explain(METHOD, []) == []


def test_two_bugs_that_one_failure_cannot_tell_apart_are_told_apart_by_what_else_they_do():
    plugin = implementation(MUTANTS["lora.merged_flag_lost"].build)
    found = failures(plugin)
    assert [prop.id for prop, *_ in found] == ["L13m"]
    assert {m.id for m in explain(METHOD, found)} == {"lora.merged_flag_lost", "lora.merged_adds_again"}
    assert [m.id for m in explain(METHOD, found, plugin.make(METHOD))] == ["lora.merged_flag_lost"]


def test_where_no_bug_explains_all_those_that_explain_most_are_named():
    case = next(cases(implementation(LoraLinear)))
    found = []
    for id, law in (("lora.scale_times_rank", "L1"), ("lora.scale_times_rank", "L3"), ("lora.frozen_zeros", "L7")):
        found.append((LAWS[law], case, witness(LAWS[law], case, implementation(MUTANTS[id].build).make(METHOD))))
    assert [m.id for m in explain(METHOD, found)] == ["lora.scale_times_rank"]
    assert suspects(METHOD, *found[0], among=[MUTANTS["lora.frozen_zeros"]]) == []


def test_a_run_that_was_left_at_its_first_failure_is_explained_too():
    plugin = implementation(MUTANTS["lora.grad_a_mean"].build)
    case = next(cases(plugin))
    seen = witness(LAWS["L2"], case, plugin.make(METHOD))
    assert len(seen) == 3
    for part in (seen, seen[:1]):
        assert [m.id for m in suspects(METHOD, LAWS["L2"], case, part)] == ["lora.grad_a_mean"]


def test_an_output_held_against_a_published_value_is_explained():
    plugin = implementation(MUTANTS["lora.scale_times_rank"].build)
    case = next(cases(plugin))
    prop = output_property(METHOD, "W_merged", case, METHOD.exact(case)["W_merged"])
    seen = witness(prop, case, plugin.make(METHOD))
    assert [m.id for m in explain(METHOD, [(prop, case, seen)])] == ["lora.scale_times_rank"]


def test_a_fault_is_explained_by_the_same_kind_of_fault():
    plugin = implementation(MUTANTS["lora.no_effect"].build)
    case = next(cases(plugin))
    seen = witness(LAWS["L2"], case, plugin.make(METHOD))
    assert [str(o).split(":")[0] for o in seen] == ["absent"]
    assert [m.id for m in suspects(METHOD, LAWS["L2"], case, seen)] == ["lora.no_effect"]


def test_one_who_declares_a_convention_and_computes_by_another_is_told():
    plugin = implementation(LoraLinear, conventions={"lora_linear": {"scaling": "alpha/sqrt(r)"}})
    found = explain(METHOD, failures(plugin), plugin.make(METHOD))
    assert words(METHOD, found) == "looks like the default conventions, not the declared ones: scaling alpha/r"


def test_the_words_have_the_effect_and_the_reports():
    said = words(METHOD, [MUTANTS["lora.scale_alpha"]])
    assert said.startswith("looks like s = alpha, not alpha / r (the update is r times too strong; reported in ")
    assert "Blaizzy/mlx-vlm #845" in said


class Unplanted(LoraLinear):
    """s = alpha r^2 ... and no mutant of ours does that."""

    def scale(self, A, alpha):
        return alpha * len(A)**2


def test_where_no_bug_fits_the_factor_is_measured_and_named():
    plugin = implementation(Unplanted)
    case = next(cases(plugin))
    found = [(LAWS[id], case, witness(LAWS[id], case, plugin.make(METHOD))) for id in ("L1", "L2")]
    assert explain(METHOD, found) == []
    said = words(METHOD, [], found)
    assert said.startswith("no planted bug of this kit gives this output; y: the contribution of A and B is 27 times")
    assert "dA is 27 times the expected value" in said


def observation(got, want, tau=1e-9):
    return Observation("y", "B", got, want, numpy.full(numpy.shape(want), tau))


def test_a_factor_has_the_name_of_what_it_is():
    case = METHOD.draw(numpy.random.default_rng(0), "float64", False, {"N": 6, "in": 12, "out": 7, "r": 3})
    case = case.but(params={"alpha": 5.0})
    y = METHOD.reference(case)["y"].exact.astype(float)
    for c, name in ((3, "r"), (5, "alpha"), (1 / 3, "1/r"), (3 ** 0.5, "sqrt(r)"), (1 / 6, "1/N"), (-1, "-1"),
                    (9, "r^2"), (5 / 3, "alpha / r"), (5 / 3 ** 0.5, "alpha / sqrt(r)")):
        assert f"(= {name}" in hints(METHOD, case, observation(c * y, y))[0], name
    assert "(=" not in hints(METHOD, case, observation(1.2345 * y, y))[0]


def test_what_is_seen_at_a_glance_is_said():
    case = next(cases(implementation(LoraLinear)))
    y = numpy.random.default_rng(1).standard_normal((5, 5))
    assert hints(METHOD, case, observation(0 * y, y))[0] == "y is zero everywhere"
    assert hints(METHOD, case, observation(y.T, y))[0] == "y is transposed"
    assert hints(METHOD, case, observation(y[[1, 2, 0, 4, 3]], y))[0].endswith("rows in another order: 1, 2, 0, 4, 3")
    assert hints(METHOD, case, observation(numpy.where(y == y[2, 3], numpy.nan, y), y)) == [
        "y has 1 of 25 numbers that are NaN or infinite, in rows 2"]
    off = y.copy()
    off[2] += numpy.arange(5) + 1
    assert hints(METHOD, case, observation(off, y))[0].endswith("and only row 2 of 5 is wrong")


def test_the_precision_of_a_narrower_dtype_is_recognized():
    case = next(cases(implementation(LoraLinear)))
    value = METHOD.reference(case)["y"]
    y = value.exact.astype(float)
    seen = Observation("y", "B", y.astype(numpy.float32).astype(float), y, case.tau(value))
    assert not seen.holds
    assert "only as accurate as float32: is something stored in float32" in hints(METHOD, case, seen)[0]


def test_one_number_is_no_proportion_unless_it_has_a_name_and_zero_is_none():
    case = next(cases(implementation(LoraLinear)))
    assert "times" not in hints(METHOD, case, observation(numpy.array([[1.2345]]), numpy.array([[1.0]])))[0]
    assert proportion(numpy.ones(3), numpy.zeros(3), numpy.zeros(3)) is None
    assert proportion(numpy.ones(3), numpy.ones(3), numpy.zeros(3)) is None
