"""The run in a process of its own, so that a plug-in that crashes or hangs does no further damage.

The child reads one job as JSON from its standard input and writes messages, one JSON object per line; output of the
plug-in goes to standard error. The child announces every call of the plug-in before it makes it. If it dies, or is
silent for too long, the property that it was running is recorded as failed. A new child then continues without that
property, and without the call that did not return. Nothing is pickled.
"""
from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import queue
import signal
import subprocess
import sys
import threading
from typing import Any, Iterator

from minipeft.conformance.methods import all_methods
from minipeft.conformance.outputs import property_named
from minipeft.conformance.result import AFTERMATH, Job, Result

_CHILD = "from minipeft.conformance.worker import main; main()"
_LAST_WORDS = 2  # seconds in which a child that closed its output must end
_PATIENCE = 30  # seconds beyond the time limit of one call that a child may be silent


def supervised(job: Job) -> Iterator[dict[str, Any]]:
    """The messages of a run of `job` (see `stages.py`), whatever the plug-in does. Raises ValueError if it cannot be
    imported or dies outside of any property."""
    while True:
        now: tuple[str, ...] | None = None
        call = ""
        last: dict[str, Any] = {}
        process, lines = _started(job)
        try:
            for message in _messages(lines, job.limit + _PATIENCE):
                last = message
                if "call" in message:
                    call = message["call"]
                    continue
                if "now" in message:
                    now, call = tuple(message["now"]), ""
                elif "done" in message:
                    job, now = dataclasses.replace(job, done=(*job.done, tuple(message["done"]))), None
                if "end" in message or "error" in message:
                    break  # threads and children of the plug-in are not waited for
                yield message
        finally:
            _ended(process, patience=0 if last.keys() & {"end", "error", "silent"} else _LAST_WORDS)
        if "end" in last:
            return
        if "error" in last:
            raise ValueError(last["error"])
        why = f"it was silent for {job.limit + _PATIENCE:g} s and was ended" if "silent" in last else \
            f"ended by signal {-process.returncode}" if process.returncode < 0 else f"status {process.returncode}"
        why += f", in {call}" if call else ""
        if call and "silent" in last:
            job = dataclasses.replace(job, hung=(*job.hung, call))
        if now is None:
            raise ValueError(f"--impl {job.impl}: its process died outside of any property ({why})")
        method, dtype, stage, id = now
        if id == AFTERMATH:  # the results were reported; only the causes of failures are lost
            job = dataclasses.replace(job, done=(*job.done, (method, dtype, stage)))
            continue
        yield {"result": Result(method, id, property_named(all_methods()[method], id).title, dtype, stage, "fail",
                                failure=f"the process of the implementation died: {why}").as_json()}
        job = dataclasses.replace(job, dead=(*job.dead, now))


def _started(job: Job) -> tuple[subprocess.Popen, "queue.Queue[str | None]"]:
    """(child, lines): a child that has its job, in a process group of its own, and the lines that it writes, then None.
    """
    path = os.pathsep.join([os.getcwd(), *(p for p in sys.path if p)])
    process = subprocess.Popen([sys.executable, "-c", _CHILD], text=True, start_new_session=True,
                               stdin=subprocess.PIPE, stdout=subprocess.PIPE, env={**os.environ, "PYTHONPATH": path})
    assert process.stdin is not None and process.stdout is not None
    try:
        process.stdin.write(json.dumps(dataclasses.asdict(job)))
        process.stdin.close()
    except BrokenPipeError:
        pass  # it died at once; its status will show that
    lines: queue.Queue[str | None] = queue.Queue()
    out = process.stdout

    def read() -> None:
        with out:
            for line in out:
                lines.put(line)
        lines.put(None)

    threading.Thread(target=read, daemon=True).start()
    return process, lines


def _ended(process: subprocess.Popen, patience: float) -> None:
    """Ends the child and every process that it started. patience: seconds in which it may end by itself, so that its
    exit status is its own."""
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(patience)
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass  # they have all ended
    process.wait()


def _messages(lines: "queue.Queue[str | None]", patience: float) -> Iterator[dict]:
    while True:
        try:
            line = lines.get(timeout=patience)
        except queue.Empty:
            yield {"silent": True}
            return
        if line is None:
            return
        try:
            yield json.loads(line)
        except ValueError:
            return  # it died in the middle of a line


def main() -> None:
    """The child: runs the job on its standard input."""
    out = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # output of the plug-in must not mix with messages
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    fields = json.load(sys.stdin)

    def say(message: dict[str, Any]) -> None:
        out.write(json.dumps(message) + "\n")

    from minipeft.conformance.plugin import load
    from minipeft.conformance.stages import conduct

    job = Job(**{name: _tuples(value) for name, value in fields.items()})
    try:
        plugin = load(job.impl, job.limit)
        plugin.alone, plugin.calling = True, lambda where: say({"call": where})
        plugin.hung |= set(job.hung)
        conduct(plugin, job, say)
        say({"end": True})
    except ValueError as error:
        say({"error": str(error)})


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if isinstance(value, list) else value
