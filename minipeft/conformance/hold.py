"""`check`: one call for anybody's test file."""
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
    """A run that was interrupted. report: what was found until then."""

    def __init__(self, report: Report):
        super().__init__()
        self.report = report


def check(impl: Any, methods: Sequence[str] | None = None, dtypes: Sequence[str] | None = None, *,
          vectors: bool = True, live: bool = True, cases: int = 50, seed: int = 0, limit: float = 10.0,
          folder: str | None = None, watch: Callable[[dict], None] | None = None) -> Report:
    """Run an implementation against the vectors and the live properties.

    impl: the dotted name of a plug-in module, which runs in a process of its own (it may crash or hang), or the module
    itself or any object with its functions, which runs in this one. methods, dtypes: some of those offered; None for
    all. cases: how many are drawn per method, dtype and kind. limit: seconds for one call. folder: where files of
    failures go; None writes none. watch: sees every message of the run. Raises ValueError for what does not exist and
    for a folder that cannot be written; Interrupted, which is a KeyboardInterrupt, with what was found so far."""
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
    """`names`, all of them known; all that are known for None."""
    for name in names or ():
        if name not in known:
            raise ValueError(f"{what} has {name!r}; expected some of {', '.join(known)}")
    return tuple(known) if names is None else tuple(names)
