"""How far a consumer has come with a scan, kept with the scan: a small named JSON file.

Used by whoever has to go on after a restart where it stopped (exports, for instance).  Reconstruct
keeps its progress in the file of the image that it made, so that the two cannot disagree.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from ptycho_stream.errors import StoreError
from ptycho_stream.scans.disk import replace_file
from ptycho_stream.scans.folders import scan_directory

_NAME = re.compile(r"[a-z0-9_-]{1,64}")


class Progress:
    """One consumer's progress through one scan."""

    def __init__(self, root: Path, scan_id: str, name: str) -> None:
        """The progress of consumer ``name`` (letters a-z, digits, ``-`` and ``_``).

        Raises:
            StoreError: the name cannot be part of a file's name.
            ScanNotFound: ``scan_id`` is not a scan id.
        """
        if not _NAME.fullmatch(name):
            raise StoreError(f"progress name {name!r}: use a-z, 0-9, - and _ only")
        self._path = scan_directory(root, scan_id) / f"progress-{name}.json"

    def load(self) -> dict[str, Any] | None:
        """What was last saved; None if nothing was.

        Raises:
            StoreError: the file cannot be read.
        """
        try:
            return cast("dict[str, Any]", json.loads(self._path.read_bytes()))
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            raise StoreError(f"cannot read {self._path}: {error}; delete it to begin") from error

    def save(self, progress: Mapping[str, Any]) -> None:
        """Replace what was saved, in one step.

        Raises:
            DiskFull: there is no room; the former progress is kept.
        """
        replace_file(self._path, json.dumps(dict(progress)).encode())
