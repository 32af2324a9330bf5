"""Runs a saved failure once more, in a process of its own: a crash or a hang is reported in one line.

The child writes its exit status into a file, so that a plug-in that ends the process itself is not mistaken for an
answer.
"""
from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

from minipeft.conformance.again import again

PATIENCE = 30.0  # seconds beyond the time limit of one call, as in a run
_CHILD = "from minipeft.conformance.apart import main; main()"


def again_apart(impl: str, path: str, limit: float) -> int:
    """`again` in a child process, with the same arguments and output.

    Returns its status; 1 if the process died or did not answer, 2 if the file or the plug-in cannot be read. Raises
    ValueError for a limit that is not finite and above 0 s."""
    if not 0 < limit < float("inf"):
        raise ValueError(f"limit is {limit}; expected a finite limit above 0 s")
    with tempfile.TemporaryDirectory() as folder:
        answer = Path(folder) / "status"
        search = os.pathsep.join([os.getcwd(), *(p for p in sys.path if p)])
        job = json.dumps([impl, path, limit, str(answer)])
        process = subprocess.Popen([sys.executable, "-u", "-c", _CHILD, job], stdin=subprocess.DEVNULL,
                                   env={**os.environ, "PYTHONPATH": search}, start_new_session=True)
        try:
            process.wait(limit + PATIENCE)
            why = f"ended by {signal.Signals(-process.returncode).name}" if process.returncode < 0 else \
                f"status {process.returncode}"
        except subprocess.TimeoutExpired:
            why = f"it did not answer in {limit + PATIENCE:g} s and was ended"
        finally:
            _ended(process)
        if answer.exists():
            return int(answer.read_text("ascii"))
    print(f"  the process of the implementation died: {why}")
    return 1


def _ended(process: subprocess.Popen) -> None:
    """Ends the child and every process that it started."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass  # they have all ended
    process.wait()


def main() -> None:
    """The child: its one argument is [impl, path, limit, answer file] as JSON."""
    impl, path, limit, answer = json.loads(sys.argv[1])
    try:
        status = again(impl, path, limit)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        status = 2
    Path(answer).write_text(str(status), "ascii")
    os._exit(status)  # does not wait for threads of the plug-in
