"""How many numbers are trained, by which method, in which part of the model.

    trainable / all / percent                  in the words of the FLAN-T5 lab
    by component: attention, feed-forward, embedding, norm, position, head; biases but those of norms on their own
    bytes: the weights, and what AdamW adds (a gradient and two moments for each trained number)
"""
from __future__ import annotations

import dataclasses
from typing import Any, Iterable, Mapping

from minipeft.nn import parts
from minipeft.nn.module import Module, attachments_of
from minipeft.nn.place import Place
from minipeft.nn.weight import Parameter

COMPONENTS = (*parts.COMPONENTS, "bias")
_EXAMPLE_RANK = 8


@dataclasses.dataclass(frozen=True)
class Report:
    """Counts of numbers, not of bytes, unless the name says so. `print` it for the table.

    components: of the base; methods: {attachment: {component: what it trains there}}, or {"selected": ...}."""

    trainable: int
    all: int
    components: dict[str, int]
    methods: dict[str, dict[str, int]]
    weight_bytes: int
    training_bytes: int
    projection: tuple[int, int, int] | None  # d_out, d_in, and rows per head of a query projection

    @property
    def percent(self) -> float:
        return 100 * self.trainable / self.all

    def __str__(self) -> str:
        lines = [f"trainable model parameters: {self.trainable}", f"all model parameters: {self.all}",
                 f"percentage of trainable model parameters: {self.percent:.2f}%", "",
                 f"  {'':<14}{'base':>14}{'':>9}" + "".join(f"{name:>14}" for name in self.methods)]
        base = sum(self.components.values())
        for part, count in self.components.items():
            trained = [found.get(part, 0) for found in self.methods.values()]
            if count or any(trained):
                lines.append(f"  {part:<14}{count:>14,}{100 * count / base:>7.1f} %"
                             + "".join(f"{n:>14,}" for n in trained))
        lines += ["", f"weights               {self.weight_bytes / 2 ** 20:>13.2f} MiB",
                  f"gradients and moments {self.training_bytes / 2 ** 20:>13.2f} MiB with AdamW"]
        if self.projection:
            d_out, d_in, d_head = self.projection
            lines += ["", f"LoRA of rank {_EXAMPLE_RANK} in place of the dense update of"]
            lines += [_example("one head's query", d_head, d_in), _example("the whole query projection", d_out, d_in)]
        return "\n".join(lines)


def _example(what: str, d_out: int, d_in: int) -> str:
    low, dense = _EXAMPLE_RANK * (d_in + d_out), d_in * d_out
    return f"  {what} {d_in} x {d_out}: {low:,} for {dense:,}, {100 * (1 - low / dense):.2f} % fewer"


def report(model: Module, params: Mapping[str, Parameter] | None = None) -> Report:
    """Counts for training `params`; None means the parameters of all plugged attachments, or, if nothing is plugged,
    the whole model (full fine-tuning). What is merged cannot be trained and counts as memory alone, and so do
    attachments that are off, and the indices of masks."""
    plugged = {name: a.parameters for name, a in attachments_of(model).items() if a.state == "plugged"}
    own = {name: p for found in plugged.values() for name, p in found.items()}
    base, places = model.base_parameters, dict(model.named_places())
    constants = {name: [e.merged for e in slot.plugged if e.merged is not None] for name, slot in model.slots.items()}
    free = {name: p for name, p in base.items() if not constants[name]}
    trained: Mapping[str, Parameter] = params if params is not None else own or free
    groups = plugged if params is None and own else {"selected": trained}
    everything = {id(p): p for p in [*base.values(), *own.values(), *trained.values()]}
    held = {id(p): p for a in attachments_of(model).values() for p in a.arrays.values()}
    memory = [*{**everything, **held}.values(), *(p for merged in constants.values() for p in merged)]
    return Report(
        trainable=sum(p.data.size for p in trained.values()),
        all=sum(p.data.size for p in everything.values()), components=_counts(base.items(), places),
        methods={name: {part: n for part, n in _counts(found.items(), places).items() if n}
                 for name, found in groups.items()},
        weight_bytes=sum(p.data.nbytes for p in memory),
        training_bytes=sum(3 * p.data.nbytes for p in trained.values()), projection=_projection(model))


def _counts(params: Iterable[tuple[str, Parameter]], places: Mapping[str, Place]) -> dict[str, int]:
    counts = dict.fromkeys(COMPONENTS, 0)
    for name, p in params:
        where = name.partition("@")[0]
        counts[component(where, places[where])] += p.data.size
    return counts


def component(name: str, place: Place) -> str:
    """Which of COMPONENTS a place counts for. Biases of linear layers are "bias"; a norm's bias belongs to the norm."""
    found = parts.component(name)
    return "bias" if place.kind == "bias" and found != "norm" else found


def _projection(model: Any) -> tuple[int, int, int] | None:
    blocks = getattr(getattr(model, "encoder", None), "blocks", None)
    if not blocks:
        return None
    d_out, d_in = blocks[0].attn.q.weight.base.shape
    return d_out, d_in, d_out // blocks[0].attn.heads
