"""The plan: the memory of training a model, by every method side by side, from its configuration alone.

    print(minipeft.tools.plan("t5-small/config.json", "lora", rank=8, batch=8, source=512, target=128))

Each method is attached to a model of hollow arrays, and the library's own training step runs on them. So a plan has the
library's own counts and its own memory, and no number of the model is read or made.
"""
from __future__ import annotations

import dataclasses
from typing import Any

from minipeft.attaching.method import METHODS, Method
from minipeft.backend import use
from minipeft.nn.where import Where
from minipeft.tools.hollow.ledger import Ledger
from minipeft.tools.hollow.namespace import Hollow
from minipeft.tools.planning import budget as budgets
from minipeft.tools.planning.budget import Budget
from minipeft.tools.planning.configs import Config, built, read
from minipeft.tools.planning.methods import FULL, chosen, known, label, made
from minipeft.tools.planning.report import text
from minipeft.tools.planning.settings import MOST_TOKENS, Settings
from minipeft.tools.planning.step import Step, planned


@dataclasses.dataclass(frozen=True)
class Plan:
    """A plan; print it for its tables. config: of the model. settings: those that were asked for. method: the row that
    the plan is about. steps: {row: Step}, full fine-tuning first. absent: {row: why the method does not fit this
    model}. budget: the answer to a budget, if one was given."""

    config: Config
    settings: Settings
    method: str
    steps: dict[str, Step]
    absent: dict[str, str]
    budget: Budget | None = None

    @property
    def step(self) -> Step:
        """The Step of the method that the plan is about."""
        return self.steps[self.method]

    def __str__(self) -> str:
        return text(self)


def plan(config: Any, method: str | Method = "lora", *, rank: int | None = None, where: Where | None = None,
         budget: int | str | None = None, others: bool = True, **settings: Any) -> Plan:
    """The memory of training the model of `config` by `method`. Nothing of the model is allocated.

    config: the path of a config.json or of its folder, its contents as a mapping, or a T5Config; T5 and the LLaMA
    family are known. method: "full" or the name of a method ("lora", "prompt", ...), with its default settings; or a
    method, such as LoRA(rank=8). rank, where: instead of its defaults; where is a pattern on the names of places, ours
    or Hugging Face's, or "all-linear". budget: bytes, or a text such as "24GB"; the plan says whether the peak fits,
    and the largest batch and rank that do. others: whether full fine-tuning and all other methods stand beside it.
    settings: the fields of `planning.settings.Settings`: batch, source, target, dtype, optimizer, quantize, double ...

    Raises FileNotFoundError for a missing file; ValueError for a configuration that is wrong or not known, for settings
    out of range, and for a method or pattern that does not fit the model; TypeError for an unknown setting."""
    sizes, s = read(config), Settings(**settings)
    limit = None if budget is None else budgets.in_bytes(budget)
    with use(Hollow(Ledger())):
        where = chosen(where, sizes, built(sizes, s.array_dtype))

    def of(rank: int | None, name: str, asked: bool) -> Method | None:
        return made(name, sizes, rank, where, asked)

    if isinstance(method, Method):
        if rank is not None or where is not None:
            raise ValueError("rank and where are fields of the method that was given; set them in it")
        own = type(method).__name__
        name = next((n for n, maker in known().items() if maker is METHODS.get(own)), own.lower())
        mine: Method | None = method
    else:
        name, mine = method, of(rank, method, True)
    row = label(name, mine)
    if mine is None and s.quantize is not None:
        raise ValueError("full fine-tuning trains the weights that quantize would freeze; expected another method")
    steps, absent = {row: planned(sizes, mine, s)}, {}
    for other in known() if others else ():
        if other != name:
            try:
                one = of(rank, other, False)
                steps[label(other, one)] = planned(sizes, one, s)
            except (ValueError, TypeError, AttributeError) as error:  # the last two where it needs numbers
                absent[other] = str(error)
    steps = {n: steps[n] for n in sorted(steps, key=lambda n: (n != FULL, n != row))}

    def peak(batch: int, r: int | None) -> int:
        one = mine if r is None or isinstance(method, Method) else of(r, method, True)
        return planned(sizes, one, dataclasses.replace(s, batch=batch)).peak

    answer = None if limit is None else budgets.answer(limit, steps[row].peak, s.batch, getattr(mine, "rank", None)
                                                       if isinstance(method, str) else None, peak,
                                                       min(budgets.MOST, MOST_TOKENS // s.tokens))
    return Plan(sizes, s, row, steps, absent, answer)
