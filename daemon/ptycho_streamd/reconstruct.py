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
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import zmq

from ptycho_stream.errors import (
    ControlError,
    DeviceError,
    FileFormatError,
    GeometryError,
    ModelError,
    ProbeError,
    PtychoStreamError,
    ScanNotFound,
    SettingsError,
    StoreError,
)
from ptycho_stream.models.active import check_unpinned, former_model
from ptycho_stream.models.registry import ModelRegistry
from ptycho_stream.reconstruct import devices
from ptycho_stream.reconstruct.lending import Loan, Made
from ptycho_stream.reconstruct.open_scan import OpenScan
from ptycho_stream.reconstruct.recipe import Recipe, load_recipe
from ptycho_stream.reconstruct.spare_time import ENOUGH_SWEEPS, SpareTime
from ptycho_stream.results import ImageState
from ptycho_stream.scans.ulid import new_scan_id
from ptycho_stream.settings import Settings, load_settings
from ptycho_streamd.bus import StageRequest
from ptycho_streamd.device_watch import DeviceWatch
from ptycho_streamd.export_desk import ExportDesk
from ptycho_streamd.freed_memory import give_back_freed_memory
from ptycho_streamd.image_store import ImageStore, Reprocessing
from ptycho_streamd.lender import Lender
from ptycho_streamd.misfit_watch import MisfitWatch
from ptycho_streamd.publish import Publisher
from ptycho_streamd.reconstruct_metrics import ReconstructMetrics
from ptycho_streamd.security import Gate
from ptycho_streamd.snapshots import snapshot
from ptycho_streamd.stage import Stage, run_stage
from ptycho_streamd.tries import end_tries

log = logging.getLogger(__name__)

BUSY_POLL_MS, IDLE_POLL_MS = 2, 20
"""Between looks at the store: while a scan is open, and while none is."""
RECIPE_RETRY_S = 2.0
MAX_FAULTS = 5
"""So many tries in a row, then a sealed scan is left alone until recipe or settings change."""
DRAIN_S = 2.0
"""After a stop, how long pairs that are in the store are still reconstructed."""
LATE_BATCHES = 2
"""Where more batches wait the network cannot keep up, and refinement gets a share of its time: it
makes more of a frame than the network, and the image covers what has come."""
LATE_BATCH_FRAMES = 4
"""Of a batch then: refinement waits for the network's pick of the frames that came meanwhile."""
DEVICE_BATCHES = 4
"""So many batches a GPU is given at once where they wait: it computes one while the next is copied,
and the loop waits for it once."""
MAX_BATCH_S = 0.25
"""A batch takes no longer, however large frames are, so that images and requests go on."""


def is_due(wait_s: float, batch_s: float) -> bool:
    """Whether to publish now, ``wait_s`` before the interval is over.

    After a batch that took ``batch_s`` the next chance comes when another one is done: now, if now
    is nearer to the end of the interval than that. 0: there was no batch, and the wait is exact.
    """
    return wait_s <= batch_s / 2


class ReconstructStage:
    """The loop of the stage: a batch, then whatever is due."""

    def __init__(self, stage: Stage, config: Path, settings: Settings) -> None:
        torch.set_num_threads(settings.reconstruct.threads)
        self._stage = stage
        self._config = config
        self._settings = settings
        self._metrics = ReconstructMetrics()
        self._images = ImageStore(settings)
        self._open: dict[str, OpenScan] = {}
        self._left_alone: set[str] = set()
        self._memory_freed = False
        self._devices = DeviceWatch(config.parent)
        self._recipe_tried_at_s = float("-inf")
        self._problem = ""
        self._frame_s = 0.0
        self._spare_time = SpareTime(self._metrics)
        self._gate = Gate(settings.security, self._metrics.registry)
        self._publisher = Publisher(self._gate, settings.results, new_scan_id())
        self._lender = Lender(self._gate.context, config.parent)
        self._poller = zmq.Poller()
        for socket in (stage.socket, self._lender.socket, *self._publisher.sockets):
            self._poller.register(socket, zmq.POLLIN)
        self._published_at_s = 0.0
        self._batch_s = 0.0  # what this turn's batch took, if there was one
        self._catalogue_seen = False
        self._shown: ImageState | None = None
        self._latencies_ms: deque[float] = deque(maxlen=2000)
        self._misfit = MisfitWatch()
        self._exports = ExportDesk(stage, self._metrics, self._images)

    def run(self) -> None:
        """Until the supervisor says stop.

        Raises:
            DeviceError: the GPU failed; another process may be able to use it.
        """
        try:
            while not self._stage.stopping:
                if not self.turn():
                    self._poller.poll(BUSY_POLL_MS if self._open else IDLE_POLL_MS)
            self._drain()
        except RuntimeError as error:
            recipe = self._images.recipe
            raise self._devices.lost(error, recipe.device if recipe else None) from error
        finally:
            self._lender.close()
            self._exports.close()
            self._publisher.close()
            self._gate.close()

    def turn(self) -> bool:
        """One batch, else some refinement, and all that is due; whether there was any of it."""
        for request in self._stage.requests():
            self._answer(request)
        if self._stage.reload_requested:
            self._reload()
        self._batch_s = 0.0
        self._find_scans()
        worked = self._help()
        worked |= not self._spare_time.owes and self._work()
        worked |= self._spare_time.use(self._open, between_batches=worked)
        self._publish_if_due()
        self._publisher.serve()
        self._gate.check()
        self._finish_scans()
        if self._memory_freed:
            self._memory_freed = False
            give_back_freed_memory()
        self._save_if_due()
        self._exports.begin_partial(self._open.values())
        self._exports.take_note()
        self._measure_if_due()
        self._beat()
        return worked

    def _count_subscribers(self) -> None:
        publisher, metrics = self._publisher, self._metrics
        metrics.subscribers.set(publisher.subscribers)
        metrics.resyncs.inc(publisher.resyncs)
        publisher.resyncs = 0
        while publisher.refusals:
            reason, count = publisher.refusals.popitem()
            metrics.refusals.labels(reason).inc(count)

    def _beat(self, *, now: bool = False) -> None:
        self._count_subscribers()
        self._stage.beat(self._status(), self._metrics.registry, now=now)

    # -- recipe and scans ---------------------------------------------------------------------

    def _reload(self) -> None:
        self._stage.reloaded()
        try:
            self._settings = load_settings(self._config)
            self._images.settings = self._settings
        except SettingsError as error:
            log.error("the settings stay as they were: %s", error)
            return
        logging.getLogger().setLevel(self._settings.log_level.upper())
        self._devices.forget()
        self._recipe_tried_at_s = float("-inf")
        self._load_recipe()
        log.info("settings read again")

    def _load_recipe(self) -> None:
        """Load network and probe; on failure keep those in use, and say what is wrong."""
        now_s = time.monotonic()
        if now_s - self._recipe_tried_at_s < RECIPE_RETRY_S:
            return
        self._recipe_tried_at_s = now_s
        try:
            self._take(*self._loaded(self._settings))
        except (ProbeError, ModelError) as error:
            if str(error) != self._problem:
                kept = f"; still in use: {self._images.recipe.model}" if self._images.recipe else ""
                log.error("network and probe are not loaded: %s%s", error, kept)
            self._problem = self._images.problem = str(error)
            self._metrics.recipe_failed()
            if isinstance(error, DeviceError):
                self._devices.failed(error)

    def _loaded(self, settings: Settings) -> tuple[Recipe, float]:
        """Network and probe of ``settings``, tried out, and the seconds that a frame takes."""
        recipe = load_recipe(self._devices.settings(settings))
        self._beat(now=True)
        return recipe, recipe.warm_up()

    def _take(self, recipe: Recipe, frame_s: float) -> None:
        """Go on with ``recipe``: images of other ones begin a new generation."""
        self._problem = ""
        self._images.recipe, self._frame_s = recipe, frame_s
        self._metrics.model_in_use(recipe.model, recipe.model_sha256)
        for scan_id in list(self._open):
            self._renew(scan_id)
        if self._left_alone:
            self._left_alone.clear()
            self._catalogue_seen = False
        log.info("reconstructing with model %s on %s", recipe.model, recipe.device)
        self._metrics.fallen_back.set(self._devices.given_up(self._settings))
        if problem := self._devices.problem(self._settings):
            log.error("%s", problem)
        self._beat(now=True)  # who asked for it sees it in the status at once

    def _renew(self, scan_id: str) -> None:
        """Go on with an open scan's image as it should be made now."""
        scan = self._open[scan_id]
        try:
            scan.image.use(self._images.recipe_for(scan.reader.header))
        except (ModelError, ProbeError, StoreError) as error:
            self._leave_alone(scan_id, error)
        scan.retry()

    def _find_scans(self) -> None:
        if self._images.recipe is None:
            self._load_recipe()
        if self._images.recipe is None or (
            self._catalogue_seen and not self._images.catalogue.changed()
        ):
            return
        headers = [h for h in self._images.catalogue.scans() if not h.detector]
        for header in reversed(headers):
            scan_id = header.scan_id
            if scan_id in self._open or scan_id in self._left_alone:
                continue
            if not self._images.done(scan_id):
                self._open_scan(scan_id)
            elif not self._catalogue_seen:
                self._exports.begin_left_over(scan_id)
        if not self._catalogue_seen and headers and self._shown is None:
            self._show_last(headers[0].scan_id)
        self._catalogue_seen = True

    def _open_scan(self, scan_id: str) -> None:
        try:
            scan = self._images.open(scan_id)
        except (ModelError, ProbeError, StoreError) as error:
            self._leave_alone(scan_id, error)
            return
        if scan is None:
            return
        self._open[scan_id] = scan
        self._latencies_ms.clear()
        if scan.image.problem:
            log.error("%s", scan.image.problem)
            self._metrics.scans_failed.inc()
        log.info("scan %s: image begins", scan_id)

    def _leave_alone(self, scan_id: str, error: PtychoStreamError) -> None:
        """This scan cannot be reconstructed as things are; its frames stay."""
        log.error("scan %s is not reconstructed: %s", scan_id, error)
        self._metrics.scans_failed.inc()
        self._left_alone.add(scan_id)
        scan = self._open.pop(scan_id, None)
        if scan is not None:
            if scan.reader.header.sealed:  # whoever waits for its end gets what there is
                self._publish(scan, final=True)
            self._close(scan)

    def _show_last(self, scan_id: str) -> None:
        """Publish the last finished image again, so that clients of a restarted daemon get it."""
        if scan_id in self._open or scan_id in self._left_alone:
            return
        try:
            state = self._images.stored(scan_id)
        except (ModelError, StoreError) as error:
            log.warning("scan %s: its image cannot be shown again: %s", scan_id, error)
            return
        self._shown = state
        self._publisher.publish(state)

    # -- work ---------------------------------------------------------------------------------

    def _work(self) -> bool:
        """A batch of the newest scan that has one ready; else of one that is being rebuilt."""
        limit, deadline_ns = self._limit(), self._settings.reconstruct.batch_deadline_ms * 1e6
        newest_first = sorted(self._open, reverse=True)
        for scan_id in newest_first:
            self._guarded(scan_id, self._open[scan_id].refresh)
        scans = [self._open[scan_id] for scan_id in newest_first if scan_id in self._open]
        waiting = (i for i, s in enumerate(scans) if self._asked(s, lambda s=s: s.waits))
        scans = scans[: next(waiting, None)]  # the fit comes before what older scans want
        waited_for = (s for s in scans if self._asked(s, partial(s.ready, limit, deadline_ns)))
        to_rebuild = (s for s in scans if self._asked(s, lambda s=s: s.to_rebuild))
        scan = next(waited_for, None) or next(to_rebuild, None)
        if scan is None:
            return False
        self._guarded(scan.reader.scan_id, lambda: self._step(scan, limit))
        return True

    def _limit(self, batches: int = 1) -> int:
        """Frames of so many batches."""
        frames = self._settings.reconstruct.batch_frames * batches
        if self._frame_s <= 0:
            return frames
        return max(1, min(frames, int(MAX_BATCH_S / self._frame_s)))

    @property
    def _step_limit(self) -> int:
        """Frames of a step: a batch, and several on a GPU."""
        recipe = self._images.recipe
        on_gpu = recipe is not None and not devices.computes_on_host(recipe.device)
        return self._limit(DEVICE_BATCHES if on_gpu else 1)

    def _help(self) -> bool:
        """Take back what helpers have made, and give them more; whether anything came back."""
        back = list(self._lender.returned())
        for loan, made in back:
            if loan.scan_id in self._open:
                scan = self._open[loan.scan_id]
                self._guarded(loan.scan_id, partial(self._take_back, scan, loan, made))
        self._lender.lend(self._open, enough=self._step_limit)
        self._metrics.helpers.set(self._lender.helpers)
        return bool(back)

    def _take_back(self, scan: OpenScan, loan: Loan, made: Made | None) -> None:
        shown = scan.image.take_back(loan, made)
        if made is None:
            return
        if made.damaged:
            self._on_damaged(made.damaged)
        self._metrics.count_batch(len(shown))
        self._take_note_of_patches(scan)
        scan.extended(shown)

    def _step(self, scan: OpenScan, limit: int) -> None:
        started_s = time.monotonic()
        image = scan.image
        late = image.backlog > LATE_BATCHES * limit
        share = self._settings.refine.share
        wanted = share > 0 and scan.refining and image.sweeps < ENOUGH_SWEEPS
        most = self._step_limit
        frames = min(most, LATE_BATCH_FRAMES) if late and wanted and image.in_the_wake else most
        shown = image.step(frames, self._on_damaged)
        took_s = self._batch_s = time.monotonic() - started_s
        if len(shown):
            self._frame_s = took_s / len(shown)
        if late or wanted:
            self._spare_time.owe(took_s, share, late=late)
        self._metrics.count_batch(len(shown))
        self._take_note_of_patches(scan)
        scan.extended(shown)

    def _take_note_of_patches(self, scan: OpenScan) -> None:
        """Count the patches of the last batch that cannot be true; say so when most are."""
        image = scan.image
        self._metrics.patches_collapsed.inc(image.patches_collapsed)
        self._metrics.patches_not_finite.inc(image.patches_not_finite)
        was, scan.collapsed = scan.collapsed, image.collapsed
        if scan.collapsed and not was:
            log.error(
                "scan %s: the network's output has collapsed: its patches do not vary as the "
                "frames say they must; use another model, or train this one for the probe",
                scan.reader.scan_id,
            )

    def _guarded(self, scan_id: str, action: Callable[[], None]) -> None:
        """Do something for a scan; a fault in it parks that scan and touches no other."""
        scan = self._open[scan_id]
        try:
            action()
        except ScanNotFound as error:
            self._leave_alone(scan_id, error)
        except (GeometryError, ModelError, StoreError) as error:
            if scan.faults == 0:
                log.error("scan %s waits: %s", scan_id, error)
            self._problem = f"scan {scan_id}: {error}"
            self._metrics.scan_faults.inc()
            scan.park()
            if scan.faults >= MAX_FAULTS and scan.reader.header.sealed:
                self._leave_alone(scan_id, error)

    def _asked(self, scan: OpenScan, question: Callable[[], bool]) -> bool:
        """The answer to a question about an open scan; False where a fault keeps it from one."""
        answers = list[bool]()
        scan_id = scan.reader.scan_id
        if scan_id in self._open:
            self._guarded(scan_id, lambda: answers.append(question()))
        return any(answers)

    def _on_damaged(self, slots: list[int]) -> None:
        log.error("stored frames whose checksums do not match are left out: slots %s", slots)
        self._metrics.frames_damaged.inc(len(slots))

    # -- results ------------------------------------------------------------------------------

    def _publish_if_due(self) -> None:
        now_s = time.monotonic()
        wait_s = self._settings.results.publish_interval_ms * 1e-3 - (now_s - self._published_at_s)
        if not is_due(wait_s, self._batch_s):
            return
        for _, scan in sorted(self._open.items()):
            if scan.changed and scan.image.current is not None:
                self._published_at_s = now_s
                self._publish(scan, final=False)

    def _publish(self, scan: OpenScan, *, final: bool) -> None:
        scan.changed = False
        state = scan.state(final=final)
        self._metrics.published_bytes.inc(self._publisher.publish(state).bytes)
        if self._shown is None or state.scan_id >= self._shown.scan_id:
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
            if scan.parked or not self._asked(scan, lambda scan=scan: scan.over):
                continue
            scan.reader.refresh()
            if not scan.finished:
                self._publish(scan, final=True)
                scan.finished = True
                scan.unsaved = True
            if not self._save(scan):
                scan.park()
                continue
            self._images.keep_probe(scan)
            self._keep_image(scan)
            self._exports.announce(scan.reader.directory)
            self._images.mark_done(scan_id)
            counts = scan.image.counts()
            log.info(
                "scan %s: %s, %d frames in the image",
                scan_id,
                scan.reader.header.state,
                counts["reconstructed"],
            )
            self._exports.begin_final(scan.state(final=True))
            self._close(scan)
            del self._open[scan_id]

    def _keep_image(self, scan: OpenScan) -> None:
        try:
            self._images.keep_image(scan)
        except FileFormatError as error:
            log.error("scan %s: its final image is not kept: %s", scan.reader.scan_id, error)
            self._metrics.saves_failed.inc()

    def _save_if_due(self) -> None:
        for scan in self._open.values():
            self._take_note_of_save(scan)
            if scan.save_due(self._settings.reconstruct.save_interval_s):
                scan.begin_save()

    def _save(self, scan: OpenScan) -> bool:
        """Save the newest state and wait for it; whether it is on disk."""
        self._take_note_of_save(scan, wait=True)
        scan.begin_save()
        return self._take_note_of_save(scan, wait=True)

    def _take_note_of_save(self, scan: OpenScan, *, wait: bool = False) -> bool:
        try:
            took_s = scan.end_save(wait=wait)
        except StoreError as error:
            log.error("%s", error)
            self._metrics.saves_failed.inc()
            return False
        if took_s is not None:
            self._metrics.save_seconds.set(took_s)
            end_tries(scan.reader.directory)
        return True

    def _close(self, scan: OpenScan) -> None:
        """Let go of a scan in order: the stage has not died at it."""
        end_tries(scan.reader.directory)
        scan.close()
        self._memory_freed = True

    def _measure_if_due(self) -> None:
        """Measure the newest scan's misfit now and then, for who starts a fine-tuning by it."""
        if (
            self._settings.training.automatic_above is None
            or not self._open
            or not self._images.recipe
        ):
            return
        excess = self._misfit.look(self._open[max(self._open)].image, self._images.recipe.device)
        if excess is not None:
            self._metrics.misfit_excess.set(excess)

    def _drain(self) -> None:
        """After stop: what the store holds already, for a while; the rest at the next start.

        Nobody waits for a stage that ends alone: another one is about to take its place.
        """
        requested = self._stage.stop_reason == "requested"
        until_s = time.monotonic() + (DRAIN_S if requested else 0.0)
        while time.monotonic() < until_s and any(not s.predicted for s in self._open.values()):
            if not self._help() and not self._work():
                self._poller.poll(BUSY_POLL_MS)
            self._finish_scans()
        for scan in self._open.values():
            if scan.changed and scan.image.current is not None:
                self._publish(scan, final=False)
            self._take_note_of_save(scan, wait=True)
            if scan.unsaved:
                self._save(scan)
            self._close(scan)
        self._open.clear()
        self._beat(now=True)

    # -- requests -----------------------------------------------------------------------------

    def _answer(self, request: StageRequest) -> None:
        try:
            match request.command:
                case "export":
                    state = self._state_of(request.arguments["scan_id"])
                    self._exports.answer(request, state, request.arguments["formats"])
                case "models":
                    self._stage.reply(request, self._models())
                case "use_model":
                    self._stage.reply(request, self._use_model(**request.arguments))
                case "rollback_model":
                    self._stage.reply(request, self._rollback_model())
                case "snapshot":
                    folder = self._settings.data.directory
                    self._stage.reply(request, snapshot(request.arguments, self._state_of, folder))
                case "reprocess":
                    self._stage.reply(request, self._reprocess(**request.arguments))
                case _:
                    self._stage.fail(
                        request, "unknown_command", f"reconstruct knows no {request.command!r}"
                    )
        except ScanNotFound as error:
            self._stage.fail(request, "not_found", str(error))
        except ControlError as error:
            self._stage.fail(request, error.code, str(error))
        except PtychoStreamError as error:
            self._stage.fail(request, "failed", str(error))

    def _models(self) -> list[dict[str, Any]]:
        in_use = self._images.recipe.model if self._images.recipe else None
        return [
            json.loads(manifest.to_json()) | {"in_use": manifest.name == in_use}
            for manifest in ModelRegistry(self._settings.model.registry).list()
        ]

    def _use_model(self, name: str) -> dict[str, Any]:
        """Take a model into use, between two batches; one that does not load changes nothing."""
        check_unpinned(self._settings.model)
        registry = ModelRegistry(self._settings.model.registry)
        loaded = self._loaded_with(name)
        registry.use(name)
        self._take(*loaded)
        return {"model": loaded[0].model}

    def _rollback_model(self) -> dict[str, Any]:
        """Go back to the model before; if it does not work here nothing changes."""
        check_unpinned(self._settings.model)
        registry = ModelRegistry(self._settings.model.registry)
        present = registry.active()
        loaded = self._loaded_with(former_model(registry.root))
        registry.rollback()
        self._take(*loaded)
        return {"model": loaded[0].model, "was": present}

    def _reprocess(self, scan_id: str, probe: str | None, model: str | None) -> dict[str, Any]:
        """Make a scan's image again; subscribers see the old one until the new one is complete."""
        self._images.reprocess(scan_id, Reprocessing(probe, model))
        self._left_alone.discard(scan_id)
        if scan_id in self._open:
            self._renew(scan_id)
        else:
            self._open_scan(scan_id)
        return {"scan_id": scan_id}

    def _loaded_with(self, name: str) -> tuple[Recipe, float]:
        """As :meth:`_loaded`, with the model ``name`` instead of the one in use."""
        changed = {"model": self._settings.model.model_copy(update={"name": name})}
        return self._loaded(self._settings.model_copy(update=changed))

    def _state_of(self, scan_id: str | None) -> ImageState:
        if scan_id is None:
            if self._shown is None:
                raise ScanNotFound(
                    "there is no image yet: wait for a scan's first frame with a position"
                )
            return self._shown
        if scan_id in self._open:
            return self._open[scan_id].state(final=False)
        return self._images.stored(scan_id)

    def _status(self) -> dict[str, Any]:
        newest = max(self._open) if self._open else None
        backlog = sum(scan.image.backlog for scan in self._open.values())
        self._metrics.backlog.set(backlog)
        latencies = np.array(self._latencies_ms or [0.0])
        return {
            "scan_id": newest,
            "open_scans": len(self._open),
            "helpers": self._lender.helpers,
            "backlog_frames": backlog,
            "frames_per_s": self._metrics.frames_per_s(),
            "latency_p50_ms": float(np.percentile(latencies, 50)),
            "latency_p99_ms": float(np.percentile(latencies, 99)),
            "model": self._images.recipe.model if self._images.recipe else None,
            "device": str(self._images.recipe.device) if self._images.recipe else None,
            "misfit": self._misfit.newest,
            **self._trusted(newest),
            "problem": self._problem
            or self._devices.problem(self._settings)
            or (self._open[newest].image.problem if newest else ""),
        }

    def _trusted(self, newest: str | None) -> dict[str, Any]:
        """What the status says of trust in the newest open scan."""
        trust = None if newest is None else self._open[newest].trust
        if trust is None or trust.report is None:
            return {"verdict": "", "reasons": [], "suggestions": [], "view_wanted": None}
        return {
            "verdict": trust.report.verdict,
            "reasons": list(trust.report.reasons),
            "suggestions": list(trust.suggestions),
            "view_wanted": trust.view_wanted,
        }


def body(stage: Stage, config: Path, settings: Settings) -> None:
    """The stage's life, for :func:`ptycho_streamd.stage.run_stage`."""
    ReconstructStage(stage, config, settings).run()


if __name__ == "__main__":
    sys.exit(run_stage("reconstruct", body))
