"""Files are replaced as a whole: after a crash at any moment there is the old file or the new one.

    1  create     .minipeft-CRC-PID-RANDOM.tmp beside the target, and lock it (CRC: of the target's name)
    2  write      the bytes, flushed to the disk, with the permissions of the file that is replaced
    3  rename     over the target; then the folder is flushed to the disk

The writer holds an exclusive lock (flock) on its temporary file, and the system releases it when the process ends, even
by SIGKILL. So a temporary file that can be locked has no writer any more, and the next write to the same target removes
it. Without such locks (other systems, some network file systems) the files of killed writers stay.
"""
from __future__ import annotations

import binascii
import contextlib
import os
import re
import stat
from typing import Any

try:
    import fcntl
except ImportError:  # not a POSIX system: no locks, here and in `train.lock`
    fcntl = None  # type: ignore[assignment]

_KINDS = {stat.S_IFDIR: "a folder", stat.S_IFIFO: "a FIFO", stat.S_IFSOCK: "a socket", stat.S_IFCHR: "a device",
          stat.S_IFBLK: "a device"}


def check_regular(path: Any, mode: int) -> None:
    """Raises ValueError, naming `path` and its kind, unless `mode` (its st_mode) is that of a regular file."""
    if not stat.S_ISREG(mode):
        raise ValueError(f"{path} is {_KINDS.get(stat.S_IFMT(mode), 'no file')}; expected a regular file")


def write_atomic(path: str | os.PathLike, *parts: bytes | memoryview) -> None:
    """Write `parts`, one after the other, as the file `path`. A symbolic link is followed.

    A file that is replaced keeps its permissions; a new one gets those of any new file. Any exception, also Ctrl-C,
    leaves the old file or the new one, and no temporary file. Raises FileNotFoundError naming the folder if that does
    not exist, ValueError if `path` is a folder, a FIFO, a socket or a device, and OSError if writing fails."""
    target = os.path.realpath(os.fsdecode(path))
    old = _replaced(path, target)
    _sweep(target)
    while not _written(target, parts, old):
        pass  # before it was locked, another process removed the temporary file as a dead writer's
    _flush(os.path.dirname(target))


def _replaced(path: Any, target: str) -> os.stat_result | None:
    """The status of the file that is replaced, or None if there is none."""
    try:
        old = os.stat(target)
    except FileNotFoundError:
        folder = os.path.dirname(target)
        if not os.path.isdir(folder):
            raise missing_folder(path, folder) from None
        return None
    check_regular(path, old.st_mode)
    return old


def missing_folder(path: Any, folder: Any) -> FileNotFoundError:
    """The error for a `path` whose `folder` does not exist. For a path below '~' it says how to expand it."""
    hint = " ('~' is not expanded: pass Path(...).expanduser())" if os.fspath(path)[:1] in ("~", b"~") else ""
    return FileNotFoundError(f"{path}: the folder {folder} does not exist; create it first{hint}")


def _written(target: str, parts: tuple, old: os.stat_result | None) -> bool:
    """Steps 1 to 3. False if the temporary file was removed by another process before it was locked."""
    name = f"{_prefix(target)}{os.getpid()}-{os.urandom(8).hex()}.tmp"
    temporary = os.path.join(os.path.dirname(target), name)
    try:
        try:
            return _renamed(temporary, target, parts, old)
        finally:
            _unlink(temporary)  # after a rename it is gone
    finally:
        _unlink(temporary)  # again: an interrupt may have come just before


def _renamed(temporary: str, target: str, parts: tuple, old: os.stat_result | None) -> bool:
    handle = -1
    try:
        # Until the file is complete, only its owner may read it: the file that it replaces may be private.
        handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_CLOEXEC", 0),
                         0o666 if old is None else old.st_mode & 0o600)
        if not _locked(handle):
            return False
        for part in parts:
            view = memoryview(part)
            while len(view):
                view = view[os.write(handle, view):]
        if old is not None:
            _take_over(handle, old)
        os.fsync(handle)
        os.replace(temporary, target)
        return True
    finally:
        if handle >= 0:
            os.close(handle)


def _locked(handle: int) -> bool:
    """Lock a temporary file that was just created. False if another process is about to remove it, or has removed
    it."""
    if fcntl is None:
        return True
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks
        pass
    return os.fstat(handle).st_nlink > 0


def _take_over(handle: int, old: os.stat_result) -> None:
    """Take over owner, group and permissions of the file that is replaced, as far as the system allows."""
    for user, group in ((old.st_uid, -1), (-1, old.st_gid)):
        with contextlib.suppress(OSError):
            os.fchown(handle, user, group)
    new, mode = os.fstat(handle), stat.S_IMODE(old.st_mode)
    if (new.st_uid, new.st_gid) != (old.st_uid, old.st_gid):
        mode &= 0o707  # the old group's permissions are not for another group
    if stat.S_IMODE(new.st_mode) != mode:
        os.fchmod(handle, mode)


def _sweep(target: str) -> None:
    """Remove the temporary files that killed writers of this target left. Files that cannot be removed stay."""
    if fcntl is None:
        return
    with contextlib.suppress(OSError):
        for name in os.listdir(os.path.dirname(target)):
            if re.fullmatch(re.escape(_prefix(target)) + r"\d+-[0-9a-f]{16}\.tmp", name):
                with contextlib.suppress(OSError):
                    _remove_if_left(os.path.join(os.path.dirname(target), name))


def _remove_if_left(temporary: str) -> None:
    """Remove a temporary file without a writer. Raises OSError if a process is still writing it."""
    handle = os.open(temporary, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if stat.S_ISREG(os.fstat(handle).st_mode):
            os.unlink(temporary)
    finally:
        os.close(handle)


def _prefix(target: str) -> str:
    return f".minipeft-{binascii.crc32(os.fsencode(os.path.basename(target))):08x}-"


def _unlink(path: str) -> None:
    with contextlib.suppress(OSError):
        os.unlink(path)


def _flush(folder: str) -> None:
    """Flush a folder, and with it the rename, to the disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
