"""One run at a time on a checkpoint, a log or a best file: a lock file beside it, `.NAME.lock`, with the holder's
process id and host.

The lock is the system's (flock), so it ends with its process, even by SIGKILL. The file that a killed run leaves is
taken over by the next one, and a run that ends removes it. Where the system or the file system has no such locks, there
is none.
"""
from __future__ import annotations

import contextlib
import os
import socket
from pathlib import Path
from typing import IO

from minipeft.checks import shown
from minipeft.nn.fingerprint import sha256

try:
    import fcntl
except ImportError:  # not a POSIX system
    fcntl = None  # type: ignore[assignment]

_LONGEST = 255  # bytes of a file's name


def lock_file(path: str | os.PathLike) -> Path:
    """Where the lock of a file lies; beside the file itself, where `path` is a symbolic link."""
    target = Path(os.path.realpath(path))
    name = f".{target.name}.lock"
    if len(os.fsencode(name)) > _LONGEST:
        name = f".{sha256([os.fsencode(target.name)])}.lock"
    return target.parent / name


class Locks:
    """Of several files, each None or a path: all of them, or none."""

    def __init__(self, *paths: str | os.PathLike | None):
        self._locks = [Lock(path) for path in paths]

    def acquire(self) -> None:
        """Raises RuntimeError, which names the file and the process that holds it."""
        try:
            for lock in self._locks:
                lock.acquire()
        except BaseException:
            self.release()
            raise

    def release(self) -> None:
        """May be called again."""
        for lock in self._locks:
            lock.release()


class Lock:
    """Of a file; path None: of nothing."""

    def __init__(self, path: str | os.PathLike | None):
        self._path, self._of = None if path is None else lock_file(path), path
        self._file: IO[bytes] | None = None

    def acquire(self) -> None:
        """Raises RuntimeError, which names the process that holds it."""
        try:
            while self._path is not None and fcntl is not None and not self._acquired(self._path):
                pass  # its holder removed the file between our opening and our locking it
        except BaseException:
            self.release()
            raise

    def release(self) -> None:
        """End the lock, and remove the file if it is ours. May be called again."""
        if self._file is not None and not self._file.closed and self._path is not None:
            with contextlib.suppress(OSError):
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # ours, unless another process holds it
                if _same(self._file, self._path):
                    os.unlink(self._path)
            self._file.close()

    def _acquired(self, path: Path) -> bool:
        try:
            self._file = open(path, "r+b", buffering=0, opener=_create)
        except OSError:
            return True  # no file can be made here: neither can a checkpoint, and its writer says so
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RuntimeError(f"{self._of} is in use by another run ({self._holder()}): wait until it ends, or pass "
                               f"another file") from None
        except OSError:  # a file system without locks
            os.unlink(path)
            self._file.close()
            return True
        if not _same(self._file, path):
            self._file.close()
            return False
        self._file.truncate(0)
        self._file.write(f"{os.getpid()} {socket.gethostname()}\n".encode())
        return True

    def _holder(self) -> str:
        assert self._file is not None
        pid, _, host = self._file.read(_LONGEST).decode("utf-8", "replace").strip().partition(" ")
        return f"process {shown(int(pid))} on host {shown(host)}" if pid.isdecimal() and host else "it just began"


def _create(path: str, _: int) -> int:
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)


def _same(file: IO[bytes], path: Path) -> bool:
    """Whether an open file is still the one of this name."""
    try:
        there, here = os.stat(path, follow_symlinks=False), os.fstat(file.fileno())
    except FileNotFoundError:
        return False
    return (there.st_ino, there.st_dev) == (here.st_ino, here.st_dev)
