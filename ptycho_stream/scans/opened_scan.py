"""What the scan state machine knows of a scan that is not sealed yet.

Changed by the machine only; ingest reads it for its status.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from ptycho_stream.messages import ScanStart
from ptycho_stream.scans.frame_ledger import FrameLedger
from ptycho_stream.scans.header import ScanState
from ptycho_stream.scans.scan_events import StoreFrame


@dataclass(slots=True)
class OpenedScan:
    """An open scan.

    Attributes:
        armed_ns: monotonic time of its start.
        opened: it is in the store.
        recovered: found open after a crash, and not gone on yet.
        end_state: what it will be sealed as, and why, unless positions fail to come.
        stopped: a person ended it; frames that still come are not its own.
        spared: frames without a position that need none.
        silent: it was ended because no more frames came.
        announced: shape and dtype that its header told.
        layouts: how often it was laid out in the store.
        counts: frames and messages lost, by reason.
        accepted: shape and dtype of its frames as last seen, compared for each.
        store: the instruction for a frame in order, and for one out of order.
    """

    scan_id: str
    series: str
    start: ScanStart
    armed_ns: int
    state: ScanState = "armed"
    opened: bool = False
    joined_late: bool = False
    recovered: bool = False
    epoch: str | None = None
    positioned: int = 0
    spared: int = 0
    first_frame_ns: int = 0
    last_frame_ns: int = 0
    ended_ns: int = 0
    end_state: ScanState = "complete"
    end_reason: str = ""
    stopped: bool = False
    silent: bool = False
    announced: tuple[tuple[int, int] | None, str | None] = (None, None)
    layouts: int = 0
    ledger: FrameLedger = field(default_factory=FrameLedger)
    counts: dict[str, int] = field(default_factory=dict[str, int])
    accepted: tuple[tuple[int, int], str] | None = None
    store: tuple[StoreFrame, ...] = ()

    def count(self, name: str, more: int = 1) -> None:
        """Count so many more of ``name`` in the scan's final accounting."""
        self.counts[name] = self.counts.get(name, 0) + more

    def accept(self) -> None:
        """Prepare for frames as ``start`` describes them."""
        assert self.start.frame_shape_yx is not None and self.start.dtype is not None
        self.accepted = (self.start.frame_shape_yx, self.start.dtype)
        self.store = (StoreFrame(self.scan_id), StoreFrame(self.scan_id, out_of_order=True))

    def looks_like(self, shape_yx: tuple[int, int], dtype: str) -> bool:
        """Whether frames are of this shape and dtype, which may be spelt in two ways."""
        expected = self.start.frame_shape_yx, _dtype(self.start.dtype)
        return (shape_yx, _dtype(dtype)) == expected

    def accounting(self) -> dict[str, int]:
        """What came of the scan's frames, so far or finally.

        Frames that were announced count as missing only if the detector itself ended the series.
        """
        ledger = self.ledger
        ended = self.state == "draining" and self.end_state == "complete" and not self.stopped
        return self.counts | {
            "frames": ledger.count,
            "duplicate": ledger.duplicate,
            "out_of_order": ledger.out_of_order,
            "missing": ledger.missing(self.start.expected_frames if ended else None),
            "positioned": self.positioned,
            "unpositioned": ledger.count - self.positioned - self.spared,
        }


def _dtype(name: str | None) -> str | None:
    return None if name is None else np.dtype(name).str
