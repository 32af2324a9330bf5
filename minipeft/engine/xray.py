"""The tape of one training step, op by op: which arrays are kept for the backward pass, and what each op costs.

    print(xray(lambda: model.loss(**batch), select(model, "@lora")))
    print(tape.compare({"full": xray(step, everything), "LoRA": xray(step, adapter)}))

Each op shows its output, the bytes that its kept VJPs hold, the FLOPs of its forward and of its kept VJPs, and its VJPs
by the name of their input. A VJP that was not kept is struck out, `-dw-`: no selected parameter lies below that input,
so neither this gradient nor the arrays for it cost anything. In a LoRA step every frozen W has its `-dw-`; x is kept
all the same, because `da` needs it; and below the lowest trained parameter everything is struck out.

The step runs once, in `value_and_grad`, and draws random numbers as usual. An observer notes every op, and the backward
pass is followed node by node. Each buffer (the memory under an array and its views) is counted once and as a whole:

    kept      the arrays that an op's kept VJPs close over at the end of the forward, at the first op that keeps them
    peak      the most bytes alive at once: kept arrays, outputs while the step holds them, gradients on their way,
              their sums, and arrays that VJPs of one op share, each until it is freed

Not counted: arrays that were there before the step and outlive it (parameters, selected or not, batches, ready-made
masks); temporaries inside one forward or one VJP that no closure sees; Python's own objects, about a kilobyte per op.
Where activations outweigh these, the peak agrees within 10 % with the allocator's own count (`tracemalloc` around the
same call), as tests check. Of object arrays (Fractions) only the pointers are counted.
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
    """The cost of one step that trains `params`: its ops in order, and totals. Print the result for a table.

    step: a function without arguments that returns the loss, a scalar. unused: "raise" or "zeros", as in
    `value_and_grad`. Runs the step once and drops the gradients. The result holds no array. Raises as `value_and_grad`
    does."""
    tape = _Tape({id(p): name for name, p in params.items()})
    token = _observer.set(tape.observe)
    try:
        loss = value_and_grad(lambda: tape.returned(step()), params, unused, training=False)[0]
    finally:
        _observer.reset(token)
    return tape.result(loss, sum(math.prod(p.shape) for p in params.values()))


class _Tape:
    """Notes every op and follows the backward pass. names: {id of a selected parameter: its name}."""

    def __init__(self, names: dict[int, str]):
        self.names = names
        self.buffers = Buffers()
        self.entries: list[Entry] = []                    # their bytes are filled in at the end
        self.keeps: list[list[int]] = []                  # for each entry: the buffers that it is the first to keep
        self.kept: set[int] = set()                       # all of these
        self.at_return: set[int] = set()                  # the buffers alive when the step returns its loss
        self.terms: collections.Counter = collections.Counter()  # by a node's time: how many gradients reached it
        self.unseen: dict[int, int] = {}                  # by a node's time: its gradient, a sum not seen yet

    def observe(self, forward: Callable, inputs: tuple, out: Array, vjps: tuple, node: Node | None) -> None:
        """Called by every op at its end, while all its closures still exist, kept or not."""
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
        """Note that the forward is over, and return `loss`."""
        self.at_return = set(self.buffers.alive.values())
        return loss

    def followed(self, entry: int, time: int, parent: Node, vjp: Vjp) -> Vjp:
        """`vjp`, which leads from a node to `parent`, wrapped so that its gradient and its term are seen."""
        def run(g: Array) -> Array:
            self.buffers.at = ("backward", entry)
            self.buffers.see(g)
            self.buffers.died(self.unseen.pop(time, None))   # now it has been seen: it is g
            term = vjp(g)
            self.buffers.see([term, vjp])                    # and the arrays that the VJPs of one op share
            self.delivered(parent, term)
            return term

        return run

    def delivered(self, parent: Node, term: Array) -> None:
        """Count the arrays that the backward pass itself makes of a term, which no VJP sees. Broadcast axes are summed
        out into a new array, and the term, which is larger, is freed before anything else is made. The first term of a
        node is its gradient, the second makes a new array, and later ones are added to that."""
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
        """The XRay, once the gradients are freed: the entries with their bytes, and the peak."""
        before = self.buffers.before()
        held = self.at_return - before
        entries = tuple(dataclasses.replace(e, kept_bytes=sum(self.buffers.bytes[n] for n in keeps if n in held))
                        for e, keeps in zip(self.entries, self.keeps))
        peak, at = self.buffers.peak(before)
        where = f"{at[0]} of {entries[at[1]].op} {list(entries[at[1]].shape)}" if at else "step, which has no op"
        return XRay(entries, loss, trained, peak, where)


def _names(forward: Callable, inputs: int) -> list[str]:
    """The names of the first `inputs` arguments of an op's forward; those of *parts are parts0, parts1, ..."""
    code = forward.__code__
    names = list(code.co_varnames[:code.co_argcount])
    if code.co_flags & inspect.CO_VARARGS:
        rest = code.co_varnames[code.co_argcount + code.co_kwonlyargcount]
        names += [f"{rest}{i}" for i in range(inputs - len(names))]
    return names
