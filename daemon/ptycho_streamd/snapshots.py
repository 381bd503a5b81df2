"""Named snapshots: a scan's image as it was at one moment, kept as NPZ in the scan's folder.

The reconstruct stage takes them, the supervisor lists them.  ``ptycho-stream export --image`` and
``np.load`` read them; they are deleted with their scan.
"""

from __future__ import annotations

import json
import re
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from ptycho_stream.errors import ControlError, FileFormatError, ScanNotFound
from ptycho_stream.results import Image, ImageState
from ptycho_stream.scans.folders import scan_directory
from ptycho_stream.wire.control import SNAPSHOT_NAME

FOLDER = "snapshots"
MAX_SNAPSHOTS = 1000
"""Of a scan: each is as large as its image."""


def snapshot(
    arguments: dict[str, Any], state_of: Callable[[str | None], ImageState], root: Path
) -> dict[str, Any]:
    """Answer the request of that name.

    Args:
        arguments: ``scan_id`` (None: the newest), ``name``, ``force``.
        state_of: the image of a scan as it is now.
        root: the data directory.

    Raises:
        ScanNotFound: there is no such scan, or it has no image.
        ControlError: ``exists``, ``bad_arguments`` or ``failed``.
        FileFormatError: the disk refused.
    """
    state = state_of(arguments.get("scan_id"))
    directory = scan_directory(root, state.scan_id)
    path = take_snapshot(state, directory, arguments["name"], force=arguments.get("force", False))
    return {"scan_id": state.scan_id, **_described(path)}


def take_snapshot(state: ImageState, directory: Path, name: str, *, force: bool = False) -> Path:
    """Write an image into the scan's folder ``directory``; the path of the file.

    It is there whole or not at all; its keys are those of ``Image.save``.

    Raises:
        ScanNotFound: the image holds nothing yet.
        ControlError: ``exists`` without ``force``, ``bad_arguments`` where the name is none,
            ``failed`` where the scan has too many.
        FileFormatError: the disk refused.
    """
    if not re.match(SNAPSHOT_NAME, name):
        raise ControlError(
            "bad_arguments",
            f"{name!r} is no name for a snapshot: use up to 64 letters, digits, '.', '_' and '-', "
            "a letter or digit first",
        )
    if not state.tiles:
        raise ScanNotFound(
            f"scan {state.scan_id} has no image: none of its frames has a position yet"
        )
    folder = directory / FOLDER
    path = folder / f"{name}.npz"
    if path.exists():
        if not force:
            raise ControlError(
                "exists",
                f"scan {state.scan_id} has a snapshot {name!r} already: take another name, or "
                "replace it with --force",
            )
    elif len(_files(folder)) >= MAX_SNAPSHOTS:
        raise ControlError(
            "failed",
            f"scan {state.scan_id} has {MAX_SNAPSHOTS} snapshots: delete some in {folder}",
        )
    try:
        folder.mkdir(exist_ok=True)
    except OSError as error:
        raise FileFormatError(f"cannot make {folder}: {error.strerror}") from error
    Image(state).save(path)
    return path


def list_snapshots(directory: Path) -> list[dict[str, Any]]:
    """The snapshots in a scan's folder, oldest first: what each is of, and where."""
    return [_described(path) for path in _files(directory / FOLDER)]


def _files(folder: Path) -> list[Path]:
    timed: list[tuple[int, Path]] = []
    for path in folder.glob("*.npz"):
        try:
            timed.append((path.stat().st_mtime_ns, path))
        except FileNotFoundError:  # deleted meanwhile
            continue
    return [path for _, path in sorted(timed)]


def _described(path: Path) -> dict[str, Any]:
    known: dict[str, Any] = {"name": path.stem, "path": str(path), "problem": ""}
    try:
        status = path.stat()
        known |= {"taken_ns": status.st_mtime_ns, "bytes": status.st_size}
        with path.open("rb") as file, np.load(file, allow_pickle=False) as held:
            said = json.loads(str(held["metadata"]))["ptycho_stream"]
            known["frames"] = int(held["frame_numbers"].size)
        words = ("state", "generation", "layer", "sweeps", "model", "trust", "verdict", "reasons")
        known |= {word: said[word] for word in words}
    except (OSError, ValueError, TypeError, KeyError, EOFError, zipfile.BadZipFile) as error:
        known["problem"] = f"not readable as a snapshot: {error}"
    return known
