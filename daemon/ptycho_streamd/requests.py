"""What each control command does: answered here from the store, or handed on to stages.

Used by the supervisor, which owns the control socket.  ``docs/protocol.md`` describes the commands
for those who send them.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

from ptycho_stream.errors import ControlError, PtychoStreamError, ScanNotFound
from ptycho_stream.files.view_change import WORDS as VIEW_WORDS
from ptycho_stream.files.view_change import asks_for_a_view
from ptycho_stream.files.view_files import DARK_FRAMES, FILES, NONE
from ptycho_stream.reconstruct.history import HistoryEntry, read_history
from ptycho_stream.scans.catalogue import Catalogue
from ptycho_stream.scans.header import ScanHeader, read_header
from ptycho_streamd.bus import Answer, Bus, Refusal, StageRequest
from ptycho_streamd.child import Child
from ptycho_streamd.control import ControlServer, Request
from ptycho_streamd.readable_files import ReadableFiles
from ptycho_streamd.snapshots import list_snapshots
from ptycho_streamd.stage import stage_of_detector
from ptycho_streamd.store_desk import Command, StoreDesk
from ptycho_streamd.stored_frames import StoredFrames
from ptycho_streamd.stored_images import stored_image

MAX_PENDING = 256
"""Requests that stages are at; one more is refused."""

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Step:
    """What one stage does for a command: its own name for it, and the seconds it may take."""

    stage: str
    command: str
    limit_s: float

    def until_s(self) -> float:
        """When it has taken too long, if it begins now; of the monotonic clock."""
        return time.monotonic() + self.limit_s


FORWARDED: dict[str, Step] = {
    "start": Step("ingest", "start_scan", 10.0),
    "stop": Step("ingest", "stop_scan", 10.0),
    "abort": Step("ingest", "abort_scan", 10.0),
    # The registry of models imports torch, which this process does without.
    "models": Step("reconstruct", "models", 10.0),
    "use_model": Step("reconstruct", "use_model", 30.0),
    "rollback_model": Step("reconstruct", "rollback_model", 30.0),
    "export": Step("reconstruct", "export", 600.0),
    "snapshot": Step("reconstruct", "snapshot", 120.0),
}
SET_VIEW = Step("ingest", "set_view", 10.0)
REPROCESS = Step("reconstruct", "reprocess", 30.0)
STEP_ARGUMENTS: dict[str, tuple[str, ...]] = {
    "set_view": ("scan_id", *VIEW_WORDS),
    "reprocess": ("scan_id", "probe", "model"),
}
"""Which of a command's arguments its stages get, where several share them."""
OF_IMAGES = ("export", "snapshot", "reprocess")
"""Commands about a scan's image."""


@dataclass(frozen=True, slots=True)
class _Pending:
    """A request that a stage is at; ``told`` is what the stages before it have answered.

    ``request`` is None where the daemon itself has asked.
    """

    request: Request | None
    stage: str
    deadline_s: float
    following: tuple[Step, ...]
    told: dict[str, Any]


class Requests:
    """Answers every request that the control server has taken, at once or when a stage has.

    Args:
        local: commands that the supervisor itself answers, by name; they take the arguments and
            return plain values or raise :class:`ControlError`.
        catalogue: of the scans, for commands that go through several stages.
        desk: answers commands that take long to read.
        readable: which files requests may name, as the settings are now.
    """

    def __init__(
        self,
        control: ControlServer,
        bus: Bus,
        children: dict[str, Child],
        local: dict[str, Callable[[dict[str, Any]], Any]],
        catalogue: Catalogue,
        desk: StoreDesk,
        readable: Callable[[], ReadableFiles],
    ) -> None:
        self._readable = readable
        self._control = control
        self._bus = bus
        self._children = children
        self._local = local
        self._catalogue = catalogue
        self._desk = desk
        self._pending: dict[int, _Pending] = {}
        self._next_id = 1

    def serve(self) -> None:
        """Take what has come and answer or forward it; give up on what takes too long."""
        for request in self._control.poll():
            self._guarded(request, self._dispatch)
        for request, outcome in self._desk.answered():
            self._guarded(request, lambda one, told=outcome: self._control.reply(one, told()))
        now_s = time.monotonic()
        for request_id, pending in list(self._pending.items()):
            if now_s > pending.deadline_s:
                self._fail(request_id, "timeout", f"stage {pending.stage} did not answer in time")

    def _guarded(self, request: Request, action: Callable[[Request], None]) -> None:
        """Do something for a request, and fail it if that does not work."""
        try:
            action(request)
        except ControlError as error:
            self._control.fail(request, error.code, str(error))
        except ScanNotFound as error:
            self._control.fail(request, "not_found", str(error))
        except PtychoStreamError as error:
            self._control.fail(request, "failed", str(error))
        except Exception as error:  # a fault of ours must not leave a client without answer
            log.exception("command %s failed", request.command)
            self._control.fail(request, "internal", f"{request.command} failed: {error!r}")

    def answered(self, message: Answer | Refusal) -> None:
        """Pass a stage's answer on; one that comes too late is dropped."""
        pending = self._pending.pop(message.request_id, None)
        if pending is None:
            log.warning("stage %s answered request %d late", message.stage, message.request_id)
        elif isinstance(message, Refusal):
            self._refused(pending, message.code, message.message)
        elif pending.request is None:
            log.info("stage %s: done: %s", message.stage, message.result)
        elif pending.following:
            try:
                self._send(pending.request, pending.following, pending.told | message.result)
            except ControlError as error:
                self._control.fail(pending.request, error.code, str(error))
        else:
            told = pending.told | message.result if pending.told else message.result
            self._control.reply(pending.request, told)

    def stage_ended(self, stage: str) -> None:
        """Fail what a stage took with it."""
        for request_id, pending in list(self._pending.items()):
            if pending.stage == stage:
                self._fail(
                    request_id, "unavailable", f"stage {stage} ended meanwhile: try once more"
                )

    def _dispatch(self, request: Request) -> None:
        if answer := self._local.get(request.command):
            self._control.reply(request, answer(request.arguments))
            return
        if request.command in self._desk:
            self._desk.submit(request)
            return
        header = self._header_of(request.arguments.get("scan_id"))
        if header is not None and header.detector and request.command in OF_IMAGES:
            raise ControlError(
                "bad_arguments",
                f"scan {header.scan_id} is of detector {header.detector}, whose frames are stored "
                f"and not reconstructed; it is beside scan {header.beside}",
            )
        if request.command == "reprocess":
            self._reprocess(request)
            return
        if request.command not in FORWARDED:
            known = ", ".join(sorted([*self._local, *self._desk.commands, *FORWARDED, "reprocess"]))
            raise ControlError(
                "unknown_command", f"there is no command {request.command!r}; known are: {known}"
            )
        step = FORWARDED[request.command]
        if header is not None and step.stage == "ingest":
            step = replace(step, stage=stage_of_detector("ingest", header.detector))
        self._send(request, (step,), {})

    def _header_of(self, scan_id: str | None) -> ScanHeader | None:
        """Of the scan that a request names, if it names one that is in the store."""
        if scan_id is None:
            return None
        try:
            return read_header(self._catalogue.directory(scan_id))
        except ScanNotFound:  # armed by hand, or none: whoever is asked says so
            return None

    def _reprocess(self, request: Request) -> None:
        """First the view, which ingest writes; then the image, which is made anew with it."""
        scan_id = _named_or_newest(self._catalogue, request.arguments["scan_id"])
        paths = self._checked_paths(request.arguments)
        request = replace(request, arguments={**request.arguments, **paths, "scan_id": scan_id})
        self._running(REPROCESS.stage)  # else the view would change and nothing come of it
        steps = (REPROCESS,)
        if asks_for_a_view(request.arguments):
            steps = (SET_VIEW, REPROCESS)
        self._send(request, steps, {})

    def _checked_paths(self, arguments: dict[str, Any]) -> dict[str, str]:
        """The arguments that name files, as paths that may be read."""
        named = {name: arguments[name] for name in ("probe", *FILES) if arguments[name] is not None}
        readable = self._readable()
        return {
            name: readable.checked(name, source)
            for name, source in named.items()
            if source not in (NONE, DARK_FRAMES)
        }

    def _send(self, request: Request, steps: tuple[Step, ...], told: dict[str, Any]) -> None:
        step, *following = steps
        pid = self._running(step.stage)
        if len(self._pending) >= MAX_PENDING:
            raise ControlError(
                "unavailable", f"{MAX_PENDING} requests wait for stages: try again in a second"
            )
        arguments = request.arguments
        if wanted := STEP_ARGUMENTS.get(step.command):
            arguments = {name: arguments[name] for name in wanted}
        what = _Pending(request, step.stage, step.until_s(), tuple(following), told)
        self._hand_over(pid, step, arguments, what)

    def _running(self, stage: str) -> int:
        """The process of a stage that can be asked."""
        child = self._children.get(stage)
        if child is None or not child.beating or child.pid is None:
            raise ControlError(
                "unavailable", f"stage {stage} is not running just now: try again in a second"
            )
        return child.pid

    def order(self, step: Step, arguments: dict[str, Any]) -> bool:
        """Have a stage do something that nobody has asked for; whether it could be told.

        What it answers goes into the log.
        """
        try:
            pid = self._running(step.stage)
        except ControlError:
            return False
        self._hand_over(pid, step, arguments, _Pending(None, step.stage, step.until_s(), (), {}))
        return True

    def _hand_over(self, pid: int, step: Step, arguments: dict[str, Any], what: _Pending) -> None:
        request_id = self._next_id
        self._next_id += 1
        self._pending[request_id] = what
        self._bus.send(step.stage, pid, StageRequest(request_id, step.command, arguments))

    def _fail(self, request_id: int, code: str, message: str) -> None:
        self._refused(self._pending.pop(request_id), code, message)

    def _refused(self, pending: _Pending, code: str, message: str) -> None:
        if pending.request is None:
            log.error("stage %s refused an order (%s): %s", pending.stage, code, message)
        else:
            self._control.fail(pending.request, code, message)


def store_commands(catalogue: Catalogue) -> dict[str, Callable[[dict[str, Any]], Any]]:
    """The commands that the scan store alone can answer."""

    def scans(arguments: dict[str, Any]) -> list[dict[str, Any]]:
        return [_plain(header) for header in catalogue.scans()[: max(arguments["limit"], 0)]]

    def scan(arguments: dict[str, Any]) -> dict[str, Any]:
        scan_id = _named_or_newest(catalogue, arguments.get("scan_id"))
        with catalogue.open(scan_id) as reader:
            return _plain(reader.header) | {
                "committed": reader.committed,
                "durable": reader.durable,
                "pairs": reader.pair_count,
                "positions": reader.position_count,
            }

    def snapshots(arguments: dict[str, Any]) -> list[dict[str, Any]]:
        scan_id = _named_or_newest(catalogue, arguments["scan_id"])
        return list_snapshots(catalogue.directory(scan_id))

    def history(arguments: dict[str, Any]) -> dict[str, Any]:
        scan_id = _named_or_newest(catalogue, arguments["scan_id"])
        entries = read_history(catalogue.directory(scan_id))
        return {"scan_id": scan_id, "entries": [asdict(e) for e in _spread(entries, arguments)]}

    return {"scans": scans, "scan": scan, "snapshots": snapshots, "history": history}


def desk_commands(catalogue: Catalogue) -> dict[str, Command]:
    """The commands that read frames and images, which may take a while."""
    frames = StoredFrames(catalogue)

    def frame(arguments: dict[str, Any]) -> dict[str, Any]:
        scan_id = _named_or_newest(catalogue, arguments["scan_id"])
        return frames.frame(scan_id, arguments["frame"], arguments["look"])

    def image(arguments: dict[str, Any]) -> dict[str, Any]:
        scan_id = _named_or_newest(catalogue, arguments["scan_id"])
        return stored_image(catalogue.directory(scan_id), {**arguments, "scan_id": scan_id})

    return {"frame": frame, "image": image}


def _named_or_newest(catalogue: Catalogue, scan_id: str | None) -> str:
    """The scan that a request is about.

    Raises:
        ControlError: there is none at all.
        ScanNotFound: there is none of that name.
    """
    if scan_id is not None:
        read_header(catalogue.directory(scan_id))
        return scan_id
    newest = catalogue.latest()
    if newest is None:
        raise ControlError("not_found", "there is no scan in the store yet")
    return newest.scan_id


def _spread(entries: list[HistoryEntry], arguments: dict[str, Any]) -> list[HistoryEntry]:
    """At most ``limit`` of them, evenly over the whole, the first and the last among them."""
    limit: int = arguments["limit"]
    if len(entries) <= limit:
        return entries
    return [entries[round(i * (len(entries) - 1) / (limit - 1))] for i in range(limit)]


def _plain(header: ScanHeader) -> dict[str, Any]:
    return json.loads(header.to_json())
