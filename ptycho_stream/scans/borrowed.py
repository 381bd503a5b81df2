"""A recorded scan under another data directory, to be worked on without touching the original.

Its frames are linked, not copied; what has been made of them (image, history, probe, snapshots)
stays behind. Used where a scan of a store is reconstructed beside the daemon.
"""

from __future__ import annotations

import re
import shutil
from pathlib import Path

from ptycho_stream.errors import StoreError
from ptycho_stream.scans.disk import disk_errors
from ptycho_stream.scans.folders import scan_directory
from ptycho_stream.scans.header import read_header

_FRAMES = re.compile(r"frames-\d+\.bin")
_LEFT_BEHIND = re.compile(
    r"reconstruct\..*|history\.jsonl|probe\.npz|reprocess\.json|export\.pending|lock|reserve|"
    r"(lease|progress)-.*|.*\.(partial|tmp|damaged)"
)


def borrow_scan(directory: Path, root: Path) -> str:
    """Lay out the scan in ``directory`` under the data directory ``root``; its id.

    It can be read as long as the original is there: hold a lease on that.

    Raises:
        ScanNotFound: there is no scan.
        StoreError: it is still being recorded, or a file cannot be copied.
    """
    header = read_header(directory)
    if not header.sealed:
        raise StoreError(
            f"scan {header.scan_id} is still {header.state}: wait for its end; after a crash the "
            "daemon seals it when it is started"
        )
    target = scan_directory(root, header.scan_id)
    with disk_errors(target):
        target.mkdir(parents=True)
        for path in directory.iterdir():
            if _FRAMES.fullmatch(path.name):
                (target / path.name).symlink_to(path.resolve())
            elif path.is_file() and not _LEFT_BEHIND.fullmatch(path.name):
                shutil.copyfile(path, target / path.name)
    return header.scan_id
