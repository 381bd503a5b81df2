"""Batch files of deleted scans, kept to be written again: ``<data.directory>/spare``.

Pages that were never touched are what a first write costs most on a virtual machine, and allocating
takes its time everywhere.  The catalogue puts files here, the writer takes them.
"""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import stat
from pathlib import Path

from ptycho_stream.scans.ulid import new_scan_id


class SpareFiles:
    """The folder of spare batch files; each is named by its size in bytes."""

    def __init__(self, root: Path) -> None:
        self._directory = root / "spare"

    def make_directory(self) -> None:
        """Make the folder; while there is room, so that :meth:`put` works on a full disk."""
        self._directory.mkdir(parents=True, exist_ok=True)

    def take(self, size_bytes: int, target: Path) -> bool:
        """Move a spare file of exactly ``size_bytes`` to ``target``; False if there is none."""
        for path in self._files():
            if path.name.startswith(f"{size_bytes}-"):
                try:
                    path.rename(target)
                except FileNotFoundError:  # another writer was faster
                    continue
                return True
        return False

    def put(self, path: Path) -> int:
        """Keep the file at ``path``, or delete it where somebody still has it open or mapped, or
        has kept it elsewhere by a link.

        To write into it again would change data under a reader's map, or behind the other name.

        Returns:
            The bytes that became free: 0 where the file was kept.
        """
        known = path.lstat()
        only_here = stat.S_ISREG(known.st_mode) and known.st_nlink == 1
        kept = self._directory / f"{known.st_size}-{new_scan_id()}.bin"
        path.rename(kept)
        if only_here and known.st_size and _unused_by_others(kept):
            return 0
        kept.unlink()
        return known.st_size if only_here else 0

    def trim(self, max_bytes: int) -> int:
        """Delete spare files until at most ``max_bytes`` are left; returns the bytes freed."""
        freed = 0
        total = self.total_bytes()
        for path in self._files():
            if total - freed <= max_bytes:
                break
            try:
                size = path.stat().st_size
                path.unlink()
            except FileNotFoundError:  # a writer took it
                continue
            freed += size
        return freed

    def total_bytes(self) -> int:
        """Bytes held in spare files."""
        return sum(int(path.name.partition("-")[0]) for path in self._files())

    def _files(self) -> list[Path]:
        try:
            found = self._directory.glob("*-*.bin")
            return sorted(path for path in found if path.name.partition("-")[0].isdecimal())
        except FileNotFoundError:
            return []


def _unused_by_others(path: Path) -> bool:
    """Whether no other open file description, and so no map, of the file exists.

    The kernel grants a write lease only then (fcntl(2), F_SETLEASE).  A file system that has no
    leases counts as in use.
    """
    fd = os.open(path, os.O_RDWR)
    try:
        # Whoever opens the file while we hold the lease makes the kernel signal us: with SIGURG,
        # which is ignored by default, and not with SIGIO, which ends the process.
        fcntl.fcntl(fd, fcntl.F_SETSIG, signal.SIGURG)
        fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_WRLCK)
        fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_UNLCK)
    except OSError as error:
        if error.errno in (errno.EAGAIN, errno.EINVAL, errno.EACCES, errno.EOPNOTSUPP):
            return False
        raise
    finally:
        os.close(fd)
    return True
