"""Scans whose sealing failed: taken over anew and sealed as soon as the disk allows it.

A failed sync leaves a writer that may promise nothing any more.  Ingest hands such scans over to
:class:`Unsealed`, which recovers them (what is whole is known then) and tries until it succeeds.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

from ptycho_stream.errors import ScanNotFound, ScanSealed, StoreError
from ptycho_stream.scans.folders import scan_directory
from ptycho_stream.scans.header import ScanHeader, read_header
from ptycho_stream.scans.join_logs import count_positioned
from ptycho_stream.scans.scan_events import SealScan
from ptycho_stream.scans.writer import ScanWriter

RETRY_NS = 1_000_000_000
MAX_RETRY_NS = 60_000_000_000

log = logging.getLogger(__name__)


@dataclass(slots=True)
class _Waiting:
    sealing: SealScan
    next_ns: int
    pause_ns: int = RETRY_NS


class Unsealed:
    """The scans under ``root`` that wait for their seal; their writers are closed."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._waiting: dict[str, _Waiting] = {}

    def add(self, sealing: SealScan, now_ns: int) -> None:
        """Seal this scan at the next :meth:`retry`."""
        self._waiting[sealing.scan_id] = _Waiting(sealing, now_ns)

    def retry(self, now_ns: int) -> list[ScanHeader]:
        """Try those that are due; the final headers of those that are sealed now."""
        sealed: list[ScanHeader] = []
        for scan_id, waiting in list(self._waiting.items()):
            if now_ns < waiting.next_ns:
                continue
            try:
                sealed.append(self._seal(waiting.sealing))
            except ScanNotFound as error:
                log.error("scan %s is gone and is not sealed: %s", scan_id, error)
                del self._waiting[scan_id]
            except StoreError as error:
                log.error("scan %s still cannot be sealed: %s", scan_id, error)
                waiting.next_ns = now_ns + waiting.pause_ns
                waiting.pause_ns = min(2 * waiting.pause_ns, MAX_RETRY_NS)
            else:
                del self._waiting[scan_id]
        return sealed

    def _seal(self, sealing: SealScan) -> ScanHeader:
        try:
            writer, report = ScanWriter.recover(self._root, sealing.scan_id)
        except ScanSealed:  # what failed came after its header was written
            return read_header(scan_directory(self._root, sealing.scan_id))
        with writer:
            records = writer.records()
            lost = max(sealing.counts.get("frames", 0) - len(records), 0)
            counts = {
                **sealing.counts,
                "missing": sealing.counts.get("missing", 0) + lost,
                "torn": report.dropped_records,
                **count_positioned(writer.header, records, writer.pairs()),
            }
            return writer.seal(sealing.state, counts, sealing.reason)
