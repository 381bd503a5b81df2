"""Stage 1: detector and position sockets -> scan store.

A thin shell around the scan state machine: it receives, asks the machine, and does what that says.
It never waits for a reader of the store; only a disk that cannot keep up makes it stop reading.
Started by the supervisor as ``python -m ptycho_streamd.ingest``, once for the detector that is
reconstructed and once, with ``--detector NAME``, for each that is stored.  It imports no torch.
"""

from __future__ import annotations

import logging
import sys
import time
from collections import deque
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import zmq

from ptycho_stream.errors import (
    DiskFull,
    FileFormatError,
    GeometryError,
    ScanNotFound,
    SettingsError,
    StoreError,
    WireError,
)
from ptycho_stream.files.view_change import change_sealed
from ptycho_stream.messages import (
    Frame,
    Message,
    Positions,
    PositionsEnd,
    PositionsStart,
    ScanEnd,
    ScanStart,
    Undecodable,
)
from ptycho_stream.scans import scan_events as ev
from ptycho_stream.scans.catalogue import Catalogue, Recovered
from ptycho_stream.scans.header import ScanHeader
from ptycho_stream.scans.scan_layout import start_of_header
from ptycho_stream.scans.state_machine import ScanRules, ScanStateMachine
from ptycho_stream.scans.ulid import new_scan_id
from ptycho_stream.settings import Settings, StoredDetector, load_settings
from ptycho_stream.wire.limits import WireLimits
from ptycho_stream.wire.positions_file import load_positions
from ptycho_streamd.bus import StageRequest
from ptycho_streamd.companion import Companion
from ptycho_streamd.housekeeping import Housekeeper
from ptycho_streamd.ingest_metrics import IngestMetrics
from ptycho_streamd.ingest_status import RateMeter, describe
from ptycho_streamd.log_limit import LimitedLog
from ptycho_streamd.recorder import EPOCH_KEY, Recorder
from ptycho_streamd.security import Gate
from ptycho_streamd.sources import Stream, open_sources
from ptycho_streamd.stage import Stage, run_stage
from ptycho_streamd.unsealed import Unsealed

COMMIT_NS = 5_000_000
"""A batch of frames is committed when it is full, or its first one is so old."""
ROUND_MESSAGES = 64
"""Taken from one socket before the other gets its turn; 1 where sockets carry parts of frames, so
that these do not wait for each other."""
IDLE_MS = 100
TICK_NS = 50_000_000
LAST_DRAIN_S = 1.0
"""At a stop: how long what has arrived already is still taken."""

DROPPED = {
    "duplicate": "its number has come before",
    "wrong_shape": "the frames of its scan have another shape or dtype",
    "closed": "its scan is over",
    "disk_full": "there is no room on the disk",
}
"""Why a frame is not stored, for the log."""

log = logging.getLogger(__name__)
trouble = LimitedLog(log)


class Ingest:
    """The stage.  Construction opens sockets and recovers scans, :meth:`run` works until the stop.

    Raises:
        EndpointError: a socket cannot be bound.
    """

    def __init__(self, stage: Stage, config: Path, settings: Settings) -> None:
        self._stage = stage
        self._config = config
        self._settings = settings
        self._root = settings.data.directory
        self._machine = ScanStateMachine(rules_of(settings), new_scan_id)
        self._recorders: dict[str, Recorder] = {}
        self._events: deque[ev.Event] = deque()
        self._metrics = IngestMetrics()
        self._rate = RateMeter()
        self._received = 0
        self._answers: list[ev.Accepted | ev.Refuse] = []
        self._next_tick_ns = 0
        self._gate = Gate(settings.security, self._metrics.registry)
        limits = WireLimits(max_shape_yx_px=settings.detector.max_shape_yx_px)
        self._sources = open_sources(self._gate, settings, limits)
        self._turn_messages = 1 if settings.detector.dialect == "slsdet" else ROUND_MESSAGES
        detector = settings.detector
        self._companion: Companion | None = None
        if isinstance(detector, StoredDetector):
            self._companion = Companion(self._root, detector)
        self._housekeeper = Housekeeper(settings.data, deletes=self._companion is None)
        self._unsealed = Unsealed(self._root)

    def run(self) -> None:
        """Work until the stage is told to stop; then seal, or leave open for the next incarnation.

        A stop that the supervisor asked for is the daemon's: scans are sealed as interrupted.
        After any other end (a signal to this process, the supervisor's death) a later one goes on.
        """
        poller = zmq.Poller()
        for socket in (self._stage.socket, *(source.socket for source in self._sources)):
            poller.register(socket, zmq.POLLIN)
        with self._housekeeper:
            self._recover()
            while not self._stage.stopping:
                if not self._round() and (self._stage.socket, zmq.POLLIN) in poller.poll(
                    self._patience_ms()
                ):
                    self._listen()
            self._stop()
        for source in self._sources:
            source.close()
        self._gate.close()

    # ---- the loop ------------------------------------------------------------------------------

    def _round(self) -> bool:
        """Take what is there, a bounded number of each; whether there may be more."""
        taken = 0
        for source in self._sources:
            taken += self._drain(source)
        now_ns = time.monotonic_ns()
        self._commit_due(now_ns)
        if now_ns >= self._next_tick_ns:
            self._next_tick_ns = now_ns + TICK_NS
            self._tick(now_ns)
        return taken > 0

    def _drain(self, source: Stream) -> int:
        taken = 0
        while taken < self._turn_messages:
            messages = source.receive()
            if messages is None:
                break
            taken += 1
            for message in messages:
                if type(message) is Frame:
                    self._frame(message)
                else:
                    self._take(message)
        if taken:
            source.health.last_message_ns = time.monotonic_ns()
        return taken

    def _frame(self, frame: Frame) -> None:
        """The hot path: 15,000 and more a second go through here."""
        now_ns = time.monotonic_ns()
        image = frame.image
        self._received += 1
        for instruction in self._machine.handle(
            ev.FrameArrived(now_ns, frame.series, frame.number, image.shape_yx, image.dtype)
        ):
            if type(instruction) is ev.StoreFrame:
                self._store(instruction, frame, now_ns)
            elif type(instruction) is ev.DropFrame:
                self._drop(instruction.reason, frame)
            else:
                self._do(instruction)

    def _store(self, instruction: ev.StoreFrame, frame: Frame, now_ns: int) -> None:
        recorder = self._recorders.get(instruction.scan_id)
        if recorder is None:  # it failed a moment ago, the machine has yet to hear of it
            self._metrics.dropped.labels("disk_full").inc()
            return
        if instruction.out_of_order:
            self._metrics.out_of_order.inc()
        try:
            recorder.store(frame, time.time_ns(), now_ns)
        except WireError as error:
            self._metrics.undecodable.labels(error.reason).inc()
            trouble.warning(error.reason, f"frame {frame.number} of series {frame.series}: {error}")
            self._feed(ev.FrameLost(now_ns, instruction.scan_id, frame.number, error.reason))
        except StoreError as error:
            self._metrics.dropped.labels("disk_full").inc()
            self._feed(ev.FrameLost(now_ns, instruction.scan_id, frame.number, "dropped_disk_full"))
            self._fail(instruction.scan_id, error)
        else:
            if recorder.writer.full:
                self._commit(instruction.scan_id, recorder)

    def _drop(self, reason: str, frame: Frame) -> None:
        if reason == "duplicate":
            self._metrics.duplicate.inc()
        else:
            self._metrics.dropped.labels(reason).inc()
        image = frame.image
        trouble.warning(
            reason,
            f"frame {frame.number} of series {frame.series}, {image.shape_yx} {image.dtype}, is "
            f"dropped: {DROPPED[reason]}",
        )

    def _take(self, message: Message) -> None:
        """Everything but frames.  What came before it is committed first, so that the machine knows
        how many frames have positions when it decides about an end.
        """
        self._commit_all()
        now_ns = time.monotonic_ns()
        match message:
            case ScanStart():
                self._feed(ev.SeriesStarted(now_ns, message))
            case ScanEnd():
                self._feed(ev.SeriesEnded(now_ns, message.series))
            case PositionsStart():
                self._feed(ev.EpochStarted(now_ns, message))
            case Positions():
                self._metrics.positions_received.inc(len(message.numbers))
                self._feed(ev.PositionsArrived(now_ns, message))
            case PositionsEnd():
                self._feed(ev.EpochEnded(now_ns, message.epoch))
            case Undecodable():
                self._metrics.undecodable.labels(message.reason).inc(message.count)
                where = "" if message.series is None else f" of series {message.series}"
                trouble.warning(
                    message.reason, f"not understood{where} ({message.reason}): {message.detail}"
                )
                self._feed(ev.MessageUndecodable(now_ns, message))
            case Frame():
                self._frame(message)

    def _feed(self, event: ev.Event) -> None:
        """Hand an event to the machine and do what it says, which may make more events."""
        self._events.append(event)
        if len(self._events) > 1:  # the call below, further up the stack, comes to it
            return
        while self._events:
            for instruction in self._machine.handle(self._events[0]):
                self._do(instruction)
            self._events.popleft()

    def _commit_due(self, now_ns: int) -> None:
        for scan_id, recorder in list(self._recorders.items()):
            first_ns = recorder.first_pending_ns
            if first_ns and now_ns - first_ns >= COMMIT_NS:
                self._commit(scan_id, recorder)

    def _commit_all(self) -> None:
        for scan_id, recorder in list(self._recorders.items()):
            if recorder.first_pending_ns:
                self._commit(scan_id, recorder)

    def _commit(self, scan_id: str, recorder: Recorder) -> None:
        frames, begun_ns = recorder.writer.pending, recorder.first_pending_ns
        try:
            recorder.commit()
        except StoreError as error:
            self._fail(scan_id, error)
            return
        self._count_positions(scan_id, recorder)
        now_ns = time.monotonic_ns()
        if frames:
            self._metrics.committed.inc(frames)
            self._metrics.commit_seconds.observe((now_ns - begun_ns) / 1e9)
        positioned = recorder.newly_positioned()
        if positioned is not None:
            self._feed(ev.FramesPositioned(now_ns, scan_id, *positioned))

    def _count_positions(self, scan_id: str, recorder: Recorder) -> None:
        """Count and tell of positions that came inline or are not to be trusted."""
        new = recorder.new_positions()
        if new is None:
            return
        self._metrics.count_positions(new)
        for count, text in (
            (new.invalid, "invalid (NaN, an impossible number, or too many without frames)"),
            (new.out_of_extent, "beyond reconstruct.max_extent_m"),
            (new.jumps, "further than reconstruct.max_step_m from the one before"),
        ):
            if count:
                trouble.warning(text, f"scan {scan_id}: {count} positions are {text}")

    def _tick(self, now_ns: int) -> None:
        self._metrics.received.inc(self._received - self._rate.frames)
        self._rate.update(self._received, now_ns)
        for scan_id, reason in self._housekeeper.take_failures().items():
            self._feed(ev.ScanFailed(now_ns, scan_id, reason))
        free, needed = self._housekeeper.free_bytes, self._settings.data.min_free_bytes
        self._feed(ev.RoomChanged(now_ns, free >= needed))
        self._commit_all()  # a scan that is sealed by the clock has the positions that came for it
        self._feed(ev.Tick(now_ns))
        for header in self._unsealed.retry(now_ns):
            self._metrics.count_sealed(header)
        for source in self._sources:
            source.watch()
        if self._companion is not None:
            self._companion.look(self._recorders)
        self._gate.check()
        self._housekeeper.check()
        self._listen()
        self._metrics.open_scans.set(len(self._recorders))
        self._metrics.free.set(free)
        self._metrics.refusing.set(self._machine.refusing)
        self._beat()

    def _patience_ms(self) -> int:
        waiting = [r.first_pending_ns for r in self._recorders.values() if r.first_pending_ns]
        now_ns = time.monotonic_ns()
        due_ns = min([self._next_tick_ns, *(first_ns + COMMIT_NS for first_ns in waiting)])
        return min(max((due_ns - now_ns) // 1_000_000 + 1, 0), IDLE_MS)

    def _beat(self, *, now: bool = False) -> None:
        status = describe(self._machine, self._recorders, self._sources, self._rate)
        self._stage.beat(status, self._metrics.registry, now=now)

    # ---- what the machine says -----------------------------------------------------------------

    def _do(self, instruction: ev.Instruction) -> None:
        match instruction:
            case ev.OpenScan():
                self._open(instruction)
            case ev.SetState(scan_id, state, reason):
                self._write(scan_id, lambda scan: scan.set_state(state, reason))
            case ev.StorePositions(scan_id, positions):
                if recorder := self._recorders.get(scan_id):
                    recorder.add_positions(positions)
                    self._count_positions(scan_id, recorder)
            case ev.BindEpoch(scan_id, epoch, metadata):
                self._write(scan_id, lambda scan: scan.bind_epoch(epoch, metadata))
            case ev.DropPositions(epoch, count):
                if count:
                    self._metrics.positions_orphaned.inc(count)
                    log.warning("%d positions of epoch %s have no open scan", count, epoch)
            case ev.SealScan():
                self._seal(instruction)
            case ev.Accepted() | ev.Refuse():
                self._answers.append(instruction)
            case ev.Say(level, text):
                log.log(logging.getLevelNamesMapping()[level.upper()], "%s", text)
            case ev.StoreFrame() | ev.DropFrame():
                raise AssertionError("only a frame that is at hand can be stored or dropped")

    def _open(self, opening: ev.OpenScan) -> None:
        try:
            recorder = Recorder.create(self._root, opening, self._settings)
        except StoreError as error:
            self._fail(opening.scan_id, error)
            return
        self._recorders[opening.scan_id] = recorder
        self._housekeeper.attach(recorder.writer)
        former = self._recorders.get(opening.replaces or "")
        if former is not None:
            self._write(opening.scan_id, lambda scan: scan.take_over_positions(former))
            reason = f"its frames turned out otherwise: see scan {opening.scan_id}"
            self._seal(ev.SealScan(former.header.scan_id, "aborted", {}, reason))
        else:
            self._load_positions(opening.scan_id, recorder)
        self._count_positions(opening.scan_id, recorder)
        log.info("scan %s records series %s", opening.scan_id, opening.start.series)

    def _load_positions(self, scan_id: str, recorder: Recorder) -> None:
        settings = self._settings.positions
        if settings.source != "file" or settings.path is None:
            return
        try:
            positions = load_positions(settings.path)
        except FileFormatError as error:
            log.error("scan %s has no positions: %s", scan_id, error)
        else:
            self._metrics.positions_received.inc(len(positions.numbers))
            recorder.add_positions(positions)

    def _write(self, scan_id: str, change: Callable[[Recorder], object]) -> None:
        recorder = self._recorders.get(scan_id)
        if recorder is None:
            return
        try:
            change(recorder)
        except StoreError as error:
            self._fail(scan_id, error)

    def _fail(self, scan_id: str, error: StoreError) -> None:
        log.error("scan %s cannot be written any more: %s", scan_id, error)
        kind = "the disk is full" if isinstance(error, DiskFull) else "the disk failed"
        self._feed(ev.ScanFailed(time.monotonic_ns(), scan_id, f"{kind}: {error}"))

    def _seal(self, sealing: ev.SealScan) -> None:
        recorder = self._recorders.pop(sealing.scan_id, None)
        if recorder is None:
            return
        self._count_positions(sealing.scan_id, recorder)
        pending = recorder.writer.pending
        counts = recorder.final_counts(sealing.counts)
        if self._companion is not None:
            sealing = self._companion.settle(sealing, recorder)
        try:
            recorder.finish_view()
        except StoreError as error:
            log.error("scan %s: its view stays as it is: %s", sealing.scan_id, error)
        try:
            header = recorder.writer.seal(sealing.state, counts, sealing.reason)
        except StoreError as error:
            log.error("scan %s cannot be sealed, it is recovered: %s", sealing.scan_id, error)
            self._unsealed.add(replace(sealing, counts=counts), time.monotonic_ns())
            return
        finally:
            self._housekeeper.detach(sealing.scan_id)
        lost = header.counts.get("dropped_disk_full", 0) - counts.get("dropped_disk_full", 0)
        self._metrics.dropped.labels("disk_full").inc(lost)
        self._metrics.committed.inc(max(pending - lost, 0))
        self._metrics.count_sealed(header)

    # ---- start, stop, requests -----------------------------------------------------------------

    def _recover(self) -> None:
        """Open again what a former incarnation left open, oldest first."""
        catalogue = Catalogue(self._root)
        if known := catalogue.ids():
            new_scan_id.go_on_after(known[0])
        recovered, failed = catalogue.recover_all(self._is_ours)
        self._metrics.unrecoverable.inc(len(failed))
        for found in reversed(recovered):
            try:
                if found.writer.header.detector != self._settings.detector.stored_as:
                    self._seal_orphan(found)
                    continue
                self._go_on(found)
            except (StoreError, OverflowError, ValueError, MemoryError):
                # Its logs are whole and say what cannot be: it must not keep others from their
                # frames, and the next start finds it as it is.
                log.exception("scan %s is left as it is", found.writer.scan_id)
                self._metrics.unrecoverable.inc()
                self._let_go(found)

    def _let_go(self, found: Recovered) -> None:
        try:
            found.writer.close()
        except StoreError as error:  # as it is on the disk it is found at the next start
            log.error("scan %s: %s", found.writer.scan_id, error)

    def _is_ours(self, header: ScanHeader | None) -> bool:
        """Whether a scan found open is for this process to take over: of its own detector, and
        (for the reconstructed one) of those that are not in the settings any more, or unreadable.
        """
        if self._companion is not None:
            return header is not None and header.detector == self._settings.detector.stored_as
        return header is None or header.detector not in [
            one.name for one in self._settings.more_detectors
        ]

    def _seal_orphan(self, found: Recovered) -> None:
        """Seal a scan of a detector that is not in the settings any more."""
        counts = {"torn": found.report.dropped_records}
        reason = f"detector {found.writer.header.detector} is not in the settings any more"
        self._metrics.count_sealed(found.writer.seal("interrupted", counts, reason))

    def _go_on(self, found: Recovered) -> None:
        header = found.writer.header
        recorder = Recorder.resume(self._root, found.writer, self._settings)
        event = ev.ScanRecovered(
            time.monotonic_ns(),
            header.scan_id,
            header.state,
            start_of_header(header),
            found.writer.records()["number"],
            recorder.join.positioned,
            header.metadata.get(EPOCH_KEY),
            header.reason,
            recorder.join.spared,
        )
        self._recorders[header.scan_id] = recorder
        self._housekeeper.attach(found.writer)
        self._metrics.recovered.inc()
        self._metrics.torn.inc(found.report.dropped_records + found.report.lost_frames)
        self._feed(event)

    def _stop(self) -> None:
        until_s = time.monotonic() + LAST_DRAIN_S
        while self._round() and time.monotonic() < until_s:
            pass
        self._commit_all()
        if self._stage.stop_reason == "requested":
            self._feed(ev.Shutdown(time.monotonic_ns()))
        for scan_id, recorder in self._recorders.items():
            self._housekeeper.detach(scan_id)
            try:
                recorder.writer.close()
            except StoreError as error:
                log.error("scan %s: %s", scan_id, error)
        self._recorders.clear()
        self._tick(time.monotonic_ns())
        self._beat(now=True)

    def _listen(self) -> None:
        for request in self._stage.requests():
            self._serve(request)
        if self._stage.reload_requested:
            self._reload()

    def _serve(self, request: StageRequest) -> None:
        now_ns, arguments = time.monotonic_ns(), request.arguments
        event: ev.Event
        match request.command:
            case "set_view":
                self._set_view(request)
                return
            case "start_scan":
                event = ev.StartRequested(
                    now_ns,
                    arguments.get("series"),
                    arguments.get("expected_frames"),
                    arguments.get("metadata") or {},
                )
            case "stop_scan":
                event = ev.StopRequested(now_ns, arguments.get("scan_id"))
            case "abort_scan":
                event = ev.AbortRequested(now_ns, arguments.get("scan_id"))
            case _:
                self._stage.fail(request, "unknown_command", f"ingest knows no {request.command}")
                return
        self._commit_all()
        self._answers.clear()
        self._feed(event)
        match self._answers[0]:
            case ev.Refuse(code, message):
                self._stage.fail(request, code, message)
            case ev.Accepted(scan_id):
                self._stage.reply(request, {"scan_id": scan_id})

    def _set_view(self, request: StageRequest) -> None:
        """Give a scan another view: the one that is being written, or one that is over."""
        scan_id: str = request.arguments["scan_id"]
        self._commit_all()  # dark frames that are pending are to be seen
        recorder = self._recorders.get(scan_id)
        try:
            if recorder is not None:
                view = recorder.request_view(request.arguments)
            else:
                view = change_sealed(self._root, scan_id, request.arguments)
        except (GeometryError, FileFormatError) as error:
            self._stage.fail(request, "bad_arguments", str(error))
        except ScanNotFound as error:
            self._stage.fail(request, "not_found", str(error))
        except StoreError as error:
            self._stage.fail(request, "failed", str(error))
        else:
            log.info("scan %s has view %d", scan_id, view.version)
            self._stage.reply(request, {"scan_id": scan_id, "view": asdict(view)})

    def _reload(self) -> None:
        self._stage.reloaded()
        former = self._settings.view
        try:
            read = load_settings(self._config)
            self._settings = read.of_detector(self._settings.detector.stored_as)
        except SettingsError as error:
            log.error("the settings stay as they were: %s", error)
            return
        logging.getLogger().setLevel(self._settings.log_level.upper())
        self._machine.rules = rules_of(self._settings)
        self._housekeeper.settings = self._settings.data
        if self._settings.view == former:  # nor undo what `reprocess` has corrected
            return
        for scan_id, recorder in list(self._recorders.items()):
            self._write(scan_id, lambda scan: scan.change_view(self._settings))
            log.info("scan %s has view %d", scan_id, recorder.header.view.version)


def rules_of(settings: Settings) -> ScanRules:
    """The part of the settings that the state machine goes by."""
    positions = settings.positions
    return ScanRules(
        wait_ns=int(positions.wait_s * 1e9),
        match_window_ns=int(positions.match_window_s * 1e9),
        silence_ns=int(settings.detector.silence_s * 1e9),
        resume_ns=int(settings.data.resume_s * 1e9),
        positions_stream=positions.is_stream,
        positions_measured=positions.is_measured,
        ends_by_silence=settings.detector.ends_by_silence,
    )


def main() -> int:
    """The process; returns its exit status."""
    return run_stage(
        "ingest", lambda stage, config, settings: Ingest(stage, config, settings).run()
    )


if __name__ == "__main__":
    sys.exit(main())
