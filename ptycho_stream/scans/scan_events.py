"""What happens to scans and what is to be done about it: the words of the scan state machine.

Events go into :class:`ptycho_stream.scans.state_machine.ScanStateMachine`, instructions come out
and are carried out by ingest, in order.  Times ``at_ns`` are of the monotonic clock.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from ptycho_stream.messages import Positions, PositionsStart, ScanStart, Undecodable
from ptycho_stream.scans.header import ScanState

# ---- events ------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class SeriesStarted:
    """A detector's header has come."""

    at_ns: int
    start: ScanStart


@dataclass(slots=True)
class FrameArrived:
    """A frame has come, not decoded yet.  Not frozen: that would cost 0.5 µs a frame."""

    at_ns: int
    series: str
    number: int
    shape_yx: tuple[int, int]
    dtype: str


@dataclass(frozen=True, slots=True)
class FrameLost:
    """A frame that was to be stored could not be decoded: it becomes a hole."""

    at_ns: int
    scan_id: str
    number: int
    reason: str


@dataclass(frozen=True, slots=True)
class MessageUndecodable:
    """Something came that no codec understands."""

    at_ns: int
    what: Undecodable


@dataclass(frozen=True, slots=True)
class SeriesEnded:
    """A detector's end message has come."""

    at_ns: int
    series: str


@dataclass(frozen=True, slots=True)
class EpochStarted:
    """A positioner begins an epoch, or says more of it (see ``PositionsStart``)."""

    at_ns: int
    start: PositionsStart


@dataclass(frozen=True, slots=True)
class PositionsArrived:
    """A batch of positions has come."""

    at_ns: int
    positions: Positions


@dataclass(frozen=True, slots=True)
class EpochEnded:
    """A positioner has sent all of an epoch."""

    at_ns: int
    epoch: str


@dataclass(frozen=True, slots=True)
class FramesPositioned:
    """So many frames of a scan now have a position (a total, not a difference).

    ``spared``: so many others need none, because they are dark or gated.
    """

    at_ns: int
    scan_id: str
    frames: int
    spared: int = 0


@dataclass(frozen=True, slots=True)
class ScanFailed:
    """A scan cannot be written on: the disk is full or broken."""

    at_ns: int
    scan_id: str
    reason: str


@dataclass(frozen=True, slots=True)
class RoomChanged:
    """The disk has room for new scans, or has not."""

    at_ns: int
    has_room: bool


@dataclass(frozen=True, slots=True)
class StartRequested:
    """Somebody arms a scan by hand, for the next series (of this name, if given)."""

    at_ns: int
    series: str | None = None
    expected_frames: int | None = None
    metadata: Mapping[str, Any] = field(default_factory=dict[str, Any])


@dataclass(frozen=True, slots=True)
class StopRequested:
    """Somebody ends a scan: what it has counts.  None: the one that runs or is armed."""

    at_ns: int
    scan_id: str | None = None


@dataclass(frozen=True, slots=True)
class AbortRequested:
    """Somebody gives a scan up.  None: the one that runs or is armed."""

    at_ns: int
    scan_id: str | None = None


@dataclass(frozen=True, slots=True)
class ScanRecovered:
    """A scan that a former process left open is open again for writing.

    ``numbers`` (n,) are those of its stored frames; ``positioned`` of them have a position, and
    ``spared`` others need none.
    """

    at_ns: int
    scan_id: str
    state: ScanState
    start: ScanStart
    numbers: NDArray[np.uint64]
    positioned: int
    epoch: str | None
    reason: str
    spared: int = 0


@dataclass(frozen=True, slots=True)
class Tick:
    """Time has passed."""

    at_ns: int


@dataclass(frozen=True, slots=True)
class Shutdown:
    """The daemon stops for good: every scan is to be sealed now."""

    at_ns: int


Event = (
    SeriesStarted
    | FrameArrived
    | FrameLost
    | MessageUndecodable
    | SeriesEnded
    | EpochStarted
    | PositionsArrived
    | EpochEnded
    | FramesPositioned
    | ScanFailed
    | RoomChanged
    | StartRequested
    | StopRequested
    | AbortRequested
    | ScanRecovered
    | Tick
    | Shutdown
)

# ---- instructions ------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class OpenScan:
    """Create the scan in the store; ``start`` has a shape and a dtype.

    ``replaces``: a scan without frames that its first frame showed to be laid out wrongly; its
    positions are the new one's, and it is removed.
    """

    scan_id: str
    start: ScanStart
    state: ScanState
    joined_late: bool
    replaces: str | None = None


@dataclass(frozen=True, slots=True)
class SetState:
    """Write the new state, and why, into the scan's header."""

    scan_id: str
    state: ScanState
    reason: str = ""


@dataclass(frozen=True, slots=True)
class StoreFrame:
    """Decode the frame at hand into the scan."""

    scan_id: str
    out_of_order: bool = False


@dataclass(frozen=True, slots=True)
class DropFrame:
    """Leave the frame at hand and count it under ``reason``."""

    reason: Literal["duplicate", "wrong_shape", "closed", "disk_full"]


@dataclass(frozen=True, slots=True)
class StorePositions:
    """Store positions and join them with the frames of the scan."""

    scan_id: str
    positions: Positions


@dataclass(frozen=True, slots=True)
class BindEpoch:
    """Note in the scan's header that an epoch is its own, so that a restart does not forget.

    ``metadata``: what the epoch says of itself and the scan's own start does not.
    """

    scan_id: str
    epoch: str
    metadata: Mapping[str, Any] = field(default_factory=dict[str, Any])


@dataclass(frozen=True, slots=True)
class DropPositions:
    """Count ``count`` positions as lost: their scan is closed, or no scan came for them."""

    epoch: str
    count: int


@dataclass(frozen=True, slots=True)
class SealScan:
    """Close the scan for good with its final accounting."""

    scan_id: str
    state: ScanState
    counts: Mapping[str, int]
    reason: str


@dataclass(frozen=True, slots=True)
class Accepted:
    """The request at hand is done to this scan: armed by hand, stopped or given up."""

    scan_id: str


@dataclass(frozen=True, slots=True)
class Refuse:
    """The request at hand cannot be done."""

    code: str
    message: str


@dataclass(frozen=True, slots=True)
class Say:
    """Tell people, in the log."""

    level: Literal["info", "warning", "error"]
    text: str


Instruction = (
    OpenScan
    | SetState
    | StoreFrame
    | DropFrame
    | StorePositions
    | BindEpoch
    | DropPositions
    | SealScan
    | Accepted
    | Refuse
    | Say
)
