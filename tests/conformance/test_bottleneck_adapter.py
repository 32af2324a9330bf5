"""Bottleneck adapters: the reference is checked by hand and by differences in 50 digits, then implementations are held
against it, minipeft's engine among them."""
import math

import mpmath
import numpy
import pytest

from minipeft.conformance.arithmetic import on_grid
from minipeft.conformance.case import Case
from minipeft.conformance.look import fails, look
from minipeft.conformance.methods.bottleneck_adapter import METHOD
from minipeft.conformance.methods.bottleneck_adapter.activations import ACTIVATIONS, Constants
from minipeft.conformance.methods.bottleneck_adapter.equations import PLACEMENTS, exact_values, many_digits, values
from minipeft.conformance.methods.bottleneck_adapter.ours import bottleneck_adapter, reading_the_norm
from minipeft.conformance.methods.bottleneck_adapter.plain import BottleneckAdapter
from minipeft.conformance.plugin import Fault
from minipeft.conformance.selftest import drawn, plugin_of
from minipeft.conformance.tolerance import rho


def by_hand(placement, **conventions):
    """One row, d = 2, m = 1: A(h) = U relu(D h + 1) + (1, 0), D = (1, 2), U = (3, -1); s = 2."""
    arrays = {"D": [[1, 2]], "b_D": [1], "U": [[3], [-1]], "b_U": [1, 0], "x": [[1, 0]], "n": [[0, 2]], "F": [[0, 1]],
              "g": [[1, 1]]}
    return Case("bottleneck_adapter", "float64", True, {"activation": "relu", "placement": placement, "scale": 2.0},
                {name: numpy.array(value, numpy.float64) for name, value in arrays.items()}, conventions=conventions)


@pytest.mark.parametrize("placement, conventions, z, y, dx, dF, dn", [
    ("houlsby", {}, 3, [1 + 20, 1 - 6], [1, 1], [1 + 4, 1 + 8], None),
    ("pfeiffer", {}, 4, [1 + 26, 1 - 8], [5, 9], [5, 9], None),
    ("pfeiffer", {"residual": "adapter_input"}, 4, [2 + 26, 1 - 8], [6, 10], [5, 9], None),
    ("parallel", {}, 2, [1 + 14, 1 - 4], [5, 9], [1, 1], None),
    ("parallel", {"parallel_input": "norm"}, 5, [1 + 32, 1 - 10], [1, 1], [1, 1], [4, 8])])
def test_one_row_by_hand(placement, conventions, z, y, dx, dF, dn):
    """y = x + F + 2 (3 z + 1, -z); da = 2 (3 - 1) = 4, so that what is read gets 4 (1, 2)."""
    found = {name: value.exact.tolist() for name, value in values(by_hand(placement, **conventions)).items()}
    assert found["y"] == [y] and found["dx"] == [dx] and found["dF"] == [dF] and found.get("dn") == (dn and [dn])
    assert found["dU"] == [[2 * z], [2 * z]] and found["db_U"] == [2, 2] and found["db_D"] == [4]
    assert found["dD"] == [[4 * h for h in {3: (0, 1), 4: (1, 1), 2: (1, 0), 5: (0, 2)}[z]]]


@pytest.mark.parametrize("z, gelu, gelu_tanh, swish", [
    (1.0, 0.5 * (1 + math.erf(math.sqrt(0.5))), 0.8411919906082768, 1 / (1 + math.exp(-1))),
    (-2.0, -(1 + math.erf(-math.sqrt(2))), -0.04540230591222, -2 / (1 + math.exp(2)))])
def test_activations_at_points(z, gelu, gelu_tanh, swish):
    at = numpy.array([numpy.longdouble(z)])
    for name, want in (("relu", max(z, 0)), ("gelu", gelu), ("gelu_tanh", gelu_tanh), ("swish", swish)):
        assert abs(float(ACTIVATIONS[name][0](at, Constants(at))[0]) - want) < 1e-14, name


@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh", "swish"])
def test_slopes_are_differences_in_50_digits(activation):
    f, slope = ACTIVATIONS[activation]
    with mpmath.workdps(50):
        z, step = many_digits([-3.0, -0.5, 0.0, 0.25, 2.0]), mpmath.mpf("1e-15")
        c = Constants(z)
        difference = (f(z + step, c) - f(z - step, c)) / (2 * step)
        assert max(abs(difference - slope(z, c))) < 1e-28


@pytest.mark.parametrize("dtype", ["float64", "bfloat16"])
def test_fractions_and_50_digits_agree_with_long_floats(dtype):
    for case in METHOD.vectors():
        if case.dtype == dtype:
            exact = exact_values(case)
            for name, value in values(case).items():
                assert rho(exact[name].exact, value.exact, case.tau(exact[name])) <= 0.5, (case.label, name)


def clean(build, dtype, **conventions):
    """Holds on a few cases, of all placements in turn."""
    plugin = plugin_of(METHOD, build, dtype, conventions)
    for i, case in enumerate(drawn(METHOD, dtype, 7)):
        settled = plugin.settle(case.but(params={"placement": PLACEMENTS[i // 2]}), METHOD)  # bounded, then exact
        for prop in METHOD.properties:
            if prop.applies(settled):
                for seen in look(prop, settled, plugin, plugin.make(METHOD))[0]:
                    assert not isinstance(seen, Fault) and seen.holds, (prop.id, seen)


@pytest.mark.parametrize("build, dtype", [(BottleneckAdapter, "float64"), (BottleneckAdapter, "float32"),
                                          (BottleneckAdapter, "bfloat16"), (bottleneck_adapter, "float64"),
                                          (bottleneck_adapter, "float32")])
def test_no_law_blames_a_correct_implementation(build, dtype):
    clean(build, dtype)


class Folded(BottleneckAdapter):
    """The scale is part of U and b_U: of dU and db_U it multiplies what has been summed."""

    def adapted(self, h):
        r = self.e.r
        return r(self.e.mm(self.f(self.inner(h)), r(self.s * self.U).T) + r(self.s * self.b_U))

    def vjp(self, x, n, F, g):
        e, h = self.e, self.read(x, n, F)
        z = self.inner(h)
        dz = e.r(e.mm(g, e.r(self.s * self.U)) * self.slope(z))
        found = {"D": e.mm(dz.T, h), "b_D": e.sum(dz, axis=0), "U": e.r(self.s * e.mm(g.T, self.f(z))),
                 "b_U": e.r(self.s * e.sum(g, axis=0))}
        return {**found, **self.to_stream(g, e.mm(dz, self.D))}


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16"])
@pytest.mark.parametrize("scale", [None, 0.1])
def test_nor_one_that_folds_the_scale_into_its_weights(dtype, scale):
    plugin = plugin_of(METHOD, Folded, dtype)
    for seed in range(6):
        for case in drawn(METHOD, dtype, seed):
            if scale and not case.exact:
                case = case.but(params={"scale": float(on_grid(scale, dtype))})
            settled = plugin.settle(case, METHOD)
            for prop in METHOD.properties:
                if prop.applies(settled):
                    for seen in look(prop, settled, plugin, plugin.make(METHOD))[0]:
                        assert not isinstance(seen, Fault) and seen.holds, (prop.id, seen)


class Twice(BottleneckAdapter):
    """The other residual: x once more."""

    def joined(self, x, F, a):
        y = super().joined(x, F, a)
        return self.e.r(y + x) if self.placement == "pfeiffer" else y

    def to_stream(self, g, dh):
        found = super().to_stream(g, dh)
        return {**found, "x": self.e.r(g + found["x"])} if self.placement == "pfeiffer" else found


class Norm(BottleneckAdapter):
    reads_norm = True


@pytest.mark.parametrize("build, conventions", [(Twice, {"residual": "adapter_input"}),
                                                (Norm, {"parallel_input": "norm"}),
                                                (reading_the_norm, {"parallel_input": "norm"})])
def test_nor_one_that_declares_another_convention(build, conventions):
    clean(build, "float32", **conventions)
    with pytest.raises(AssertionError):
        clean(build, "float32")  # and does not declare it


@pytest.mark.parametrize("id, laws", [
    ("adapter.save_scale_in_half", {"A13"}), ("adapter.load_half", {"A13x"}), ("adapter.load_misses_gradient", {"A13"}),
    ("adapter.forward_stale", {"A13"}), ("adapter.last_input", {"A2s"}), ("adapter.activation_in_class", {"A14"})])
def test_what_an_adapter_remembers_is_seen(id, laws):
    """A used one that is loaded into, a refused file, another forward in between, another adapter beside it."""
    mutant, = (m for m in METHOD.mutants if m.id == id)
    plugin, found = plugin_of(METHOD, mutant.build, "float32"), set()
    for case in drawn(METHOD, "float32", 1):
        case = plugin.settle(case, METHOD)
        found |= {prop.id for prop in METHOD.properties if prop.applies(case) and fails(
            look(prop, case, plugin, plugin.make(METHOD))[0])}
    assert found == laws


def test_gelu_by_tanh_is_seen_in_float32_and_hidden_by_bfloat16():
    mutant = next(m for m in METHOD.mutants if m.id == "adapter.gelu_by_tanh")
    case = next(c for c in METHOD.vectors() if c.params["activation"] == "gelu")
    for dtype, seen in (("float32", True), ("bfloat16", False)):
        make = plugin_of(METHOD, mutant.build, dtype).make(METHOD)
        twin = case.but(dtype=dtype, arrays={k: numpy.round(v * 16) / 16 for k, v in case.arrays.items()})
        value = values(twin)["y"]
        error = rho(METHOD.outputs["y"][1](make, twin), value.exact, twin.tau(value))
        assert error > 10 if seen else error < 1
