"""`check`: runs the kit on an implementation, in one call."""
from __future__ import annotations

from typing import Any, Callable, Sequence

from minipeft.conformance.arithmetic import DTYPES
from minipeft.conformance.methods import all_methods
from minipeft.conformance.plugin import Plugin
from minipeft.conformance.report import Report
from minipeft.conformance.result import STAGES, Job
from minipeft.conformance.stages import conduct
from minipeft.conformance.worker import supervised
from minipeft.conformance.writable import folder_trouble


class Interrupted(KeyboardInterrupt):
    """A run was interrupted. report: the results until then."""

    def __init__(self, report: Report):
        super().__init__()
        self.report = report


def check(impl: Any, methods: Sequence[str] | None = None, dtypes: Sequence[str] | None = None, *,
          vectors: bool = True, live: bool = True, cases: int = 50, seed: int = 0, limit: float = 10.0,
          folder: str | None = None, watch: Callable[[dict], None] | None = None) -> Report:
    """Check an implementation on the published vectors and on drawn cases.

    impl: the dotted name of a plug-in module, which runs in a process of its own (it may crash or hang); or the module
    itself, or any object with its functions, which runs in this process. methods, dtypes: names to which the run is
    restricted; None takes all. vectors, live: whether to run the published vectors and the drawn cases. cases: how many
    are drawn per method, dtype and kind (bounded or exact). seed: of the drawn cases. limit: seconds for one call.
    folder: for the files of failures; None writes none. watch: called with every message of the run (see `stages.py`).

    Raises ValueError for an unknown method or dtype, a plug-in that cannot be imported, numbers out of range, and a
    folder that cannot be written; Interrupted, a KeyboardInterrupt with the results so far, if the run is interrupted.
    """
    chosen = _known("methods", methods, all_methods())
    if cases < 1 or not 0 < limit < float("inf"):
        raise ValueError(f"cases is {cases} and limit {limit}; expected at least 1 case and a finite limit above 0 s")
    _known("dtypes", dtypes, DTYPES)
    if folder is not None and (trouble := folder_trouble(folder)):
        raise ValueError(f"failures cannot be saved in {folder}: {trouble}")
    stages = tuple(stage for stage, wanted in zip(STAGES, (vectors, live)) if wanted)
    job = Job(impl if isinstance(impl, str) else getattr(impl, "__name__", type(impl).__name__), chosen,
              None if dtypes is None else tuple(dtypes), stages, cases, seed, limit, folder)
    report = Report(job=job)

    def take(message: dict) -> None:
        report.take(message)
        if watch is not None:
            watch(message)

    try:
        if isinstance(impl, str):
            for message in supervised(job):
                take(message)
        else:
            conduct(Plugin(impl, limit), job, take)
    except KeyboardInterrupt:
        report.interrupted = True
        raise Interrupted(report) from None
    return report


def _known(what: str, names: Sequence[str] | None, known: Any) -> tuple[str, ...]:
    """`names`, after a check that all are known; None stands for all that are known."""
    for name in names or ():
        if name not in known:
            raise ValueError(f"{what} has {name!r}; expected some of {', '.join(known)}")
    return tuple(known) if names is None else tuple(names)
