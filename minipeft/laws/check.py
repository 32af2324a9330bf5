"""`check`: run every law on a method, and report which hold."""
from __future__ import annotations

import dataclasses
from typing import Any

from minipeft.attaching.build import wanted
from minipeft.attaching.method import Method, checked
from minipeft.attaching.trial import tried
from minipeft.laws.law import LAWS, Broken, DoesNotApply
from minipeft.laws.models import FAMILIES, model_of
from minipeft.nn.module import Model, whole

HOLDS, BROKEN, NOT = "holds", "BROKEN", "does not apply"


@dataclasses.dataclass(frozen=True)
class Verdict:
    """The result of one law on one model. law, model: their names. outcome: "holds", "BROKEN" or "does not apply".
    found: the fault, or why the law does not apply."""

    law: str
    model: str
    outcome: str
    found: str = ""


@dataclasses.dataclass(frozen=True)
class Verdicts:
    """The result of `check`; print it for the table. all: one verdict for each law and model. skipped: {model: why the
    method does not fit it}."""

    method: Method
    all: tuple[Verdict, ...]
    skipped: dict[str, str]

    @property
    def ok(self) -> bool:
        """Whether at least one law was tried, and none is broken."""
        return bool(self.all) and all(v.outcome != BROKEN for v in self.all)

    def raise_for_failures(self) -> None:
        """Raises AssertionError, with the table, unless `ok`."""
        if not self.ok:
            raise AssertionError(str(self))

    def __str__(self) -> str:
        lines = [f"{type(self.method).__name__} and the laws of minipeft", ""]
        for law in dict.fromkeys(v.law for v in self.all):
            found = [v for v in self.all if v.law == law]
            counts = ", ".join(f"{outcome} on {n} model{'s' if n > 1 else ''}" for outcome in (HOLDS, BROKEN, NOT)
                               if (n := sum(v.outcome == outcome for v in found)))
            lines.append(f"  {law:<36}{counts}")
            for fault in dict.fromkeys(v.found for v in found if v.outcome == BROKEN):
                first, *more = (v.model for v in found if v.found == fault)
                lines.append(f"  {'':<36}{first}{f' and {len(more)} more' if more else ''}: {fault}")
            lines += [f"  {'':<36}({why})" for why in dict.fromkeys(v.found for v in found if v.outcome == NOT)]
        lines += [f"  not tried on {model}: {why}" for model, why in self.skipped.items()]
        return "\n".join([*lines, "", "all laws hold" if self.ok else "some laws are broken" if self.all
                          else "the method fits no model: nothing was tried"])


def check(method: Method, model: Model | None = None, seed: int = 0) -> Verdicts:
    """Run every law on `method`. model: the model to run them on, by default four tiny ones (two T5, two Transformers),
    each in float64 and float32. It is not changed; a law works on clones. seed: of all random numbers.

    Three laws are not run here, but in the tests of the library. Laws 9, fused = definition, and 11, backends agree,
    concern ops and backends, not methods. Law 10, rank, concerns LoRA. Raises TypeError and ValueError for a method
    that breaks its contract, TypeError for a part of a model, ValueError for a model with attachments and for one that
    takes fewer than eight positions."""
    checked(method)
    if model is not None and whole(model).attachments:
        raise ValueError(f"the model has attachments ({', '.join(model.attachments)}); expected one without")
    room = getattr(getattr(model, "config", None), "max_length", None)
    if room is not None and getattr(model.config, "positions", "") == "learned" and room < 8:  # type: ignore
        raise ValueError(f"the model has {room} positions; the laws need 8")
    models = {f"{family}, {dtype}": model_of(family, dtype, seed) for family in FAMILIES for dtype in
              ("float64", "float32")} if model is None else {type(model).__name__: whole(model)}
    verdicts: list[Verdict] = []
    skipped: dict[str, str] = {}
    for name, found in models.items():
        try:
            plan = wanted(found, method)
        except ValueError as error:
            skipped[name] = str(error)
            continue
        tried(plan)
        verdicts += [_verdict(law, name, method, found, seed)
                     for law in sorted(LAWS, key=lambda law: int(law.split()[0]))]
    return Verdicts(method, tuple(verdicts), skipped)


def _verdict(law: str, name: str, method: Method, model: Any, seed: int) -> Verdict:
    try:
        LAWS[law](method, model, seed)
    except DoesNotApply as why:
        return Verdict(law, name, NOT, str(why))
    except Broken as found:
        return Verdict(law, name, BROKEN, str(found))
    except Exception as error:  # a method of somebody else may fail in any way, and the other laws still count
        return Verdict(law, name, BROKEN, f"{type(error).__name__}: {error}")
    return Verdict(law, name, HOLDS)
