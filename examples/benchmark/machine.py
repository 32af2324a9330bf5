"""The machine of a run, in words: figures mean little without it."""
from __future__ import annotations

import os
import platform
import textwrap
from pathlib import Path
from typing import Any


def machine() -> dict[str, Any]:
    """The host. Each library's process reports what the library is built on."""
    return {"cpu": _cpu(), "cores": cores(), "memory_bytes": _memory(), "system": platform.platform(),
            "load_before": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
            "python": f"{platform.python_implementation()} {platform.python_version()}"}


def cores() -> int:
    """The number of cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def last_core() -> int | None:
    """The number of the last core that this process may run on; None where the system does not tell."""
    return max(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _memory() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None


def described(run: dict[str, Any]) -> str:
    """A few lines about the machine, the libraries with their BLAS, and the settings."""
    host, settings = run["machine"], run["settings"]
    memory = "memory unknown" if host["memory_bytes"] is None else f"{host['memory_bytes'] / 2 ** 30:.1f} GiB"
    kept = settings["sides"]["ours"][1]
    busy = host.get("load_before")
    rows = [f"{host['cpu']}, {host['cores']} cores, {memory}; {host['system']}; {host['python']}"
            + ("" if busy is None else f"; load average before the run {busy:.2f}")]
    for side, about in run["about"].items():
        rows.append(f"{side}: " + ", ".join(f"{name} {value}" for name, value in about.items()))
    rows.append(f"setting: {settings['backend']}, {settings['threads']} threads, float32, dropout "
                f"{settings['dropout']:g}; ours with {'a heap that is kept' if kept else 'the allocator as it is'}; "
                f"{settings['rounds']} rounds after {settings['warmup']} to warm up; {run['date']}")
    return "\n".join(textwrap.fill(row, 110, subsequent_indent="    ") for row in rows)
