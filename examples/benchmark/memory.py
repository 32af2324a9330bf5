"""The peak memory of a training step above the loaded model, as the system counts it for this process.

    peak of resident memory over two steps of forward, backward and AdamW - resident memory before

The process is fresh and has made a tiny forward and backward pass. So neither reading the model counts, nor what a
library sets up at its first pass. The second step runs with the optimizer's state in place, so that counts. Freed
memory is given back first; otherwise the heap that was free after reading the model would hide as much of the step.
On a GPU the figures are those of the pool.
"""
from __future__ import annotations

import ctypes
import gc
from pathlib import Path
from typing import Any

RESIDENT, POOL = COUNTED = "resident memory", "the device's pool"   # with these, the peak belongs to the steps
STATUS, REFERENCES = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def of_two_steps(library: Any, kind: str) -> dict[str, Any]:
    """{"base", "peak": bytes, "counted": how, "losses"}. The memory of the steps is peak - base.

    library: as in ours.py. kind: "lora" or "full"."""
    library.tiny(kind)
    give_back()
    on_device = library.device_bytes() is not None
    if on_device:
        library.reset_device_peak()
        base, counted = library.device_bytes(), POOL
    else:
        base, counted = resident("VmRSS"), reset_peak()
    losses = []
    for _ in range(2):
        losses.append(library.forward_backward(kind))
        library.update(kind)
    peak = library.device_bytes() if on_device else resident("VmHWM")
    return {"base": base, "peak": peak, "counted": counted, "losses": losses}


def give_back() -> None:
    """Collect garbage, and return free pages to the system where glibc is the allocator."""
    gc.collect()
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    except (OSError, AttributeError):
        pass


def reset_peak() -> str:
    """Start the high-water mark anew where the system can; return a description of how the peak is counted."""
    try:
        REFERENCES.write_text("5")
    except OSError:
        return "the process's own peak since it began, which may lie before the steps"
    return RESIDENT


def resident(field: str) -> int:
    """Bytes of this process now ("VmRSS") or at most ("VmHWM"). Outside Linux both are the peak of getrusage."""
    try:
        line = next(line for line in STATUS.read_text().splitlines() if line.startswith(field + ":"))
    except OSError:
        import resource
        import sys
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return int(line.split()[1]) * 1024
