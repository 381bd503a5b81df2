"""Which files of which images the reconstruct stage has written, for whom, and what came of it.

At a scan's end by the settings, while it runs in intervals, and on request. The loop of the stage
tells it of scans and requests; nothing here waits.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from pathlib import Path

from ptycho_stream.errors import ControlError, FileFormatError, ModelError, ScanNotFound, StoreError
from ptycho_stream.files.products import FORMATS
from ptycho_stream.reconstruct.open_scan import OpenScan
from ptycho_stream.results import ImageState
from ptycho_stream.settings import ExportFormat, ExportSettings
from ptycho_streamd.bus import StageRequest
from ptycho_streamd.exports import Export, Exports
from ptycho_streamd.image_store import ImageStore
from ptycho_streamd.reconstruct_metrics import ReconstructMetrics
from ptycho_streamd.stage import Stage

PENDING_FILE = "export.pending"
"""In the folder of a scan whose files are to be written; deleted when that was tried."""

log = logging.getLogger(__name__)


class ExportDesk:
    """Begins exports and takes note of those that have ended.

    Args:
        stage: whose requests are answered.
        metrics: of it.
        images: of the store, with the present settings.
    """

    def __init__(self, stage: Stage, metrics: ReconstructMetrics, images: ImageStore) -> None:
        self._stage, self._metrics, self._images = stage, metrics, images
        self._exports = Exports()

    @property
    def _settings(self) -> ExportSettings:
        return self._images.settings.export

    def announce(self, folder: Path) -> None:
        """The scan in ``folder`` will be over in a moment: remember that over the daemon's end."""
        if not self._settings.formats:
            return
        try:
            (folder / PENDING_FILE).touch()
        except OSError as error:
            log.warning("should the daemon end now, %s is not exported: %s", folder.name, error)

    def begin_final(self, state: ImageState) -> None:
        """Have the files of a finished image written that the settings name."""
        formats = self._settings.formats
        if not formats or not state.tiles:
            _tried(self._folder(state.scan_id))
            return
        try:
            self._begin(state, formats)
        except (ControlError, StoreError) as error:
            self._failed(state.scan_id, error)

    def begin_left_over(self, scan_id: str) -> None:
        """Have the files of a finished scan written that an earlier life of the stage has not."""
        if not (self._folder(scan_id) / PENDING_FILE).exists():
            return
        try:
            self.begin_final(self._images.stored(scan_id))
        except (ModelError, StoreError) as error:
            self._failed(scan_id, error)

    def begin_partial(self, scans: Iterable[OpenScan]) -> None:
        """Have the product of a scan that runs written, if it is time and nothing else waits."""
        interval_s = self._settings.partial_interval_s
        if interval_s is None or self._exports.waiting:
            return
        for scan in scans:
            state = scan.state(final=False) if scan.partial_due(interval_s) else None
            if state is not None and state.tiles:
                scan.partial_begun()
                try:
                    self._begin(state, (), partial=True)
                except (ControlError, StoreError) as error:
                    self._failed(state.scan_id, error)
                return

    def answer(self, request: StageRequest, state: ImageState, formats: Sequence[str]) -> None:
        """Begin an export that was asked for; the answer is given when it has ended.

        Raises:
            FileFormatError: a format is unknown.
            ScanNotFound: there is no image.
            StoreError: the scan cannot be leased.
            ControlError: too many exports wait already.
        """
        wanted = _known(formats)
        if not state.tiles:
            raise ScanNotFound(
                f"scan {state.scan_id} has no image: none of its frames has a position"
            )
        self._begin(state, wanted, request=request)

    def _begin(
        self,
        state: ImageState,
        formats: tuple[ExportFormat, ...],
        *,
        request: StageRequest | None = None,
        partial: bool = False,
    ) -> None:
        """Hand an export over, with a lease on its scan."""
        lease = self._images.catalogue.lease(state.scan_id, "export")
        export = Export(state, self._folder(state.scan_id), lease, request, partial)
        try:
            self._exports.begin(export, self._settings, formats)
        except ControlError:
            lease.release()
            raise

    def take_note(self) -> None:
        """Answer who waits for an export that has ended; say and count what went wrong."""
        for export, outcome in self._exports.done():
            scan_id, request = export.state.scan_id, export.request
            export.lease.release()
            self._metrics.exports_written.inc(len(outcome.paths))
            for problem in outcome.problems:
                self._failed(scan_id, problem)
            if request is None:
                log.info("scan %s: %s", scan_id, ", ".join(outcome.paths) or "no file is written")
                if not export.partial:
                    _tried(export.folder)
            elif outcome.problems:
                self._stage.fail(request, "failed", "; ".join(outcome.problems))
            else:
                told = {"scan_id": scan_id, "paths": list(outcome.paths)}
                self._stage.reply(request, told)

    def close(self) -> None:
        """Give up what is not done; files of finished scans are written at the next start."""
        self._exports.close()

    def _folder(self, scan_id: str) -> Path:
        return self._images.catalogue.directory(scan_id)

    def _failed(self, scan_id: str, problem: object) -> None:
        log.error("scan %s is not exported: %s", scan_id, problem)
        self._metrics.exports_failed.inc()


def _tried(folder: Path) -> None:
    """The files of the scan in ``folder`` are written, or cannot be."""
    try:
        (folder / PENDING_FILE).unlink(missing_ok=True)
    except OSError as error:
        log.warning("at its next start the daemon exports %s again: %s", folder.name, error)


def _known(formats: Sequence[str]) -> tuple[ExportFormat, ...]:
    """The formats of these names, each once.

    Raises:
        FileFormatError: one is unknown, or there is none.
    """
    for name in formats:
        if name not in FORMATS:
            raise FileFormatError(f"no export format {name!r}: use {', '.join(FORMATS)}")
    if not formats:
        raise FileFormatError(f"no export format is named: use {', '.join(FORMATS)}")
    return tuple(kind for kind in FORMATS if kind in formats)
