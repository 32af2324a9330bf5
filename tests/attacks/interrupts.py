"""KeyboardInterrupt at any line of every move: the model is as it was before the move or after it, never between.

    python tests/attacks/interrupts.py --seconds 20 --seed 0

Each move (attach, load, plug, unplug, merge, unmerge, remove, off) is made on stacks of three attachments, once to
see where it leads and how many lines it runs, and again with an interrupt before one of these lines. Afterwards the
attachments and their states, the output of a forward and the bits of the base must be those from before the move or
those from after it, and every attachment must come off.
"""
from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Callable

import numpy

import minipeft

PACKAGE = str(Path(minipeft.__file__).parent)
IDS, TARGETS = [[5, 6, 1], [7, 1, 1]], [[0, 7], [0, 2]]
MOVES = ("attach", "load", "plug", "unplug", "merge", "unmerge", "remove", "off")
METHODS = {"lora": minipeft.LoRA(2), "delta": minipeft.Selective(component=("attention", "norm")),
           "adapter": minipeft.Bottleneck(size=2), "prompt": minipeft.PromptTuning(2),
           "dora": minipeft.DoRA(2), "factors": minipeft.IA3(), "shared": minipeft.VeRA(2),
           "prefix": minipeft.PrefixTuning(2, mlp=3),
           "wide": minipeft.LoRA(1, where=["^embedding", r"\.ff\."])}


class Stack:
    """A model with three attachments, drawn by the seed, plugged in order, some of them off or merged."""

    def __init__(self, seed: int, folder: Path):
        rng = numpy.random.default_rng(seed)
        self.model = minipeft.T5(minipeft.T5Config(16, 8, 4, 2, 8, 1, 1), rng, "float64")
        for name in map(str, rng.permutation(sorted(METHODS))[:3]):
            attachment = minipeft.attach(self.model, METHODS[name], rng, name)
            for p in attachment.parameters.values():
                p.data = p.data + 0.3 * rng.standard_normal(p.shape)
        self.names, self.file = list(self.model.attachments), folder / "saved.safetensors"
        for name in self.names:
            for move in ("merge", "unplug"):
                if rng.random() < 0.4:
                    try:
                        getattr(self.model.attachments[name], move)()
                    except ValueError:
                        pass  # not legal here

    def move(self, what: str, name: str) -> Callable[[], Any] | None:
        """The move, ready to be made; None if it is illegal here."""
        model, attachment = self.model, self.model.attachments[name]
        if what == "attach":
            return lambda: minipeft.attach(model, METHODS[name], numpy.random.default_rng(1), "new")
        if what == "load":
            attachment.save(self.file)
            return lambda: minipeft.load(model, self.file, force=True, name="new")

        def off() -> None:
            with attachment.off():
                pass

        made, before = off if what == "off" else getattr(attachment, what), model.host.now
        try:
            made()
        except ValueError:
            return None
        finally:
            model.host.now = before
        return made

    def seen(self) -> tuple:
        """What a user can see: the states, the order, the output, the bits of the base."""
        model = self.model
        return ({n: a.state for n, a in model.attachments.items()}, model.plugged, model(IDS, TARGETS).data.tobytes(),
                [p.data.tobytes() for p in model.base_parameters.values()])

    def comes_off(self) -> bool:
        """Whether every attachment can be taken off, top first, and the base alone is left."""
        model = self.model
        for name in reversed(model.plugged):
            if model.attachments[name].state == "merged":
                model.attachments[name].unmerge()
            model.attachments[name].remove()
        for attachment in list(model.attachments.values()):
            attachment.remove()
        bare = minipeft.T5(model.config, None, "float64")
        bare.load_state(model.state())
        return not model.attachments and model(IDS, TARGETS).data.tobytes() == bare(IDS, TARGETS).data.tobytes()


def lines_of(action: Callable[[], Any], at: int | None = None) -> int:
    """Make the move, and count the lines of the package that it runs; with an interrupt before the at-th of them."""
    count = 0

    def trace(frame: Any, event: str, _: Any) -> Any:
        nonlocal count
        if event == "line" and frame.f_code.co_filename.startswith(PACKAGE):
            count += 1
            if count == at:
                raise KeyboardInterrupt
        return trace

    sys.settrace(trace)
    try:
        action()
    except KeyboardInterrupt:
        pass
    finally:
        sys.settrace(None)
    return count


def attack(seconds: float, seed: int) -> dict[str, list[int]]:
    """{move: [interrupts, of which the model was as before, as after, neither]}. Every other interrupt comes in the
    last lines of its move, where the state changes."""
    table = {what: [0, 0, 0, 0] for what in MOVES}
    end, turn, rng = time.monotonic() + seconds, 0, numpy.random.default_rng(seed)
    with tempfile.TemporaryDirectory() as folder:
        while time.monotonic() < end or turn < 2 * len(MOVES):
            what = MOVES[turn % len(MOVES)]
            stack = Stack(int(rng.integers(2 ** 32)), Path(folder))
            actions = [(name, stack.move(what, name)) for name in stack.names]
            turn += 1
            for action in [action for _, action in actions if action is not None][:1]:
                before, state = stack.seen(), stack.model.host.now
                count = lines_of(action)
                after, stack.model.host.now = stack.seen(), state
                first = max(1, count - 30) if turn // len(MOVES) % 2 else 1
                lines_of(action, int(rng.integers(first, count + 1)))
                found = stack.seen()
                kind = 1 if found == before else 2 if found == after else 3
                table[what][0] += 1
                table[what][kind if stack.comes_off() else 3] += 1
    return table


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=20, help="how long to go on (default 20)")
    parser.add_argument("--seed", type=int, default=0, help="of everything that is drawn (default 0)")
    arguments = parser.parse_args()
    table = attack(arguments.seconds, arguments.seed)
    print(f"{'move':8} {'interrupts':>10} {'as before':>10} {'as after':>10} {'neither':>8}")
    for what, counts in table.items():
        print(f"{what:8} {counts[0]:10} {counts[1]:10} {counts[2]:10} {counts[3]:8}")
    failed = sum(counts[3] for counts in table.values())
    print(f"{sum(counts[0] for counts in table.values())} interrupts, {failed} of them left half a move")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
