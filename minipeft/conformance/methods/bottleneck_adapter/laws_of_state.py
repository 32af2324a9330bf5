"""Laws of an adapter's state: the weights that it trains, its files, and another adapter beside it. All are M or S."""
from __future__ import annotations

from typing import Any

from minipeft.conformance.arithmetic import on_grid
from minipeft.conformance.case import Case
from minipeft.conformance.method import Laws, Make
from minipeft.conformance.methods.bottleneck_adapter.activations import ACTIVATIONS
from minipeft.conformance.methods.bottleneck_adapter.equations import LEAVES, PLACEMENTS
from minipeft.conformance.methods.bottleneck_adapter.laws import Seen, gradients_by, out
from minipeft.conformance.observe import fact, raised, same

LAWS = Laws()
law = LAWS.law


@law("A11", "S: exactly D, b_D, U and b_U are trained", "trainable")
def trainable(case: Case, make: Make) -> Seen:
    yield fact("trainable()", sorted(make(case).trainable()), sorted(LEAVES))


@law("A12", "S: it cannot be merged, and says so", "merge", "forward", kinds=("exact",))
def not_merged(case: Case, make: Make) -> Seen:
    adapter = make(case)
    y = out(adapter, case)
    yield raised("merge()", lambda: adapter.merge(), "no weight of the model computes what it does")
    yield same("y after that", out(adapter, case), y)


@law("A13", "M: saved and loaded, into a new adapter or a used one, it is the same in value and gradient, bit for bit",
     "save", "load", "forward")
def round_trip(case: Case, make: Make) -> Seen:
    for scale in dict.fromkeys((case.params["scale"], _of_many_digits(case))):
        twin = case.but(params={"scale": scale})
        adapter = make(twin)
        y, blob = out(adapter, twin), adapter.save()
        for how in ("", " into one that was used"):
            other = make(twin.but({name: -2 * case[name] for name in LEAVES}, {"scale": -3 * scale}))
            if how:
                out(other, twin)
                _gradients(other, twin)
            other.load(blob)
            yield same(f"y after save and load{how}, scale {scale:g}", out(other, twin), y)
            ours, theirs = _gradients(adapter, twin), _gradients(other, twin)
            for name in ours:
                yield same(f"d{name} after save and load{how}, scale {scale:g}", theirs[name], ours[name])


def _of_many_digits(case: Case) -> float:
    """0.1 in the case's dtype, a scale that no narrower dtype holds; for an exact case, its own scale."""
    return case.params["scale"] if case.exact else float(on_grid(0.1, case.dtype))


def _gradients(adapter: Any, case: Case) -> dict:
    """{name: gradient} of the adapter's own weights; {} if it offers no gradients."""
    found = gradients_by(adapter, case) if adapter.offers("vjp") else {}
    return {name: g for name, g in found.items() if name in LEAVES}


@law("A13x", "S: a saved adapter for another width is refused", "save", "load",
     where=lambda case: case["x"].shape[1] > 1)
def wrong_file(case: Case, make: Make) -> Seen:
    blob = make(case).save()
    narrow = case.but({"D": case["D"][:, 1:], **{name: case[name][1:] for name in ("U", "b_U")},
                       **{name: case[name][:, 1:] for name in ("x", "n", "F", "g")}},
                      {"scale": -3 * case.params["scale"]})
    adapter = make(narrow)
    y, before = out(adapter, narrow), _gradients(adapter, narrow)
    yield raised("load() of an adapter for a larger width", lambda: adapter.load(blob))
    yield same("y after the refusal", out(adapter, narrow), y)
    after = _gradients(adapter, narrow)
    for name in before:
        yield same(f"d{name} after the refusal", after[name], before[name])


@law("A14", "M: two adapters alive at once do not affect each other", "forward")
def two_alive(case: Case, make: Make) -> Seen:
    adapter = make(case)
    y, before = out(adapter, case), _gradients(adapter, case)
    activation, placement = (kinds[kinds.index(case.params[name]) - 1] for kinds, name in
                             (([*ACTIVATIONS], "activation"), (PLACEMENTS, "placement")))
    other = case.but({name: -2 * case[name] for name in LEAVES}, exact=False, params={
        "activation": activation, "placement": placement, "scale": -3 * case.params["scale"]})
    second = make(other)
    out(second, other)
    _gradients(second, other)
    yield same("y after another adapter was used", out(adapter, case), y)
    after = _gradients(adapter, case)
    for name in before:
        yield same(f"d{name} after another adapter was used", after[name], before[name])
