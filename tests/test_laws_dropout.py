"""Law 14: dropout reaches every weight that asks for it, whatever is stacked above or below.

For every plugged, unmerged weight that is used as a product and asks for dropout, two passes with different generators
differ, and the mean over many passes is the undropped value. Table lookups have no dropout.
"""
from __future__ import annotations

import dataclasses
from typing import Any

import numpy
import pytest

import minipeft
from minipeft.nn.weight import Reparam
from tests.methods_under_test import moved
from tests.models_under_test import FAMILIES, Case

RNG = numpy.random.default_rng
# what is stacked with the LoRA that drops, on one slot: a method of the slot's name
OTHERS: dict[str, Any] = {
    "nothing": None,
    "LoRA": lambda name: minipeft.LoRA(1, where=f"^{name}$"),
    "Selective": lambda name: minipeft.Selective(where=f"^{name}$"),
    "a mask": lambda name: minipeft.Selective(mask={name: numpy.arange(3)}),
    "rows": lambda name: minipeft.Selective(where=f"^{name}$", rows=(1, 4))}

# methods that have no dropout here; a Selective above one of them asks it about the weights below
SILENT: list[Any] = [
    minipeft.LoRA(1), minipeft.LoRA(1, init="pissa"), minipeft.LoRA(1, enable=(True,)), minipeft.DoRA(1),
    minipeft.DoRA(1, norm="input", detach=False), minipeft.IA3(), minipeft.VeRA(2), minipeft.LoHa(1), minipeft.LoKr(1),
    minipeft.HiRA(1), minipeft.OFT(2), minipeft.QALoRA(1, group=3)]


def without_dropout(family: str) -> Any:
    """A model whose own layers drop nothing."""
    model = Case((family, "q and v"), 1, 1, "float64", 0).model()
    return type(model)(dataclasses.replace(model.config, dropout_rate=0.0), RNG(0), "float64")


def products(model: Any) -> list[str]:
    """The slots that are multiplied by: every matrix, and a table where it is the head."""
    return [name for name, slot in model.slots.items()
            if slot.kind == "linear" or slot is model.head.weight]


def stacked(model: Any, name: str, other: str, order: str) -> list[str]:
    """A LoRA with dropout on the slot, and the other below or above it; their names, bottom first."""
    methods = [("drops", minipeft.LoRA(2, dropout=0.5, where=f"^{name}$"))]
    if OTHERS[other] is not None:
        methods.insert(0 if order == "below" else 1, ("other", OTHERS[other](name)))
    for i, (called, method) in enumerate(methods):
        moved(minipeft.attach(model, method, RNG(i), called), RNG([i, 1]))
    return [called for called, _ in methods]


@pytest.mark.parametrize("order", ["below", "above"])
@pytest.mark.parametrize("other", OTHERS)
@pytest.mark.parametrize("family", FAMILIES)
def test_law_14_dropout_of_any_one_weight_reaches_the_loss_plugged_and_routed(family, other, order):
    batch = Case((family, "q and v"), 1, 1, "float64", 0).batch()
    names = products(without_dropout(family))
    for name in names if other in ("nothing", "rows") else names[::3]:
        if other == "rows" and without_dropout(family).slots[name].kind != "embedding":
            continue
        model = without_dropout(family)
        stack = stacked(model, name, other, order)
        for adapter in (None, tuple(stack), tuple(reversed(stack)), [tuple(stack), None, "drops", tuple(stack)]):
            first, again, second = (float(model.loss(**batch, rng=RNG(seed), adapter=adapter)) for seed in (1, 1, 2))
            assert first == again != second, (name, adapter)
        model.attachments["drops"].merge() if stack[0] == "drops" else model.attachments["drops"].unplug()
        assert len({float(model.loss(**batch, rng=RNG(seed))) for seed in (1, 2)}) == 1, "merged, or off"


@pytest.mark.parametrize("above", [("Selective", "a mask"), ("a mask", "Selective", "LoRA", "a mask")])
def test_law_14_dropout_reaches_through_several_weights_above_it(above):
    batch, name = Case(("t5 v1.0", "q and v"), 1, 1, "float64", 0).batch(), "decoder.0.ff.wo.weight"
    model = without_dropout("t5 v1.0")
    stacked(model, name, "nothing", "below")
    for i, other in enumerate(above):
        moved(minipeft.attach(model, OTHERS[other](name), RNG(i), f"above{i}"), RNG([i, 1]))
    assert len({float(model.loss(**batch, rng=RNG(seed))) for seed in (1, 2)}) == 2


@pytest.mark.parametrize("silent", SILENT, ids=lambda method: f"{type(method).__name__} {method.fields()}")
def test_law_14_a_method_without_dropout_hands_it_on_and_says_that_a_weight_below_has_it(silent):
    name = "decoder.0.ff.wi.weight"
    batch, model = Case(("t5 v1.0", "q and v"), 1, 1, "float64", 0).batch(), without_dropout("t5 v1.0")
    stacked(model, name, "nothing", "below")
    for called, method in (("silent", dataclasses.replace(silent, where=f"^{name}$")),
                           ("above", OTHERS["Selective"](name))):
        moved(minipeft.attach(model, method, RNG(1), called), RNG([1, 1]))
        assert model.slots[name].fold().drops, called
        assert len({float(model.loss(**batch, rng=RNG(seed))) for seed in (1, 2)}) == 2, called


@pytest.mark.parametrize("order", ["below", "above"])
@pytest.mark.parametrize("other", OTHERS)
def test_law_14_the_mean_over_many_passes_is_the_undropped_product(other, order):
    model = without_dropout("t5 v1.0")
    name = "embedding.weight" if other == "rows" else "decoder.0.ff.wo.weight"
    stacked(model, name, other, order)
    slot, passes = model.slots[name], 4000
    x = RNG(3).standard_normal((1, 2, slot.base.shape[1]))
    rng, exact = RNG(4), slot.project(x).data
    seen = numpy.stack([slot.project(x, rng).data for _ in range(passes)])
    error = abs(seen.mean(axis=0) - exact)
    assert (seen.std(axis=0) > 0).all()
    # a number of 6 standard errors is seen once in 500 million
    assert (error <= 6 * seen.std(axis=0) / passes ** 0.5).all()
    dense = slot.fold().dense().data
    assert abs(exact - x @ dense.T).max() <= 1e-13 * (abs(x) @ abs(dense).T).max()


def test_a_table_that_is_only_looked_up_has_no_dropout():
    model = without_dropout("t5 v1.1")
    stacked(model, "embedding.weight", "Selective", "above")
    batch = Case(("t5 v1.1", "q and v"), 1, 1, "float64", 0).batch()
    assert len({float(model.loss(**batch, rng=RNG(seed))) for seed in (1, 2, 3)}) == 1


@pytest.mark.parametrize("other", [name for name in OTHERS if name not in ("nothing", "rows")])
def test_evaluation_is_what_it_is_without_dropout_to_the_bit(other):
    batch = Case(("post-LN", "q and v"), 1, 1, "float64", 0).batch()
    model, name = without_dropout("post-LN"), "encoder.0.ff.wi.weight"
    stacked(model, name, other, "above")
    wanted = float(model.loss(**batch))
    model.attachments["drops"].at[model.slots[name]].p = 0.0
    assert float(model.loss(**batch)) == wanted


# ---- what cannot hand a generator on


class Doubled(Reparam):
    """2 W: a definition alone."""

    def dense(self):
        return self.base.dense() * 2.0


class DoubledProduct(Doubled):
    """The same, with a product that hands the generator on."""

    def project(self, x, rng=None):
        return self.base.project(x, rng) * 2.0


@minipeft.register
@dataclasses.dataclass(frozen=True)
class Twice(minipeft.Method):
    """Doubles every matrix that `where` finds."""

    product: bool = False
    where: str = r"ff\.wo"

    def arrays(self, name, slot, model):
        return {"v": minipeft.trained((), minipeft.ones)}

    def make(self, name, slot, arrays):
        return (DoubledProduct if self.product else Doubled)(**arrays)


def test_a_method_with_a_definition_alone_is_refused_above_a_weight_with_dropout_however_it_gets_there():
    model, batch = without_dropout("t5 v1.0"), Case(("t5 v1.0", "q and v"), 1, 1, "float64", 0).batch()
    lower = minipeft.attach(model, minipeft.LoRA(2, dropout=0.5, where=r"ff\.wo"), RNG(0), "lower")
    before = model.host.now
    message = "Doubled defines dense\\(\\) alone, where dropout is lost: write Doubled.project"
    with pytest.raises(ValueError, match=message):
        minipeft.attach(model, Twice(), RNG(1))
    assert model.host.now is before
    lower.unplug()
    upper = minipeft.attach(model, Twice(), RNG(1), "upper")
    with pytest.raises(ValueError, match=message):
        model.loss(**batch, adapter=("lower", "upper"))
    assert numpy.isfinite(float(model.loss(**batch, adapter=("upper", "lower"), rng=RNG(1))))
    upper.unplug()
    lower.plug()
    with pytest.raises(ValueError, match=message):
        upper.plug()
    lower.merge()
    upper.plug()
    now = model.host.now
    with pytest.raises(ValueError, match=message):
        lower.unmerge()
    assert model.host.now is now and lower.state == "merged"


def test_a_method_whose_product_hands_the_generator_on_is_not_refused():
    model, batch = without_dropout("t5 v1.0"), Case(("t5 v1.0", "q and v"), 1, 1, "float64", 0).batch()
    moved(minipeft.attach(model, minipeft.LoRA(2, dropout=0.5, where=r"ff\.wo"), RNG(0), "lower"), RNG(1))
    minipeft.attach(model, Twice(product=True), RNG(1))
    assert len({float(model.loss(**batch, rng=RNG(seed))) for seed in (1, 2)}) == 2
