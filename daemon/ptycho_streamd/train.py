"""Stage 3: one training job, in a process of its own and at low priority.

Started by the supervisor as ``python -m ptycho_streamd.train --config FILE --job FOLDER``.  It owns
no frame and no socket but the bus, so that its death costs nothing but time; the GPU memory that it
took is free when it ends.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import sys
import threading
import time
from pathlib import Path
from typing import Literal

import msgspec
from prometheus_client import CollectorRegistry

from ptycho_stream.errors import PtychoStreamError, TrainingError
from ptycho_stream.settings import Settings, load_settings
from ptycho_stream.training.job import JobProgress
from ptycho_streamd.job_files import JobFolder
from ptycho_streamd.log_format import configure_logging
from ptycho_streamd.stage import Stage

POLL_MS = 100
WRITE_INTERVAL_S = 10.0
"""Between writes of the progress, for a daemon that is started again; heartbeats tell the rest."""
PAUSE_S = 3.0
"""After a stop, how long the run may take to save a checkpoint; then it ends without a new one.

Less than ``supervisor.stop_timeout_s`` is by default, after which this process is killed."""
OOM_SCORE = 500
"""Who runs out of memory first: this process, not the stages that take and show frames."""

log = logging.getLogger(__name__)


class Trainer:
    """Runs a job in a thread, so that heartbeats and requests go on while it computes."""

    def __init__(self, stage: Stage, settings: Settings, folder: JobFolder) -> None:
        self._stage = stage
        self._settings = settings
        self._folder = folder
        self._record = folder.record()
        self._progress = folder.progress()
        self._written: JobProgress | None = None
        self._written_at_s = float("-inf")
        self._beats = CollectorRegistry()

    def run(self) -> int:
        """Until the job is over or has to pause; the exit status."""
        work = threading.Thread(target=self._work, name="train", daemon=True)
        work.start()
        leave_at_s = float("inf")
        while work.is_alive():
            self._stage.socket.poll(POLL_MS)
            for request in self._stage.requests():
                self._stage.fail(request, "unknown_command", f"train knows no {request.command!r}")
            if self._stage.stop_reason == "orphaned":
                log.error("the daemon is gone: it goes on from the last checkpoint with the next")
                os._exit(1)  # at once: this process holds the lock that the next one waits for
            if self._stage.stopping:
                leave_at_s = min(leave_at_s, time.monotonic() + PAUSE_S)
            if time.monotonic() > leave_at_s:
                log.error("no checkpoint within %g s: the one before will be used", PAUSE_S)
                os._exit(1)  # the thread cannot be ended otherwise
            self._tell()
        return 0 if self._tell(now=True) else 1

    def _tell(self, *, now: bool = False) -> bool:
        """Say how the job is; whether the disk took it, where it had to."""
        progress = self._progress  # one read: the other thread replaces it
        told = {"job_id": self._record.spec.job_id, "progress": msgspec.to_builtins(progress)}
        changed = self._written is None or self._written.state != progress.state
        at_s = time.monotonic()
        kept = True
        if now or changed or at_s - self._written_at_s >= WRITE_INTERVAL_S:
            self._written, self._written_at_s = progress, at_s
            try:
                self._folder.write_progress(progress)
            except TrainingError as error:  # no reason to lose hours of work: heartbeats tell it
                log.error("%s", error)
                kept = False
        self._stage.beat(told, self._beats, now=now)
        return kept

    def _work(self) -> None:
        try:
            # Lightning takes seconds to import: heartbeats have begun by now.
            from ptycho_stream.training.jobs import run_job

            self._progress = run_job(
                self._record.spec, self._settings, self._folder.path, self._report, self._stop
            )
        except PtychoStreamError as error:
            log.error("%s", error)
            self._failed(str(error))
        except Exception as error:  # whatever Lightning or the device make of it ends the job only
            log.exception("the job failed")
            self._failed(f"{type(error).__name__}: {error}; the daemon's log has the details")

    def _report(self, progress: JobProgress) -> None:
        if not progress.ended:  # the end is told when the process has nothing left to do
            self._progress = progress

    def _stop(self) -> Literal["", "pause", "cancel"]:
        if self._record.cancelled or self._stage.cancelled:
            return "cancel"
        return "pause" if self._stage.stopping else ""

    def _failed(self, message: str) -> None:
        self._progress = msgspec.structs.replace(self._progress, state="failed", message=message)


def main() -> int:
    """The program; returns its exit status."""
    parser = argparse.ArgumentParser(
        prog="ptycho_streamd.train",
        description="A training job of ptycho-streamd, which starts it.",
    )
    parser.add_argument("--config", type=Path, required=True, help="the daemon's settings, TOML")
    parser.add_argument("--job", type=Path, required=True, help="the job's folder")
    options = parser.parse_args()
    try:
        settings = load_settings(options.config)
        configure_logging(settings.log_level, "train")
        os.nice(settings.training.nice)
        with contextlib.suppress(OSError):  # where /proc is not writable the kernel decides
            Path("/proc/self/oom_score_adj").write_text(str(OOM_SCORE))
        with Stage("train") as stage:
            try:
                return Trainer(stage, settings, JobFolder(options.job)).run()
            except PtychoStreamError as error:
                stage.fatal(str(error))
                raise
    except PtychoStreamError as error:
        log.error("%s", error)
        return 1


if __name__ == "__main__":
    sys.exit(main())
