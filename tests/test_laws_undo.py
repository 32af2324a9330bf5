"""Law 4: unmerge and unplug restore every bit, after any sequence of moves; an illegal move raises and moves nothing.

A state machine makes every move, legal or not, on three attachments of different families, some of which act on the
same weights, against an oracle that knows the rules of the design:

    off  --plug-->  plugged  --merge-->  merged            remove: from off or plugged;    swap: from off
    off <--unplug-- plugged <--unmerge-- merged            save: from any;   attach, load: from removed
    plug puts it back below what lay above it when it was unplugged, and otherwise on top

plug needs nothing merged above that position, where a constant would hide it;
merge needs all below at its places to be merged, and a method that acts on weights; unmerge needs nothing merged above;
training needs "plugged". A swap unplugs the one on top, plugs another, and goes back and forth: A, B, A is A.
"""
from __future__ import annotations

import collections
import dataclasses
import hashlib
import os
import shutil
import tempfile
from typing import Any, Callable

import numpy
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test

import minipeft
from minipeft.engine.tensor import array_of
from tests.methods_under_test import HALF


@dataclasses.dataclass(frozen=True)
class Trio:
    """The methods of a, b and c; whose places have something in common; which of them act on weights."""

    methods: dict[str, Any]
    share: dict[str, str]
    weights: str


_MASK = numpy.arange(66).reshape(11, 6) % 5 == 0
TRIOS = {
    "LoRA, Selective, Bottleneck": Trio(
        {"a": minipeft.LoRA(1, 3), "b": minipeft.Selective(component=("attention", "embedding")),
         "c": minipeft.Bottleneck(size=2)}, {"a": "b", "b": "a", "c": ""}, "ab"),
    "PromptTuning, a mask, LoRA": Trio(
        {"a": minipeft.PromptTuning(2), "b": minipeft.Selective(mask={"embedding.weight": _MASK}),
         "c": minipeft.LoRA(2, -1, where=["^embedding", r"\.ff\."])}, {"a": "", "b": "c", "c": "b"}, "bc"),
    "three on weights, in a chain": Trio(
        {"a": minipeft.LoRA(1, 3), "b": minipeft.LoRA(2, -1, where=[r"\.(q|v|k|o)\.weight$", "^embedding"]),
         "c": minipeft.Selective(where=["^embedding", r"\.ff\."])}, {"a": "b", "b": "ac", "c": "b"}, "abc")}
STATES = ("removed", "off", "plugged", "merged")
MOVES = ("attach", "load", "plug", "unplug", "swap", "merge", "unmerge", "step", "save", "remove")
PAIRS = {(move, state) for move in MOVES for state in STATES} | {
    ("plug", "off below a merged one"), ("merge", "plugged above an unmerged one"),
    ("unmerge", "merged below a merged one"), ("step", "base weight below a merged one")}
REACHED: collections.Counter = collections.Counter()

_CONFIG = minipeft.T5Config(11, 6, 5, 2, 9, 1, 1, 8, 20)
_BASE = minipeft.T5(_CONFIG, numpy.random.default_rng(0), "float64")
_RNG = numpy.random.default_rng(1)
_BATCH = {"input_ids": _RNG.integers(1, 11, (2, 4)), "labels": _RNG.integers(1, 11, (2, 3))}


def output_of(model: Any) -> bytes:
    return model(_BATCH["input_ids"], _BATCH["labels"]).data.tobytes()


def digest(arrays: dict[str, Any]) -> str:
    """Of names, dtypes, shapes and bytes."""
    h = hashlib.sha256()
    for name, p in arrays.items():
        h.update(f"{name} {p.dtype} {p.shape} ".encode() + array_of(p).tobytes())
    return h.hexdigest()


_BASE_DIGEST, _BASE_OUTPUT = digest(_BASE.base_parameters), output_of(_BASE)


class Undo(RuleBasedStateMachine):
    """`order` is what is plugged, bottom first; `state`, `own` (digests of A and B) and `saved` are the oracle's."""

    trio: Trio
    names = st.sampled_from("abc")

    def __init__(self) -> None:
        super().__init__()
        self.model, self.rng = _BASE.clone(), numpy.random.default_rng(2)
        self.places = [(name, place, getattr(place, "base", None)) for name, place in self.model.named_places()]
        self.folder = tempfile.mkdtemp()
        self.handles: dict[str, minipeft.Attachment] = {}
        self.state, self.own = dict.fromkeys("abc", "removed"), dict.fromkeys("abc", "")
        self.saved: dict[str, str] = {}
        self.order: list[str] = []
        self.above: dict[str, list[str]] = {name: [] for name in "abc"}  # of one that is off, what lay above it
        self.seen = {(): _BASE_OUTPUT}
        self.now: tuple | None = None  # the last snapshot, until a legal move

    def teardown(self) -> None:
        shutil.rmtree(self.folder)

    @initialize(order=st.permutations("abc"), states=st.lists(st.sampled_from(STATES), min_size=3, max_size=3))
    def all_were_attached_and_saved_once(self, order: list[str], states: list[str]) -> None:
        """And then merged, unplugged or removed, as far as that is legal."""
        for name, state in zip(order, states):
            self.handles[name] = handle = minipeft.attach(self.model, self.trio.methods[name], self.rng, name)
            for p in handle.parameters.values():
                p.data = self.rng.standard_normal(p.shape)
            self.arrived(name)
            self.save(name)
            if state == "merged":
                self.merge(name)
            if state in ("off", "removed"):
                self.unplug(name)
                if state == "removed":
                    self.remove(name)

    @rule(move=st.sampled_from(MOVES), name=names)
    def make_a_move(self, move: str, name: str) -> None:
        getattr(self, move)(name)

    # ---- the moves: what the oracle expects, and what it then knows

    def attach(self, name: str) -> None:
        def action() -> None:
            self.handles[name] = minipeft.attach(self.model, self.trio.methods[name], self.rng, name)
        if self.made("attach", name, self.state[name] == "removed", action):
            self.arrived(name)

    def load(self, name: str) -> None:
        def action() -> None:
            # forced: what lay below it when it was saved may be gone (tests/attaching/test_load.py has that rule)
            self.handles[name] = minipeft.load(self.model, self.path(name), force=True)
        if self.made("load", name, self.state[name] == "removed", action):
            self.arrived(name)
            assert self.own[name] == self.saved[name]

    def arrived(self, name: str) -> None:
        self.state[name], self.own[name], self.above[name] = "plugged", digest(self.handles[name].parameters), []
        self.order.append(name)

    def plug(self, name: str, move: str = "plug") -> None:
        legal = self.state[name] == "off" and not self.shared(self.order[self.back(name):], name, "merged")
        if self.made(move, name, legal, self.handles[name].plug):
            self.state[name] = "plugged"
            self.order.insert(self.back(name), name)

    def back(self, name: str) -> int:
        """The position that `name` is plugged at."""
        return next((i for i, n in enumerate(self.order) if n in self.above[name]), len(self.order))

    def unplug(self, name: str, move: str = "unplug") -> None:
        legal = self.state[name] == "plugged" and not self.merged_above(name)
        if self.made(move, name, legal, self.handles[name].unplug):
            self.state[name], self.above[name] = "off", self.order[self.order.index(name) + 1:]
            self.order.remove(name)

    def swap(self, name: str) -> None:
        top = next((n for n in reversed(self.order) if self.state[n] == "plugged" and not self.merged_above(n)), None)
        before = output_of(self.model)
        if top is None or self.state[name] != "off":
            self.plug(name, "swap")
            return
        REACHED["swap", "off"] += 1
        at = self.order.index(top)
        for off, on in ((top, name), (name, top), (top, name)):
            self.unplug(off, "")
            self.plug(on, "")
            if on == top and at == len(self.order) - 1:
                assert output_of(self.model) == before, f"{top!r}, {name!r}, {top!r} is not {top!r}"

    def merged_above(self, name: str) -> bool:
        return self.shared(self.order[self.order.index(name) + 1:], name, "merged")

    def merge(self, name: str) -> None:
        legal = self.where("merge", name) == "plugged" and name in self.trio.weights
        if self.made("merge", name, legal, self.handles[name].merge):
            self.state[name] = "merged"

    def unmerge(self, name: str) -> None:
        if self.made("unmerge", name, self.where("unmerge", name) == "merged", self.handles[name].unmerge):
            self.state[name] = "plugged"

    def step(self, name: str) -> None:
        if self.made("step", name, self.state[name] == "plugged", lambda: self.train(f"@{name}\\.")):
            self.own[name] = digest(self.handles[name].parameters)
        if self.state[name] == "merged":
            place = list(self.handles[name].places)[0]
            self.made("step", name, False, lambda: self.train(f"^{place}$"), "base weight below a merged one")

    def save(self, name: str) -> None:
        if self.made("save", name, self.state[name] != "removed", lambda: self.handles[name].save(self.path(name))):
            self.saved[name] = self.own[name]

    def remove(self, name: str) -> None:
        legal = self.state[name] == "off" or self.state[name] == "plugged" and not self.merged_above(name)
        if self.made("remove", name, legal, self.handles[name].remove):
            self.state[name] = "removed"
            self.order = [n for n in self.order if n != name]

    def made(self, move: str, name: str, legal: bool, action: Callable[[], Any], why: str = "") -> bool:
        """Make the move; an illegal one must raise, and leave everything as `check` last saw it."""
        if move:
            REACHED[move, why or self.where(move, name)] += 1
        if legal:
            action()
            self.now = None
            return True
        self.check()
        with pytest.raises(ValueError):
            action()
        assert self.snapshot() == self.now, f"{move} {name!r} raised, and changed something"
        return False

    # ---- what is there

    def path(self, name: str) -> str:
        return os.path.join(self.folder, name + ".safetensors")

    def where(self, move: str, name: str) -> str:
        """The state from which the move would start, said more exactly where the neighbours matter."""
        state, at = self.state[name], self.order.index(name) if name in self.order else 0
        if (move, state) == ("plug", "off") and self.shared(self.order[self.back(name):], name, "merged"):
            return "off below a merged one"
        if (move, state) == ("merge", "plugged") and self.shared(self.order[:at], name, "plugged"):
            return "plugged above an unmerged one"
        if (move, state) == ("unmerge", "merged") and self.shared(self.order[at + 1:], name, "merged"):
            return "merged below a merged one"
        return state

    def shared(self, others: list[str], name: str, state: str) -> bool:
        """Whether one of `others` is in that state and has a place in common with `name`."""
        return any(self.state[n] == state and n in self.trio.share[name] for n in others)

    def train(self, where: str) -> None:
        params = minipeft.select(self.model, where)
        _, grads = minipeft.value_and_grad(lambda: self.model.loss(**_BATCH), params)
        minipeft.AdamW(lr=0.05).step(params, grads)

    def snapshot(self) -> tuple:
        """Everything that an illegal move must leave alone."""
        structure = [(name, list(place.attached), [(e.name, e.merged is None or digest({"": e.merged}))
                                                   for e in place.entries]) for name, place, _ in self.places]
        own = {name: digest(handle.parameters) for name, handle in self.model.attachments.items()}
        return (digest(self.model.base_parameters), structure, own, {n: h.state for n, h in self.handles.items()},
                self.rng.bit_generator.state, output_of(self.model), sorted(os.listdir(self.folder)))

    @invariant()
    def check(self) -> None:
        """The model is what the oracle says, to the bit."""
        if self.now is not None:
            return  # checked, and only illegal moves since, each of which found everything as it was
        base, structure, own, states, _, output, _ = self.now = self.snapshot()
        assert base == _BASE_DIGEST
        assert [(name, place, getattr(place, "base", None)) for name, place in self.model.named_places()] == self.places
        assert own == {name: self.own[name] for name, state in self.state.items() if state != "removed"}
        assert all(states[name] == self.state[name] for name in states)
        for name, attached, plugged in structure:
            assert [n for n, _ in plugged] == [n for n in self.order if n in attached], name
        # One configuration, however it was reached, has one output: nothing that was undone has left a trace.
        configuration = tuple((n, self.state[n], self.own[n]) for n in self.order)
        assert self.seen.setdefault(configuration, output) == output


def machine_of(trio: str) -> type[Undo]:
    return type("Undo", (Undo,), {"trio": TRIOS[trio]})


@pytest.mark.parametrize("trio", TRIOS)
def test_law_4_any_sequence_of_moves_can_be_undone_and_illegal_ones_move_nothing(trio):
    run_state_machine_as_test(machine_of(trio), settings=settings(HALF, stateful_step_count=20))


def merge_above_one_that_is_off(machine: Undo) -> None:
    """And then plug that, which chance alone seldom tries."""
    lower, upper = next((x, y) for x in machine.trio.weights for y in machine.trio.share[x])
    for move, names in (("unmerge", 3 * "abc"), ("unplug", "abc"), ("remove", lower + upper), ("attach", lower + upper),
                        ("unplug", lower), ("merge", upper), ("plug", lower), ("unmerge", upper)):
        for name in names:
            getattr(machine, move)(name)
            machine.check()


@pytest.mark.slow
@pytest.mark.parametrize("trio", TRIOS)
def test_law_4_on_a_walk_that_makes_every_move_from_every_state_at_least_20_times(trio):
    """The same machine; every other move is the one made least often so far from where it would start."""
    rng, machine = numpy.random.default_rng(0), machine_of(trio)()
    REACHED.clear()
    try:
        machine.all_were_attached_and_saved_once(list("abc"), ["plugged"] * 3)
        for i in range(2000):
            chosen = rng.permutation([(move, name) for move in MOVES for name in "abc"])
            move, name = chosen[0] if i % 2 else min(chosen, key=lambda pair: REACHED[pair[0], machine.where(*pair)])
            getattr(machine, move)(name)
            machine.check()
            if i % 100 == 0:
                merge_above_one_that_is_off(machine)
    finally:
        machine.teardown()
    print("\n".join(f"{move:8} {state:32} {REACHED[move, state]:5}" for move, state in sorted(PAIRS)))
    assert set(REACHED) == PAIRS and min(REACHED.values()) >= 20, REACHED
