"""Laws of attachments: 4 undo, 6 names, 7 files, 8 swap and mixed batches."""
from __future__ import annotations

import os
import pickle
import tempfile
from typing import Any, Callable

import numpy

from minipeft.attaching.attach import attach
from minipeft.attaching.load import load
from minipeft.attaching.method import Method
from minipeft.attaching.select import select
from minipeft.engine.tensor import value_and_grad
from minipeft.laws.bounds import close, close_gradients
from minipeft.laws.law import Bench, holds, law
from minipeft.laws.models import bits, logits
from minipeft.nn.module import Model
from minipeft.nn.scaled import scaled
from minipeft.nn.slot import Slot

MOVES = ("plug", "unplug", "merge", "unmerge")


@law("4 undo")
def undo(method: Method, model: Model, seed: int) -> None:
    """After any sequence of moves of this attachment and of a LoRA on the same model, the base has its old bits, and
    the same arrangement gives the same logits, bit for bit. A refused move changes nothing."""
    bench = Bench.of(method, model, seed)
    copy, rng = bench.model, numpy.random.default_rng([seed, 5])
    attachments = [bench.attachment, bench.partner(seed)]
    base = bits(copy.base_arrays)
    seen: dict[tuple, bytes] = {}
    for _ in range(24):
        attachment, move = attachments[rng.integers(2)], MOVES[rng.integers(4)]
        now = copy.host.now
        try:
            getattr(attachment, move)()
        except ValueError:
            holds(copy.host.now is now, f"{move} of {attachment.name!r} is refused, and changes something")
        holds(bits(copy.base_arrays) == base, f"after {move} of {attachment.name!r} the base has other bits")
        state = tuple((name, copy.attachments[name].state) for name in copy.plugged)
        found = logits(copy, bench.batch).tobytes()
        holds(seen.setdefault(state, found) == found, f"{state} gives other logits than it gave before")


@law("6 names")
def names(method: Method, model: Model, seed: int) -> None:
    """Attaching changes no name and no object of the base. The attachment's parameters are called place@name.leaf, or
    shared@name.leaf where places share them."""
    copy = model.clone()
    before, objects = dict(copy.base_parameters), [place for _, place in copy.named_places()]
    attachment = attach(copy, method, numpy.random.default_rng([seed, 2]), "my-name")
    holds(list(copy.base_parameters) == list(before) and all(copy.base_parameters[n] is p for n, p in before.items()),
          "attaching changes a name or a parameter of the base")
    holds(all(a is b for a, b in zip(objects, (place for _, place in copy.named_places()), strict=True)),
          "attaching changes a place of the base")
    holds(all("@my-name." in name for name in attachment.arrays), "an array is not called place@name.leaf")
    holds(list(select(copy, ".")) == [*before, *attachment.parameters], "select() finds other parameters")
    holds(set(attachment.places) <= {name for name, _ in copy.named_places()}, "it lies at places of no name")


@law("7 files")
def files(method: Method, model: Model, seed: int) -> None:
    """Saved, and loaded on a model of the same base, an attachment has the same fields and arrays and gives the same
    logits, bit for bit. A copy and a pickle of the model give them too. A file for another base is refused."""
    bench = Bench.of(method, model, seed)
    copy, attachment = bench.model, bench.attachment
    wanted, own = logits(copy, bench.batch).tobytes(), bits(attachment.tensors)
    twins = {"a clone": copy.clone()}
    # Pickled here and read back at once, as for another process. No file is ever read like this. A function may not
    # pickle, so a model whose `where` is one is left out.
    if not callable(method.where) and not any(map(callable, method.where or ())):
        twins["a pickle"] = pickle.loads(pickle.dumps(copy))
    for what, twin in twins.items():
        holds(logits(twin, bench.batch).tobytes() == wanted, f"{what} of the model has other logits")
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "adapter.safetensors")
        attachment.save(path)
        fresh = model.clone()
        loaded = load(fresh, path)
        holds(bits(loaded.tensors) == own, "a file gives back other arrays")
        holds(loaded.method.fields() == method.fields(), f"a file gives back other fields: {loaded.method}")
        holds(set(loaded.places) == set(attachment.places), "a file gives back other places")
        holds(logits(fresh, bench.batch).tobytes() == wanted, "the loaded attachment gives other logits")
        other = model.clone()
        first = next(iter(other.base_parameters.values()))
        first.data = first.data + 1  # a bias may be 0
        try:
            load(other, path)
        except ValueError:
            holds(not other.attachments, "a file that is refused leaves something on the model")
        else:
            holds(False, "a file is loaded on another base than it was made for")


@law("8 swap and mixed batches")
def swap_and_mixed_batches(method: Method, model: Model, seed: int) -> None:
    """Plugging this attachment, then a LoRA in its place, then this one again gives the first bits again. In a batch
    whose rows see different attachments, each row gives the logits, loss and gradients of that row alone. A factor w
    multiplies the change: W + w (f(W) - W) at a slot, and at w = 0 the logits of the base. Prompts and prefixes take no
    factor but 1."""
    bench = Bench.of(method, model, seed)
    copy, batch = bench.model, bench.batch
    bench.attachment.unplug()
    base = logits(copy, batch).tobytes()
    other = bench.partner(seed)
    other.unplug()
    first, second, third = (_alone(a, lambda: logits(copy, batch).tobytes())
                            for a in (bench.attachment, other, bench.attachment))
    holds(first == third and first != second, "this, another, and this again does not give the first bits again")
    holds(logits(copy, batch).tobytes() == base, "with both off, the logits are not the base's")
    holds(logits(copy, batch, adapter="a").tobytes() == first, "adapter='a' gives other bits than plugging it")
    kinds = {place.kind for place in bench.attachment.places.values()}
    w = 1 if kinds & {"input", "keys_values"} else -0.5
    _rows_alone(bench, ["a", None, ("b", "a"), {"b": 0.5, "a": w}])
    holds(logits(copy, batch, adapter={"a": 1}).tobytes() == first, "adapter={'a': 1} gives other bits than 'a'")
    if w != 1:
        _along_the_change(bench, w)
        holds(close(logits(copy, batch, adapter={"a": 0}), logits(copy, batch), bench.u),
              "adapter={'a': 0} does not give the logits of the base")


def _along_the_change(bench: Bench, w: float) -> None:
    for name, slot in bench.attachment.places.items():
        if isinstance(slot, Slot):
            piece, W = bench.attachment.at[slot], slot.base.dense().data
            wanted = W + w * (piece.over(slot.base).dense().data - W)
            found = scaled("a", slot, piece, w).over(slot.base).dense().data
            holds(close(found, wanted, bench.u), f"the factor {w} gives no W + {w} (f(W) - W) at {name}")


def _alone(attachment: Any, run: Callable[[], Any]) -> Any:
    attachment.plug()
    try:
        return run()
    finally:
        attachment.unplug()


def _rows_alone(bench: Bench, routing: list) -> None:
    copy, batch = bench.model, bench.batch
    params = {name: p for a in copy.attachments.values() for name, p in a.parameters.items()}
    mixed = logits(copy, batch, adapter=routing)
    loss, grads = value_and_grad(lambda: copy.loss(**batch, adapter=routing), params, "zeros")
    tokens, total, summed = 0, 0.0, {name: numpy.zeros_like(g) for name, g in grads.items()}
    for i, entry in enumerate(routing):
        row = {key: value[i:i + 1] for key, value in batch.items()}
        holds(close(mixed[i:i + 1], logits(copy, row, adapter=[entry]), bench.u),
              f"row {i} of a mixed batch, which sees {entry!r}, differs from that row alone")
        n = int((row["labels"] != -100).sum())
        row_loss, row_grads = value_and_grad(lambda: copy.loss(**row, adapter=[entry]), params, "zeros")
        tokens, total = tokens + n, total + n * row_loss
        for name, g in row_grads.items():
            summed[name] += n * g
    holds(abs(loss - total / tokens) <= 9007 * bench.u * abs(loss), "the loss of a mixed batch is not that of its rows")
    off = close_gradients(grads, {name: g / tokens for name, g in summed.items()}, bench.u)
    holds(off is None, f"the gradient of {off} in a mixed batch is not that of its rows")
