"""Laws of training: 5 masking, 13 accumulation, 14 dropout."""
from __future__ import annotations

import collections
from typing import Any, Callable

import numpy

from minipeft.attaching.attach import attach
from minipeft.attaching.method import Method
from minipeft.attaching.select import select
from minipeft.engine.tensor import Node, _observer, value_and_grad
from minipeft.laws.bounds import close, close_gradients
from minipeft.laws.law import Bench, DoesNotApply, attach_moved, holds, law
from minipeft.laws.models import bits, is_causal
from minipeft.methods.lora import LoRA
from minipeft.nn.module import Model
from minipeft.nn.slot import Slot
from minipeft.train.data import Batches, batch_of
from minipeft.train.loop import fit
from minipeft.train.optim import AdamW


@law("5 masking")
def masking(method: Method, model: Model, seed: int) -> None:
    """Training the attachment computes its gradients alone and changes its arrays alone. The gradients are bit-equal to
    those of a run that trains everything. Each is evaluated at most once per use, and no other at all. Each is nonzero
    on at least one of five batches. After steps with momentum and decay every other array has its old bits."""
    bench = Bench.of(method, model, seed)
    copy, own, everything = bench.model, bench.attachment.parameters, select(bench.model, ".")

    def step() -> Any:  # the same dropout masks at every call
        return copy.loss(**bench.batch, rng=numpy.random.default_rng(seed))

    full_loss, full = value_and_grad(step, everything, unused="zeros")
    (loss, grads), uses, evaluated = _counted(step, own, everything)
    holds(loss == full_loss and bits(grads) == bits({name: full[name] for name in own}),
          "the gradients are not, bit for bit, those of a run that trains everything")
    # A use that the loss does not depend on, behind stop_gradient, is not evaluated.
    often = [name for name, n in evaluated.items() if n > (uses[name] if name in own else 0)]
    holds(not often, f"the gradient of {', '.join(often)} is evaluated more often than it is used")
    idle = {name for name, g in grads.items() if not g.any()}
    never = set(idle)
    for other in range(seed + 1, seed + 5) if idle else ():  # a relu may be 0 on a whole batch
        again = Bench.of(method, model, other)
        found = value_and_grad(lambda: again.model.loss(**again.batch), again.attachment.parameters, unused="zeros")[1]
        never -= {name for name, g in found.items() if g.any()}
    holds(not never, f"{', '.join(sorted(never))} never gets a gradient")
    before, optimizer = bits(everything), AdamW(lr=1e-2, weight_decay=0.1)
    arrays = {**copy.base_arrays, **bench.attachment.arrays}
    fixed = bits({name: a for name, a in arrays.items() if name not in everything})  # codes of the base, among others
    for _ in range(2):
        optimizer.step(own, value_and_grad(step, own)[1])
    after = bits(everything)
    moved = {name for name in everything if after[name] != before[name]}
    holds(moved | idle == set(own), f"a step moves {sorted((moved | idle) ^ set(own))[:3]} too, or does not move it")
    holds(bits({name: arrays[name] for name in fixed}) == fixed, "a step moves a fixed array")
    holds(set(optimizer.m) == set(own), "the optimizer keeps moments of other arrays")


def _counted(step: Callable, own: Any, everything: Any) -> tuple[tuple, collections.Counter, collections.Counter]:
    """value_and_grad(step, own); how often each parameter was used, and how often its gradient was evaluated."""
    by_id = {id(p): name for name, p in everything.items()}
    uses: collections.Counter = collections.Counter()
    evaluated: collections.Counter = collections.Counter()

    def counted(parent: Node, vjp: Callable) -> Callable:
        def run(g: Any) -> Any:
            evaluated[parent.op] += 1
            return vjp(g)
        return vjp if parent.edges else run

    def observe(forward: Any, inputs: Any, out: Any, vjps: Any, node: Node | None) -> None:
        uses.update(by_id[id(x)] for x, vjp in zip(inputs, vjps) if id(x) in by_id and vjp is not None)
        if node is not None:
            node.edges = [(parent, counted(parent, vjp)) for parent, vjp in node.edges]

    token = _observer.set(observe)
    try:
        return value_and_grad(step, own), uses, evaluated
    finally:
        _observer.reset(token)


@law("13 accumulation = one batch")
def accumulation(method: Method, model: Model, seed: int) -> None:
    """Micro-batches, weighted by their numbers of label tokens, give the loss and the gradients of one batch."""
    bench = Bench.of(method, model, seed)
    rng = numpy.random.default_rng([seed, 6])
    vocab, own = bench.model.config.vocab_size, bench.attachment.parameters
    pairs = [tuple(rng.integers(1, vocab, rng.integers(1, 6)).tolist() for _ in range(2)) for _ in range(5)]
    size, causal = int(rng.integers(1, 5)), is_causal(bench.model)
    optimizer = AdamW(lr=0.0, betas=(0.0, 0.0), weight_decay=0.0)  # changes nothing, and its m is the gradient
    history = fit(bench.model, own, Batches(pairs, size, causal=causal), steps=1, optimizer=optimizer, clip=None,
                  accumulate=-(-len(pairs) // size), dropout=False, progress=False)
    loss, grads = value_and_grad(lambda: bench.model.loss(**batch_of(pairs, causal=causal)), own, unused="zeros")
    found = {name: optimizer.m.get(name, numpy.zeros_like(g)) for name, g in grads.items()}
    holds(close(numpy.array(history.losses[0]), numpy.array(loss), bench.u),
          f"accumulated, the loss is {history.losses[0]}; expected {loss}")
    off = close_gradients(found, grads, bench.u)
    holds(off is None, f"accumulated, the gradient of {off} is not that of one batch")


@law("14 dropout reaches every weight")
def dropout_reaches_every_weight(method: Method, model: Model, seed: int) -> None:
    """A LoRA that drops half of its input still does so when the method lies above or below it on the same weight: two
    training passes differ, and the mean of many is the pass without dropout. A method that cannot hand dropout on is
    refused above the LoRA. Raises DoesNotApply for a method that acts on no linear weight."""
    copy, rng = model.clone(), numpy.random.default_rng([seed, 7])
    place = next((name for name, place in attach(copy, method, rng, "a").places.items() if isinstance(place, Slot)
                  and place.kind == "linear" and min(place.shape) > 1), None)
    if place is None:
        raise DoesNotApply("it acts on no matrix that is multiplied by")
    lora = LoRA(2, dropout=0.5, where=f"^{place}$")
    for below, above in ((method, lora), (lora, method)):
        stack = model.clone()
        attach_moved(stack, below, seed, "below")
        try:
            attach_moved(stack, above, seed + 1, "above")
        except ValueError as error:
            side = "above" if above is method else "below"
            holds(above is method and "dropout" in str(error), f"it cannot lie {side} a LoRA: {error}")
            holds(list(stack.attachments) == ["below"], "an attachment that is refused stays on the model")
            continue
        slot = stack.slots[place]
        x = rng.standard_normal((2, 5, slot.shape[1])).astype(slot.dtype)
        one, again, other = (slot.project(x, numpy.random.default_rng(s)).data for s in (1, 1, 2))
        where = "below" if below is method else "above"
        holds(one.tobytes() == again.tobytes(), f"{where} a LoRA with dropout, one seed gives two results")
        holds(one.tobytes() != other.tobytes(), f"{where} a LoRA with dropout, the dropout is lost")
        passes = numpy.stack([slot.project(x, rng).data for _ in range(400)]).astype("float64")
        exact, spread = slot.project(x).data, passes.std(axis=0)
        off = abs(passes.mean(axis=0) - exact)
        holds((off <= 6 * spread / 20 + 1e-6 * abs(exact).max()).all(),  # six standard errors: once in 500 million
              f"{where} a LoRA with dropout, the mean of many passes is not the pass without dropout")
