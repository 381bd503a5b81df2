"""Stage 2: scan store -> network -> canvas -> subscribers.

Reads the store behind progress of its own and never holds up ingest: what it cannot keep up with
waits on disk.  Started by the supervisor as ``python -m ptycho_streamd.reconstruct``.
"""

from __future__ import annotations

import json
import logging
import sys
import time
from collections import deque
from pathlib import Path
from typing import Any

import numpy as np
import torch
import zmq
from numpy.typing import NDArray

from ptycho_stream.errors import (
    FileFormatError,
    GeometryError,
    ModelError,
    ProbeError,
    PtychoStreamError,
    ScanNotFound,
    StoreError,
)
from ptycho_stream.files.images import save_png
from ptycho_stream.models.registry import ModelRegistry
from ptycho_stream.reconstruct.recipe import Recipe, load_recipe
from ptycho_stream.reconstruct.scan_image import ScanImage
from ptycho_stream.results import Image, ImageState
from ptycho_stream.scans.catalogue import Catalogue
from ptycho_stream.scans.folders import scan_directory
from ptycho_stream.scans.leases import Lease
from ptycho_stream.scans.reader import ScanReader
from ptycho_stream.scans.ulid import new_scan_id
from ptycho_stream.settings import Settings, load_settings
from ptycho_streamd.bus import StageRequest
from ptycho_streamd.publish import Publisher
from ptycho_streamd.reconstruct_metrics import ReconstructMetrics
from ptycho_streamd.stage import Stage, run_stage

log = logging.getLogger(__name__)

DONE_FILE = "reconstruct.done"
IDLE_POLL_MS = 2
HEADER_POLL_S = 0.02
RECIPE_RETRY_S = 2.0
DRAIN_S = 2.0
"""After a stop, how long pairs that are in the store are still reconstructed."""
SAVE_SHARE = 0.05
"""At most this share of the time goes into saving states."""


class OpenScan:
    """A scan whose image may still grow, and what is due for it."""

    def __init__(self, image: ScanImage, lease: Lease) -> None:
        self.image = image
        self.lease = lease
        self.unpublished: list[NDArray[np.int64]] = []
        self.changed = True
        self.saved_at_s = time.monotonic()
        self.save_took_s = 0.0
        self.unsaved = False
        self.header_read_at_s = 0.0

    @property
    def reader(self) -> ScanReader:
        """The scan in the store."""
        return self.image.reader

    def refresh(self, now_s: float) -> None:
        """Look, now and then, whether the scan's header has changed."""
        if now_s - self.header_read_at_s >= HEADER_POLL_S:
            self.header_read_at_s = now_s
            self.changed |= self.reader.refresh()

    def ready(self, batch_frames: int, deadline_ns: float) -> bool:
        """Whether a batch is full, late, or the last one."""
        if not self.image.has_work:
            return False
        backlog = self.image.backlog
        if backlog == 0 or backlog >= batch_frames or self.reader.header.sealed:
            return True
        oldest = self.image.oldest_pending_monotonic_ns()
        now = time.monotonic_ns()
        # Times of before a reboot lie in the future, or far back: such pairs are late in any case.
        return oldest is None or not 0 <= now - oldest < deadline_ns


class ReconstructStage:
    """The loop of the stage: a batch, then whatever is due."""

    def __init__(self, stage: Stage, config: Path, settings: Settings) -> None:
        torch.set_num_threads(settings.reconstruct.threads)
        self._stage = stage
        self._config = config
        self._settings = settings
        self._metrics = ReconstructMetrics()
        self._catalogue = Catalogue(settings.data.directory)
        self._open: dict[str, OpenScan] = {}
        self._recipe: Recipe | None = None
        self._recipe_tried_at_s = float("-inf")
        self._problem = ""
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._publisher = Publisher(self._context, settings.results, new_scan_id())
        self._poller = zmq.Poller()
        for socket in (stage.socket, *self._publisher.sockets):
            self._poller.register(socket, zmq.POLLIN)
        self._published_at_s = 0.0
        self._catalogue_seen = False
        self._shown: ImageState | None = None
        self._latencies_ms: deque[float] = deque(maxlen=2000)

    def run(self) -> None:
        """Until the supervisor says stop."""
        try:
            while not self._stage.stopping:
                if not self.turn():
                    self._poller.poll(IDLE_POLL_MS)
            self._drain()
        finally:
            self._publisher.close()
            self._context.term()

    def turn(self) -> bool:
        """One batch, if one is ready, and all that is due; whether there was a batch."""
        for request in self._stage.requests():
            self._answer(request)
        if self._stage.reload_requested:
            self._reload()
        self._find_scans()
        worked = self._work()
        self._publish_if_due()
        self._publisher.serve()
        self._finish_scans()
        self._save_if_due()
        self._stage.beat(self._status(), self._metrics.registry)
        return worked

    # -- recipe and scans ---------------------------------------------------------------------

    def _reload(self) -> None:
        self._stage.reloaded()
        self._settings = load_settings(self._config)
        self._recipe_tried_at_s = float("-inf")
        self._load_recipe()
        log.info("settings read again from %s", self._config)

    def _load_recipe(self) -> None:
        """Load network and probe; on failure keep those in use, and say what is wrong."""
        now_s = time.monotonic()
        if now_s - self._recipe_tried_at_s < RECIPE_RETRY_S:
            return
        self._recipe_tried_at_s = now_s
        try:
            recipe = load_recipe(self._settings)
        except (ProbeError, ModelError) as error:
            if str(error) != self._problem:
                log.error("nothing is reconstructed for now: %s", error)
            self._problem = str(error)
            self._metrics.recipe_failures.inc()
            return
        recipe.warm_up()
        self._problem = ""
        self._recipe = recipe
        for scan in self._open.values():
            scan.image.use(recipe)
        log.info("reconstructing with model %s on %s", recipe.model, recipe.device)

    def _find_scans(self) -> None:
        if self._recipe is None:
            self._load_recipe()
        if self._recipe is None or (self._catalogue_seen and not self._catalogue.changed()):
            return
        headers = self._catalogue.scans()
        for header in reversed(headers):
            if header.scan_id not in self._open:
                self._open_scan(header.scan_id)
        if not self._catalogue_seen and headers and self._shown is None:
            self._show_last(headers[0].scan_id)
        self._catalogue_seen = True

    def _open_scan(self, scan_id: str) -> None:
        if (self._directory(scan_id) / DONE_FILE).exists():
            return
        try:
            lease = self._catalogue.lease(scan_id, "reconstruct")
        except ScanNotFound:
            return  # retired in this moment
        try:
            image = self._scan_image(scan_id)
        except (GeometryError, StoreError) as error:
            lease.release()
            self._give_up(scan_id, error)
            return
        self._open[scan_id] = OpenScan(image, lease)
        self._latencies_ms.clear()
        log.info("scan %s: image begins", scan_id)

    def _scan_image(self, scan_id: str) -> ScanImage:
        assert self._recipe is not None
        reader = self._catalogue.open(scan_id)
        try:
            return ScanImage(reader, self._recipe, self._settings.reconstruct.tile_px)
        except PtychoStreamError:
            reader.close()
            raise

    def _show_last(self, scan_id: str) -> None:
        """Publish the last finished image again, so that clients of a restarted daemon get it."""
        if scan_id in self._open:
            return
        try:
            image = self._scan_image(scan_id)
        except (GeometryError, StoreError) as error:
            log.info("scan %s: its image cannot be shown again: %s", scan_id, error)
            return
        state = image.image(final=True)
        image.reader.close()
        if state is not None:
            self._publisher.publish(state)
            self._shown = state

    def _give_up(self, scan_id: str, error: PtychoStreamError) -> None:
        """A scan that cannot be reconstructed: its frames stay, its image ends here."""
        log.error("scan %s is not reconstructed: %s", scan_id, error)
        self._metrics.scans_failed.inc()
        self._problem = f"scan {scan_id}: {error}"
        self._mark_done(scan_id)
        scan = self._open.pop(scan_id, None)
        if scan is not None:
            self._close(scan)

    def _directory(self, scan_id: str) -> Path:
        return scan_directory(self._settings.data.directory, scan_id)

    def _mark_done(self, scan_id: str) -> None:
        (self._directory(scan_id) / DONE_FILE).touch()

    # -- work ---------------------------------------------------------------------------------

    def _work(self) -> bool:
        now_s = time.monotonic()
        deadline_ns = self._settings.reconstruct.batch_deadline_ms * 1e6
        newest_first = sorted(self._open.items(), reverse=True)
        for scan_id, scan in newest_first:
            scan.refresh(now_s)
            if not scan.ready(self._settings.reconstruct.batch_frames, deadline_ns):
                continue
            try:
                shown = scan.image.step(self._on_damaged)
            except (GeometryError, StoreError) as error:
                self._give_up(scan_id, error)
                return True
            self._metrics.count_batch(len(shown))
            scan.unpublished.append(shown)
            scan.changed = scan.unsaved = True
            return True
        return False

    def _on_damaged(self, slots: list[int]) -> None:
        log.error("stored frames whose checksums do not match are left out: slots %s", slots)
        self._metrics.frames_damaged.inc(len(slots))

    # -- results ------------------------------------------------------------------------------

    def _publish_if_due(self) -> None:
        now_s = time.monotonic()
        if now_s - self._published_at_s < self._settings.results.publish_interval_ms * 1e-3:
            return
        for _, scan in sorted(self._open.items()):
            if scan.changed:
                self._published_at_s = now_s
                self._publish(scan, final=False)

    def _publish(self, scan: OpenScan, *, final: bool) -> None:
        scan.changed = False
        state = scan.image.image(final)
        if state is None:
            return
        self._publisher.publish(state)
        self._shown = state
        now_ns = time.monotonic_ns()
        for paired_ns in scan.unpublished:
            for latency_ns in (now_ns - paired_ns).tolist():
                if latency_ns >= 0:  # else it was received before a reboot
                    self._metrics.latency.observe(latency_ns * 1e-9)
                    self._latencies_ms.append(latency_ns * 1e-6)
        scan.unpublished.clear()

    def _finish_scans(self) -> None:
        for scan_id, scan in list(self._open.items()):
            if not scan.reader.header.sealed or scan.image.has_work:
                continue
            scan.reader.refresh()
            self._publish(scan, final=True)
            self._save(scan)
            self._export_finished(scan_id)
            self._mark_done(scan_id)
            log.info(
                "scan %s: %s, %d frames in the image",
                scan_id,
                scan.reader.header.state,
                scan.image.counts()["reconstructed"],
            )
            self._close(self._open.pop(scan_id))

    def _close(self, scan: OpenScan) -> None:
        scan.reader.close()
        scan.lease.release()

    def _save_if_due(self) -> None:
        now_s = time.monotonic()
        for scan in self._open.values():
            interval_s = max(
                self._settings.reconstruct.save_interval_s, scan.save_took_s / SAVE_SHARE
            )
            if scan.unsaved and now_s - scan.saved_at_s >= interval_s:
                self._save(scan)

    def _save(self, scan: OpenScan) -> None:
        started_s = time.monotonic()
        try:
            scan.image.save()
        except StoreError as error:
            log.error("%s", error)
            self._metrics.saves_failed.inc()
        scan.unsaved = False
        scan.saved_at_s = time.monotonic()
        scan.save_took_s = scan.saved_at_s - started_s
        self._metrics.save_seconds.set(scan.save_took_s)

    def _drain(self) -> None:
        """After stop: what the store holds already, for a while; the rest at the next start."""
        until_s = time.monotonic() + DRAIN_S
        while time.monotonic() < until_s and self._open:
            self._work()
            self._finish_scans()
        for scan in self._open.values():
            if scan.changed:
                self._publish(scan, final=False)
            if scan.unsaved:
                self._save(scan)
            self._close(scan)
        self._stage.beat(self._status(), self._metrics.registry, now=True)

    # -- requests -----------------------------------------------------------------------------

    def _answer(self, request: StageRequest) -> None:
        try:
            match request.command:
                case "export":
                    self._stage.reply(request, self._export(**request.arguments))
                case "models":
                    self._stage.reply(request, self._models())
                case _:
                    self._stage.fail(
                        request, "unknown_command", f"reconstruct knows no {request.command!r}"
                    )
        except PtychoStreamError as error:
            self._stage.fail(request, "failed", str(error))
        except TypeError as error:
            self._stage.fail(request, "bad_request", f"wrong arguments: {error}")

    def _models(self) -> list[dict[str, Any]]:
        in_use = self._recipe.model if self._recipe else None
        return [
            json.loads(manifest.to_json()) | {"in_use": manifest.name == in_use}
            for manifest in ModelRegistry(self._settings.model.registry).list()
        ]

    def _export(self, scan_id: str | None = None, formats: list[str] | None = None) -> Any:
        state = self._state_of(scan_id)
        paths = self._write(state, tuple(formats or ("npz", "png")))
        return {"scan_id": state.scan_id, "paths": [str(path) for path in paths]}

    def _state_of(self, scan_id: str | None) -> ImageState:
        if scan_id is None or (self._shown is not None and self._shown.scan_id == scan_id):
            if self._shown is None:
                raise ScanNotFound(
                    "there is no image yet: wait for a scan's first positioned frame"
                )
            return self._shown
        image = self._open[scan_id].image if scan_id in self._open else self._scan_image(scan_id)
        state = image.image(final=scan_id not in self._open)
        if state is None:
            raise ScanNotFound(f"scan {scan_id} has no image: none of its frames had a position")
        return state

    def _export_finished(self, scan_id: str) -> None:
        formats = self._settings.export.formats
        if not formats or self._shown is None or self._shown.scan_id != scan_id:
            return
        try:
            self._write(self._shown, formats)
        except FileFormatError as error:
            log.error("scan %s is not exported: %s", scan_id, error)
            self._metrics.exports_failed.inc()

    def _write(self, state: ImageState, formats: tuple[str, ...]) -> list[Path]:
        directory = self._settings.export.directory
        directory.mkdir(parents=True, exist_ok=True)
        image, paths = Image(state), []
        for name in formats:
            path = directory / f"{state.scan_id}.{name}"
            match name:
                case "npz":
                    image.save(path)
                case "png":
                    save_png(image, path)
                case _:
                    raise FileFormatError(f"no export format {name!r}: use npz or png")
            paths.append(path)
        return paths

    def _status(self) -> dict[str, Any]:
        newest = self._open[max(self._open)] if self._open else None
        backlog = sum(scan.image.backlog for scan in self._open.values())
        self._metrics.backlog.set(backlog)
        latencies = np.array(self._latencies_ms or [0.0])
        return {
            "scan_id": newest.reader.header.scan_id if newest else None,
            "open_scans": len(self._open),
            "backlog_frames": backlog,
            "frames_per_s": self._metrics.frames_per_s(),
            "latency_p50_ms": float(np.percentile(latencies, 50)),
            "latency_p99_ms": float(np.percentile(latencies, 99)),
            "model": self._recipe.model if self._recipe else None,
            "device": str(self._recipe.device) if self._recipe else None,
            "problem": self._problem,
        }


def body(stage: Stage, config: Path, settings: Settings) -> None:
    """The stage's life, for :func:`ptycho_streamd.stage.run_stage`."""
    ReconstructStage(stage, config, settings).run()


if __name__ == "__main__":
    sys.exit(run_stage("reconstruct", body))
