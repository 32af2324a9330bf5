"""Selective tuning: its equations agree with minipeft's engine and with numbers by hand, both plug-ins hold, and both
ways of writing a step are within the bound."""
import types

import numpy
import pytest

from minipeft.engine.tensor import value_and_grad
from minipeft.conformance.arithmetic import arithmetic
from minipeft.conformance.fault import Fault
from minipeft.conformance.methods.selective import METHOD, ours
from minipeft.conformance.methods.selective.cases import SELECTIONS, bounded_case
from minipeft.conformance.methods.selective.equations import NAMES, equations, values, values_moved, whole
from minipeft.conformance.methods.selective.plain import Selective
from minipeft.conformance.numbers import wide
from minipeft.conformance.observe import near, raised
from minipeft.conformance.plugin import Plugin
from minipeft.conformance.tolerance import tau
from minipeft.nn.weight import Parameter
from minipeft.engine.ops import mul
from minipeft.engine.ops import sum as total
from minipeft.attaching.select import select

HAND = {"norm.weight": [1, -2], "norm.bias": [0, 1], "fc1.weight": [[2, 1]], "fc1.bias": [0.5],
        "fc2.weight": [[1], [2]], "fc2.bias": [0, -1], "x": [[1, -1]], "g": [[1, 1]]}
BY_HAND = {"y": [[4.5, 5]], "dx": [[3.25, -1.25]], "d norm.weight": [3, -1.5], "d norm.bias": [6, 3],
           "d fc1.weight": [[1.5, 6]], "d fc1.bias": [3], "d fc2.weight": [[3.5], [3.5]], "d fc2.bias": [1, 1]}


def plugin(build, dtypes=("float64", "float32", "bfloat16"), **conventions):
    return Plugin(types.SimpleNamespace(selective=build, capabilities={
        "dtypes": dtypes, "conventions": {"selective": conventions}}))


def cases(exact, dtype, seeds=range(2)):
    for seed in seeds:
        rng = numpy.random.default_rng(seed)
        sizes = {axis: int(rng.integers(low, high + 1)) for axis, (low, high) in METHOD.sizes.items()}
        if seed == 1:
            sizes |= {"d": 4, "hidden": 4}
        yield METHOD.draw(rng, dtype, exact, sizes)


def failures(plug, dtype, seeds=range(2), ids=None):
    """What does not hold, as it is found."""
    make = plug.make(METHOD)
    for exact in (False, True):
        for case in cases(exact, dtype, seeds):
            case = plug.settle(case, METHOD)
            for prop in METHOD.properties:
                if prop.applies(case) and (ids is None or prop.id in ids) and make(case).offers(*prop.needs):
                    try:
                        yield from [(prop.id, o.name, o.rho) for o in prop.run(case, make) if not o.holds]
                    except Fault as fault:
                        yield prop.id, str(fault)


def test_the_equations_give_what_comes_out_by_hand():
    arrays = {name: wide(value) for name, value in HAND.items()}
    found = equations(arrays, arrays["x"], arrays["g"], 3.0)
    assert {name: value.tolist() for name, value in found.items()} == BY_HAND


@pytest.mark.parametrize("convention, bias", [("towards 0", 0.375 - 1.5), ("towards the start", 0.5 - 1.5)])
def test_a_step_by_hand(convention, bias):
    case = next(cases(True, "float64")).but({name: numpy.array(v, float) for name, v in HAND.items()},
                                            {"eps": 3.0, "lr": 0.5, "decay": 0.5, "steps": 1})
    case = case.but(conventions={"decay": convention})
    after = values_moved(case, {"fc1.bias": numpy.array([True])})
    assert after["fc1.bias"].exact == bias
    assert all((after[name].exact == case[name]).all() and not after[name].mag.any() for name in NAMES
               if name != "fc1.bias")


def test_the_equations_agree_with_the_engine():
    for case in cases(False, "float64", range(6)):
        model, x = ours.Block({name: case[name] for name in NAMES}, case.params["eps"]), Parameter(case["x"])
        found = value_and_grad(lambda: total(mul(model(x), case["g"])), {"x": x, **select(model, "")})[1]
        ref = values(case)
        assert near(case, "y", model(case["x"]).data, ref["y"]).holds
        for name, gradient in found.items():
            assert near(case, name, gradient, ref["dx" if name == "x" else f"d {name}"]).holds
            assert abs(gradient - ref["dx" if name == "x" else f"d {name}"].exact).max() <= 1e-11 * abs(gradient).max()


def test_what_is_published_is_the_same_in_fifty_digits():
    for case in METHOD.vectors():
        exact, live = METHOD.exact(case), METHOD.reference(case)
        assert set(exact) == set(live) <= set(METHOD.outputs)
        for name, value in live.items():
            assert near(case, name, exact[name].exact, value).holds, (case.label, name)
            rounding = 2.0 ** -53 * abs(exact[name].exact) + 2.0 ** -10 * tau(value, arithmetic("float64"))
            assert (abs(exact[name].exact - value.exact) <= rounding).all(), (case.label, name)


def test_published_cases_have_names_of_their_own_and_all_selections():
    published = METHOD.vectors()
    assert len({case.id for case in published}) == len(published) and all(case.label for case in published)
    assert {case.params["train"] for case in published} == set(SELECTIONS.values())


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16"])
def test_the_plain_block_holds(dtype):
    assert not [*failures(plugin(Selective), dtype)]


@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_minipeft_holds(dtype):
    assert not [*failures(Plugin(ours), dtype)]


@pytest.mark.parametrize("build", [Selective, ours.selective])
def test_what_must_be_refused_is(build):
    plug = plugin(build, ("float64",), **({} if build is Selective else ours.CONVENTIONS))
    for refusal in METHOD.refusals("float64"):
        case = plug.settle(refusal.case, METHOD)
        assert raised(refusal.what, lambda: plug.make(METHOD)(case).forward(case["x"])).holds


@pytest.mark.parametrize("build", [Selective, ours.selective])
def test_both_give_what_is_published(build):
    plug = Plugin(ours) if build is ours.selective else plugin(build)
    for case in METHOD.vectors():
        if case.dtype in plug.dtypes:
            case = plug.settle(case, METHOD)
            for name, value in METHOD.reference(case).items():
                assert near(case, name, METHOD.outputs[name][1](plug.make(METHOD), case), value).holds


class Welford(Selective):
    """Running mean and squares: dyadic numbers leave this norm rounded."""

    def statistics(self, x):
        mean, squares = 0 * x[:, :1], 0 * x[:, :1]
        for i in range(x.shape[1]):
            off = x[:, i:i + 1] - mean
            mean = mean + off / (i + 1)
            squares = squares + off * (x[:, i:i + 1] - mean)
        return mean, 1 / self.root(squares / x.shape[1])

    def normalized(self, x):
        x = numpy.asarray(x, self.e.wide)
        mean, inverse = self.statistics(x)
        return self.e.r((x - mean) * inverse), inverse


class Kept(Welford):
    """What the gradients need of the norm is stored in the dtype: x, mean and 1 / root."""

    def all_gradients(self, x, g):
        self.backward = True
        found = super().all_gradients(x, g)
        self.backward = False
        return found

    backward = False

    def parts(self, x):
        found = super().parts(x)
        if self.backward:
            wide = numpy.asarray(x, self.e.wide)
            mean, inverse = (numpy.asarray(self.e.r(v), self.e.wide) for v in self.statistics(wide))
            found |= {"z": (wide - mean) * inverse, "inverse": inverse}
        return found


class OnesTimes(Selective):
    """Where biases alone are trained, their gradients are products with ones, summed from the other end."""

    def vjp(self, x, g):
        found = super().vjp(x, g)
        if set(self.chosen) == {"norm.bias", "fc1.bias", "fc2.bias"}:
            found["fc2.bias"] = self.e.mm(numpy.ones((1, len(g))), g[::-1])[0]
        return found


class RowsAlone(Selective):
    """Of fc2.weight, gradients of the chosen rows alone are computed, one by one."""

    def restricted(self, name, gradient):
        found = super().restricted(name, gradient)
        if name == "fc2.weight" and found is not None:
            for row in numpy.flatnonzero(self.chosen[name].all(axis=1)):
                found[row] = self.e.mm(self.seen[1][::-1, row], self.seen[0][::-1])
        return found

    def all_gradients(self, x, g):
        self.seen = self.parts(x)["a"], g
        return super().all_gradients(x, g)


@pytest.mark.parametrize("build", [Welford, Kept, OnesTimes, RowsAlone])
@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16"])
def test_no_bit_is_demanded_of_a_norm_nor_of_another_sum(build, dtype):
    """A norm that is computed otherwise, statistics that are stored, a subset that is summed in another order."""
    assert not [*failures(plugin(build), dtype, range(4))]


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16"])
def test_exact_cases_do_not_depend_on_the_norm(dtype):
    for case in cases(True, dtype, range(8)):
        assert case.exact and METHOD.exact_when(case) and not case["norm.weight"].any()
        assert not METHOD.exact_when(case.but({"norm.weight": case["norm.weight"] + 1}))
        assert not METHOD.exact_when(case.but(params={"train": "norm.weight"}))
        bounds = values(case)
        assert abs(bounds["d fc1.weight"].mag).any() and (values(case.but({"x": 2 * case["x"]}))["d fc1.weight"].exact
                                                          == bounds["d fc1.weight"].exact).all()


def test_no_relu_of_a_dyadic_case_is_at_its_kink():
    for case in METHOD.vectors():
        if case.label.startswith("dyadic"):
            z = (case["x"] - case["x"].mean(axis=1, keepdims=True)) / numpy.sqrt(
                case["x"].var(axis=1, keepdims=True) + case.params["eps"])
            n = z * case["norm.weight"] + case["norm.bias"]
            assert (abs(n @ case["fc1.weight"].T + case["fc1.bias"]) >= 0.25).all()


class Summed(Selective):
    """Gradient and decay are summed before they are multiplied by the rate."""

    def update(self, w, gradient, lr, decay):
        return self.e.r(w - self.e.r(lr * self.e.r(gradient + self.e.r(decay * w))))


class Apart(Selective):
    """What is stored is a difference."""

    def __init__(self, weights, train, dtype, *, eps=1e-5):
        super().__init__(weights, train, dtype, eps=eps)
        self.d = {name: 0 * w for name, w in self.base.items()}

    def stepped(self, name, w, gradient, lr, decay):
        self.d[name] = self.e.r(self.d[name] - self.e.r(lr * self.e.r(gradient + self.e.r(decay * w))))
        return numpy.where(self.chosen[name], self.e.r(self.base[name] + self.d[name]), w)


@pytest.mark.parametrize("build", [Summed, Apart])
@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16"])
def test_a_step_may_be_written_in_other_ways(build, dtype):
    assert not [*failures(plugin(build), dtype, range(4), ("L7v", "L7es", "L7rs"))]


def test_a_function_that_only_runs_forward_is_held_against_something():
    class Forward:
        def __init__(self, weights, train, dtype, *, eps):
            self.inner = Selective(weights, train, dtype, eps=eps)

        def forward(self, x):
            return self.inner.forward(x)

    plug, case = plugin(Forward), bounded_case(numpy.random.default_rng(0), "float64", 3, 4, 5, "fc1.bias")
    offered = [prop.id for prop in METHOD.properties if plug.make(METHOD)(case).offers(*prop.needs)]
    assert offered == ["L1", "L1s", "F1", "L10", "X2"]
    assert not [*failures(plug, "float64")]


def test_a_bound_is_zero_where_nothing_moves_and_nowhere_else():
    case = bounded_case(numpy.random.default_rng(1), "float32", 4, 4, 4, "fc1.bias")
    after = values_moved(case, whole(case))
    assert [name for name, value in after.items() if value.mag.any()] == ["fc1.bias"]


@pytest.mark.parametrize("mutant", METHOD.mutants, ids=lambda m: m.id)
def test_a_planted_bug_is_found(mutant):
    assert next(failures(plugin(mutant.build), "float32"), None)
