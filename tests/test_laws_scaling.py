"""Law 8, with factors: at `adapter={"a": w}` the change that an attachment makes is multiplied by w.

    W -> W + w (f(W) - W) at a slot          F -> F + w (A(F) - F) at a sublayer site
"""
from __future__ import annotations

import dataclasses
import math
from fractions import Fraction
from typing import Any

import numpy
import pytest
from hypothesis import given
from hypothesis import strategies as st

import minipeft
from minipeft.engine.tensor import Tensor, _observer
from minipeft.laws.bounds import close, close_gradients, tau, within
from minipeft.methods.lora import LowRank
from minipeft.nn.routing import _view, routed
from minipeft.nn.scaled import ScaledOutput, ScaledWeight, scaled
from minipeft.nn.site import Site
from minipeft.nn.slot import Slot
from tests.foreign_methods import ForeignIA3
from tests.methods_under_test import DTYPES, Variant, each, share, variants
from tests.models_under_test import bits, logits, same_values

RNG = numpy.random.default_rng
LORA = Variant("LoRA", "every linear", "t5 v1.0", "float64", 0)
PAIRS = {"LoRA": ("LoRA", "mixture"), "Selective": ("LoRA", "every linear"), "Bottleneck": ("Selective", "norms")}
STREAMS = ("PromptTuning", "PrefixTuning")  # whose changes no factor can weaken


def with_two(case: Variant) -> Any:
    """The case's method as a, another as b; both off."""
    model = case.model()
    case.attach(model, "a").unplug()
    case.attach(model, "b", 3, PAIRS.get(case.method, ("LoRA", "q and v"))).unplug()
    return model


class Generic(minipeft.Reparam):
    """A piece behind another class, without `scaled` of its own: what the generic way makes of it."""

    def dense(self) -> Tensor:
        return self.piece.over(self.base).dense()

    def project(self, x: Any, rng: Any = None) -> Tensor:
        return self.piece.over(self.base).project(x, rng)

    def rows(self, ids: Any) -> Tensor:
        return self.piece.over(self.base).rows(ids)


@each()
@share(20)
@given(st.data())
def test_law_8_the_factor_1_gives_the_bits_of_the_name_and_0_the_values_of_the_base(method, kind, dtype, data):
    case = data.draw(variants(method, kind, dtype))
    model, batch = with_two(case), case.batch()
    ids, base = batch["input_ids"], logits(model, batch)
    assert logits(model, batch, adapter={"b": 1, "a": 1.0}).tobytes() == logits(
        model, batch, adapter=("b", "a")).tobytes()
    assert logits(model, batch, adapter={}).tobytes() == base.tobytes()
    if method not in STREAMS:
        assert same_values(logits(model, batch, adapter={"a": 0, "b": 0.0}), base)
        assert same_values(model.encode(ids, adapter={"a": 0}).data, model.encode(ids).data)
        half = logits(model, batch, adapter={"a": 0.5})
        assert not same_values(half, base) and not same_values(half, logits(model, batch, adapter="a"))


@each("LoRA", "Selective", "Relatives", "Zoo")
@share(20)
@given(st.data(), st.sampled_from([0.5, -2.0, 3.0, 1 / 3]))
def test_law_8_a_weight_goes_by_the_factor_along_its_change(method, kind, dtype, data, w):
    """In dense form, product, rows and vector, above another piece; W + w (f(W) - W) in the longest floats."""
    case = data.draw(variants(method, kind, dtype))
    model = with_two(case)
    b, u = model.attachments["b"].at, case.u
    for name, slot in model.attachments["a"].places.items():
        base = b[slot].over(slot.base) if slot in b else slot.base
        piece = model.attachments["a"].at[slot]
        found, full = scaled("a", slot, piece, w).over(base), piece.over(base)
        W = base.dense().data.astype(numpy.longdouble)
        wanted = W + w * (full.dense().data - W)
        size = (1 + abs(w)) * (abs(W) + abs(full.dense().data))
        assert within(found.dense().data, wanted, 64 * u * size + 64 * u * size.max()), name
        if W.ndim == 1:
            assert found.vector().data.tobytes() == found.dense().data.tobytes()
            continue
        ids, x = numpy.arange(min(slot.shape[0], 4))[None], RNG(0).standard_normal((2, 3, slot.shape[1])).astype(dtype)
        assert within(found.rows(ids).data, wanted[ids], 64 * u * (size[ids] + size.max())), name
        bound = tau(abs(x) @ size.T.astype(float), 64 + slot.shape[1], 64, u) + 64 * u * size.max() * abs(x).sum()
        assert within(found.project(x).data, x @ wanted.T, numpy.asarray(bound, float)), name


def test_law_8_on_fractions_the_scaled_weight_is_exact_and_both_ways_to_scale_a_lora_agree():
    def fractions(*shape, seed):
        return numpy.vectorize(lambda n: Fraction(int(n), 7))(RNG(seed).integers(-9, 9, shape)).astype(object)

    slot = Slot("linear", fractions(4, 3, seed=0))
    A, B = minipeft.Parameter(fractions(2, 3, seed=1)), minipeft.Parameter(fractions(4, 2, seed=2))
    piece, w, x = LowRank(A=A, B=B, scale=Fraction(3, 5), p=0.0), -0.375, fractions(2, 3, seed=3)
    wanted = slot.base.data + Fraction(w) * Fraction(3, 5) * (B.data @ A.data)
    for found in (scaled("a", slot, piece, w), scaled("a", slot, Generic(piece=piece), w)):
        found = found.over(slot.base)
        assert (found.dense().data == wanted).all() and (found.project(x).data == x @ wanted.T).all()
        assert (found.rows(numpy.array([[3, 0]])).data == wanted[[[3, 0]]]).all()
    assert type(scaled("a", slot, piece, w)) is LowRank and type(scaled("a", slot, Generic(piece=piece), w)) \
        is ScaledWeight


def test_law_8_a_sublayer_goes_by_the_factor_along_its_change():
    case = Variant("Bottleneck", "houlsby, cross", "pre-LN", "float64", 0)
    model = with_two(case)
    for site in model.attachments["a"].places.values():
        piece, (x, n, F) = model.attachments["a"].at[site], RNG(0).standard_normal((3, 2, 4, site.width))
        for strength, kind in (("scale", type(piece)), (None, ScaledOutput)):
            piece.strength = strength
            found, wanted = scaled("a", site, piece, -0.75), F - 0.75 * (piece(x, n, F).data - F)
            assert type(found) is kind and found is not piece
            assert numpy.allclose(found(x, n, F).data, wanted, rtol=1e-14, atol=1e-14)


@each(dtypes=("float64",))
@share(5)
@given(st.data(), st.permutations([{"a": 0.5}, {"a": 0.5, "b": 1}, {"b": -2, "a": 0.25}, "a", None, ("a", "b")]))
def test_law_8_each_row_of_a_batch_with_factors_is_that_row_alone(method, kind, dtype, data, routing):
    """In logits, loss, gradients and generated ids. (test_laws_routing.py has more examples, without factors.)"""
    case = data.draw(variants(method, kind, dtype))
    if method in STREAMS:
        routing = [{"a": 1, "b": 0.5}, {"b": -2}, None, {"b": 0.5, "a": 1}, "a", {"b": 0.5}]
    model, batch = with_two(case), case.batch(len(routing))
    params = {n: p for name in "ab" for n, p in model.attachments[name].parameters.items()}
    mixed = logits(model, batch, adapter=routing)
    together = model.generate(batch["input_ids"], max_new_tokens=4, adapter=routing)
    loss, grads = minipeft.value_and_grad(lambda: model.loss(**batch, adapter=routing), params, "zeros")
    tokens, total, summed = 0, 0.0, {name: numpy.zeros_like(g) for name, g in grads.items()}
    for i, entry in enumerate(routing):
        row = {key: value[i:i + 1] for key, value in batch.items()}
        assert close(mixed[i:i + 1], logits(model, row, adapter=[entry]), case.u), (i, entry)
        ids = model.generate(row["input_ids"], max_new_tokens=4, adapter=entry or [None])[0]
        assert together[i, :len(ids)].tolist() == ids.tolist()
        n = int((row["labels"] != -100).sum())
        value, own = minipeft.value_and_grad(lambda: model.loss(**row, adapter=[entry]), params, "zeros")
        tokens, total = tokens + n, total + n * value
        for name, g in own.items():
            summed[name] += n * g
    assert abs(loss - total / tokens) <= 9007 * case.u * abs(loss)
    assert close_gradients(grads, {name: g / tokens for name, g in summed.items()}, case.u) is None


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_factors_that_rows_share_are_computed_once(dtype):
    case = dataclasses.replace(LORA, dtype=dtype)
    model, batch = with_two(case), case.batch(4)
    slot = next(iter(model.attachments["a"].places.values()))
    seen: list[list] = []
    with routed(model.host, [{"a": 2}, {"a": 2.0}, {"a": numpy.float32(2)}, {"a": 3}], 4):
        seen += [[entry.factor for entry in here] for here, _ in _view.get().groups(slot)]
    assert seen == [[2], [3]] and len(batch["labels"]) == 4


@pytest.mark.parametrize("adapter, error, expected", [
    ({"a": math.nan}, ValueError, "adapter {'a': nan}; expected a finite number as the factor"),
    ({"a": -math.inf}, ValueError, "adapter {'a': -inf}; expected a finite"),
    ({"a": True}, ValueError, "adapter {'a': True}; expected a finite"),
    ({"a": "1"}, ValueError, "adapter {'a': '1'}; expected a finite"),
    ({"a": None}, ValueError, "adapter {'a': None}; expected a finite"),
    ({"a": 10 ** 400}, ValueError, "expected a finite number"),
    ({"d": 0.5}, ValueError, "adapter 'd' is not attached to this model; attached: a, b"),
    (["a", {"d": 1}, None, None], ValueError, "'d' is not attached"),
    ({1: 0.5}, TypeError, "adapter holds 1, of type int; expected names (of an attachment a: a.name), tuples of names, "
     "dicts {name: factor}, or None"),
    ([("a", 2)] * 4, TypeError, "adapter holds 2, of type int"),
    ([{"a"}] * 4, TypeError, "adapter holds {'a'}, of type set"),
    (0.5, TypeError, "adapter holds 0.5, of type float")])
def test_a_bad_factor_raises_before_anything_is_computed_in_every_call(adapter, error, expected):
    model, batch = with_two(LORA), LORA.batch()
    refused(model, batch, adapter, error, expected)


def refused(model: Any, batch: Any, adapter: Any, error: type, expected: str) -> None:
    ids, before = batch["input_ids"], bits({"base": logits(model, batch)})
    for call in (lambda: model(ids, ids, adapter=adapter), lambda: model.encode(ids, adapter=adapter),
                 lambda: model.loss(**batch, adapter=adapter), lambda: model.generate(ids, adapter=adapter)):
        computed: list[str] = []
        token = _observer.set(lambda forward, *_: computed.append(forward.__name__))
        try:
            with pytest.raises(error) as raised:
                call()
        finally:
            _observer.reset(token)
        assert expected in str(raised.value) and _view.get() is None and not computed
    assert bits({"base": logits(model, batch)}) == before


@pytest.mark.parametrize("method, family, dtype, factor", [
    ("LoRA", "pre-LN", "float64", 1e308), ("LoRA", "pre-LN", "float32", -1e38),
    ("Selective", "t5 v1.0", "float32", 1e39), ("Bottleneck", "t5 v1.0", "float32", 1e308)])
def test_a_factor_that_overflows_is_refused_before_anything_is_computed(method, family, dtype, factor):
    variant = {"LoRA": "pissa", "Selective": "all", "Bottleneck": "houlsby, cross"}[method]
    case = Variant(method, variant, family, dtype, 0)
    model, batch = with_two(case), case.batch()
    strength = 1e3
    for piece in model.attachments["a"].at.values():
        if piece.strength is not None:
            setattr(piece, piece.strength, Fraction(strength))
    refused(model, batch, {"b": 1, "a": factor}, ValueError, f"adapter {{'a': {factor:g}}}: the factor, times the "
            f"strength of 'a' itself, overflows in {dtype}; expected a smaller factor")


def test_a_prompt_takes_no_factor_but_1_and_the_error_comes_before_anything_is_computed():
    case = Variant("PromptTuning", "2", "t5 v1.0", "float64", 0)
    model, batch = with_two(case), case.batch()
    refused(model, batch, {"b": 2, "a": 0.5}, ValueError, "adapter {'a': 0.5}: 'a' adds positions at a site of kind "
            "'input', and no factor can weaken a position; expected the factor 1")
    refused(model, batch, [None, "a", {"a": 0}, None], ValueError, "adapter {'a': 0}")
    wanted = logits(model, batch, adapter="a")
    assert logits(model, batch, adapter=[{"a": 1}] * 4).tobytes() == wanted.tobytes()
    with pytest.raises(ValueError, match="at a site of kind 'keys_values'"):
        scaled("p", Site("keys_values", 3, "float64"), minipeft.Piece(), 2.0)


# ---- training


def test_a_forward_with_factors_that_is_differentiated_is_recorded_by_its_names():
    model, batch = with_two(LORA), LORA.batch()
    b = model.attachments["b"]
    minipeft.value_and_grad(lambda: model.loss(**batch, adapter=["a", None, {"a": 0.5, "b": 0.5}, {"a": 1}]),
                            b.parameters)
    assert [layer.name for layer in b.trained_on.below] == ["a"]
    assert b.trained_on.below == (model.attachments["a"].layer,) and model.attachments["a"].trained_on is None


def slope(run: Any, p: Any, at: tuple, h: float = 1e-6) -> float:
    values, before = [], p.data
    for step in (h, -h):
        p.data = before.copy()
        p.data[at] += step
        values.append(run())
    p.data = before
    return (values[0] - values[1]) / (2 * h)


@pytest.mark.parametrize("method", [ForeignIA3(), minipeft.Selective(component="norm"), minipeft.LoRA(2),
                                    minipeft.Bottleneck("pfeiffer", size=3)], ids=lambda m: type(m).__name__)
def test_the_gradients_of_a_scaled_piece_are_slopes(method):
    model, batch = LORA.model(), LORA.batch()
    a = minipeft.attach(model, method, RNG(0), "a")
    for p in a.parameters.values():
        p.data = p.data + 0.2 * RNG(1).standard_normal(p.shape)

    def run() -> Any:
        return model.loss(**batch, adapter={"a": -0.75})

    _, grads = minipeft.value_and_grad(run, a.parameters, "zeros")
    for name, p in list(a.parameters.items())[::3]:
        at = tuple(RNG(2).integers(0, p.shape))
        assert abs(grads[name][at] - slope(lambda: float(run()), p, at)) <= 1e-7 * max(1, abs(grads[name]).max()), name


class DropsBoth(minipeft.Reparam):
    """W0 x + p drop(x): a piece with dropout of its own, and no `scaled`."""

    drops = True

    def dense(self) -> Tensor:
        return self.base.dense() + self.d

    def project(self, x: Any, rng: Any = None) -> Tensor:
        return self.base.project(x, rng) + minipeft.ops.linear(minipeft.ops.dropout(x, 0.5, rng), self.d)


@pytest.mark.parametrize("w", [0.5, -2.0, 0.0])
def test_law_14_dropout_reaches_through_a_scaled_piece_and_what_lies_below_drops_the_same_for_both_terms(w):
    rng, x = RNG(0), RNG(1).standard_normal((2, 3, 4))
    slot = Slot("linear", rng.standard_normal((5, 4)))
    lora = minipeft.LoRA(2, dropout=0.5).make("w", slot, {
        "A": minipeft.Parameter(rng.standard_normal((2, 4))), "B": minipeft.Parameter(rng.standard_normal((5, 2)))})
    own = DropsBoth(d=minipeft.Parameter(rng.standard_normal((5, 4))))
    below = lora.over(slot.base)
    found = scaled("a", slot, own, w).over(below)
    assert found.drops and type(found) is ScaledWeight
    y, dropped = found.project(x, RNG(7)), below.project(x, RNG(7))
    change = y.data - dropped.data          # what the scaled piece adds to the weight below, which dropped this
    undropped = minipeft.ops.linear(x, own.d).data
    drawn = RNG(7)
    below.project(x, drawn)
    wanted = w * minipeft.ops.linear(minipeft.ops.dropout(Tensor(x), 0.5, drawn), own.d).data
    assert numpy.allclose(change, wanted, rtol=0, atol=1e-13)
    assert numpy.allclose(found.project(x).data - below.project(x).data, w * undropped, rtol=0, atol=1e-13)
    over = scaled("b", slot, lora, w).over(own.over(slot.base))
    assert over.drops and same_values(over.project(x, RNG(3)).data, over.project(x, RNG(3)).data)


class Before(minipeft.Reparam):
    """W0 (l x): a piece that gives the weight below another x."""

    def dense(self) -> Tensor:
        return self.base.dense() * self.l

    def project(self, x: Any, rng: Any = None) -> Tensor:
        return self.base.project(x * self.l, rng)


def test_law_14_what_lies_below_a_scaled_piece_drops_the_same_for_another_x():
    rng, x = RNG(0), Tensor(RNG(1).standard_normal((2, 3, 4)))
    slot = Slot("linear", rng.standard_normal((5, 4)))
    below = DropsBoth(d=minipeft.Parameter(rng.standard_normal((5, 4)))).over(slot.base)
    piece = Before(l=minipeft.Parameter(rng.standard_normal(4)))
    y, z = below.project(x, RNG(7)).data, below.project(x * piece.l, RNG(7)).data
    found = scaled("a", slot, piece, -0.75).over(below)
    assert numpy.allclose(found.project(x, RNG(7)).data, y - 0.75 * (z - y), rtol=0, atol=1e-13)


def test_a_scaled_piece_that_cannot_lie_above_dropout_is_refused_as_the_piece_itself_is():
    class Alone(minipeft.Reparam):
        def dense(self) -> Tensor:
            return self.base.dense() * 2

    slot = Slot("linear", RNG(0).standard_normal((3, 4)))
    lora = minipeft.LoRA(2, dropout=0.5)
    piece = lora.make("w", slot, {leaf: minipeft.Parameter(RNG(1).standard_normal(d.shape))
                                  for leaf, d in lora.arrays("w", slot, None).items()})
    with pytest.raises(ValueError, match="Alone defines dense"):
        scaled("a", slot, Alone(), 0.5).over(piece.over(slot.base))
