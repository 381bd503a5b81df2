"""What ingest says of itself in its heartbeats: for ``ctl status``, ``watch`` and systemd."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from typing import Any

from ptycho_stream.scans.opened_scan import OpenedScan
from ptycho_stream.scans.state_machine import ScanStateMachine
from ptycho_streamd.recorder import Recorder
from ptycho_streamd.sources import Stream

MEASURE_NS = 1_000_000_000


class RateMeter:
    """Frames a second, over the last whole second or so.

    Attributes:
        frames: the total at the last :meth:`update`.
        frames_per_s: the rate.
    """

    def __init__(self) -> None:
        self.frames = 0
        self.frames_per_s = 0.0
        self._since_ns = time.monotonic_ns()
        self._since_frames = 0

    def update(self, frames: int, now_ns: int) -> None:
        """Take the total of frames at ``now_ns``."""
        self.frames = frames
        elapsed_ns = now_ns - self._since_ns
        if elapsed_ns >= MEASURE_NS:
            self.frames_per_s = (frames - self._since_frames) * 1e9 / elapsed_ns
            self._since_ns, self._since_frames = now_ns, frames


def describe(
    machine: ScanStateMachine,
    recorders: Mapping[str, Recorder],
    sources: Iterable[Stream],
    rate: RateMeter,
) -> dict[str, Any]:
    """The status of ingest, as plain values."""
    scans = [
        _scan(scan, recorders[scan.scan_id])
        for scan in machine.open_scans.values()
        if scan.scan_id in recorders
    ]
    newest = scans[-1] if scans else None
    return {
        "scan_id": newest["scan_id"] if newest else None,
        "state": newest["state"] if newest else "idle",
        "scans": scans,
        "frames_received": rate.frames,
        "frames_per_s": rate.frames_per_s,
        "refusing": "no room on the disk (data.min_free_bytes)" if machine.refusing else "",
        "endpoints": [source.describe() for source in sources],
        "summary": _summary(machine, newest, rate),
    }


def _scan(scan: OpenedScan, recorder: Recorder) -> dict[str, Any]:
    return {
        "scan_id": scan.scan_id,
        "series": scan.series,
        "state": scan.state,
        "expected": scan.start.expected_frames,
        "committed": recorder.writer.committed,
        "positions": recorder.position_count,
        **scan.accounting(),
    }


def _summary(machine: ScanStateMachine, newest: dict[str, Any] | None, rate: RateMeter) -> str:
    if machine.refusing:
        return "refusing new scans: no room on the disk"
    if newest is None:
        return "waiting for a scan"
    expected = f" of {newest['expected']}" if newest["expected"] else ""
    return (
        f"series {newest['series']} {newest['state']}: {newest['frames']}{expected} frames, "
        f"{rate.frames_per_s:.0f}/s"
    )
