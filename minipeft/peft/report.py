"""How many numbers are trained, and where a model's numbers are.

    trainable / all / percent                  as the usual training libraries print it
    by component: attention, feed-forward, embedding, norm, position, bias
    bytes: the weights, and what AdamW adds (a gradient and two moments for each trained number)
"""
from __future__ import annotations

import dataclasses
from typing import Any, Mapping

from minipeft.nn.module import Module, attachments_of
from minipeft.nn.weight import Parameter, Slot

COMPONENTS = ("attention", "feed-forward", "embedding", "norm", "position", "bias")
_EXAMPLE_RANK = 8


@dataclasses.dataclass(frozen=True)
class Report:
    """Counts of numbers, not of bytes, unless the name says so. `print` it for the table."""

    trainable: int
    all: int
    components: dict[str, int]
    weight_bytes: int
    training_bytes: int
    projection: tuple[int, int, int] | None  # d_out, d_in, and rows per head of a query projection

    @property
    def percent(self) -> float:
        return 100 * self.trainable / self.all

    def __str__(self) -> str:
        lines = [f"trainable parameters  {self.trainable:>14,}",
                 f"all parameters        {self.all:>14,}",
                 f"percent trainable     {self.percent:>13.2f}%", ""]
        base = sum(self.components.values())
        lines += [f"  {name:<19} {count:>14,}  {100 * count / base:5.1f}% of the base"
                  for name, count in self.components.items() if count]
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
    the whole model (full fine-tuning). What is merged cannot be trained and counts as memory alone."""
    plugged = [a for a in attachments_of(model).values() if a.state == "plugged"]
    own = {name: p for a in plugged for name, p in a.parameters.items()}
    base = model.base_parameters
    trained: Mapping[str, Parameter] = params if params is not None else own or base
    everything = {id(p): p for p in [*base.values(), *own.values(), *trained.values()]}
    merged = [e.merged for slot in model.slots.values() for e in slot.plugged if e.merged is not None]
    components = dict.fromkeys(COMPONENTS, 0)
    for name, slot in model.slots.items():
        components[component(name, slot)] += slot.base.data.size  # type: ignore[attr-defined]
    return Report(
        trainable=sum(p.data.size for p in trained.values()),
        all=sum(p.data.size for p in everything.values()), components=components,
        weight_bytes=sum(p.data.nbytes for p in [*everything.values(), *merged]),
        training_bytes=sum(3 * p.data.nbytes for p in trained.values()), projection=_projection(model))


def component(name: str, slot: Slot) -> str:
    """Which of COMPONENTS a slot counts for. Biases of linear layers are "bias"; a norm's bias belongs to the norm."""
    if slot.kind == "norm" or "norm." in name:
        return "norm"
    if slot.kind in ("bias", "position"):
        return slot.kind
    if slot.kind == "embedding" or name == "head.weight":
        return "embedding"
    return "attention" if ".attn." in name or ".cross." in name else "feed-forward"


def _projection(model: Any) -> tuple[int, int, int] | None:
    blocks = getattr(getattr(model, "encoder", None), "blocks", None)
    if not blocks:
        return None
    d_out, d_in = blocks[0].attn.q.weight.base.shape
    return d_out, d_in, d_out // blocks[0].attn.heads
