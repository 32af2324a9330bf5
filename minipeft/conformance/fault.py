"""What an implementation did wrong, other than a wrong number."""
from __future__ import annotations

RAISES, HANGS, NOT_FINITE = "raises", "does not return", "not finite"
WRONG_TYPE, WRONG_SHAPE, OFF_GRID, ABSENT = "wrong type", "wrong shape", "off the grid", "absent"
WRITES, NO_USE = "writes into its inputs", "an answer of no use"
_SLIPS = ("TypeError", "AttributeError", "NameError", "ImportError", "ModuleNotFoundError")


class Fault(Exception):
    """What an implementation did wrong. kind: one of the above. detail: for people, the call first:
    "lora_linear.forward returned [3]; expected [2]"."""

    holds = False  # as an observation that does not

    def __init__(self, kind: str, detail: str):
        super().__init__(f"{kind}: {detail}")
        self.kind, self.detail = kind, detail

    @property
    def gist(self) -> str:
        """The kind and the call, without the numbers that differ from case to case; of an error its type too."""
        words = self.detail.split()[:2 if self.kind == RAISES else 1]
        return f"{self.kind}: {' '.join(words).rstrip(':')}"

    def like(self, other: "Fault") -> bool:
        """Whether both may be one mistake: the same kind in the same call. A slip of the pen, such as a call that does
        not fit, is like nothing else; other types of errors differ from library to library for one cause."""
        slip = any(word in _SLIPS for fault in (self, other) for word in fault.gist.split())
        return self.kind == other.kind and self.detail.split()[:1] == other.detail.split()[:1] and not slip


class Skip(Exception):
    """A property cannot be put to this implementation, and why: what it needs is refused, or not implemented. Counted
    and shown, as a method that a handle does not offer is; never a pass."""
