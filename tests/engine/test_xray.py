"""The tape of a step: what it says is kept is what the allocator says is kept, and what it strikes out is not there."""
from __future__ import annotations

import dataclasses
import functools
import gc
import tracemalloc
import weakref
from typing import Any, Callable

import numpy
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import minipeft
from minipeft.engine import ops
from minipeft.engine import tensor as engine
from minipeft.engine import xray as xray_module
from minipeft.engine.buffers import Buffers, owners
from minipeft.engine.tape import Entry, compare, folded
from minipeft.engine.calling import once
from minipeft.engine.tensor import Leaf, Tensor, array_of, op, value_and_grad
from minipeft.engine.xray import xray
from tests.models_under_test import Case, bits, cases
from tests.strategies import draw_array

NORMS_AND_BIASES = r"norm\.weight$|bias$"


def leaf(*shape: int, seed: int = 0) -> Leaf:
    return Leaf(draw_array(seed, shape))


def named(entries: Any, name: str) -> list[Entry]:
    return [e for e in entries if e.op == name]


def lora_case(seed: int = 0, family: str = "t5 v1.0") -> Case:
    return Case((family, "q and v"), 2, 4, "float64", seed)


# ---- what is kept

def test_linear_keeps_the_bytes_of_x_for_a_trained_weight_and_none_for_a_frozen_one():
    p, w = leaf(4, 3), leaf(5, 3, seed=1)
    step = lambda: ops.sum(ops.linear(ops.add(p, p), w))  # noqa: E731

    def entry(params: dict) -> Entry:
        return named(xray(step, params).entries, "linear")[0]

    frozen, trained, both = entry({"p": p}), entry({"w": w}), entry({"p": p, "w": w})
    assert (frozen.kept, frozen.struck, frozen.kept_bytes) == (("x",), ("w",), 0)
    assert (trained.kept, trained.struck, trained.kept_bytes) == (("w",), ("x",), 4 * 3 * 8)
    assert (both.kept, both.struck, both.kept_bytes) == (("x", "w"), (), 4 * 3 * 8)
    assert frozen.trains == () and trained.trains == both.trains == ("w",)
    assert frozen.shape == (4, 5)


def test_a_lora_layer_keeps_x_and_h_although_its_weight_is_frozen():
    n, d_in, d_out, rank = 40, 30, 20, 4
    p, w, a, b = leaf(n, d_in), leaf(d_out, d_in, seed=1), leaf(rank, d_in, seed=2), leaf(d_out, rank, seed=3)

    def step() -> Tensor:
        x = ops.add(p, p)
        return ops.sum(ops.low_rank_linear(ops.linear(x, w), x, a, b, scale=2))

    add, linear, low_rank, total = xray(step, {"A": a, "B": b}).entries
    assert add.vjps == (("a", False), ("b", False)) and linear.vjps == (("x", False), ("w", False))
    assert low_rank.vjps == (("y", False), ("x", False), ("a", True), ("b", True)) and low_rank.trains == ("A", "B")
    assert [e.kept_bytes for e in (add, linear, low_rank, total)] == [0, 0, 8 * n * (d_in + rank), 0]


def test_a_buffer_counts_once_at_the_first_op_that_keeps_it_and_as_a_whole():
    p, q, w = leaf(6, 4), leaf(2, 4, seed=1), leaf(3, 4, seed=2)

    def step() -> Tensor:
        x = ops.mul(p, 2.0)
        part = ops.index(x, key=slice(1, 2))
        return ops.sum(ops.linear(part, q)) + ops.sum(ops.linear(x, w))

    first, second = named(xray(step, {"q": q, "w": w}).entries, "linear")
    assert (first.kept_bytes, second.kept_bytes) == (6 * 4 * 8, 0)


def test_parameters_and_arrays_from_before_the_step_are_not_counted_and_arrays_made_in_it_are():
    p, q = leaf(50), leaf(50, seed=1)
    batch = draw_array(2, (50,))
    assert xray(lambda: ops.sum(ops.mul(p, q)), {"p": p, "q": q}).kept_bytes == 0
    assert xray(lambda: ops.sum(ops.mul(p, batch)), {"p": p}).kept_bytes == 0
    assert xray(lambda: ops.sum(ops.mul(p, batch[::2].repeat(2))), {"p": p}).kept_bytes == 50 * 8
    assert xray(lambda: ops.sum(ops.mul(p, batch + 1)), {"p": p}).kept_bytes == 50 * 8


def test_what_no_longer_leads_to_the_loss_when_the_step_returns_is_not_kept():
    p = leaf(50)

    def step() -> Tensor:
        ops.exp(p)
        return ops.sum(ops.exp(p))

    assert [e.kept_bytes for e in xray(step, {"p": p}).entries] == [0, 50 * 8, 0]


class Scaled:
    """A VJP as an object and as a method, with an array of its own."""

    def __init__(self, array: Any):
        self.array = array

    def __call__(self, g: Any) -> Any:
        return g * self.array

    def vjp(self, g: Any) -> Any:
        return g * self.array


WAYS: dict[str, Callable] = {
    "a closure": lambda a: lambda g: g * a,
    "a closure over a closure": lambda a: (lambda inner: lambda g: inner(g))(lambda g: g * a),
    "a list in a closure": lambda a: (lambda held: lambda g: g * held[0][0])([[a]]),
    "a dict in a closure": lambda a: (lambda held: lambda g: g * held["a"])({"a": a}),
    "a Tensor in a closure": lambda a: (lambda held: lambda g: g * held.data)(Tensor(a)),
    "a partial": lambda a: functools.partial(numpy.multiply, a),
    "a default": lambda a: lambda g, held=a: g * held,
    "a method": lambda a: Scaled(a).vjp,
    "an object": lambda a: Scaled(a),
    "a view": lambda a: lambda g, held=a[::-1][::-1]: g * held,
    "once": lambda a: once(lambda g: g * a)}


def in_a_circle(array: Any) -> Callable:
    """A closure that refers to itself: only the garbage collector ends it."""
    def vjp(g: Any) -> Any:
        return g * array if callable(vjp) else g

    return vjp


WAYS["a circle"] = in_a_circle


@pytest.mark.parametrize("way", sorted(WAYS))
def test_an_array_is_found_however_a_vjp_holds_it(way):
    @op
    def doubled(a):
        return a * 2, (WAYS[way](a + 1),)

    p = leaf(70)
    assert xray(lambda: ops.sum(doubled(p)), {"p": p}).entries[0].kept_bytes == 70 * 8


def test_the_kept_bytes_of_a_model_are_those_that_the_allocator_has_after_the_forward():
    case = lora_case()
    model = case.model()
    adapter = case.attach(model).parameters
    batch = {name: numpy.tile(ids, (20, 4)) for name, ids in case.batch().items()}
    alive: dict[str, int] = {}

    def step() -> Tensor:
        before = tracemalloc.get_traced_memory()[0]
        loss = model.loss(**batch)
        gc.collect()
        alive["bytes"] = tracemalloc.get_traced_memory()[0] - before
        return loss

    for params in (adapter, minipeft.select(model, "."), minipeft.select(model, NORMS_AND_BIASES)):
        tracemalloc.start()
        try:
            value_and_grad(step, params)
            measured = alive["bytes"]
        finally:
            tracemalloc.stop()
        kept = xray(step, params).kept_bytes
        assert 0.9 * measured < kept < measured  # the rest are closures and nodes, a kilobyte or so each


# ---- what is struck out

def leads(case: Case, model: Any, selected: dict, step: Callable) -> list[list[bool]]:
    """For each op in order and each input with a VJP: whether a selected parameter lies below. By the arrays' identity
    and not by the engine's nodes."""
    chosen = {id(p) for p in selected.values()}
    below: set[int] = set()
    outs, marks = [], []

    def observe(forward: Any, inputs: Any, out: Any, vjps: Any, node: Any) -> None:
        found = [id(x) in chosen if isinstance(x, Leaf) else id(array_of(x)) in below for x in inputs]
        if any(lead and vjp is not None for lead, vjp in zip(found, vjps)):
            below.add(id(out))
        outs.append(out)  # alive, or its identity could be another's
        marks.append([lead for lead, x, vjp in zip(found, inputs, vjps) if x is not None and vjp is not None])

    token = engine._observer.set(observe)
    try:
        step()
    finally:
        engine._observer.reset(token)
    return marks


GROUPS = {"the adapter": r"@lora\.", "its A": r"\.A$", "norms and biases": r"(bias|norm\.weight)$",
          "one matrix": r"^decoder\.0\.ff\.wo\.weight$", "the head": r"^(head|embedding)\.weight$", "all": "."}


@settings(max_examples=30)
@given(cases(), st.sampled_from(sorted(GROUPS)))
def test_exactly_the_vjps_whose_inputs_lead_to_no_selected_parameter_are_struck_out(case, group):
    model = case.model()
    case.attach(model)
    selected = minipeft.select(model, GROUPS[group])
    step = lambda: model.loss(**case.batch(), rng=numpy.random.default_rng(case.seed))  # noqa: E731
    entries = xray(step, selected).entries
    assert [[kept for _, kept in e.vjps] for e in entries] == leads(case, model, selected, step)
    assert {name for e in entries for name in e.trains} == set(selected)
    assert all(e.kept_bytes == 0 == e.backward_flops for e in entries if not e.kept)


def test_below_the_lowest_trained_parameter_everything_is_struck_out_and_nothing_is_kept():
    case = lora_case(family="pre-LN")
    model = case.model()
    selected = minipeft.select(model, r"^decoder\.1\.ff\.")
    entries = xray(lambda: model.loss(**case.batch()), selected).entries
    first = next(i for i, e in enumerate(entries) if e.trains)
    assert first > len(entries) / 2
    assert all(e.kept == () and e.kept_bytes == 0 for e in entries[:first])
    assert all(e.kept for e in entries[first:])


def test_vjps_are_named_by_the_arguments_of_the_op_however_it_is_called():
    q, k = leaf(2, 3, 4), leaf(2, 3, 4, seed=1)
    entries = xray(lambda: ops.sum(ops.attention(q, k=k, v=k, heads=2, scale=1.0)), {"q": q}).entries
    assert entries[0].vjps == (("q", True), ("k", False), ("v", False))  # no bias: no dbias, kept or not

    @op
    def joined(first, *others, axis=0):
        return numpy.concatenate((first, *others), axis), (lambda g: g[:2], lambda g: g[2:4], lambda g: g[4:])

    entries = xray(lambda: ops.sum(joined(q, k, q)), {"q": q}).entries
    assert entries[0].vjps == (("first", True), ("others0", False), ("others1", True))
    entries = xray(lambda: ops.sum(ops.concat(q, k)), {"q": q}).entries
    assert entries[0].vjps == (("parts0", True), ("parts1", False))


# ---- FLOPs of a step

def test_a_lora_step_takes_2_n_per_frozen_weight_and_token_forward_and_again_for_dx_above_the_lowest_adapter():
    config = minipeft.T5Config(50, 16, 3, 4, 20, 3, 2)
    model = minipeft.T5(config, numpy.random.default_rng(0))
    rank, batch, source, target = 2, 3, 7, 5
    adapter = minipeft.attach(model, minipeft.LoRA(rank, 4), numpy.random.default_rng(1), "lora").parameters
    ids = numpy.random.default_rng(2).integers(1, 50, (batch, source + target))
    entries = xray(lambda: model.loss(ids[:, :source], ids[:, source:]), adapter).entries
    d, inner, ff = 16, 12, 20
    s, t = batch * source, batch * target
    attention, feed_forward = 4 * d * inner, 2 * d * ff
    encoder, decoder = attention + feed_forward, attention + 2 * d * inner + feed_forward  # k, v of cross: the memory
    dense = 3 * s * encoder + 2 * (t * decoder + s * 2 * d * inner) + t * d * 50
    no_dx = 3 * d * inner * (s + t)  # q, k, v of the first layers read embeddings, below which nothing is trained
    linear = named(entries, "linear")
    assert sum(e.forward_flops for e in linear) == 2 * dense
    assert sum(e.backward_flops for e in linear) == 2 * (dense - no_dx)
    low_rank = named(entries, "low_rank_linear")
    places = 2 * (3 * s + 2 * t) + 2 * (t + s)  # q and v of 3 + 2 self-attentions; cross: q on t tokens, v on s
    one = 2 * rank * (d + inner)
    assert sum(e.forward_flops for e in low_rank) == places * one
    thin = 2 * rank * d  # backward: g B, dA, dB everywhere; dx where the input leads to an adapter
    assert sum(e.backward_flops for e in low_rank) == places * (one + 2 * rank * inner + thin) - 2 * (s + t) * thin


def test_full_fine_tuning_takes_twice_as_many_flops_backward_as_forward_in_its_products():
    case = lora_case()
    model = case.model()
    entries = xray(lambda: model.loss(**case.batch()), minipeft.select(model, ".")).entries
    for name in ("linear", "attention"):
        chosen = named(entries, name)
        assert sum(e.backward_flops for e in chosen) == 2 * sum(e.forward_flops for e in chosen) > 0


def test_an_op_without_a_flop_rule_counts_1_per_element_and_is_named():
    @op
    def convolved(a):
        return a * 3, (lambda g: g * 3,)

    p = leaf(7)
    x = xray(lambda: ops.sum(convolved(p)), {"p": p})
    assert x.entries[0].forward_flops == x.entries[0].backward_flops == 7
    assert x.without_rule == ("convolved",) and "without a rule, counted as 1 FLOP per element: convolved" in str(x)
    assert xray(lambda: ops.sum(p), {"p": p}).without_rule == ()


# ---- the peak

def measured_peak(step: Callable, params: dict) -> int:
    """The allocator's: the most above the start of value_and_grad(step, params)."""
    gc.collect()
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        tracemalloc.reset_peak()
        value_and_grad(step, params)
        return tracemalloc.get_traced_memory()[1] - before
    finally:
        tracemalloc.stop()


def within_10_percent(step: Callable, params: dict) -> None:
    measured, counted = measured_peak(step, params), xray(step, params).peak_bytes
    assert 0.9 * measured <= counted <= measured, (counted, measured)


def small_t5(config: minipeft.T5Config, batch: int, source: int, target: int) -> tuple[Any, dict, dict]:
    rng = numpy.random.default_rng(0)
    model = minipeft.T5(config, rng)
    adapter = minipeft.attach(model, minipeft.LoRA(rank=8), rng, "lora").parameters
    ids = rng.integers(2, config.vocab_size, (batch, source + target))
    return model, adapter, {"input_ids": ids[:, :source], "labels": ids[:, source:]}


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("what", ["LoRA", "full", "norms and biases"])
def test_the_peak_is_the_allocators_within_10_percent(what, training):
    model, adapter, batch = small_t5(minipeft.T5Config(256, 64, 16, 4, 256, 2, 2), 16, 48, 32)
    step = lambda: model.loss(**batch, rng=numpy.random.default_rng(1) if training else None)  # noqa: E731
    if what != "LoRA":
        model.attachments["lora"].unplug()
        adapter = minipeft.select(model, "." if what == "full" else NORMS_AND_BIASES)
    within_10_percent(step, adapter)


@pytest.mark.parametrize("what", ["LoRA", "full"])
def test_the_peak_is_the_allocators_within_10_percent_at_the_size_of_the_examples(what):
    model, adapter, batch = small_t5(minipeft.T5Config(2048, 256, 32, 8, 1024, 4, 4), 16, 64, 64)
    if what == "full":
        model.attachments["lora"].unplug()
        adapter = minipeft.select(model, ".")
    within_10_percent(lambda: model.loss(**batch), adapter)


def test_the_peak_of_a_chain_is_what_paper_and_pencil_say():
    """Two exp keep their outputs, n numbers each. In the backward of the first one that is visited: both outputs and
    its term; then one output and two gradients. The loss and the number that the backward starts from are 8 bytes."""
    n = 1000
    p = leaf(n)
    x = xray(lambda: ops.sum(ops.exp(ops.exp(p))), {"p": p})
    assert x.kept_bytes == 2 * n * 8
    assert x.peak_bytes == 3 * n * 8 + 16 and x.peak_at == "backward of exp [1000]"


def big() -> Leaf:
    return Leaf(numpy.ones(2 ** 16))


def many_terms(p: Leaf) -> Tensor:
    """Five terms of one gradient: a sum is made, then added to."""
    return functools.reduce(ops.add, [ops.sum(ops.mul(p, float(i))) for i in range(5)])


def broadcast(p: Leaf) -> Tensor:
    """Terms larger than the gradient that they are summed into."""
    return functools.reduce(ops.add, [ops.sum(ops.mul(p, numpy.ones((3, 1)) * i)) for i in range(3)])


def inner_sum(p: Leaf) -> Tensor:
    """Sums at nodes that are not leaves, each gone when it has been passed on."""
    x = ops.exp(p)
    for _ in range(10):
        x = ops.add(x, x)
    return ops.sum(x)


def shared_work(p: Leaf) -> Tensor:
    """A VJP remembers an array eight times its gradient's size for the other one, and lets it go with the node."""
    @op
    def wide(a, b):
        work = once(lambda g: numpy.tile(g, 8))
        return a + b, (lambda g: work(g)[:g.size] * 1, lambda g: work(g)[g.size:2 * g.size] * 1)

    return ops.sum(wide(ops.neg(p), ops.neg(p)))


def transient(p: Leaf) -> Tensor:
    """The forward's own peak: large arrays that nothing keeps."""
    return ops.sum(ops.index(ops.add(ops.concat(p, p, p, p, p, p, p, p), 1.0), key=slice(0, 8)))


def made_here(p: Leaf) -> Tensor:
    """An array that is no op's output and that nothing keeps."""
    return ops.sum(ops.index(ops.add(p, numpy.ones((8, p.shape[0]))), key=slice(0, 1)))


def dropped_closure(p: Leaf) -> Tensor:
    """An op below all that is trained: what its VJP closes over lives until the op is over."""
    @op
    def wide(a):
        held = numpy.tile(a, 8)
        return a * 2, (lambda g: g * held[:a.size],)

    return ops.sum(ops.add(p, wide(numpy.ones(p.shape))))


@pytest.mark.parametrize("program", [many_terms, broadcast, inner_sum, shared_work, transient, made_here,
                                     dropped_closure])
def test_the_peak_follows_sums_remembered_work_and_what_only_the_forward_holds(program):
    p = big()
    within_10_percent(lambda: program(p), {"p": p})


def test_the_peak_falls_in_the_forward_where_the_forward_holds_most():
    p = big()
    assert xray(lambda: transient(p), {"p": p}).peak_at.startswith("forward of add")


# ---- what it leaves alone

def test_an_xray_holds_plain_numbers_and_names_and_no_array_outlives_it(monkeypatch):
    case = lora_case()
    model = case.model()
    adapter = case.attach(model).parameters
    before = {id(p.data) for p in minipeft.select(model, ".").values()}
    seen: list[weakref.ref] = []
    see = Buffers.see

    def noting(self: Buffers, thing: Any, made: bool = False) -> list[int]:
        seen.extend(weakref.ref(owner) for owner in owners(thing) if id(owner) not in before)
        return see(self, thing, made)

    monkeypatch.setattr(Buffers, "see", noting)
    x = xray(lambda: model.loss(**case.batch()), adapter)
    assert len(seen) > 300 and not any(r() is not None for r in seen)

    def plain_only(thing: Any) -> bool:
        if isinstance(thing, tuple):
            return all(plain_only(t) for t in thing)
        if dataclasses.is_dataclass(thing):
            return all(plain_only(getattr(thing, f.name)) for f in dataclasses.fields(thing))
        return type(thing) in (int, float, str, bool)

    assert plain_only(x)


@settings(max_examples=30)
@given(cases(), st.sampled_from(["all", "the adapter"]))
def test_gradients_loss_and_parameters_are_those_of_value_and_grad_bit_for_bit(case, group):
    model = case.model()
    case.attach(model)
    selected = minipeft.select(model, GROUPS[group])
    step = lambda: model.loss(**case.batch(), rng=numpy.random.default_rng(case.seed))  # noqa: E731
    loss, grads = value_and_grad(step, selected)
    everything = bits(minipeft.select(model, "."))
    caught = []

    def catching(*what: Any, **options: Any) -> Any:
        caught.append(value_and_grad(*what, **options))
        return caught[0]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(xray_module, "value_and_grad", catching)
        x = xray(step, selected)
    assert x.loss == loss == caught[0][0] and bits(caught[0][1]) == bits(grads)
    assert bits(minipeft.select(model, ".")) == everything
    assert x.trained == sum(p.data.size for p in selected.values())


def test_two_xrays_of_one_step_are_equal():
    case = lora_case()
    model = case.model()
    step, adapter = (lambda: model.loss(**case.batch())), case.attach(model).parameters
    assert xray(step, adapter) == xray(step, adapter)


def test_it_raises_as_value_and_grad_does_and_leaves_no_observer_behind():
    p, q = leaf(2), leaf(2, seed=1)

    def broken() -> Tensor:
        ops.exp(p)
        raise KeyError("mine")

    for step, params, error, words in [
            (lambda: ops.sum(p), {}, ValueError, "nothing is selected"),
            (lambda: ops.sum(p), {"p": p, "q": q}, ValueError, "1 of 2 selected parameters: q"),
            (lambda: ops.exp(p), {"p": p}, ValueError, r"returned shape \[2\]"),
            (lambda: xray(lambda: ops.sum(p), {"p": p}), {"p": p}, RuntimeError, "only first-order"),
            (lambda: ops.sum(p), {"p": p.data}, TypeError, "is ndarray; expected a Parameter"),
            (broken, {"p": p}, KeyError, "mine")]:
        with pytest.raises(error, match=words):
            xray(step, params)
        assert engine._observer.get() is None and engine._watched.get() is None and p.node is None
    assert xray(lambda: ops.sum(p), {"p": p, "q": q}, unused="zeros").trained == 4
    assert engine._observer.get() is None


def test_an_observer_that_was_set_is_set_again():
    p, seen = leaf(2), []
    token = engine._observer.set(lambda *what: seen.append(what[0].__name__))
    try:
        xray(lambda: ops.sum(p), {"p": p})
        ops.exp(p)
    finally:
        engine._observer.reset(token)
    assert seen == ["exp"]


def test_a_step_without_an_op_is_an_empty_tape():
    p = leaf(1)
    x = xray(lambda: p, {"p": p})
    assert x.entries == () and x.kept_bytes == x.forward_flops == x.peak_bytes == 0 and "0 ops" in str(x)


# ---- how it reads

def test_a_short_step_is_printed_op_by_op_with_the_frozen_struck_out():
    p, w = leaf(4, 3), leaf(5, 3, seed=1)
    lines = str(xray(lambda: ops.sum(ops.linear(ops.exp(p), w)), {"p": p})).splitlines()
    assert [line.split() for line in lines[:4]] == [
        ["op", "output", "kept", "forward", "backward", "VJPs"], ["exp", "[4,", "3]", "96", "B", "12", "12", "da"],
        ["linear", "[4,", "5]", "-", "120", "120", "dx", "-dw-"], ["sum", "[]", "-", "20", "-", "da"]]
    assert lines[5] == "12 numbers trained; 3 ops, 3 of 4 VJPs kept"
    assert lines[6].startswith("kept 96 B, peak ") and "-dw-: it is not" in lines[-1]


def test_layers_that_repeat_are_folded_in_print_and_not_in_the_data():
    p = leaf(4, 4)

    def step() -> Tensor:
        x: Any = p
        for _ in range(30):
            x = ops.exp(ops.mul(x, 0.1))
        return ops.sum(x)

    x = xray(step, {"p": p})
    lines = str(x).splitlines()
    assert len(x.entries) == 61 and [line.split()[0] for line in lines[1:5]] == ["30", "mul", "exp", "sum"]
    assert lines[1] == "30 times:" and lines[2].startswith("  mul      [4, 4]  ")
    assert x.tape() == "\n".join(lines[:5])


@given(st.lists(st.sampled_from("abc"), max_size=30))
def test_folding_loses_no_row_and_adds_none(rows):
    assert [row for times, block in folded(rows) for _ in range(times) for row in block] == rows


def test_folding_names_a_repeated_block_once():
    assert folded(list("abcbcbcd")) == [(1, ["a"]), (3, ["b", "c"]), (1, ["d"])]
    assert folded(list("aaaa")) == [(4, ["a"])] and folded([]) == []


def test_the_print_of_a_deep_model_fits_a_page_and_its_groups_sum_to_the_totals():
    model, adapter, batch = small_t5(minipeft.T5Config(64, 16, 4, 4, 32, 6, 6), 2, 5, 4)
    step = lambda: model.loss(**batch, rng=numpy.random.default_rng(0))  # noqa: E731
    x = xray(step, adapter)
    lines = str(x).splitlines()
    assert len(x.entries) > 200 and len(lines) <= 60 and max(map(len, lines)) <= 120
    groups = [line.split() for line in lines[1:lines.index("")]]
    assert sum(int(g[1]) for g in groups) == len(x.entries)
    frozen = [line for line in lines if line.startswith("linear")]
    assert len(frozen) == 2 and all("-dw-" in line for line in frozen)
    assert "the largest keepers" in lines and any("weight@lora.A" in line for line in lines)


def test_two_steps_are_compared_row_by_row():
    p, w = leaf(4, 3), leaf(5, 3, seed=1)
    step = lambda: ops.sum(ops.linear(ops.exp(p), w))  # noqa: E731
    lines = compare({"full": xray(step, {"p": p, "w": w}), "frozen W": xray(step, {"p": p})}).splitlines()
    assert [line.split("  ")[0].strip() for line in lines] == ["", "full", "frozen W"]
    assert lines[0].split() == ["trained", "kept", "peak", "forward", "backward", "VJPs", "kept"]
    assert lines[1].endswith("4 of 4") and lines[2].endswith("3 of 4") and lines[1].split()[1] == "27"
