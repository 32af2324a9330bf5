"""The conformance kit: checks any PEFT implementation against the reference.

    from minipeft.conformance import check
    check("mypkg.adapter").raise_for_failures()                    # in any test file

    python -m minipeft.conformance --impl mypkg.adapter            # a table of rho, failures in words

A plug-in is a module of plain functions over NumPy arrays: see `plugin.py`, and `methods/` for their arguments.

Where to begin: methods/lora_linear/, a method from its equation to its planted bugs; then method.py, the parts of every
method; tolerance.py, the error allowed to a correct implementation; stages.py, the run.

The other files, by what they are for:

    the tests           case  numbers: inputs.  method  outputs: properties of one method, of all.  planted: bugs
    the bounds          arithmetic: unit roundoffs.  tolerance: polynomials.  running: other equations.  emulated: half
                        precision in NumPy
    the implementation  plugin  guard: a module and one guarded call of it.  fault: its mistakes.  observe: got and
                        wanted values.  look: one property on one case.  saved: attachments of minipeft as bytes
    a run               hold  __main__: entry points.  stages: the run.  live: drawn cases.  vectors/: published cases.
                        worker: a process for it.  result  report  progress: output.  survival: digits kept by a merge.
                        listing: the text of --list.  writable: whether output files can be written
    a failure           aftermath: all that follows.  shrink: a smaller case.  diagnose  hints: likely causes.
                        replay  again  apart: run once more.  script  literals  importing: as a script without the kit
    the kit itself      selftest: correct implementations pass, every planted bug is found
    a whole model       trace  recording: a run, tensor by tensor.  compare  comparison  likeness: two runs compared
"""
from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from minipeft.conformance.hold import check
    from minipeft.conformance.report import Report

__all__ = ["check", "Report"]


def __getattr__(name: str) -> Any:
    """The public names, imported on first use: `import minipeft` needs only `trace` of this folder."""
    if name == "check":
        from minipeft.conformance.hold import check
        return check
    if name == "Report":
        from minipeft.conformance.report import Report
        return Report
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
