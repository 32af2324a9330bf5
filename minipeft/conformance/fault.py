"""Mistakes of an implementation other than wrong numbers."""
from __future__ import annotations

RAISES, HANGS, NOT_FINITE = "raises", "does not return", "not finite"
WRONG_TYPE, WRONG_SHAPE, OFF_GRID, ABSENT = "wrong type", "wrong shape", "off the grid", "absent"
WRITES, NO_USE = "writes into its inputs", "an unusable result"
_SLIPS = ("TypeError", "AttributeError", "NameError", "ImportError", "ModuleNotFoundError")


class Fault(Exception):
    """A mistake of an implementation. kind: one of the constants of this module. detail: a sentence that begins with
    the call, such as "lora_linear.forward returned [3]; expected [2]"."""

    holds = False  # like an observation that is wrong

    def __init__(self, kind: str, detail: str):
        super().__init__(f"{kind}: {detail}")
        self.kind, self.detail = kind, detail

    @property
    def gist(self) -> str:
        """The kind and the call, and the type of an error, without the numbers that differ from case to case."""
        words = self.detail.split()[:2 if self.kind == RAISES else 1]
        return f"{self.kind}: {' '.join(words).rstrip(':')}"

    def like(self, other: "Fault") -> bool:
        """Whether `other` may be the same mistake: the same kind in the same call. A programming error (TypeError,
        NameError, ...) is never taken for another one. The types of all other errors are ignored, since libraries raise
        different ones for the same cause."""
        slip = any(word in _SLIPS for fault in (self, other) for word in fault.gist.split())
        return self.kind == other.kind and self.detail.split()[:1] == other.detail.split()[:1] and not slip


class Skip(Exception):
    """A property cannot be tested on this implementation, because something it needs is refused or not implemented; its
    message is the reason. It is counted and shown, like a call that a handle does not offer; never as a pass."""
