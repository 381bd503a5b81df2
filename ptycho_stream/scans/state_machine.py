"""The life of scans as a pure state machine: events in, instructions out, no I/O and no clock.

Ingest feeds it everything that arrives and carries out what it says, so that every race between
frames, positions, ends and requests can be written down in a test as a plain list.  ::

    (nothing) --start--> armed --frame--> running --end, stop, new start--> draining --> sealed
                                                                            positions or wait_s

A scan is sealed as ``complete``, ``interrupted`` (it was cut short), ``aborted`` (given up, or
without a frame) or ``unmatched`` (no positions came).  Several scans may drain while one runs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

from ptycho_stream.messages import ScanStart, Undecodable
from ptycho_stream.scans import scan_events as ev
from ptycho_stream.scans.epochs import Epoch, EpochBook
from ptycho_stream.scans.header import ScanState
from ptycho_stream.scans.opened_scan import OpenedScan

MAX_CLOSED_SERIES: Final = 1024
MAX_LAYOUTS: Final = 8
"""A scan without a frame is laid out for each other shape that comes, but not for ever."""
SUPERSEDED: Final = "superseded by a new start"
STOPPED: Final = "stopped by request"


@dataclass(frozen=True, slots=True)
class ScanRules:
    """The settings that the life of scans depends on, in nanoseconds.

    Attributes:
        wait_ns: from a scan's end, for its positions; also from the last expected frame, for an end
            message.
        match_window_ns: how far apart a scan and an epoch without a series may be armed.
        silence_ns: without a frame, after which a running scan is taken for cut short.
        resume_ns: for the stream of a scan that was found open after a crash to go on.
        positions_stream: whether positions come on their own, so that an ended scan waits for them.
        positions_measured: whether they are read while frames are taken. Then an epoch that names
            no series is matched when its first positions and a scan's first frame have come: it may
            be armed ahead of its scan, while another one is open, or be an alignment.
        ends_by_silence: whether the detector never says that a series is over, so that silence is
            how scans end, and not a fault.
    """

    wait_ns: int
    match_window_ns: int
    silence_ns: int
    resume_ns: int
    positions_stream: bool
    positions_measured: bool = False
    ends_by_silence: bool = False


Out = Sequence[ev.Instruction]


class ScanStateMachine:
    """All open scans.  Feed :meth:`handle` and do what it returns, in order.

    Args:
        rules: may be replaced at any time through the attribute of this name.
        new_scan_id: makes identities (the only thing that is not a function of the events).
    """

    def __init__(self, rules: ScanRules, new_scan_id: Callable[[], str]) -> None:
        self.rules = rules
        self._new_scan_id = new_scan_id
        self._open: dict[str, OpenedScan] = {}
        self._by_series: dict[str, OpenedScan] = {}
        self._closed: dict[str, None] = {}
        self._refused: dict[str, None] = {}
        self._armed: tuple[str, ev.StartRequested] | None = None
        self._has_room = True
        self._epochs = EpochBook(rules.match_window_ns, rules.wait_ns, rules.positions_measured)
        self._handlers: dict[type[Any], Callable[[Any], Out]] = {
            ev.FrameArrived: self._frame_arrived,
            ev.SeriesStarted: self._series_started,
            ev.SeriesEnded: self._series_ended,
            ev.FrameLost: self._frame_lost,
            ev.MessageUndecodable: self._message_undecodable,
            ev.EpochStarted: self._epoch_started,
            ev.PositionsArrived: self._positions_arrived,
            ev.EpochEnded: self._epoch_ended,
            ev.FramesPositioned: self._frames_positioned,
            ev.ScanFailed: self._scan_failed,
            ev.RoomChanged: self._room_changed,
            ev.StartRequested: self._start_requested,
            ev.StopRequested: self._stop_requested,
            ev.AbortRequested: self._abort_requested,
            ev.ScanRecovered: self._scan_recovered,
            ev.Tick: self._tick,
            ev.Shutdown: self._shutdown,
        }

    @property
    def open_scans(self) -> Mapping[str, OpenedScan]:
        """Scans that are not sealed, oldest first; to be read only."""
        return self._open

    @property
    def refusing(self) -> bool:
        """Whether new scans are refused for want of room on the disk."""
        return not self._has_room

    def handle(self, event: ev.Event) -> Out:
        """What is to be done about ``event``, in this order."""
        return self._handlers[type(event)](event)

    # ---- frames --------------------------------------------------------------------------------

    def _frame_arrived(self, event: ev.FrameArrived) -> Out:
        scan = self._by_series.get(event.series)
        out: list[ev.Instruction] = []
        if scan is None:
            if event.series in self._closed:
                return (ev.DropFrame("closed"),)
            if event.series in self._refused:
                return (ev.DropFrame("disk_full"),)
            scan = self._join_late(event, out)
            if scan is None:
                return [*out, ev.DropFrame("disk_full")]
        if scan.stopped:
            return (ev.DropFrame("closed"),)
        if scan.recovered:
            if event.number in scan.ledger:  # the number starts again: it is another series
                out += self._seal(scan, event.at_ns, "interrupted", "another series followed")
                self._closed.pop(event.series, None)
                return [*out, *self._frame_arrived(event)]
            scan.recovered = False
            out.append(ev.Say("info", f"scan {scan.scan_id} goes on at frame {event.number}"))
        if (event.shape_yx, event.dtype) != scan.accepted:
            if not scan.looks_like(event.shape_yx, event.dtype) and (
                scan.state != "armed"
                or (scan.layouts > MAX_LAYOUTS and scan.announced != (event.shape_yx, event.dtype))
            ):
                scan.count("wrong_shape")
                return [*out, ev.DropFrame("wrong_shape")]
            if scan.state == "armed":
                out += self._lay_out(scan, event)
        if scan.state == "armed":
            scan.state, scan.first_frame_ns = "running", event.at_ns
            out.append(ev.SetState(scan.scan_id, "running"))
            out += self._find_epoch(scan)
        highest = scan.ledger.highest
        scan.last_frame_ns = event.at_ns
        if not scan.ledger.take(event.number):
            return [*out, ev.DropFrame("duplicate")]
        store = scan.store[event.number < highest]
        return [*out, store] if out else (store,)

    def _join_late(self, event: ev.FrameArrived, out: list[ev.Instruction]) -> OpenedScan | None:
        if not self._has_room:
            self._refuse(event.series, out)
            return None
        start = ScanStart("", event.series, None, event.shape_yx, event.dtype)
        by_hand = self._armed is not None
        scan = self._arm(start, event.at_ns)
        scan.joined_late = not by_hand or event.number > 0
        if scan.joined_late:
            text = f"joined series {event.series} at frame {event.number} without its header"
            out.append(ev.Say("warning", text))
        out += self._open_in_store(scan)
        return scan

    def _lay_out(self, scan: OpenedScan, event: ev.FrameArrived) -> list[ev.Instruction]:
        """Open an armed scan for its first frame, anew if its header had announced another."""
        out: list[ev.Instruction] = []
        replaced: str | None = None
        if scan.looks_like(event.shape_yx, event.dtype):
            scan.accepted = (event.shape_yx, event.dtype)
            return out
        if scan.opened:
            shape_yx, dtype = scan.announced
            text = f"series {scan.series} announced {shape_yx} {dtype}"
            text = f"{text} and sends {event.shape_yx} {event.dtype}: laid out as sent"
            out.append(ev.Say("warning", text))
            replaced, scan.scan_id = scan.scan_id, self._new_scan_id()
            self._open = {s.scan_id: s for s in self._open.values()}
            if scan.epoch is not None:
                self._epochs[scan.epoch].scan_id = scan.scan_id
        scan.start = replace(scan.start, frame_shape_yx=event.shape_yx, dtype=event.dtype)
        out += self._open_in_store(scan, replaced)
        if replaced is not None and scan.epoch is not None:
            out.append(self._bound(self._epochs[scan.epoch], scan))
        return out

    def _frame_lost(self, event: ev.FrameLost) -> Out:
        scan = self._open.get(event.scan_id)
        if scan is None:
            return ()
        scan.ledger.forget(event.number)
        scan.count(event.reason)
        if scan.state != "running" or scan.ledger.count:
            return ()
        # Its shape may have been as wrong as its content: the next frame decides again.
        scan.state = "armed"
        return (ev.SetState(scan.scan_id, "armed"),)

    def _message_undecodable(self, event: ev.MessageUndecodable) -> Out:
        scan = self._scan_of(event.what)
        if scan is not None:
            scan.count(event.what.reason, event.what.count)
        return ()

    def _scan_of(self, what: Undecodable) -> OpenedScan | None:
        if what.series is not None:
            return self._by_series.get(what.series)
        if what.epoch is not None:
            return self._open.get(self._epochs.scan_of(what.epoch) or "")
        return self._find(None, ("armed", "running"))

    # ---- starts and ends -----------------------------------------------------------------------

    def _series_started(self, event: ev.SeriesStarted) -> Out:
        out: list[ev.Instruction] = []
        for scan in list(self._open.values()):
            if scan.state == "armed":
                out += self._seal(scan, event.at_ns, "aborted", f"{SUPERSEDED}, without a frame")
            elif scan.state == "running":
                out += self._end(scan, event.at_ns, "interrupted", SUPERSEDED)
        series = event.start.series
        self._closed.pop(series, None)
        self._refused.pop(series, None)
        if not self._has_room:
            self._refuse(series, out)
            return out
        scan = self._arm(event.start, event.at_ns)
        if scan.start.frame_shape_yx is not None and scan.start.dtype is not None:
            out += self._open_in_store(scan)
        return out

    def _arm(self, start: ScanStart, at_ns: int) -> OpenedScan:
        """Make a scan of ``start`` and of what was armed by hand for it."""
        scan_id = ""
        if self._armed is not None and self._armed[1].series in (None, start.series):
            scan_id, request = self._armed
            start = replace(
                start,
                metadata={**start.metadata, **request.metadata},
                expected_frames=request.expected_frames or start.expected_frames,
            )
            self._armed = None
        scan = OpenedScan(scan_id or self._new_scan_id(), start.series, start, at_ns)
        scan.announced = (start.frame_shape_yx, start.dtype)
        self._epochs.scan_armed(scan)
        self._open[scan.scan_id] = self._by_series[start.series] = scan
        return scan

    def _open_in_store(self, scan: OpenedScan, replaces: str | None = None) -> list[ev.Instruction]:
        assert scan.start.frame_shape_yx is not None and scan.start.dtype is not None
        scan.opened = True
        scan.layouts += 1
        scan.accept()
        opening = ev.OpenScan(scan.scan_id, scan.start, scan.state, scan.joined_late, replaces)
        return [opening, *self._find_epoch(scan)]

    def _find_epoch(self, scan: OpenedScan) -> Out:
        epoch = self._epochs.find_epoch(scan) if scan.epoch is None else None
        return self._bind(epoch, scan) if epoch else ()

    def _refuse(self, series: str, out: list[ev.Instruction]) -> None:
        self._refused[series] = None
        out.append(ev.Say("error", f"series {series} is not recorded: no room on the disk"))

    def _series_ended(self, event: ev.SeriesEnded) -> Out:
        scan = self._by_series.get(event.series)
        if scan is None:
            if event.series in self._refused:
                self._refused.pop(event.series)
                self._close_series(event.series)
            return ()
        if scan.state == "armed":
            return self._seal(scan, event.at_ns, "aborted", "the series ended without a frame")
        if scan.state == "draining":
            return ()
        scan.recovered = False
        return self._end(scan, event.at_ns, "complete", "")

    def _end(self, scan: OpenedScan, at_ns: int, state: ScanState, reason: str) -> Out:
        scan.state = "draining"
        scan.ended_ns = at_ns
        scan.end_state, scan.end_reason = state, reason
        out: list[ev.Instruction] = [ev.SetState(scan.scan_id, "draining", reason)]
        if scan.epoch is None and (late := self._epochs.find_suspect(scan)):
            out += self._bind(late, scan)
        return [*out, *self._seal_if_done(scan, at_ns)]

    def _seal_if_done(self, scan: OpenedScan, at_ns: int) -> Out:
        if scan.state != "draining":
            return ()
        epoch_over = scan.epoch is not None and self._epochs[scan.epoch].ended
        done = (
            scan.positioned + scan.spared >= scan.ledger.count
            or epoch_over
            or not self.rules.positions_stream
            or at_ns - scan.ended_ns >= self.rules.wait_ns
        )
        if not done:
            return ()
        if scan.epoch is None and (nearest := self._epochs.find_nearest(scan)):
            return self._bind(nearest, scan)  # how many frames find their positions is told next
        lacking = scan.ledger.count > scan.spared
        if scan.end_state == "complete" and lacking and not scan.positioned:
            return self._seal(scan, at_ns, "unmatched", self._why_unmatched(scan))
        return self._seal(scan, at_ns, scan.end_state, scan.end_reason)

    def _why_unmatched(self, scan: OpenedScan) -> str:
        missed = None if scan.epoch is not None else self._epochs.missed(scan)
        if missed is None:
            return "no positions came for it"
        apart_s, window_s, wait_s = (
            ns / 1e9
            for ns in (
                missed.begun_ns - scan.armed_ns,
                self.rules.match_window_ns,
                self.rules.wait_ns,
            )
        )
        when = f"{abs(apart_s):.1f} s {'before' if apart_s < 0 else 'after'} it"
        came = f"positions came, of epoch {missed.name}, which names no series and was armed {when}"
        if abs(apart_s) > window_s:
            return f"{came}, more than positions.match_window_s = {window_s:g}"
        return (
            f"{came}: too long before or after its frames (positions.wait_s = {wait_s:g}), or "
            "another epoch was armed nearer and sent nothing"
        )

    def _seal(self, scan: OpenedScan, at_ns: int, state: ScanState, reason: str) -> Out:
        del self._open[scan.scan_id]
        if self._by_series.get(scan.series) is scan:
            del self._by_series[scan.series]
            if not scan.silent:  # after a pause its stream is joined late, in a scan of its own
                self._close_series(scan.series)
        self._epochs.scan_closed(scan, at_ns)
        text = f"scan {scan.scan_id} (series {scan.series}) is {state}"
        level = "info" if state == "complete" else "warning"
        says = ev.Say(level, f"{text}: {reason}" if reason else text)
        if not scan.opened:
            return (says,)
        return (ev.SealScan(scan.scan_id, state, scan.accounting(), reason), says)

    def _close_series(self, series: str) -> None:
        self._closed[series] = None
        if len(self._closed) > MAX_CLOSED_SERIES:
            del self._closed[next(iter(self._closed))]

    # ---- positions -----------------------------------------------------------------------------

    def _epoch_started(self, event: ev.EpochStarted) -> Out:
        start = event.start
        out: list[ev.Instruction] = []
        epoch = self._begin_epoch(start.epoch, start.series, event.at_ns, out)
        epoch.joined = start.joined
        self._epochs.tell(epoch, start.metadata)
        scan = self._open.get(epoch.scan_id or "")
        if scan is not None and start.metadata:
            return [*out, self._bound(epoch, scan)]
        return [*out, *self._try_to_bind(epoch)]

    def _positions_arrived(self, event: ev.PositionsArrived) -> Out:
        positions = event.positions
        out: list[ev.Instruction] = []
        epoch = self._begin_epoch(positions.epoch, positions.series, event.at_ns, out)
        if not positions.numbers.size:  # what is held is bounded by its number
            return out
        epoch.since_ns = epoch.since_ns or event.at_ns
        out += self._try_to_bind(epoch)
        if epoch.scan_id is None:
            dropped = self._epochs.hold(epoch, positions)
            return [*out, *(ev.DropPositions(name, count) for name, count in dropped)]
        if epoch.scan_id in self._open:
            return [*out, ev.StorePositions(epoch.scan_id, positions)]
        return [*out, ev.DropPositions(epoch.name, len(positions.numbers))]

    def _epoch_ended(self, event: ev.EpochEnded) -> Out:
        out: list[ev.Instruction] = []
        epoch = self._begin_epoch(event.epoch, None, event.at_ns, out)
        epoch.ended = True
        scan = self._open.get(epoch.scan_id or "")
        return [*out, *self._seal_if_done(scan, event.at_ns)] if scan else out

    def _begin_epoch(
        self,
        name: str,
        series: str | None,
        at_ns: int,
        out: list[ev.Instruction],
    ) -> Epoch:
        epoch = self._epochs.begin(name, series, at_ns)
        out += (ev.DropPositions(other, n) for other, n in self._epochs.forget_surplus() if n)
        return epoch

    def _try_to_bind(self, epoch: Epoch) -> Out:
        if epoch.scan_id is not None:
            return ()
        opened = [scan for scan in self._open.values() if scan.opened]
        scan = self._epochs.find_scan(epoch, opened)
        return self._bind(epoch, self._open[scan.scan_id]) if scan else ()

    def _bind(self, epoch: Epoch, scan: OpenedScan) -> Out:
        held, stale = self._epochs.bind(epoch, scan)
        return [
            self._bound(epoch, scan),
            *(ev.DropPositions(name, count) for name, count in stale),
            *(ev.StorePositions(scan.scan_id, positions) for positions in held),
        ]

    def _bound(self, epoch: Epoch, scan: OpenedScan) -> ev.BindEpoch:
        """What an epoch says goes into its scan's header; what that says itself comes first."""
        own = scan.start.metadata
        told = {key: held for key, held in self._epochs.told(epoch).items() if key not in own}
        return ev.BindEpoch(scan.scan_id, epoch.name, told)

    def _frames_positioned(self, event: ev.FramesPositioned) -> Out:
        scan = self._open.get(event.scan_id)
        if scan is None:
            return ()
        scan.positioned, scan.spared = event.frames, event.spared
        return self._seal_if_done(scan, event.at_ns)

    # ---- people, disks, clocks -----------------------------------------------------------------

    def _start_requested(self, event: ev.StartRequested) -> Out:
        if not self._has_room:
            return (ev.Refuse("no_room", "there is no room on the disk for another scan"),)
        scan_id = self._new_scan_id()
        self._armed = (scan_id, event)
        return (ev.Accepted(scan_id),)

    def _stop_requested(self, event: ev.StopRequested) -> Out:
        scan = self._find(event.scan_id, ("armed", "running"))
        if scan is None:
            return (_no_such_scan(event.scan_id, "running"),)
        scan.stopped = True
        accepted = ev.Accepted(scan.scan_id)
        if scan.state == "armed":
            reason = "stopped before its first frame"
            return (accepted, *self._seal(scan, event.at_ns, "aborted", reason))
        return (accepted, *self._end(scan, event.at_ns, "complete", STOPPED))

    def _abort_requested(self, event: ev.AbortRequested) -> Out:
        states: tuple[ScanState, ...] = ("armed", "running")
        scan = self._find(event.scan_id, (*states, "draining") if event.scan_id else states)
        if scan is not None:
            accepted = ev.Accepted(scan.scan_id)
            return (accepted, *self._seal(scan, event.at_ns, "aborted", "aborted by request"))
        if self._armed is not None and event.scan_id in (None, self._armed[0]):
            scan_id, self._armed = self._armed[0], None
            says = ev.Say("info", f"scan {scan_id}, armed by hand, is given up")
            return (ev.Accepted(scan_id), says)
        return (_no_such_scan(event.scan_id, "open" if event.scan_id else "running"),)

    def _scan_failed(self, event: ev.ScanFailed) -> Out:
        scan = self._open.get(event.scan_id)
        if scan is None:
            return ()
        out = self._seal(scan, event.at_ns, "interrupted", event.reason)
        if scan.state != "draining":
            self._closed.pop(scan.series, None)
            self._refused[scan.series] = None
        return out

    def _room_changed(self, event: ev.RoomChanged) -> Out:
        if event.has_room == self._has_room:
            return ()
        self._has_room = event.has_room
        if not event.has_room:
            return (ev.Say("error", "new scans are refused: no room on the disk"),)
        self._refused.clear()
        return (ev.Say("info", "there is room on the disk again: new scans are recorded"),)

    def _scan_recovered(self, event: ev.ScanRecovered) -> Out:
        scan = OpenedScan(event.scan_id, event.start.series, event.start, event.at_ns)
        scan.state, scan.opened = event.state, True
        scan.recovered = event.state != "draining"
        scan.ledger.restore(event.numbers)
        scan.positioned, scan.spared = event.positioned, event.spared
        scan.first_frame_ns = scan.last_frame_ns = scan.ended_ns = event.at_ns
        scan.end_reason = event.reason
        scan.end_state = "complete" if event.reason in ("", STOPPED) else "interrupted"
        scan.stopped = event.state == "draining" and event.reason == STOPPED
        scan.announced = (event.start.frame_shape_yx, event.start.dtype)
        scan.layouts = 1
        scan.accept()
        self._open[scan.scan_id] = scan
        self._by_series[scan.series] = scan
        out: list[ev.Instruction] = []
        if event.epoch is not None:
            self._epochs.resume(event.epoch, scan, event.at_ns)
        out.append(
            ev.Say("info", f"scan {scan.scan_id} is open again with {scan.ledger.count} frames")
        )
        return out

    def _tick(self, event: ev.Tick) -> Out:
        self._epochs.match_window_ns = self.rules.match_window_ns
        self._epochs.lag_ns = self.rules.wait_ns
        out: list[ev.Instruction] = []
        for scan in list(self._open.values()):
            silent_ns = event.at_ns - max(scan.last_frame_ns, scan.armed_ns)
            expected = scan.start.expected_frames
            if scan.state == "draining":
                out += self._seal_if_done(scan, event.at_ns)
            elif scan.recovered and silent_ns >= self.rules.resume_ns:
                reason = "the daemon was killed and the stream did not go on"
                out += self._give_up_recovered(scan, event.at_ns, reason)
            elif (
                scan.state == "running"
                and expected is not None
                and scan.ledger.highest + 1 >= expected
                and silent_ns >= self.rules.wait_ns
            ):
                out += self._end(scan, event.at_ns, "complete", "")
            elif scan.state == "running" and silent_ns >= self.rules.silence_ns:
                scan.silent = True
                seconds = self.rules.silence_ns / 1e9
                reason = f"no frame came for {seconds:g} s (detector.silence_s) and no end"
                state: ScanState = "interrupted"
                if self.rules.ends_by_silence:
                    state, reason = "complete", ""
                out += self._end(scan, event.at_ns, state, reason)
        expired = self._epochs.expire(event.at_ns, self._open.values())
        out += (ev.DropPositions(name, n) for name, n in expired if n)
        return out

    def _give_up_recovered(self, scan: OpenedScan, at_ns: int, reason: str) -> Out:
        state: ScanState = "interrupted" if scan.ledger.count else "aborted"
        return self._seal(scan, at_ns, state, reason)

    def _shutdown(self, event: ev.Shutdown) -> Out:
        out: list[ev.Instruction] = []
        for scan in list(self._open.values()):
            state: ScanState = "interrupted" if scan.ledger.count else "aborted"
            out += self._seal(scan, event.at_ns, state, "the daemon was stopped")
        return out

    def _find(self, scan_id: str | None, states: tuple[ScanState, ...]) -> OpenedScan | None:
        if scan_id is not None:
            scan = self._open.get(scan_id)
            return scan if scan is not None and scan.state in states else None
        found = [scan for scan in self._open.values() if scan.state in states]
        return max(found, key=lambda scan: (scan.state == "running", scan.armed_ns), default=None)


def _no_such_scan(scan_id: str | None, state: str) -> ev.Refuse:
    which = f"scan {scan_id} is not {state}" if scan_id else f"no scan is {state}"
    return ev.Refuse("not_found", f"{which}: `ptycho-stream ctl scans` lists all")
