"""The conformance kit: hold any PEFT implementation against the reference.

    from minipeft.conformance import check
    check("mypkg.adapter").raise_for_failures()                    # in anybody's tests

    python -m minipeft.conformance --impl mypkg.adapter            # a table of rho, failures in words

A plug-in is a module of plain functions over NumPy arrays: see `plugin.py`, and `methods/` for what each is given.

Where to begin: methods/lora_linear/, a method from its equation to its planted bugs; then method.py, what every one is
made of; tolerance.py, how far off a right one may be; stages.py, the run. The other files, by what they are for:

    what is judged      case  numbers: inputs.  method  outputs: properties, of one method, of all.  planted: bugs
    how far off         arithmetic: what u is.  tolerance: polynomials.  running: the rest.  emulated: half precision
    who is judged       plugin  guard: a module and one guarded call of it.  fault: what it did wrong.  observe: got
                        and wanted.  look: one property on one case.  saved: attachments of minipeft as bytes
    a run               hold  __main__: who asks.  stages: what is run.  live: cases drawn.  vectors/: cases published.
                        worker: its own process.  result  report  progress: what is told.  survival: digits in a merge.
                        listing  writable: what is asked before a run
    a failure           aftermath: all that follows.  shrink: a smaller case.  diagnose  hints: what it looks like.
                        replay  again  apart: run once more.  script  literals  importing: as a script without the kit
    the kit itself      selftest: what is right passes, every planted bug is found
    a whole model       trace  recording: a run, tensor by tensor.  compare  comparison  likeness: another against it
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
