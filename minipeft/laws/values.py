"""Laws of values: 1 definition, 2 transparency, 3 merge, 12 dtype kept."""
from __future__ import annotations

from typing import Any, Callable

import numpy

from minipeft.attaching.attach import attach
from minipeft.attaching.method import Method
from minipeft.attaching.select import select
from minipeft.engine.check import check_gradients
from minipeft.engine.ops import embedding, linear
from minipeft.engine.tensor import Tensor, _observer, value_and_grad
from minipeft.laws.bounds import close, close_gradients
from minipeft.laws.law import Bench, DoesNotApply, holds, law
from minipeft.laws.models import batch_for, bits, is_causal, logits, outputs, same_values
from minipeft.nn.module import Model
from minipeft.nn.slot import Slot
from minipeft.nn.weight import Parameter
from minipeft.train.data import Batches
from minipeft.train.loop import fit
from minipeft.train.optim import AdamW


@law("1 definition")
def definition(method: Method, model: Model, seed: int) -> None:
    """project(x) = x dense^T and rows(ids) = dense[ids], in value and gradient. In float64 the gradients of all trained
    arrays agree with finite differences."""
    bench = Bench.of(method, model, seed)
    rng = numpy.random.default_rng([seed, 4])
    for name, slot in bench.attachment.places.items():
        if isinstance(slot, Slot) and len(slot.shape) == 2:
            own = {key: p for key, p in bench.attachment.parameters.items() if p in bench.attachment.at[
                slot].arrays.values()}
            own |= {"the base": p for p in [slot.base] if isinstance(p, Parameter)}
            _agrees(name, slot, own, rng, bench.u)
    if next(iter(bench.model.base_parameters.values())).dtype == numpy.float64:
        try:
            check_gradients(lambda: bench.model.loss(**bench.batch), bench.attachment.parameters, rng, each=False)
        except ValueError as error:
            if "no derivative" not in str(error):  # a kink of the model itself, such as a relu's
                raise


def _agrees(name: str, slot: Slot, own: dict[str, Parameter], rng: numpy.random.Generator, u: float) -> None:
    d_out, d_in = slot.shape
    x = Parameter(rng.standard_normal((2, 5, d_in)).astype(slot.dtype))
    ids = rng.integers(0, d_out, (2, 5))
    ways: list[tuple[str, Callable, Callable, int, dict]] = [
        ("project(x)", lambda: slot.project(x), lambda: linear(x, slot.fold().dense()), d_out, {"x": x})]
    if slot.kind == "embedding":
        ways.append(("rows(ids)", lambda: slot.rows(ids), lambda: embedding(slot.fold().dense(), ids), d_in, {}))
    for what, one, other, width, inputs in ways:
        g = rng.standard_normal((2, 5, width)).astype(slot.dtype)
        (y, grads), (wanted, wanted_grads) = (_evaluated(run, {**inputs, **own}, g) for run in (one, other))
        holds(close(y, wanted, u), f"{what} at {name} differs from that of dense(): {_gap(y, wanted)}")
        off = close_gradients(grads, wanted_grads, u)
        holds(off is None, f"the gradient of {off} through {what} at {name} differs from that through dense()")


def _evaluated(run: Callable[[], Tensor], params: dict[str, Parameter], g: numpy.ndarray) -> tuple[Any, dict]:
    """The value, and the gradients of <value, g>."""
    seen: list[Any] = []

    def step() -> Tensor:
        seen.append(run())
        return (seen[0] * g).sum()

    grads = value_and_grad(step, params, unused="zeros", training=False)[1]
    return seen[0].data, grads


def _gap(found: numpy.ndarray, wanted: numpy.ndarray) -> str:
    if found.shape != wanted.shape or found.dtype != wanted.dtype:
        return f"{found.dtype} {list(found.shape)}; expected {wanted.dtype} {list(wanted.shape)}"
    return f"off by {abs(found - wanted).max():.3g} of {abs(wanted).max():.3g}"


@law("2 transparency")
def transparency(method: Method, model: Model, seed: int) -> None:
    """Attaching changes no output: logits, loss, the encoder's output, generated ids. A method with transparent = False
    changes the logits. Either way, unplugging gives back every bit of the outputs."""
    copy = model.clone()
    batch = batch_for(copy.config.vocab_size, seed, causal=is_causal(copy))  # type: ignore[attr-defined]
    before = outputs(copy, batch)
    attachment = attach(copy, method, numpy.random.default_rng([seed, 2]), "a")
    holds(attachment.state == "plugged" and attachment.parameters, "nothing that can be trained was attached")
    after = outputs(copy, batch)
    if method.transparent:
        for what, a, b in zip(("logits", "the loss", "the encoder's output", "generated ids"), before, after):
            holds(same_values(a, b), f"attaching changes {what} (say transparent = False if it is meant)")
    else:
        holds(not same_values(before[0], after[0]), "attaching changes nothing, though transparent is False")
    attachment.unplug()
    holds(all(a.tobytes() == b.tobytes() for a, b in zip(before, outputs(copy, batch))),
          "unplugging does not give back the bits from before")


@law("3 merge")
def merge(method: Method, model: Model, seed: int) -> None:
    """Merged, alone or below another attachment, it gives the logits that it gave unmerged. Alone, the model then runs
    the ops of the base only. A merge on hidden states is refused and changes nothing; the law raises DoesNotApply."""
    bench = Bench.of(method, model, seed)
    copy, batch, attachment = bench.model, bench.batch, bench.attachment
    before = logits(copy, batch)
    if not bench.on_weights:
        _is_refused(attachment, copy, batch, before)
        raise DoesNotApply("it acts on hidden states, and refuses to be merged")
    shapes = {name: slot.fold().dense().shape for name, slot in copy.slots.items()}
    attachment.unplug()
    base, plain = logits(copy, batch), _ops_run(copy, batch)
    holds(not close(before, base, bench.u), "the trained attachment changes nothing: any merge would do")
    attachment.plug()
    attachment.merge()
    merged = logits(copy, batch)
    holds(close(merged, before, bench.u), f"merged logits are not the unmerged ones: {_gap(merged, before)}")
    if all(isinstance(weight, Parameter) for slot in attachment.places.values()  # another kind may run ops of its own
           for weight in (getattr(slot, "base", None), *(entry.merged for entry in slot.merged))):
        holds(_ops_run(copy, batch) == plain, "a merged model runs other ops than the base")
    holds({name: slot.fold().dense().shape for name, slot in copy.slots.items()} == shapes,
          "merging changes the shape of a weight")
    upper = bench.partner(seed, where=list(attachment.places)[:1] if _takes_lora(attachment) else r"\.(q|v)\.weight$")
    before = logits(copy, batch)
    upper.merge()
    holds(close(logits(copy, batch), before, bench.u), "merged below a merged LoRA, the model gives other logits")
    upper.unmerge()
    attachment.unmerge()
    upper.unplug()
    attachment.unplug()
    holds(logits(copy, batch).tobytes() == base.tobytes(), "unmerging does not give back the bits of the base")


def _takes_lora(attachment: Any) -> bool:
    """Whether a LoRA of rank 2 can lie above the attachment, at its first place."""
    place = next(iter(attachment.places.values()))
    return place.kind in ("linear", "embedding") and min(place.shape) >= 2


def _is_refused(attachment: Any, model: Any, batch: dict, before: Any) -> None:
    own = bits(attachment.parameters)
    try:
        attachment.merge()
    except ValueError:
        holds(attachment.state == "plugged", "a merge that is refused changes the state")
        holds(logits(model, batch).tobytes() == before.tobytes() and bits(attachment.parameters) == own,
              "a merge that is refused changes something")
    else:
        holds(False, "a method that acts on hidden states is merged")


def _ops_run(model: Any, batch: dict) -> list[tuple]:
    """The ops of a forward, and the shapes of their outputs, in order."""
    seen: list[tuple] = []
    token = _observer.set(lambda forward, inputs, out, *_: seen.append((forward.__name__, out.shape)))
    try:
        logits(model, batch)
    finally:
        _observer.reset(token)
    return seen


@law("12 dtype kept")
def dtype_kept(method: Method, model: Model, seed: int) -> None:
    """A training step of everything computes in the model's dtype alone: every floating input and output of every op,
    every array that a VJP returns, moments and parameters."""
    bench = Bench.of(method, model, seed)
    params = select(bench.model, ".")
    dtype = next(iter(bench.model.base_parameters.values())).dtype
    odd: list[str] = []

    def noted(what: str, *arrays: Any) -> None:
        odd.extend(f"{what} is {a.dtype}" for a in arrays if hasattr(a, "dtype") and a.dtype.kind == "f"
                   and a.dtype != dtype)

    def watched(name: str, vjp: Callable) -> Callable:
        def run(g: Any) -> Any:
            out = vjp(g)
            noted(f"a gradient of {name}", g, out)
            return out
        return run

    def observe(forward: Any, inputs: Any, out: Any, vjps: Any, node: Any) -> None:
        noted(f"an input of {forward.__name__}", *(getattr(x, "data", x) if isinstance(x, Tensor) else x
                                                   for x in inputs))
        noted(f"the output of {forward.__name__}", out)
        if node is not None:
            node.edges = [(parent, watched(forward.__name__, vjp)) for parent, vjp in node.edges]

    optimizer, rng = AdamW(1e-3), numpy.random.default_rng([seed, 8])
    vocab, own = bench.model.config.vocab_size, bench.attachment.parameters
    pairs = [tuple(rng.integers(1, vocab, rng.integers(1, 4)).tolist() for _ in range(2)) for _ in range(6)]
    token = _observer.set(observe)
    try:
        _, grads = value_and_grad(lambda: bench.model.loss(**bench.batch, rng=rng), params, unused="zeros")
        optimizer.step(params, grads)
        fit(bench.model, own, Batches(pairs, 2, causal=is_causal(bench.model)), steps=2, optimizer=AdamW(1e-3),
            accumulate=1 + seed % 3, progress=False)
    finally:
        _observer.reset(token)
    noted("a moment", *optimizer.m.values(), *optimizer.v.values())
    noted("a parameter", *params.values())
    holds(not odd, f"a step in {dtype} computes in other dtypes: {'; '.join(odd[:3])}")
