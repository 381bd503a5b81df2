"""Deleting scans that were taken out of the catalogue, keeping their batch files as spares.

Used by :meth:`Catalogue.retain`.  A scan is first renamed (``.old-<id>``), so that nobody can open
it any more, and then taken apart; what a crash leaves half done is swept up the next time.
"""

from __future__ import annotations

import logging
import shutil
import time
from pathlib import Path
from typing import Final

from ptycho_stream.errors import ScanLocked, ScanNotFound
from ptycho_stream.scans.folders import scans_directory
from ptycho_stream.scans.scan_lock import ScanLock
from ptycho_stream.scans.spare import SpareFiles

_log = logging.getLogger(__name__)

# Between making its folder and locking it, a new scan looks like one left behind.
_BUILDING_S: Final = 60.0


def directory_bytes(directory: Path) -> int:
    """Disk space that the files of a folder take, and those of the folders in it."""
    total = 0
    for path in directory.rglob("*"):
        try:
            total += path.stat().st_blocks * 512
        except FileNotFoundError:  # temporary files come and go
            continue
    return total


def retire(root: Path, scan_id: str, spare: SpareFiles) -> int:
    """Take a scan that was set aside apart; returns the bytes that became free.

    Raises:
        OSError: a file cannot be deleted; :meth:`Catalogue.retain` says which.
    """
    directory = scans_directory(root) / f".old-{scan_id}"
    freed = sum(spare.put(path) for path in directory.glob("frames-*.bin"))
    freed += directory_bytes(directory)
    shutil.rmtree(directory)
    return freed


def sweep(root: Path) -> int:
    """Delete what crashes left of scans half made or half deleted; returns the bytes freed.

    A folder that cannot be deleted is named in the log, and keeps no other.
    """
    freed = 0
    for pattern, min_age_s in ((".new-*", _BUILDING_S), (".old-*", 0.0)):
        for directory in scans_directory(root).glob(pattern):
            try:
                if time.time() - directory.stat().st_mtime < min_age_s:
                    continue
                lock = ScanLock(directory)
            except (ScanLocked, ScanNotFound, FileNotFoundError):  # somebody is at it
                continue
            try:
                held = directory_bytes(directory)
                shutil.rmtree(directory)
                freed += held
            except OSError as error:
                _log.error("%s cannot be deleted, which is tried again: %s", directory, error)
            finally:
                lock.release()
    return freed
