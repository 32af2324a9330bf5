"""The conformance kit: hold any PEFT implementation against the reference.

    from minipeft.conformance import check
    check("mypkg.adapter").raise_for_failures()                    # in anybody's tests

    python -m minipeft.conformance --impl mypkg.adapter            # a table of rho, failures in words

A plug-in is a module of plain functions over NumPy arrays: see `plugin.py`, and `methods/` for what each is given.
"""
from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from minipeft.conformance.hold import check
    from minipeft.conformance.report import Report

__all__ = ["check", "Report"]


def __getattr__(name: str) -> Any:
    """The public names, imported when they are asked for: `import minipeft` needs `trace` of this folder alone."""
    if name == "check":
        from minipeft.conformance.hold import check
        return check
    if name == "Report":
        from minipeft.conformance.report import Report
        return Report
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
