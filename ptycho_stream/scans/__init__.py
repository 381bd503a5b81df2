"""The scan store: append-only, memory-mapped scans; one writer, many readers (docs/store.md).

Import from here: :class:`ScanWriter`, :class:`ScanReader` and :class:`Catalogue` are all that
stages need.
"""

from ptycho_stream.scans.catalogue import Catalogue, Recovered, RetentionReport
from ptycho_stream.scans.header import SEALED_STATES, ScanHeader, ScanState
from ptycho_stream.scans.leases import Lease
from ptycho_stream.scans.progress import Progress
from ptycho_stream.scans.reader import ScanReader
from ptycho_stream.scans.records import (
    FRAME_FLAG_DARK,
    FRAME_FLAG_SKIP,
    FRAME_RECORD,
    PAIR_FLAG_GATED,
    PAIR_FLAG_JUMP,
    PAIR_FLAG_OUT_OF_EXTENT,
    PAIR_RECORD,
    POSITION_RECORD,
)
from ptycho_stream.scans.recovery import RecoveryReport
from ptycho_stream.scans.ulid import is_scan_id, new_scan_id
from ptycho_stream.scans.writer import ScanWriter

__all__ = [
    "FRAME_FLAG_DARK",
    "FRAME_FLAG_SKIP",
    "FRAME_RECORD",
    "PAIR_FLAG_GATED",
    "PAIR_FLAG_JUMP",
    "PAIR_FLAG_OUT_OF_EXTENT",
    "PAIR_RECORD",
    "POSITION_RECORD",
    "SEALED_STATES",
    "Catalogue",
    "Lease",
    "Progress",
    "Recovered",
    "RecoveryReport",
    "RetentionReport",
    "ScanHeader",
    "ScanReader",
    "ScanState",
    "ScanWriter",
    "is_scan_id",
    "new_scan_id",
]
