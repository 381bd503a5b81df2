"""How a scan's image came about: a line for each look at how far it can be trusted.

Kept as ``history.jsonl`` in the scan's folder, only ever appended to; written by the reconstruct
stage, read by the report of a scan and by whoever shows a finished image again.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ptycho_stream.errors import StoreError

HISTORY_FILE = "history.jsonl"

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class HistoryEntry:
    """An image at one moment.

    Attributes:
        time_ns: UTC.
        generation: of the image.
        frames: in the image.
        layer: ``predicted`` or ``refined``.
        sweeps: of refinement, on average.
        model: that the patches were predicted with.
        figures: of trust, by name (docs/trust.md).
        verdict: in a word or two.
        reasons: of it, in words.
    """

    time_ns: int
    generation: int
    frames: int
    layer: str
    sweeps: float
    model: str
    figures: Mapping[str, float] = field(default_factory=dict[str, float])
    verdict: str = ""
    reasons: tuple[str, ...] = ()


def append_history(directory: Path, entry: HistoryEntry) -> None:
    """Add a line to the history of the scan in ``directory``.

    Raises:
        StoreError: the disk refused.
    """
    path = directory / HISTORY_FILE
    line = json.dumps(asdict(entry), allow_nan=False) + "\n"
    try:
        with path.open("ab+") as file:
            end = file.seek(0, os.SEEK_END)
            file.seek(max(end - 1, 0))
            torn = end > 0 and file.read() != b"\n"  # by a crash: it must not spoil this one too
            file.write((b"\n" if torn else b"") + line.encode())
    except OSError as error:
        raise StoreError(
            f"cannot write {path}: {error.strerror}; free space there. Frames and image are safe"
        ) from error


def read_history(directory: Path) -> list[HistoryEntry]:
    """The history of the scan in ``directory``, oldest first; empty where there is none.

    A line that was torn by a crash, or is none of ours, is left out and logged.

    Raises:
        StoreError: the file cannot be read.
    """
    path = directory / HISTORY_FILE
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except FileNotFoundError:
        return []
    except OSError as error:
        raise StoreError(f"cannot read {path}: {error.strerror}") from error
    entries: list[HistoryEntry] = []
    for number, line in enumerate(lines, 1):
        try:
            raw: dict[str, Any] = json.loads(line)
            raw["reasons"] = tuple(raw["reasons"])
            entries.append(HistoryEntry(**raw))
        except (ValueError, TypeError, KeyError) as error:
            _log.warning("%s, line %d is left out: %s", path, number, error)
    return entries


def losses_of(directory: Path, generation: int) -> list[tuple[int, float]]:
    """How the misfit R of a generation's image fell: (sweeps, R), one for each whole sweep.

    Raises:
        StoreError: the history cannot be read.
    """
    found = {
        int(entry.sweeps): entry.figures["r_factor"]
        for entry in read_history(directory)
        if entry.generation == generation and "r_factor" in entry.figures
    }
    return sorted(found.items())
