"""Files of images, written beside the reconstruct stage: at a scan's end, on request, in between.

A thread hands one task after another to a program of its own
(:mod:`ptycho_streamd.export_files`). Used by :mod:`ptycho_streamd.export_desk`.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from ptycho_stream.errors import ControlError, FileFormatError
from ptycho_stream.results import Image, ImageState
from ptycho_stream.scans.leases import Lease
from ptycho_stream.settings import ExportFormat, ExportSettings
from ptycho_streamd.bus import StageRequest
from ptycho_streamd.export_files import ExportOutcome, ExportTask

MAX_WAITING = 16
PROGRAM = (sys.executable, "-m", "ptycho_streamd.export_files")


@dataclass(frozen=True, slots=True)
class Export:
    """What the stage has asked for.

    Attributes:
        state: the image.
        folder: of its scan.
        lease: that keeps the scan in the store until the export has ended.
        request: who waits for the answer; None: nobody.
        partial: it is a partial product.
    """

    state: ImageState
    folder: Path
    lease: Lease
    request: StageRequest | None = None
    partial: bool = False


class Exports:
    """The exports of the stage, one after another.

    Used by one thread, that of the stage's loop; it never waits.
    """

    def __init__(self) -> None:
        self._worker = ThreadPoolExecutor(1, "exports")
        self._running: list[tuple[Export, Future[ExportOutcome]]] = []
        self._process: subprocess.Popen[str] | None = None
        self._closed = False

    @property
    def waiting(self) -> int:
        """Exports that were begun and are not done."""
        return len(self._running)

    def begin(
        self, export: Export, settings: ExportSettings, formats: Sequence[ExportFormat] = ()
    ) -> None:
        """Have files written.

        Args:
            export: of which image, and for whom.
            settings: where they go.
            formats: of the files; none: the next partial product.

        Raises:
            ControlError: ``failed``: too many exports wait already.
        """
        if self.waiting >= MAX_WAITING:
            raise ControlError(
                "failed", f"{self.waiting} exports wait already: try again when some are done"
            )
        future = self._worker.submit(self._carry_out, export, settings, tuple(formats))
        self._running.append((export, future))

    def done(self) -> list[tuple[Export, ExportOutcome]]:
        """Exports that have ended since the last call."""
        ended = [(export, future) for export, future in self._running if future.done()]
        self._running = [held for held in self._running if not held[1].done()]
        return [(export, _outcome(future)) for export, future in ended]

    def close(self) -> None:
        """Give up what is not done; what is half written is deleted."""
        self._closed = True
        process = self._process  # which the thread takes away when it has ended
        if process is not None:
            process.terminate()
        self._worker.shutdown(cancel_futures=True)

    def _carry_out(
        self, export: Export, settings: ExportSettings, formats: tuple[ExportFormat, ...]
    ) -> ExportOutcome:
        """In the thread: hand the image over to the program as a file, and wait for it."""
        handed_over = (
            export.folder / "export.npz.tmp"
        )  # one at a time; of a killed stage: taken over
        try:
            Image(export.state).save(handed_over)
            task = ExportTask(
                image=str(handed_over),
                scan=str(export.folder),
                directory=str(settings.directory),
                formats=formats,
                keep_partial=settings.partial_keep,
            )
            return self._outcome_of(task)
        except (FileFormatError, OSError) as error:
            return ExportOutcome((), (str(error),))
        finally:
            handed_over.unlink(missing_ok=True)

    def _outcome_of(self, task: ExportTask) -> ExportOutcome:
        self._process = subprocess.Popen(
            PROGRAM,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        try:
            if self._closed:
                self._process.terminate()
            told, _ = self._process.communicate(task.to_json())
            status = self._process.returncode
        finally:
            self._process = None
        try:
            return ExportOutcome.from_json(told)
        except (ValueError, KeyError, TypeError):
            return ExportOutcome((), (f"the writer of files ended with status {status}",))


def _outcome(future: Future[ExportOutcome]) -> ExportOutcome:
    """What came of an export; a fault of ours is one that failed, and must not end the stage."""
    fault = future.exception()
    return future.result() if fault is None else ExportOutcome((), (f"it failed: {fault!r}",))
