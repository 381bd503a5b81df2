"""What each control command does: answered here from the store, or handed on to a stage.

Used by the supervisor, which owns the control socket.  ``docs/protocol.md`` describes the commands
for those who send them.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ptycho_stream.errors import ControlError, PtychoStreamError, ScanNotFound
from ptycho_stream.scans.catalogue import Catalogue
from ptycho_stream.scans.header import ScanHeader
from ptycho_streamd.bus import Answer, Bus, Refusal, StageRequest
from ptycho_streamd.child import Child
from ptycho_streamd.control import ControlServer, Request

FORWARDED: dict[str, tuple[str, str, float]] = {
    "start": ("ingest", "start_scan", 10.0),
    "stop": ("ingest", "stop_scan", 10.0),
    "abort": ("ingest", "abort_scan", 10.0),
    "endpoints": ("ingest", "endpoints", 10.0),
    # The registry of models imports torch, which this process does without.
    "models": ("reconstruct", "models", 10.0),
    "use_model": ("reconstruct", "use_model", 30.0),
    "rollback_model": ("reconstruct", "rollback_model", 30.0),
    "export": ("reconstruct", "export", 120.0),
}
"""Command -> (stage, the stage's name for it, seconds it may take)."""

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Pending:
    request: Request
    stage: str
    deadline_s: float


class Requests:
    """Answers every request that the control server has taken, at once or when a stage has.

    Args:
        local: commands that the supervisor itself answers, by name; they take the arguments and
            return plain values or raise :class:`ControlError`.
    """

    def __init__(
        self,
        control: ControlServer,
        bus: Bus,
        children: dict[str, Child],
        local: dict[str, Callable[[dict[str, Any]], Any]],
    ) -> None:
        self._control = control
        self._bus = bus
        self._children = children
        self._local = local
        self._pending: dict[int, _Pending] = {}
        self._next_id = 1

    def serve(self) -> None:
        """Take what has come and answer or forward it; give up on what takes too long."""
        for request in self._control.poll():
            try:
                self._dispatch(request)
            except ControlError as error:
                self._control.fail(request, error.code, str(error))
            except ScanNotFound as error:
                self._control.fail(request, "not_found", str(error))
            except PtychoStreamError as error:
                self._control.fail(request, "failed", str(error))
            except Exception as error:  # a fault of ours must not leave a client without answer
                log.exception("command %s failed", request.command)
                self._control.fail(request, "internal", f"{request.command} failed: {error!r}")
        now_s = time.monotonic()
        for request_id, pending in list(self._pending.items()):
            if now_s > pending.deadline_s:
                self._fail(request_id, "timeout", f"stage {pending.stage} did not answer in time")

    def answered(self, message: Answer | Refusal) -> None:
        """Pass a stage's answer on; one that comes too late is dropped."""
        pending = self._pending.pop(message.request_id, None)
        if pending is None:
            log.warning("stage %s answered request %d late", message.stage, message.request_id)
        elif isinstance(message, Answer):
            self._control.reply(pending.request, message.result)
        else:
            self._control.fail(pending.request, message.code, message.message)

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
        if request.command not in FORWARDED:
            known = ", ".join(sorted([*self._local, *FORWARDED]))
            raise ControlError(
                "unknown_command", f"there is no command {request.command!r}; known are: {known}"
            )
        stage, command, limit_s = FORWARDED[request.command]
        child = self._children.get(stage)
        if child is None or not child.beating or child.pid is None:
            raise ControlError(
                "unavailable", f"stage {stage} is not running just now: try again in a second"
            )
        request_id = self._next_id
        self._next_id += 1
        self._pending[request_id] = _Pending(request, stage, time.monotonic() + limit_s)
        self._bus.send(stage, child.pid, StageRequest(request_id, command, request.arguments))

    def _fail(self, request_id: int, code: str, message: str) -> None:
        self._control.fail(self._pending.pop(request_id).request, code, message)


def store_commands(catalogue: Catalogue) -> dict[str, Callable[[dict[str, Any]], Any]]:
    """The commands that the scan store alone can answer."""

    def scans(arguments: dict[str, Any]) -> list[dict[str, Any]]:
        return [_plain(header) for header in catalogue.scans()[: max(arguments["limit"], 0)]]

    def scan(arguments: dict[str, Any]) -> dict[str, Any]:
        scan_id = arguments.get("scan_id")
        if scan_id is None:
            newest = catalogue.latest()
            if newest is None:
                raise ControlError("not_found", "there is no scan in the store yet")
            scan_id = newest.scan_id
        with catalogue.open(scan_id) as reader:
            return _plain(reader.header) | {
                "committed": reader.committed,
                "durable": reader.durable,
                "pairs": reader.pair_count,
                "positions": reader.position_count,
            }

    return {"scans": scans, "scan": scan}


def _plain(header: ScanHeader) -> dict[str, Any]:
    return json.loads(header.to_json())
