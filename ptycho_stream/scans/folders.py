"""Where things lie under the data directory: the one owner of the store's paths.

Used by writer, reader and catalogue.  ``<root>/scans/<scan_id>/`` is a scan, ``<root>/spare/``
holds batch files to be used again.
"""

from __future__ import annotations

import os
import time
from pathlib import Path

from ptycho_stream.errors import ScanNotFound
from ptycho_stream.scans.disk import disk_errors
from ptycho_stream.scans.ulid import is_scan_id

MASK_NAME = "mask.npy"


def scans_directory(root: Path) -> Path:
    """The folder of all scans."""
    return root / "scans"


def scan_directory(root: Path, scan_id: str) -> Path:
    """The folder of a scan.

    Raises:
        ScanNotFound: ``scan_id``, which may come from outside, is not a scan's name.
    """
    if not is_scan_id(scan_id):
        raise ScanNotFound(
            f"{scan_id!r} is not a scan id (26 characters): `ptycho-stream ctl scans` lists them"
        )
    return scans_directory(root) / scan_id


def mask_path(directory: Path) -> Path:
    """The optional mask of a scan's bad pixels."""
    return directory / MASK_NAME


def announce_change(root: Path) -> None:
    """Make :meth:`Catalogue.changed` notice a change inside a scan's folder.

    The time is given, because the kernel's own has steps of milliseconds, in which a second change
    would go unseen.
    """
    directory, now = scans_directory(root), time.time_ns()
    with disk_errors(directory):
        os.utime(directory, ns=(now, now))
