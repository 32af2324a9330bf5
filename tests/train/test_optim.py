"""AdamW against the textbook, and what it does and does not touch."""
import copy
import gc
import math
import pickle
import weakref
from typing import Any

import numpy
import pytest
from hypothesis import given
from hypothesis import strategies as st

import minipeft
from minipeft.nn.weight import Parameter
from minipeft.train import update
from tests.train import tiny
from tests.train.interrupted import InterruptedAt

LR, B1, B2, EPS, DECAY = 3e-3, 0.9, 0.99, 1e-8, 0.1
UNIT = {"float64": 2.0 ** -53, "float32": 2.0 ** -24}


def parameters(rng: numpy.random.Generator, dtype: str = "float64") -> dict[str, Parameter]:
    """A matrix, one that is not contiguous, a vector, a number, an empty one; far from 1 in size."""
    shapes: dict[str, tuple] = {"matrix": (3, 4), "bias": (5,), "gate": (), "none": (0, 3)}
    params = {name: Parameter(rng.normal(size=shape, scale=2).astype(dtype).reshape(shape))
              for name, shape in shapes.items()}
    return {**params, "turned": Parameter(rng.normal(size=(4, 2)).astype(dtype).T)}


def gradients(params: dict[str, Parameter], rng: numpy.random.Generator) -> dict[str, Any]:
    return {name: numpy.asarray(rng.normal(size=p.shape) * 10.0 ** rng.integers(-6, 4), dtype=p.dtype)
            for name, p in params.items()}


class Textbook:
    """The module docstring's two lines in the longest floats there are, with a bound on how far rounding leads.

    Where terms cancel (m), the bound takes the same sum of absolute values. One update passes at most 5 t + 12
    roundings at step t: 3 t + 2 in m, half of 3 t + 3 and one more in sqrt(v), 7 in the rest. b^t is one double
    operation, whose relative error u is an error u / (1 - b^t) in 1 - b^t. The parameter itself rounds 3 times."""

    def __init__(self, p: numpy.ndarray, decay: float):
        self.p, self.decay, self.u = p.astype(numpy.longdouble), decay, UNIT[str(p.dtype)]
        self.m, self.v, self.m_abs, self.t = 0 * self.p, 0 * self.p, 0 * self.p, 0
        self.bound = 0 * self.p

    def step(self, g: numpy.ndarray) -> None:
        g = g.astype(numpy.longdouble)
        b1, b2 = numpy.longdouble(B1), numpy.longdouble(B2)
        self.t += 1
        self.m, self.v = b1 * self.m + (1 - b1) * g, b2 * self.v + (1 - b2) * g ** 2
        self.m_abs = b1 * self.m_abs + (1 - b1) * abs(g)
        c1, c2 = 1 - b1 ** self.t, 1 - b2 ** self.t
        rate = LR / c1 / (numpy.sqrt(self.v / c2) + EPS)
        self.p = self.p - LR * self.decay * self.p - rate * self.m
        roundings = (5 * self.t + 12) * self.u + float(1 / c1 + 1 / c2) * UNIT["float64"]
        self.bound = self.bound + 1.01 * (roundings * rate * self.m_abs
                                          + 3 * self.u * (abs(self.p) + rate * self.m_abs))


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@given(seed=st.integers(0, 2 ** 32 - 1), steps=st.integers(1, 8))
def test_every_step_is_the_textbook_formula_within_its_rounding(dtype: str, seed: int, steps: int) -> None:
    rng = numpy.random.default_rng(seed)
    params = parameters(rng, dtype)
    optimizer = minipeft.AdamW(LR, (B1, B2), EPS, DECAY, decay="matrix|turned|gate")
    books = {name: Textbook(p.data, DECAY if name in ("matrix", "turned", "gate") else 0.0)
             for name, p in params.items()}
    for _ in range(steps):
        grads = gradients(params, rng)
        optimizer.step(params, grads)
        for name, book in books.items():
            book.step(grads[name])
            assert params[name].dtype == dtype
            assert (abs(params[name].data - book.p) <= book.bound).all(), name
    assert optimizer.steps == dict.fromkeys(params, steps)


def test_the_first_step_moves_by_lr_whatever_the_gradients_size() -> None:
    """Bias correction: at t = 1 the update is lr g / (|g| + eps)."""
    p = Parameter(numpy.zeros(4))
    minipeft.AdamW(lr=0.5, weight_decay=0).step({"p": p}, {"p": numpy.array([1e-3, -1e-3, 1e3, -1e3])})
    numpy.testing.assert_allclose(p.data, [-0.5, 0.5, -0.5, 0.5], rtol=2e-5)  # eps / |g| is 1e-5


def test_decay_is_decoupled_it_shrinks_by_a_factor_and_never_enters_the_moments() -> None:
    p = Parameter(numpy.array([4.0, -2.0]))
    optimizer = minipeft.AdamW(lr=0.5, weight_decay=0.25)
    optimizer.step({"p": p}, {"p": numpy.zeros(2)})
    assert p.data.tolist() == [3.5, -1.75]
    assert not optimizer.m["p"].any() and not optimizer.v["p"].any()


@pytest.mark.parametrize("decay, moved", [("", {"a.weight", "a.bias"}), (r"weight$", {"a.weight"}),
                                          (lambda name: "bias" in name, {"a.bias"}),
                                          ([r"weight$", r"bias$"], {"a.weight", "a.bias"})])
def test_decay_acts_on_the_names_it_selects(decay: Any, moved: set) -> None:
    params = {name: Parameter(numpy.ones(2)) for name in ("a.weight", "a.bias")}
    minipeft.AdamW(weight_decay=0.1, decay=decay).step(params, {name: numpy.zeros(2) for name in params})
    assert {name for name, p in params.items() if (p.data != 1).all()} == moved


def test_what_changes_changes_in_place_and_gradients_are_only_read() -> None:
    rng = numpy.random.default_rng(0)
    params = parameters(rng)
    optimizer, grads = minipeft.AdamW(), gradients(params, rng)
    optimizer.step(params, grads, scale=0.5)
    arrays = {name: (p.data, optimizer.m[name], optimizer.v[name]) for name, p in params.items()}
    kept = {name: g.tobytes() for name, g in grads.items()}
    optimizer.step(params, grads, scale=0.5)
    for name, p in params.items():
        assert all(a is b for a, b in zip(arrays[name], (p.data, optimizer.m[name], optimizer.v[name])))
    assert kept == {name: g.tobytes() for name, g in grads.items()}


def test_a_scale_is_the_same_as_scaled_gradients() -> None:
    rng = numpy.random.default_rng(1)
    params = parameters(rng, "float32")
    twins = {name: Parameter(p.data.copy()) for name, p in params.items()}
    grads = gradients(params, rng)
    minipeft.AdamW().step(params, grads, scale=0.3)
    minipeft.AdamW().step(twins, {name: numpy.asarray(g * 0.3) for name, g in grads.items()})
    assert all(p.data.tobytes() == twins[name].data.tobytes() for name, p in params.items())


def test_state_exists_for_what_was_stepped_and_each_counts_its_own_steps() -> None:
    params = parameters(numpy.random.default_rng(0))
    optimizer, some = minipeft.AdamW(), {"bias": params["bias"]}
    optimizer.step(some, {"bias": numpy.ones(5)})
    assert set(optimizer.m) == set(optimizer.v) == set(optimizer.steps) == {"bias"}
    optimizer.step(params, {name: numpy.ones(p.shape) for name, p in params.items()})
    assert optimizer.steps == {**dict.fromkeys(params, 1), "bias": 2}


def test_the_order_of_the_parameters_does_not_matter() -> None:
    rng = numpy.random.default_rng(2)
    params = parameters(rng)
    twins = {name: Parameter(params[name].data.copy()) for name in reversed(params)}
    one, other = minipeft.AdamW(), minipeft.AdamW()
    for _ in range(3):
        grads = gradients(params, rng)
        one.step(params, grads)
        other.step(twins, dict(sorted(grads.items())))
    assert all(p.data.tobytes() == twins[name].data.tobytes() for name, p in params.items())


def test_lr_given_to_a_step_overrides_the_optimizers() -> None:
    params = {"p": Parameter(numpy.ones(3))}
    minipeft.AdamW(lr=1.0).step(params, {"p": numpy.ones(3)}, lr=0.0)
    assert params["p"].data.tolist() == [1, 1, 1]


@pytest.mark.parametrize("grads, lr, message", [
    ({"a": numpy.ones(2)}, None, "differ in 1 names; first: 'b'"),
    ({"a": numpy.ones(2), "b": numpy.ones(3), "c": numpy.ones(1)}, None, "differ in 1 names; first: 'c'"),
    ({"a": numpy.ones(2), "b": numpy.ones(4)}, None, r"the gradient of b has shape \[4\]; expected \[3\]"),
    ({"a": numpy.ones(2), "b": numpy.ones(3)}, float("nan"), "lr is nan"),
    ({"a": numpy.ones(2), "b": numpy.ones(3)}, -1e-3, "lr is -0.001")])
def test_what_does_not_fit_is_refused_before_anything_changes(grads: dict, lr: Any, message: str) -> None:
    params, optimizer = {"a": Parameter(numpy.ones(2)), "b": Parameter(numpy.ones(3))}, minipeft.AdamW()
    with pytest.raises(ValueError, match=message):
        optimizer.step(params, grads, lr)
    assert params["a"].data.tolist() == [1, 1] and params["b"].data.tolist() == [1, 1, 1]
    assert not optimizer.m and not optimizer.v and not optimizer.steps


def test_an_array_of_another_shape_in_the_same_parameter_is_refused_before_anything_changes() -> None:
    optimizer, params = minipeft.AdamW(), {"a": Parameter(numpy.ones(2)), "b": Parameter(numpy.ones(3))}
    optimizer.step(params, {"a": numpy.ones(2), "b": numpy.ones(3)})
    before = params["a"].data.tolist()
    params["b"].data = numpy.ones(4)
    with pytest.raises(ValueError, match=r"moments of b are float64 \[3\].*it is float64 \[4\] now"):
        optimizer.step(params, {"a": numpy.ones(2), "b": numpy.ones(4)})
    assert params["a"].data.tolist() == before and optimizer.steps == {"a": 1, "b": 1}


# ---- whose the moments are

def one_step(optimizer: minipeft.AdamW, name: str, p: Parameter, g: float = 1.0) -> None:
    optimizer.step({name: p}, {name: numpy.full(p.shape, g)})


@pytest.mark.parametrize("shape", [(2,), (3,)])
def test_another_parameter_under_the_same_name_starts_anew(shape: tuple) -> None:
    optimizer, old, new = minipeft.AdamW(), Parameter(numpy.ones(2)), Parameter(numpy.ones(shape))
    for _ in range(3):
        one_step(optimizer, "p", old)
    one_step(optimizer, "p", new, -4.0)
    assert optimizer.steps == {"p": 1} and optimizer.m["p"].tolist() == pytest.approx([-0.4] * shape[0])
    one_step(optimizer, "p", old)  # and the first one still has its own
    assert optimizer.steps == {"p": 4} and optimizer.m["p"].shape == (2,)


def test_the_first_step_of_a_new_adapter_is_one_of_t_1_whatever_was_removed_before() -> None:
    """At t = 1 Adam moves every number by lr g / (|g| + eps'): B, which starts at 0, is +-lr where g is not tiny."""
    optimizer = minipeft.AdamW(lr=1e-2, weight_decay=0.0)
    for turn in (1, 2):
        model = tiny.model(dtype="float64", dropout=0.0)
        attachment = minipeft.attach(model, minipeft.LoRA(rank=2), numpy.random.default_rng(turn))
        minipeft.fit(model, attachment, tiny.batches(), steps=1, optimizer=optimizer, clip=None)
        B = attachment.parameters["encoder.0.attn.q.weight@lora.B"]
        assert abs(abs(B.data) / 1e-2 - 1).max() < 1e-3
        assert optimizer.steps["encoder.0.attn.q.weight@lora.B"] == 1
        attachment.remove()


def test_a_parameter_keeps_its_moments_under_another_name() -> None:
    optimizer, p = minipeft.AdamW(), Parameter(numpy.ones(2))
    one_step(optimizer, "old", p)
    m = optimizer.m["old"]
    one_step(optimizer, "new", p)
    assert optimizer.steps == {"new": 2} and optimizer.m["new"] is m and set(optimizer.v) == {"new"}


def test_a_parameter_that_nobody_holds_is_not_kept_alive_and_takes_its_moments_with_it() -> None:
    optimizer, p = minipeft.AdamW(), Parameter(numpy.ones(2))
    one_step(optimizer, "p", p)
    parameter, moments = weakref.ref(p), weakref.ref(optimizer.m["p"])
    del p
    gc.collect()
    assert parameter() is None and moments() is None and optimizer.steps == {} == optimizer.m


def copies(optimizer: minipeft.AdamW) -> list[minipeft.AdamW]:
    return [copy.deepcopy(optimizer), copy.copy(optimizer), pickle.loads(pickle.dumps(optimizer))]


def test_a_copy_of_an_optimizer_goes_on_with_the_moments_by_name_and_apart_from_the_first() -> None:
    optimizer, p = minipeft.AdamW(lr=0.1, betas=(0.8, 0.9), decay="p"), Parameter(numpy.ones(2))
    one_step(optimizer, "p", p, 2.0)
    twins = [(other, Parameter(p.data.copy())) for other in copies(optimizer)]
    one_step(optimizer, "p", p, 3.0)
    for other, q in twins:
        assert other.steps == {"p": 1} and other.describe() == optimizer.describe()
        one_step(other, "p", q, 3.0)
        assert tiny.bits({"p": q}, other) == tiny.bits({"p": p}, optimizer)
        one_step(other, "p", another := Parameter(numpy.ones(2)))  # the moments are claimed: this one starts anew
        assert other.steps == {"p": 1} and another.data[0] < 1


# ---- a step is made whole or not at all

def formula(p: Any, m: Any, v: Any, t: int, g: Any, lr: float, scale: float, decay: float) -> None:
    """One step in place, on whole arrays, operation by operation."""
    g = g if scale == 1 else g * scale
    work = numpy.asarray(g * (1 - B1))
    m *= B1
    m += work
    numpy.multiply(g, g, out=work)
    work *= 1 - B2
    v *= B2
    v += work
    numpy.sqrt(v, out=work)
    work /= math.sqrt(1 - B2 ** t)
    work += EPS
    numpy.divide(m, work, out=work)
    work *= lr / (1 - B1 ** t)
    if decay:
        p *= 1 - lr * decay
    p -= work


def laid_out(rng: numpy.random.Generator, shape: tuple, dtype: str, layout: str) -> numpy.ndarray:
    """Random numbers, contiguous, transposed, or every second column of a larger array."""
    if layout == "turned":
        return rng.normal(size=shape[::-1]).astype(dtype).T
    if layout == "gaps":
        return rng.normal(size=(*shape[:-1], 2 * shape[-1])).astype(dtype)[..., ::2]
    return rng.normal(size=shape).astype(dtype)


@pytest.mark.parametrize("shape", [(update.BLOCK,), (update.BLOCK + 1,), (3 * update.BLOCK - 7,), (300, 500),
                                   (2, 3, 40000), (3, update.BLOCK + 5), (7,), (1, 1)], ids=str)
@pytest.mark.parametrize("dtype, grad_dtype", [("float32", "float32"), ("float64", "float64"), ("float32", "float64"),
                                               ("float64", "float32")])
def test_every_bit_is_that_of_the_formula_on_whole_arrays(shape: tuple, dtype: str, grad_dtype: str) -> None:
    rng = numpy.random.default_rng(0)
    layouts = ["plain", "turned", "gaps"]
    params = {f"{a} {b}": Parameter(laid_out(rng, shape, dtype, a)) for a in layouts for b in layouts}
    hand = {name: (p.data.copy(), 0 * p.data, 0 * p.data) for name, p in params.items()}
    optimizer = minipeft.AdamW(LR, (B1, B2), EPS, DECAY, decay="plain$")
    for t, scale in enumerate((1.0, 0.3), 1):
        grads = {name: laid_out(rng, shape, grad_dtype, name.split()[1]) for name in params}
        optimizer.step(params, grads, scale=scale)
        for name, arrays in hand.items():
            formula(*arrays, t, grads[name], LR, scale, DECAY if name.endswith("plain") else 0.0)
            found = params[name].data, optimizer.m[name], optimizer.v[name]
            assert all(a.dtype == dtype and numpy.array_equal(a, b) for a, b in zip(found, arrays)), name


def stepped(interrupt: Any = None) -> tuple[Any, bool]:
    """The bits after two steps of some parameters, the second under `interrupt`; and whether that let it pass."""
    rng = numpy.random.default_rng(0)
    params = {**parameters(rng, "float32"), "long": Parameter(rng.normal(size=700).astype("float32"))}
    optimizer, grads = minipeft.AdamW(), [gradients(params, rng) for _ in range(2)]
    optimizer.step({name: p for name, p in params.items() if name != "gate"},  # the second makes new moments, too
                   {name: g for name, g in grads[0].items() if name != "gate"})
    if interrupt is None:
        optimizer.step(params, grads[1])
        return tiny.bits(params, optimizer), True
    before = tiny.bits(params, optimizer)
    with interrupt, pytest.raises(KeyboardInterrupt):
        optimizer.step(params, grads[1], scale=1.0)
    after = tiny.bits(params, optimizer)
    return after, after != before


def test_an_interrupt_at_any_line_leaves_a_whole_step_or_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(update, "BLOCK", 256)  # so that one array has several blocks
    whole, _ = stepped()
    nothing, lines, made = None, 0, []
    while True:
        interrupt = InterruptedAt(lines + 1, "minipeft/train")
        try:
            bits, changed = stepped(interrupt)
        except pytest.fail.Exception:
            assert not interrupt.raised
            break
        lines += 1
        made.append(changed)
        nothing = bits if nothing is None else nothing
        assert bits == (whole if changed else nothing), interrupt.where
    assert lines > 200 and 20 < made.count(False) and made == sorted(made)  # first none, then whole ones


def test_warnings_that_are_errors_do_not_break_a_step() -> None:
    """A square that overflows is no reason to stop between two arrays."""
    params = {name: Parameter(numpy.ones(2, "float32")) for name in "ab"}
    optimizer, grads = minipeft.AdamW(), {"a": numpy.ones(2, "float32"), "b": numpy.full(2, 1e30, "float32")}
    with numpy.errstate(all="raise"):
        optimizer.step(params, grads)
    assert optimizer.steps == {"a": 1, "b": 1} and numpy.isinf(optimizer.v["b"]).all()


@pytest.mark.parametrize("change, error, message", [
    ({"b": numpy.ones(2, complex)}, TypeError, "b is float64 and its gradient complex128"),
    ({"b": numpy.array(["x", "y"])}, TypeError, "b is float64 and its gradient <U1"),
    ({"scale": math.nan}, ValueError, "scale is nan"), ({"scale": "1"}, ValueError, "scale is '1'"),
    ({"lr": "1"}, ValueError, "lr is '1'"), ({"read-only": True}, ValueError, "the array of b is read-only"),
    ({"twice": True}, ValueError, "'a' and 'b' are the same parameter")])
def test_what_would_fail_in_the_middle_of_a_step_is_refused_before_it(change: dict, error: type, message: str) -> None:
    a, b = Parameter(numpy.ones(2)), Parameter(numpy.ones(2))
    b.data.flags.writeable = "read-only" not in change
    options = {key: value for key, value in change.items() if key in ("scale", "lr")}
    optimizer = minipeft.AdamW()
    with pytest.raises(error, match=message):
        optimizer.step({"a": a, "b": a if "twice" in change else b}, {"a": numpy.ones(2), "b": change.get(
            "b", numpy.ones(2))}, **options)
    assert a.data.tolist() == [1, 1] == b.data.tolist() and not optimizer.steps


def test_numpy_scalars_are_numbers_and_become_pythons() -> None:
    optimizer = minipeft.AdamW(numpy.float32(0.5), (numpy.float64(0.5), numpy.float32(0.25)), numpy.float32(0.125),
                               numpy.int64(2))
    assert repr(optimizer.describe()) == repr({"lr": 0.5, "betas": [0.5, 0.25], "eps": 0.125, "weight_decay": 2.0})
    p, twin = Parameter(numpy.ones(2, "float32")), Parameter(numpy.ones(2, "float32"))
    optimizer.step({"p": p}, {"p": numpy.ones(2, "float32")}, numpy.float64(0.25), numpy.float64(0.5))
    minipeft.AdamW(0.5, (0.5, 0.25), 0.125, 2.0).step({"p": twin}, {"p": numpy.ones(2, "float32")}, 0.25, 0.5)
    assert p.data.tobytes() == twin.data.tobytes() and optimizer.m["p"].dtype == "float32"


def test_a_decay_pattern_that_matches_nothing_raises_before_anything_changes() -> None:
    params, optimizer = {"a.weight": Parameter(numpy.ones(2))}, minipeft.AdamW(decay="bias")
    with pytest.raises(ValueError, match="'bias' matches none"):
        optimizer.step(params, {"a.weight": numpy.ones(2)})
    assert params["a.weight"].data.tolist() == [1, 1] and not optimizer.steps


@pytest.mark.parametrize("wrong", [{"lr": -1.0}, {"lr": float("inf")}, {"eps": -1e-8}, {"weight_decay": float("nan")},
                                   {"betas": (1.0, 0.9)}, {"betas": (0.9, -0.1)}, {"betas": (0.9,)},
                                   {"betas": 0.9}, {"betas": ("a", "b")}, {"lr": "1e-3"}, {"lr": True}, {"eps": "x"},
                                   {"lr": 10 ** 400}, {"weight_decay": None}])
def test_hyper_parameters_out_of_range_are_named(wrong: dict) -> None:
    with pytest.raises(ValueError, match=f"AdamW: {next(iter(wrong))}"):
        minipeft.AdamW(**wrong)


class Elsewhere(numpy.ndarray):
    """Arrays of another library, as far as a type can tell."""


class Namespace:
    """Just enough of one for `to`."""

    ndarray = Elsewhere

    @staticmethod
    def asarray(array: Any) -> Any:
        return numpy.asarray(array).view(Elsewhere)


def test_moments_move_with_to_and_are_refused_where_the_parameters_are_not() -> None:
    params, optimizer = {"p": Parameter(numpy.ones(3))}, minipeft.AdamW()
    optimizer.step(params, {"p": numpy.ones(3)})
    moments = optimizer.m["p"].tolist()
    assert optimizer.to(Namespace) is optimizer
    assert type(optimizer.m["p"]) is Elsewhere and type(optimizer.v["p"]) is Elsewhere
    with pytest.raises(TypeError, match=r"the moments of p live on another backend.*optimizer\.to"):
        optimizer.step(params, {"p": numpy.ones(3)})
    assert optimizer.m["p"].tolist() == moments and optimizer.steps == {"p": 1}


def test_an_eps_of_0_is_refused_because_a_gradient_of_0_would_give_nan():
    with pytest.raises(ValueError, match="eps is 0"):
        minipeft.AdamW(eps=0)
