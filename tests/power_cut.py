"""A disk on which only what was synced survives: what a power cut leaves of a folder.

While it is installed every ``fsync`` and ``fdatasync`` of this process is noted together with what
it makes durable: of a file its content, of a folder its names.  :meth:`PowerCut.remains` lays out
what a cut at this moment leaves.  That is the least that POSIX promises; with ``chance`` each page
and each name that was not synced may be there all the same, as on a real disk.
"""

from __future__ import annotations

import os
import random
import shutil
import stat
import threading
from pathlib import Path

import pytest

PAGE = 4096


class PowerCut:
    """The disk below ``root``."""

    def __init__(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self._root = root
        self._contents: dict[int, bytes] = {}
        self._names: dict[int, dict[str, int]] = {}
        self._held: dict[int, int] = {}
        self._lock = threading.Lock()
        self.syncs = 0
        for name in ("fsync", "fdatasync"):
            monkeypatch.setattr(os, name, self._noting(getattr(os, name)))

    def _noting(self, real):
        def sync(fd: int) -> None:
            real(fd)
            with self._lock:
                self._note(fd)

        return sync

    def _note(self, fd: int) -> None:
        self.syncs += 1
        status = os.fstat(fd)
        path = Path(f"/proc/self/fd/{fd}").readlink()
        if stat.S_ISDIR(status.st_mode):
            # By inode: a folder that is renamed keeps its names.
            self._names[status.st_ino] = self._names_in(path)
        else:
            inode = self._inode(path)
            self._contents[inode] = os.pread(self._held[inode], status.st_size, 0)

    def _names_in(self, folder: Path) -> dict[str, int]:
        """The names of a folder at one moment: other threads make and rename files meanwhile."""
        for _ in range(1000):
            before = sorted(folder.iterdir())
            try:
                names = {p.name: self._inode(p) for p in before if p.is_file()}
            except FileNotFoundError:
                continue
            names |= {p.name: -1 for p in before if p.is_dir()}
            if sorted(folder.iterdir()) == before:
                return names
        raise AssertionError(f"{folder} does not stand still")

    def _inode(self, path: Path) -> int:
        """The inode of a file, which is held so that no other file gets its number."""
        inode = path.stat().st_ino
        if inode not in self._held:
            self._held[inode] = os.open(path, os.O_RDONLY)
        return inode

    def remains(self, to: Path, chance: random.Random | None = None) -> Path:
        """Lay out under ``to`` what is there when the power comes back."""
        shutil.rmtree(to, ignore_errors=True)
        to.mkdir()
        with self._lock:
            self._lay_out(self._root, to, chance)
        return to

    def _lay_out(self, folder: Path, to: Path, chance: random.Random | None) -> None:
        names = dict(self._names.get(folder.stat().st_ino, {}))
        if folder == self._root:  # it was there before the program
            names |= {path.name: -1 for path in folder.iterdir() if path.is_dir()}
        for path in folder.iterdir():
            if path.is_file() and chance is not None and chance.random() < 0.5:
                names[path.name] = self._inode(path)
        for name, inode in names.items():
            if inode == -1:
                if (folder / name).is_dir():
                    (to / name).mkdir()
                    self._lay_out(folder / name, to / name, chance)
                continue
            (to / name).write_bytes(self._after(inode, chance))

    def _after(self, inode: int, chance: random.Random | None) -> bytes:
        fd = self._held[inode]
        size = os.fstat(fd).st_size
        synced = self._contents.get(inode, b"")
        if chance is None:
            return synced
        now = os.pread(fd, size, 0)
        kept = bytearray(synced.ljust(size, b"\0"))
        for at in range(0, size, PAGE):
            if chance.random() < 0.5:
                kept[at : at + PAGE] = now[at : at + PAGE]
        return bytes(kept)

    def close(self) -> None:
        """Let go of all files."""
        for fd in self._held.values():
            os.close(fd)
        self._held.clear()
