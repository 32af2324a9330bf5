"""How much memory a process can still have."""
from __future__ import annotations

from pathlib import Path

_SYSTEM = Path("/proc/meminfo")
_GROUP = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current"))


def free_memory() -> int | None:
    """Bytes that the system, and the container where there is one, will still give; None where they do not tell."""
    try:
        line = next(line for line in _SYSTEM.read_text().splitlines() if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        return None
    free = int(line.split()[1]) * 1024
    try:
        most, now = (int(file.read_text()) for file in _GROUP)
    except (OSError, ValueError):               # no container, or "max"
        return free
    return min(free, max(0, most - now))
