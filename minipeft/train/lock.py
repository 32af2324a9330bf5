"""Locks, so that only one run at a time uses a checkpoint, a log or a best file. The lock file `.NAME.lock` lies beside
it and holds the process id and the host of its owner.

The operating system keeps the lock (flock), so it ends with its process, even after SIGKILL. A run that ends removes
its lock file; the lock file that a killed run leaves is taken over by the next one. On systems and file systems without
flock there is no lock.
"""
from __future__ import annotations

import contextlib
import os
import socket
from pathlib import Path
from typing import IO

from minipeft.atomic import fcntl
from minipeft.checks import shown
from minipeft.nn.fingerprint import sha256

_LONGEST = 255  # bytes of a file's name


def lock_file(path: str | os.PathLike) -> Path:
    """Where the lock file of `path` lies: beside the file itself, also if `path` is a symbolic link to it."""
    target = Path(os.path.realpath(path))
    name = f".{target.name}.lock"
    if len(os.fsencode(name)) > _LONGEST:
        name = f".{sha256([os.fsencode(target.name)])}.lock"
    return target.parent / name


class Lock:
    """The lock of the file `path`."""

    def __init__(self, path: str | os.PathLike):
        self._path, self._of = lock_file(path), path
        self._file: IO[bytes] | None = None

    def acquire(self) -> None:
        """Take the lock. Raises RuntimeError naming the process that holds it, if another run does."""
        try:
            while fcntl is not None and not self._acquired():
                pass  # its holder removed the file after we opened it and before we locked it
        except BaseException:
            self.release()
            raise

    def release(self) -> None:
        """End the lock, and remove the file if it is ours. May be called again."""
        if self._file is not None and not self._file.closed:
            with contextlib.suppress(OSError):
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # raises if another process holds it
                if _same(self._file, self._path):
                    os.unlink(self._path)
            self._file.close()

    def _acquired(self) -> bool:
        try:
            self._file = open(self._path, "r+b", buffering=0, opener=_create)
        except OSError:
            return True  # no file can be made here, so writing a checkpoint will fail, too, and say why
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RuntimeError(f"{self._of} is in use by another run ({self._holder()}): wait until it ends, or pass "
                               f"another file") from None
        except OSError:  # a file system without locks
            os.unlink(self._path)
            self._file.close()
            return True
        if not _same(self._file, self._path):
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
    """Whether an open file is still the file at `path`."""
    try:
        there, here = os.stat(path, follow_symlinks=False), os.fstat(file.fileno())
    except FileNotFoundError:
        return False
    return (there.st_ino, there.st_dev) == (here.st_ino, here.st_dev)
