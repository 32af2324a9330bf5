"""LoRA on a linear layer: correct implementations that round otherwise pass, and bugs of what a layer keeps do not."""
import warnings

import numpy
import pytest
import safetensors.numpy

from minipeft.conformance.case import Case
from minipeft.conformance.look import fails, look
from minipeft.conformance.methods.lora_linear import METHOD
from minipeft.conformance.methods.lora_linear.equations import values
from minipeft.conformance.methods.lora_linear.laws_of_moves import second
from minipeft.conformance.methods.lora_linear.ours import lora_linear
from minipeft.conformance.methods.lora_linear.plain import LoraLinear
from minipeft.conformance.methods.lora_linear.steps import leaves_after, rate_of, values_after
from minipeft.conformance.selftest import drawn, plugin_of

LAWS = {prop.id: prop for prop in METHOD.properties}


def failing(build, dtype, cases):
    """The ids of the laws that fail on any of the cases."""
    plugin, found = plugin_of(METHOD, build, dtype), set()
    for case in (plugin.settle(case, METHOD) for case in cases):
        for prop in METHOD.properties:
            if prop.applies(case) and plugin.make(METHOD)(case).offers(*prop.needs):
                if fails(look(prop, case, plugin, plugin.make(METHOD))[0]):
                    found.add(prop.id)
    return found


def several(dtype, seeds):
    return [case for seed in range(seeds) for case in drawn(METHOD, dtype, seed)]


class Fused(LoraLinear):
    """One product of [x, x A^T] with [W, s B]^T: other sums than one with W alone."""

    def forward(self, x):
        if self.kept is not None or not self.active:
            return self.base(x)
        A, B, alpha = self.adapters[self.active[0]]
        wide, tall = numpy.hstack([x, self.e.mm(x, A.T)]), numpy.hstack([self.W, self.e.r(self.scale(A, alpha) * B)])
        return self.e.r(self.e.mm(wide[:, ::-1], tall[:, ::-1].T) + self.b)


class Composed(LoraLinear):
    """x (W + s B A)^T, from the back."""

    def forward(self, x):
        W = self.W if self.kept is not None or not self.active else self.merged()
        return self.e.r(self.e.mm(x[:, ::-1], W[:, ::-1].T) + self.b)


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16", "float16"])
@pytest.mark.parametrize("build", [Fused, Composed, LoraLinear])
def test_no_law_blames_a_correct_implementation(build, dtype):
    assert failing(build, dtype, several(dtype, 4)) == set()


@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_no_law_blames_minipeft(dtype):
    assert failing(lora_linear, dtype, several(dtype, 2)) == set()


@pytest.mark.parametrize("dtype, x, g", [
    ("bfloat16", 1.0, -0.020751953125), ("float16", 0.0069122314453125, 0.04107666015625)])
def test_a_correct_step_that_leaves_y_as_it_was_in_half_precision_is_not_blamed(dtype, x, g):
    one = numpy.ones((1, 1))
    x, g = x * one, g * one
    case = Case("lora_linear", dtype, False, {"alpha": 1.0}, {"W": 0 * one, "b": 0 * one[0], "A": one, "B": one,
                                                              "x": x, "g": g})
    layer = LoraLinear(0 * one, 0 * one[0], one, one, 1.0, dtype)
    before = layer.forward(x)
    layer.step(x, g, 0.125)
    assert layer.forward(x) == before
    assert failing(LoraLinear, dtype, [case]) == set()


@pytest.mark.parametrize("dtype", ["float64", "bfloat16", "float16"])
def test_a_step_is_as_large_as_what_half_precision_holds(dtype):
    """By 1 at most: alpha 16 at rank 1 makes gradients of hundreds, and float16 ends at 65504."""
    plugin = plugin_of(METHOD, LoraLinear, dtype)
    for case in (plugin.settle(case, METHOD) for case in several(dtype, 3)):
        ref = values(case)
        assert rate_of(ref) <= 0.125 and numpy.log2(rate_of(ref)) % 1 == 0
        for leaf, moved in leaves_after(case, ref).items():
            assert (abs(moved.value - case[leaf]) <= 1).all()
        assert (abs(values_after(case)["y"].exact) < 60000).all()


def test_the_reference_after_a_step_is_that_of_the_layer_with_the_stepped_arrays():
    case = plugin_of(METHOD, LoraLinear, "float64").settle(drawn(METHOD, "float64", 3)[0], METHOD)
    ref = values(case)
    moved = case.but({k: numpy.asarray(case[k] - rate_of(ref) * ref[f"d{k}"].exact, float) for k in "AB"})
    for name, value in values(moved).items():
        assert (abs(value.exact - values_after(case)[name].exact) <= case.tau(values_after(case)[name])).all(), name


@pytest.mark.parametrize("scaling", METHOD.conventions["scaling"])
def test_the_second_adapter_has_another_rank_where_there_is_room_and_another_strength(scaling):
    for case in several("float64", 4):
        case = case.but(conventions={"scaling": scaling})
        other, least = second(case), min(case["W"].shape)
        assert len(other["A"]) == other["B"].shape[1] <= least and other.params["alpha"] != case.params["alpha"]
        assert len(other["A"]) != len(case["A"]) or least < 4


class StepAscends(LoraLinear):
    def step(self, x, g, lr):
        super().step(x, g, -lr)


class StepOnlyB(LoraLinear):
    def step(self, x, g, lr):
        A = self.adapters[self.active[0]][0]
        super().step(x, g, lr)
        self.adapters[self.active[0]] = (A, *self.adapters[self.active[0]][1:])


class StepSquaresRate(LoraLinear):
    def step(self, x, g, lr):
        super().step(x, g, lr * lr)


class MaskStays(LoraLinear):
    mask = None

    def forward_train(self, x, keep):
        self.mask = keep
        return super().forward_train(x, keep)

    def forward(self, x):
        stays = self.mask is not None and self.mask.shape == x.shape
        return super().forward_train(x, self.mask) if stays else super().forward(x)


class DeltaOfFirstMerge(LoraLinear):
    kept_delta = None

    def merged(self):
        self.kept_delta = self.delta(self.active[0]) if self.kept_delta is None else self.kept_delta
        return self.e.r(self.W + self.kept_delta)


class ScaleStaleInVjp(LoraLinear):
    def __init__(self, W, b, A, B, alpha, dtype, **fields):
        super().__init__(W, b, A, B, alpha, dtype, **fields)
        self.first = self.scale(A, alpha)

    def vjp(self, x, g):
        (A, B, alpha), name = self.adapters[self.active[0]], self.active[0]
        if name != "default":
            return super().vjp(x, g)
        self.adapters[name] = A, B, self.first * len(A)
        found = super().vjp(x, g)
        self.adapters[name] = A, B, alpha
        return found


class NoneIsIgnored(LoraLinear):
    def activate(self, names):
        super().activate(names or self.active)


class ActivatesWhileMerged(LoraLinear):
    def activate(self, names):
        kept, self.kept = self.kept, None
        super().activate(names)
        self.kept = kept


class SafeMergeUnmarked(LoraLinear):
    def merge_safe(self):
        self.W = self.merged()


class UnknownRowIsBase(LoraLinear):
    def adapter_of(self, rows):
        return [row if row in self.adapters else None for row in rows]


class AddedBeforeChecked(LoraLinear):
    def add(self, name, A, B, alpha):
        try:
            super().add(name, A, B, alpha)
        except ValueError:
            self.adapters.setdefault(name, (0 * self.W[:1], 0 * self.W[:, :1], 1.0))
            raise


class LoadTakesAlphaFirst(LoraLinear):
    def load(self, blob):
        A, B, _ = self.adapters["default"]
        self.adapters["default"] = A, B, float(safetensors.numpy.load(blob)["alpha"])
        super().load(blob)


class StepsDefault(LoraLinear):
    def step(self, x, g, lr):
        active, self.active = self.active, ["default"]
        super().step(x, g, lr)
        self.active = active


@pytest.mark.parametrize("build, law", [
    (StepAscends, "L7v"), (StepOnlyB, "L7v"), (StepSquaresRate, "L7v"), (MaskStays, "L12f"),
    (DeltaOfFirstMerge, "L13m"), (ScaleStaleInVjp, "L13"), (NoneIsIgnored, "L9"), (ActivatesWhileMerged, "L9w"),
    (SafeMergeUnmarked, "L14"), (UnknownRowIsBase, "X2"), (AddedBeforeChecked, "X2"), (LoadTakesAlphaFirst, "L13x"),
    (StepsDefault, "L9a")])
@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16"])
def test_a_bug_of_what_a_layer_keeps_is_found_by_the_law_about_it(build, law, dtype):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        assert law in failing(build, dtype, drawn(METHOD, dtype, 1))


def test_a_step_that_leaves_w_is_told_apart_from_one_that_is_wrong():
    assert not {"L7s"} & failing(StepAscends, "float64", drawn(METHOD, "float64", 1))
    assert LAWS["L7s"].needs == ("step", "weight")
