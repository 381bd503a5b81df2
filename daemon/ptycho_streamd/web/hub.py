"""What all pages share: the daemon's condition, lists of scans, models and jobs, and the sources.

Everything is asked for while a page is open, by one task for all pages, over the public protocol.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from dataclasses import asdict, dataclass
from typing import Any

from ptycho_stream.client import AsyncDaemon
from ptycho_stream.errors import PtychoStreamError
from ptycho_stream.keys import ClientKeys, load_private_key
from ptycho_stream.settings import SecuritySettings, Settings, reachable
from ptycho_stream.wire.stored import StoredFrame
from ptycho_streamd.web.alarms import Alarm, RestartWatch, alarms
from ptycho_streamd.web.sources import KeptSource, LiveSource, Source
from ptycho_streamd.web.thumbnails import Thumbnails

STATUS_S = 1.0
LISTS_S = 5.0
BUSY_LISTS_S = 1.0
FRAME_S = 1.0
MAX_SCANS = 100
MAX_JOBS = 20
MAX_SOURCES = 12
"""Different scans and snapshots that pages may look at at the same time."""
UNUSED_S = 30.0
_AT_ONCE = frozenset({"abort", "cancel", "finetune", "stop"})
_LONG = frozenset({"export", "reprocess", "rollback_model", "snapshot", "use_model"})
"""Commands that change something. Those that may take minutes must not hold up an abort."""

log = logging.getLogger(__name__)
SourceKey = tuple[str, str | None]


@dataclass(slots=True)
class _Used:
    """A source that pages look at."""

    source: Source
    task: asyncio.Task[None]
    used_at_s: float


class Hub:
    """Asks the daemon on behalf of all pages, with the daemon's own key where there are keys.

    Args:
        settings: of the daemon.

    Raises:
        KeyFileError: the key cannot be used.

    Attributes:
        told: by name (``status``, ``scans``, ``models``, ``jobs``): a number that grows with each
            change, and the newest value, JSON.
        pages: how many are open.
        newest: the image of the newest scan.
    """

    def __init__(self, settings: Settings) -> None:
        self._results, self._keys = settings.results, _own_keys(settings.security)
        endpoint = reachable(settings.control.endpoint)
        # Calls of one client take turns.
        self._watcher = AsyncDaemon(endpoint, keys=self._keys)
        self._reader = AsyncDaemon(endpoint, keys=self._keys)
        self._at_once = AsyncDaemon(endpoint, keys=self._keys)
        self._long = AsyncDaemon(endpoint, keys=self._keys)
        self.told: dict[str, tuple[int, Any]] = {}
        self.pages = 0
        self._watched = asyncio.Event()
        self.newest = LiveSource(self._results, self._keys)
        self._used: dict[SourceKey, _Used] = {}
        self.thumbnails = Thumbnails(self._reader)
        self._restarts = RestartWatch()
        self._lists_due_s = 0.0
        self._frames: dict[tuple[str, int | None, str], tuple[float, StoredFrame]] = {}

    async def run(self) -> None:
        """Until it is cancelled."""
        try:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self.newest.run())
                tasks.create_task(self._repeat(self._watch_status, STATUS_S))
                tasks.create_task(self._repeat(self._watch_lists, BUSY_LISTS_S))
                tasks.create_task(self._repeat(self._draw_thumbnail, 0.2))
        finally:
            for used in self._used.values():
                used.task.cancel()
            for daemon in (self._watcher, self._reader, self._at_once, self._long):
                daemon.close()

    def page_opened(self) -> None:
        """There is one page more."""
        self.pages += 1
        self._watched.set()

    def page_closed(self) -> None:
        """There is one page less."""
        self.pages -= 1
        if not self.pages:
            self._watched.clear()

    async def command(self, name: str, arguments: dict[str, Any]) -> Any:
        """Have the daemon do something that a person has asked for.

        Raises:
            PtychoStreamError: it refused, failed, or does not answer.
        """
        if name in _AT_ONCE:
            result = await self._at_once.call(name, arguments)
        elif name in _LONG:
            result = await self._long.call(name, arguments)
        else:
            return await self._reader.call(name, arguments)
        self._lists_due_s = 0.0
        return result

    # -- sources ------------------------------------------------------------------------------

    def source(self, scan_id: str | None, snapshot: str | None) -> Source | None:
        """Where the image of a scan comes from now; None: too many are looked at."""
        newest = self.newest
        if snapshot is None:
            of_newest = newest.image is not None and newest.image.scan_id == scan_id
            if scan_id is None or of_newest:
                return newest
        if scan_id is None:
            if newest.image is None:
                return newest
            scan_id = newest.image.scan_id
        if snapshot is None and scan_id in newest.held:
            live = self._opened(
                ("live", scan_id), lambda: LiveSource(self._results, self._keys, scan_id)
            )
            if isinstance(live, LiveSource) and live.ended_at not in (None, newest.held[scan_id]):
                self._close(("live", scan_id))  # it was made anew since
            return live
        key = (scan_id, snapshot or "")
        return self._opened(key, lambda: KeptSource(self._reader, scan_id, snapshot))

    def _opened(self, key: SourceKey, make: Callable[[], Source]) -> Source | None:
        now_s = time.monotonic()
        used = self._used.get(key)
        if used is not None and used.task.done() and used.task.exception() is not None:
            log.error("a source of pictures failed", exc_info=used.task.exception())
            self._close(key)
            used = None
        if used is None:
            if len(self._used) >= MAX_SOURCES and not self._close_unused(0.5):
                return None
            source = make()
            used = self._used[key] = _Used(source, asyncio.create_task(source.run()), now_s)
        used.used_at_s = now_s
        return used.source

    def _close_unused(self, unused_s: float) -> bool:
        """Close sources that no page has looked at for so long; whether there were any."""
        now_s = time.monotonic()
        unused = [key for key, held in self._used.items() if now_s - held.used_at_s > unused_s]
        for key in unused:
            self._close(key)
        return bool(unused)

    def _close(self, key: SourceKey) -> None:
        used = self._used.pop(key, None)
        if used is not None:
            used.task.cancel()

    async def frame(self, scan_id: str, number: int | None, look: str) -> StoredFrame:
        """A diffraction frame; the newest one is asked for once a second for all pages.

        Raises:
            PtychoStreamError: there is none.
        """
        key = (scan_id, number, look)
        known = self._frames.get(key)
        now_s = time.monotonic()
        if known is not None and (number is not None or now_s - known[0] < FRAME_S):
            return known[1]
        frame = await self._reader.frame(scan_id, number, look=look)
        self._frames[key] = (now_s, frame)
        while len(self._frames) > MAX_SOURCES:
            del self._frames[next(iter(self._frames))]
        return frame

    # -- what is told -------------------------------------------------------------------------

    async def _repeat(self, action: Callable[[], Awaitable[None]], pause_s: float) -> None:
        """Do something again and again while a page is open."""
        while True:
            await self._watched.wait()
            await action()
            await asyncio.sleep(pause_s)

    async def _watch_status(self) -> None:
        self._close_unused(UNUSED_S)
        try:
            status = await self._watcher.status()
        except PtychoStreamError as error:
            alarm = Alarm("bad", "The daemon does not answer", str(error))
            self._tell("status", {"state": "silent", "alarms": [asdict(alarm)]})
            return
        restarted = self._restarts.lately(status["stages"], time.monotonic())
        jobs = self.told.get("jobs", (0, []))[1]
        found = alarms(status, self.newest.image, jobs, restarted)
        self._tell("status", _condition(status) | {"alarms": [asdict(alarm) for alarm in found]})

    async def _watch_lists(self) -> None:
        """Lists change seldom: they are read every few seconds, and when something has happened."""
        busy = self.told.get("status", (0, {}))[1].get("busy", False)
        now_s = time.monotonic()
        if now_s < self._lists_due_s:
            return
        self._lists_due_s = now_s + (BUSY_LISTS_S if busy else LISTS_S)
        for name, ask in (
            ("scans", lambda: self._watcher.scans(MAX_SCANS)),
            ("models", self._watcher.models),
            ("jobs", lambda: self._watcher.jobs(MAX_JOBS)),
        ):
            try:
                found = await ask()
            except PtychoStreamError as error:
                log.debug("%s: %s", name, error)
                continue
            if name == "scans":
                # Those of detectors that are only stored have no image.
                found = [header for header in found if not header["detector"]]
                self.thumbnails.of(found)
                found = [self._scan(header) for header in found]
            self._tell(name, found)

    async def _draw_thumbnail(self) -> None:
        if await self.thumbnails.draw(self.newest.image):
            self._lists_due_s = min(self._lists_due_s, time.monotonic() + 0.3)

    def _scan(self, header: dict[str, Any]) -> dict[str, Any]:
        """What a page's list says of a scan."""
        scan_id = header["scan_id"]
        version, verdict = self.thumbnails.known(scan_id)
        sample = header["metadata"].get("sample", "")
        return {
            "scan_id": scan_id,
            "series": header["series"],
            "sample": str(sample)[:80],
            "state": header["state"],
            "created_ns": header["created_ns"],
            "expected": header["expected_frames"],
            "frames": header["counts"].get("frames"),
            "reason": header["reason"][:400],
            "thumbnail": version,
            "verdict": verdict,
        }

    def _tell(self, name: str, value: Any) -> None:
        version, before = self.told.get(name, (0, None))
        if value != before:
            self.told[name] = (version + 1, value)


def _own_keys(security: SecuritySettings) -> ClientKeys | None:
    if security.key_path is None:
        return None
    own = load_private_key(security.key_path)
    return ClientKeys(own, own.public)


def _condition(status: dict[str, Any]) -> dict[str, Any]:
    """The figures of a status that a page shows."""
    stages = status["stages"]
    ingest = stages.get("ingest", {}).get("status", {})
    reconstruct = stages.get("reconstruct", {}).get("status", {})
    running = status["training"]["running"]
    return {
        "state": status["state"],
        "version": status["version"],
        "uptime_s": 10 * round(status["uptime_s"] / 10),
        "stages": {
            name: {"alive": stage["alive"], "restarts": stage["restarts"]}
            for name, stage in stages.items()
        },
        "summary": ingest.get("summary", ""),
        "scan_state": ingest.get("state", ""),
        "running_scan_id": ingest.get("scan_id"),
        "received_per_s": round(ingest.get("frames_per_s", 0.0), 1),
        "reconstructed_per_s": round(reconstruct.get("frames_per_s", 0.0), 1),
        "backlog_frames": reconstruct.get("backlog_frames", 0),
        "latency_p50_ms": round(reconstruct.get("latency_p50_ms", 0.0)),
        "latency_p99_ms": round(reconstruct.get("latency_p99_ms", 0.0)),
        "model": reconstruct.get("model"),
        "device": reconstruct.get("device"),
        "training": running,
        "queued": status["training"]["queued"],
        "busy": running is not None or ingest.get("state", "idle") != "idle",
    }
