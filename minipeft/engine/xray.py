"""The tape of one training step, op by op: what is kept for the backward and what is not, and what it all costs.

    print(xray(lambda: model.loss(**batch), select(model, "@lora")))
    print(tape.compare({"full": xray(step, everything), "LoRA": xray(step, adapter)}))

Each op shows its output, the bytes that its kept VJPs hold on to, the FLOPs of its forward and of its kept VJPs, and
its VJPs by the name of their input. One that was not kept is struck out, `-dw-`: no selected parameter lies below that
input, so neither the gradient nor what it needs costs anything. In a LoRA step every frozen W has its `-dw-`; x is
kept all the same, because `da` needs it; and below the lowest trained parameter everything is struck out.

The step runs once, in `value_and_grad`, and draws the random numbers that it draws: an observer notes every op, and
the backward is followed node by node. Counted, each buffer (the memory under an array and its views) once and as a
whole:

    kept      what an op's kept VJPs close over when the forward is over, at the first op that keeps it
    peak      the most bytes alive at once: what is kept, outputs while the step holds them, gradients on their way,
              their sums, and what VJPs of one op remember for each other, each until it is freed

Not counted: arrays that were there before the step and outlive it (parameters, selected or not, batches, ready-made
masks); temporaries inside one forward or one VJP that no closure sees; Python's own objects, about a kilobyte per op.
Against the allocator's own count (`tracemalloc` around the same call) the peak is right within 10 % where
activations outweigh these, which tests hold. Of object arrays (Fractions) the pointers alone are counted.
"""
from __future__ import annotations

import collections
import dataclasses
import inspect
import math
from typing import Callable, Mapping

from minipeft.engine.buffers import Buffers
from minipeft.engine.flops import flops
from minipeft.engine.tape import Entry, XRay
from minipeft.engine.tensor import Leaf, Node, Tensor, Vjp, _observer, array_of, value_and_grad
from minipeft.backend import Array


def xray(step: Callable[[], Tensor], params: Mapping[str, Leaf], unused: str = "raise") -> XRay:
    """What one step costs in which `params` are trained: its ops in order, and totals. Print it for a table.

    Runs the step once and computes the gradients; they are dropped. Holds no array. Raises as `value_and_grad` does."""
    tape = _Tape({id(p): name for name, p in params.items()})
    token = _observer.set(tape.observe)
    try:
        loss = value_and_grad(lambda: tape.returned(step()), params, unused, training=False)[0]
    finally:
        _observer.reset(token)
    return tape.result(loss, sum(math.prod(p.shape) for p in params.values()))


class _Tape:
    """Notes every op and follows the backward; `names` are those of the selected parameters, by identity."""

    def __init__(self, names: dict[int, str]):
        self.names = names
        self.buffers = Buffers()
        self.entries: list[Entry] = []                    # their bytes are filled in at the end
        self.keeps: list[list[int]] = []                  # of each entry: the buffers that it is the first to keep
        self.kept: set[int] = set()                       # all of these
        self.at_return: set[int] = set()                  # what is alive when the step returns its loss
        self.terms: collections.Counter = collections.Counter()  # by a node's time: gradients that reached it
        self.unseen: dict[int, int] = {}                  # by a node's time: its gradient, a sum that nobody shows

    def observe(self, forward: Callable, inputs: tuple, out: Array, vjps: tuple, node: Node | None) -> None:
        """Called by every op at its end, while its closures are still there, kept or not."""
        op, names = forward.__name__, _names(forward, len(inputs))
        watched = [i for i, x in enumerate(inputs) if isinstance(x, Tensor) and x.node is not None]
        kept = [i for i in watched if vjps[i] is not None]
        buffers, entry = self.buffers, len(self.entries)
        buffers.at = ("forward", entry)
        buffers.see(inputs)
        buffers.see(out, made=True)
        buffers.see(vjps)
        keeps = set(buffers.see([vjps[i] for i in kept])) - self.kept
        self.keeps.append(sorted(keeps))
        self.kept |= keeps
        shapes = [getattr(array_of(x), "shape", ()) for x in inputs]
        self.entries.append(Entry(
            op, out.shape, tuple((names[i], i in kept) for i, x in enumerate(inputs)
                                 if x is not None and vjps[i] is not None),
            0, *flops(op, shapes, out.shape, kept), tuple(self.names[id(x)] for x in inputs if id(x) in self.names)))
        if node is not None:
            node.edges = [(parent, self.followed(entry, node.time, parent, vjp)) for parent, vjp in node.edges]

    def returned(self, loss: Tensor) -> Tensor:
        """The forward is over."""
        self.at_return = set(self.buffers.alive.values())
        return loss

    def followed(self, entry: int, time: int, parent: Node, vjp: Vjp) -> Vjp:
        """`vjp`, a node's way to `parent`, with its gradient and its term seen."""
        def run(g: Array) -> Array:
            self.buffers.at = ("backward", entry)
            self.buffers.see(g)
            self.buffers.died(self.unseen.pop(time, None))   # it has been shown: it is g
            term = vjp(g)
            self.buffers.see([term, vjp])                    # and what the VJPs of one op remember for each other
            self.delivered(parent, term)
            return term

        return run

    def delivered(self, parent: Node, term: Array) -> None:
        """What the backward does with a term next, unseen. Broadcast axes are summed out into a new array, and the
        term, which is larger, is gone before anything else is made. The first term of a node is its gradient, the
        second makes a new array, later ones are added to that."""
        size = math.prod(parent.shape) * parent.dtype.itemsize
        self.terms[parent.time] += 1
        reduced = self.buffers.born(size) if getattr(term, "shape", None) != parent.shape else None
        if self.terms[parent.time] == 1 and reduced is not None:
            self.unseen[parent.time] = reduced
            return
        self.buffers.died(reduced)
        if self.terms[parent.time] == 2:
            total = self.buffers.born(size)
            self.buffers.died(self.unseen.pop(parent.time, None))
            self.unseen[parent.time] = total

    def result(self, loss: float, trained: int) -> XRay:
        """When the gradients are gone: the entries with their bytes, and the peak."""
        before = self.buffers.before()
        held = self.at_return - before
        entries = tuple(dataclasses.replace(e, kept_bytes=sum(self.buffers.bytes[n] for n in keeps if n in held))
                        for e, keeps in zip(self.entries, self.keeps))
        peak, at = self.buffers.peak(before)
        where = f"{at[0]} of {entries[at[1]].op} {list(entries[at[1]].shape)}" if at else "step, which has no op"
        return XRay(entries, loss, trained, peak, where)


def _names(forward: Callable, inputs: int) -> list[str]:
    """What an op's forward calls its first `inputs` arguments; those of *parts are parts0, parts1, ..."""
    code = forward.__code__
    names = list(code.co_varnames[:code.co_argcount])
    if code.co_flags & inspect.CO_VARARGS:
        rest = code.co_varnames[code.co_argcount + code.co_kwonlyargcount]
        names += [f"{rest}{i}" for i in range(inputs - len(names))]
    return names
