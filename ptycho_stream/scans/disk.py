"""Writing to a disk so that it either happened or is said not to have: used by the whole store.

Whole writes at an offset, files replaced in one step, space allocated before it is needed, and the
operating system's three ways of saying "full" turned into :class:`DiskFull`.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path

from ptycho_stream.atomic_file import sync_path
from ptycho_stream.errors import DiskFull, StoreError

# EFBIG: a file-size limit (ulimit -f) looks like a full disk to whoever meets it.
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextmanager
def disk_errors(path: Path, needed_bytes: int = 0) -> Generator[None]:
    """Turn an :class:`OSError` met while writing ``path`` into an error of the store.

    Raises:
        DiskFull: the disk, the quota or the limit on a file's size is exhausted.
        StoreError: anything else that the operating system refused.
    """
    try:
        yield
    except OSError as error:
        if error.errno in _FULL:
            raise DiskFull(
                f"no room for {needed_bytes} more bytes of {path} ({error.strerror}; "
                f"{_free_bytes(path)} bytes are free): make room, or lower data.retention_bytes"
            ) from error
        raise StoreError(f"cannot write {path}: {error.strerror}") from error


def _free_bytes(path: Path) -> int:
    for folder in path.parents:
        if folder.exists():
            disk = os.statvfs(folder)
            return disk.f_bavail * disk.f_frsize
    return 0


def write_all(fd: int, data: memoryview, offset: int) -> None:
    """Write all of ``data`` (bytes) at ``offset``; a short write is continued."""
    written = os.pwrite(fd, data, offset)
    while written < len(data):
        written += os.pwrite(fd, data[written:], offset + written)


def read_up_to(fd: int, target: memoryview, offset: int) -> int:
    """Fill ``target`` (bytes) from ``offset``; returns how many bytes the file had."""
    done = 0
    while done < len(target):
        count = os.preadv(fd, [target[done:]], offset + done)
        if count == 0:
            break
        done += count
    return done


def replace_file(path: Path, data: bytes) -> None:
    """Write ``path`` so that a reader, or a crash, meets the old content or the new, never a part.

    Raises:
        DiskFull: there is no room; the old file is as it was.
        StoreError: the operating system refused otherwise.
    """
    _put(path, data, os.fsync)
    with disk_errors(path):
        sync_path(path.parent)


def copy_file(path: Path, data: bytes) -> None:
    """Like :func:`replace_file` but for a loss of power, after which it may be old, empty or gone.

    For what can be had elsewhere: nothing waits for the disk.

    Raises:
        DiskFull: there is no room; the old file is as it was.
        StoreError: the operating system refused otherwise.
    """
    _put(path, data, lambda _fd: None)


def being_written(path: Path) -> bool:
    """Whether the process that began the temporary file ``path`` still lives on this machine.

    Its name is ``<name>.<process id>.tmp``, as :func:`replace_file` makes it.
    """
    process_id = path.name.removesuffix(".tmp").rpartition(".")[2]
    return process_id.isdigit() and Path(f"/proc/{process_id}").exists()


def _put(path: Path, data: bytes, sync: Callable[[int], None]) -> None:
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    with disk_errors(path, len(data)):
        try:
            with temporary.open("wb") as file:
                file.write(data)
                file.flush()
                sync(file.fileno())
            temporary.replace(path)
        except OSError:
            temporary.unlink(missing_ok=True)
            raise


def allocate(fd: int, size_bytes: int, path: Path) -> None:
    """Give the file at least ``size_bytes`` of real disk space, so that no map of it can fault.

    Raises:
        DiskFull: there is no room.
    """
    with disk_errors(path, size_bytes):
        os.posix_fallocate(fd, 0, size_bytes)
