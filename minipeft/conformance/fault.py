"""What an implementation did wrong, other than a wrong number."""
from __future__ import annotations


class Fault(Exception):
    """What an implementation did wrong. kind: "raises", "does not return", "wrong type", "wrong shape", "not finite",
    "absent", "writes into its inputs". detail: for people."""

    def __init__(self, kind: str, detail: str):
        super().__init__(f"{kind}: {detail}")
        self.kind, self.detail = kind, detail


class Skip(Exception):
    """A property cannot be put to this implementation, and why: what it needs is refused, or not implemented. Counted
    and shown, as a method that a handle does not offer is; never a pass."""
