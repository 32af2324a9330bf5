"""Each law can be broken: for each there is a method that breaks it, and `laws.check` says so and where."""
from __future__ import annotations

import dataclasses
from typing import Any

import pytest

import minipeft
from minipeft import laws
from minipeft.engine.ops import linear
from minipeft.engine.tensor import op
from minipeft.laws.models import model_of


class Scaled(minipeft.Reparam):
    """W0 * l, l [d_out, 1]: right. The others differ from it in one line."""

    def dense(self):
        return self.base.dense() * self.l

    def project(self, x, rng=None):
        return self.base.project(x, rng) * self.l.reshape(-1)


class WrongProduct(Scaled):
    def project(self, x, rng=None):
        return super().project(x, rng) * 1.001


class WrongGradient(Scaled):
    def project(self, x, rng=None):
        return self.base.project(x, rng) * minipeft.stop_gradient(self.l).reshape(-1) \
            + 0 * linear(x, self.dense())


class WrongMerge(Scaled):
    def merged(self):
        return minipeft.Parameter(self.dense().data + 1e-3)


class WritesIntoTheBase(Scaled):
    def merged(self):
        self.base.dense().data[...] *= self.l.data
        return minipeft.Parameter(self.base.dense().data)


class CountsItsCalls(Scaled):
    calls = 0

    def project(self, x, rng=None):
        CountsItsCalls.calls += 1
        return super().project(x, rng) * (1 + 1e-6 * CountsItsCalls.calls)


@op
def widened(x):
    """x, with a gradient in float64."""
    return x * 1, (lambda g: g.astype("float64"),)


class ForgetsTheFactor(Scaled):
    strength, idle = "idle", 1  # which multiplies nothing


class Widens(Scaled):
    def project(self, x, rng=None):
        return widened(super().project(x, rng))


class LosesDropout(Scaled):
    def project(self, x, rng=None):
        return linear(x, self.dense())


class Mixes(minipeft.Piece):
    """F * l, where l depends on the other rows of the batch."""

    def __call__(self, x, n, F):
        mean = F.mean(axis=0, keepdims=True)
        return F + (mean - minipeft.stop_gradient(mean)) + mean * (self.l - 1)


@minipeft.register
@dataclasses.dataclass(frozen=True)
class Lawless(minipeft.Method):
    """Scaled, with one line changed."""

    piece: str = "Scaled"
    start: float = 1.0
    where: Any = r"\.(q|v)\.weight$"

    def arrays(self, name, slot, model):
        return {"l": minipeft.trained((slot.shape[0], 1), minipeft.ones if self.start == 1 else minipeft.normal(1.0))}

    def make(self, name, slot, arrays):
        return globals()[self.piece](**arrays)


@minipeft.register
@dataclasses.dataclass(frozen=True)
class Mixing(minipeft.Method):
    kinds = ("sublayer",)
    where: Any = r"ff\.out$"

    def arrays(self, name, site, model):
        return {"l": minipeft.trained((site.width,), minipeft.ones)}

    def make(self, name, site, arrays):
        return Mixes(**arrays)


def broken(method: Any, family: str = "t5 v1.0", dtype: str = "float32") -> set[int]:
    report = laws.check(method, model_of(family, dtype, 0))
    return {int(v.law.split()[0]) for v in report.all if v.outcome == "BROKEN"}


def test_a_method_that_is_right_breaks_none():
    assert broken(Lawless()) == broken(Lawless(), dtype="float64") == set()


@pytest.mark.parametrize("kind, law", [
    ("WrongProduct", 1), ("WrongGradient", 1), ("WrongMerge", 3), ("WritesIntoTheBase", 4), ("CountsItsCalls", 2),
    ("Widens", 12), ("LosesDropout", 14), ("ForgetsTheFactor", 8)])
def test_a_method_that_breaks_a_law_is_told_which(kind, law):
    assert law in broken(Lawless(kind))


def test_a_method_that_is_not_transparent_and_does_not_say_so_breaks_law_2():
    assert 2 in broken(Lawless(start=0.0))


def test_a_piece_that_mixes_rows_breaks_the_laws_of_batches():
    assert {8, 13} <= broken(Mixing())


def test_gradients_that_never_come_break_law_5():
    class Idle(Scaled):
        def dense(self):
            return self.base.dense() * minipeft.stop_gradient(self.l)

        def project(self, x, rng=None):
            return self.base.project(x, rng) * minipeft.stop_gradient(self.l).reshape(-1)
    globals()["Idle"] = Idle
    assert 5 in broken(Lawless("Idle"))


def test_the_report_names_the_law_the_model_and_what_was_found():
    report = laws.check(Lawless("WrongProduct"), model_of("post-LN", "float64", 0))
    assert not report.ok and "project(x) at encoder.0.attn.q.weight differs from that of dense()" in str(report)
    assert f"{'1 definition':<36}BROKEN on 1 model" in str(report) and str(report).endswith("some laws are broken")


@pytest.mark.parametrize("name", ["kind", "fields", "places", "transparent"])
def test_a_field_with_a_name_of_the_contract_is_refused(name):
    """`kind` would replace the name of the method in its file."""
    fields = dataclasses.make_dataclass("Clash", [(name, str, "x"), ("where", str, "q")], bases=(Lawless,), frozen=True)
    with pytest.raises(TypeError, match=f"Clash has a field `{name}`, a name that the contract uses"):
        minipeft.register(fields)


def test_what_is_wrong_on_several_models_is_said_once():
    report = str(laws.check(Lawless("WrongMerge")))
    assert report.count("merged logits are not the unmerged ones") <= 8 and "4 undo" in report
    unpicklable = str(laws.check(Lawless("Unpicklable")))
    assert f"{'7 files':<36}BROKEN on 8 models" in unpicklable and unpicklable.count(" and 7 more: ") == 1


class Unpicklable(Scaled):
    def __init__(self, **arrays):
        super().__init__(**arrays, f=lambda x: x)
