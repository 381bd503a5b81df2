"""Training on demand: a queue of jobs, one process for the one whose turn it is.

The supervisor owns one :class:`Jobs`, hands it control requests and turns it in its loop.  Jobs are
files (:mod:`ptycho_streamd.job_files`), so that they go on after a restart of the daemon; what
happens to a training process touches no other stage.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from ptycho_stream.errors import ControlError, TrainingError
from ptycho_stream.scans.ulid import is_scan_id
from ptycho_stream.settings import Settings
from ptycho_stream.training.job import JobKind, JobProgress, JobSpec
from ptycho_stream.training.job_request import completed
from ptycho_streamd.bus import Beat, Cancel, Fatal, FromStage
from ptycho_streamd.job_files import JOBS_FOLDER, JobFolder, JobRecord
from ptycho_streamd.job_metrics import JobMetrics
from ptycho_streamd.process import StageProcess

MAX_STARTS = 5
"""So many processes in a row may die in a job without getting further; then it has failed."""
FIRST_BACKOFF_S = 0.5
MAX_BACKOFF_S = 60.0
"""Between tries to begin a process where disk or system refuse it."""
CANCEL_PATIENCE_S = 5.0
"""A cancelled job that has not ended by itself by then is killed."""
MAX_WAITING = 20
MAX_ENDED = 100
"""Folders of so many jobs that are over are kept."""

log = logging.getLogger(__name__)


@dataclass(slots=True)
class _Job:
    folder: JobFolder
    record: JobRecord
    progress: JobProgress

    @property
    def job_id(self) -> str:
        return self.record.spec.job_id

    def told(self) -> dict[str, Any]:
        """For clients."""
        spec = self.record.spec
        return {
            "job_id": spec.job_id,
            "kind": spec.kind,
            "name": spec.name,
            "scan_ids": list(spec.scan_ids),
            "parent": spec.model,
            "automatic": self.record.automatic,
            "created_ns": self.record.created_ns,
            "folder": str(self.folder.path),
            **msgspec.to_builtins(self.progress),
        }


class Jobs:
    """All training jobs of a data directory.

    Args:
        settings: what the daemon goes by now.
        process: that jobs are run with, one after the other.
        metrics: to count in.
        on_promoted: called when a job has taken another model into use.
    """

    def __init__(
        self,
        settings: Callable[[], Settings],
        process: StageProcess,
        metrics: JobMetrics,
        on_promoted: Callable[[], None],
    ) -> None:
        self._settings = settings
        self._process = process
        self._metrics = metrics
        self._on_promoted = on_promoted
        self._jobs: dict[str, _Job] = {}
        self._running: _Job | None = None
        self._not_before_s = float("-inf")
        self._kill_at_s = float("inf")
        self._refusals = 0
        self._load()

    # -- requests -----------------------------------------------------------------------------

    def commands(self) -> dict[str, Callable[[dict[str, Any]], Any]]:
        """What answers the control commands, by name."""
        return {
            "finetune": lambda arguments: self.submit("finetune", arguments),
            "train": lambda arguments: self.submit("train", arguments),
            "jobs": lambda arguments: self.jobs(arguments["limit"]),
            "job": lambda arguments: self.job(arguments["job_id"]),
            "cancel": lambda arguments: self.cancel(arguments["job_id"]),
        }

    def submit(
        self, kind: JobKind, arguments: dict[str, Any], *, automatic: bool = False
    ) -> dict[str, Any]:
        """Queue a job.

        Raises:
            PtychoStreamError: it cannot be done; the text says why.
        """
        waiting = [job for job in self._jobs.values() if not job.progress.ended]
        if len(waiting) >= MAX_WAITING:
            raise ControlError(
                "failed", f"{len(waiting)} jobs wait already: let some end, or cancel them"
            )
        taken = {job.record.spec.name for job in waiting}
        values = completed(kind, arguments, self._settings(), taken)
        try:
            spec = JobSpec.from_mapping(values)
        except TrainingError as error:
            raise ControlError("bad_arguments", str(error)) from error
        folder = JobFolder.of(self._settings().data.directory, spec.job_id)
        job = _Job(folder, JobRecord(spec=spec, created_ns=time.time_ns()), JobProgress())
        job.record = msgspec.structs.replace(job.record, automatic=automatic)
        folder.write_record(job.record)
        self._jobs[spec.job_id] = job
        if automatic:
            self._metrics.automatic.inc()
        log.info("job %s: %s of %s is queued", spec.job_id, kind, spec.name)
        return job.told()

    def jobs(self, limit: int) -> list[dict[str, Any]]:
        """The newest jobs, newest first."""
        return [self._jobs[job_id].told() for job_id in sorted(self._jobs, reverse=True)[:limit]]

    def job(self, job_id: str | None) -> dict[str, Any]:
        """A job with all that was asked for; None: the newest.

        Raises:
            ControlError: there is none.
        """
        if job_id is None:
            job_id = max(self._jobs, default=None)
        job = self._find(job_id)
        return {**job.told(), "spec": msgspec.to_builtins(job.record.spec)}

    def cancel(self, job_id: str | None) -> dict[str, Any]:
        """End a job without a model; None: the one that runs.

        Raises:
            ControlError: there is none, or it is over.
        """
        if job_id is None:
            if self._running is None or self._running.progress.ended:
                raise ControlError("not_found", "no training job runs: see `ctl jobs`")
            job_id = self._running.job_id
        job = self._find(job_id)
        if job.progress.ended:
            raise ControlError("failed", f"job {job_id} is over: it is {job.progress.state}")
        job.record = msgspec.structs.replace(job.record, cancelled=True)
        job.folder.write_record(job.record)
        if job is self._running:
            self._kill_at_s = time.monotonic() + CANCEL_PATIENCE_S
            self._process.send(Cancel())
        else:
            self._end(job, "cancelled", "cancelled before it began")
        return job.told()

    @property
    def busy(self) -> bool:
        """Whether a job runs or waits."""
        return self._running is not None or bool(self._waiting())

    def triggered(self, scan_id: str) -> bool:
        """Whether a job for ``scan_id`` was queued without anybody's asking."""
        return any(
            job.record.automatic and scan_id in job.record.spec.scan_ids
            for job in self._jobs.values()
        )

    def status(self) -> dict[str, Any]:
        """For the daemon's status."""
        return {
            "running": self._running.told() if self._running else None,
            "queued": len(self._waiting()),
        }

    # -- the process --------------------------------------------------------------------------

    def turn(self) -> None:
        """Notice what has ended, start what is next."""
        self._turn()
        self._metrics.queued.set(len(self._waiting()))
        self._metrics.show(self._running.progress if self._running else None)

    def heard(self, message: FromStage) -> None:
        """Take what the training process says of itself."""
        if isinstance(message, Fatal):
            self._process.failed(message)
        job = self._running
        if job is None or not isinstance(message, Beat) or not self._process.heard(message):
            return
        if job.record.cancelled:  # the process may not have been on the bus when it was
            self._process.send(Cancel())
        job.progress = msgspec.convert(message.status["progress"], JobProgress)

    def ask_to_stop(self) -> None:
        """The daemon stops: the job saves where it is and goes on at the next start."""
        self._process.ask_to_stop()

    def wait_until(self, deadline_s: float) -> None:
        """Wait for the process' end until ``time.monotonic()`` is ``deadline_s``, then kill it.

        It was asked to stop: that it did so, or was killed while it was at it, is no death.
        """
        self._process.wait_until(deadline_s)
        job = self._running
        if job is None:
            return
        job.record = msgspec.structs.replace(job.record, starts=max(job.record.starts - 1, 0))
        try:
            job.folder.write_record(job.record)
        except TrainingError as error:
            log.error("job %s: its stop counts as a death: %s", job.job_id, error)

    def _turn(self) -> None:
        if self._running is not None:
            if time.monotonic() > self._kill_at_s:
                self._process.kill()
            status = self._process.reap(self._settings().supervisor)
            if status is not None:
                job, self._running = self._running, None
                self._kill_at_s = float("inf")
                self._process_ended(job, status)
        if self._running is None and time.monotonic() >= self._not_before_s:
            waiting = self._waiting()
            if waiting:
                self._try_to_start(waiting[0])

    def _try_to_start(self, job: _Job) -> None:
        """Start ``job``; where disk or system refuse, it is where it was and waits a while."""
        try:
            self._start(job)
        except (TrainingError, OSError) as error:
            pause_s = min(FIRST_BACKOFF_S * 2**self._refusals, MAX_BACKOFF_S)
            self._refusals = min(self._refusals + 1, 16)
            self._not_before_s = time.monotonic() + pause_s
            log.error("job %s cannot begin, next try in %.1f s: %s", job.job_id, pause_s, error)
        else:
            self._refusals = 0

    def _start(self, job: _Job) -> None:
        record = msgspec.structs.replace(
            job.record,
            starts=job.record.starts + 1,
            furthest_step=max(job.record.furthest_step, job.progress.step),
        )
        progress = msgspec.structs.replace(job.progress, state="running", message="starting")
        # Kept before the process begins, so that a job that takes the machine down is not begun
        # for ever.
        job.folder.write_progress(progress)
        job.folder.write_record(record)
        training = self._settings().training
        environment = {"OMP_WAIT_POLICY": "PASSIVE", "OMP_NUM_THREADS": str(training.threads)}
        self._process.start(environment, ("--job", str(job.folder.path)))
        job.record, job.progress, self._running = record, progress, job
        log.info("job %s begins (pid %s)", job.job_id, self._process.pid)

    def _process_ended(self, job: _Job, status: int) -> None:
        """Take over a job whose process is gone: it is over, paused, or its process has died."""
        try:
            held = job.folder.progress()
        except TrainingError as error:
            log.error("job %s: %s", job.job_id, error)
            held = JobProgress()
        if job.progress.ended and not held.ended:  # heard, while the disk refused it
            self._end(job, job.progress.state, job.progress.message)
            return
        if held.ended or held.step >= job.progress.step:
            job.progress = held
        if job.progress.ended:
            self._ended(job)
        elif job.record.cancelled:
            self._end(job, "cancelled", "cancelled; its process had to be killed")
        elif self._process.last_words:
            self._end(job, "failed", self._process.last_words)
        elif status == 0:
            job.record = msgspec.structs.replace(job.record, starts=0)
            log.info("job %s is paused at step %d", job.job_id, job.progress.step)
        else:
            self._died(job, status)

    def _died(self, job: _Job, status: int) -> None:
        self._metrics.deaths.inc()
        _forget_overcome_deaths(job)
        starts = job.record.starts
        if starts >= MAX_STARTS:
            message = (
                f"its process ended unasked {starts} times, the last time with status {status}: "
                "the daemon's log has its last words; with less memory or time than it needs, ask "
                "for fewer frames in a step (batch_frames)"
            )
            self._end(job, "failed", message)
            return
        pause_s = FIRST_BACKOFF_S * 2 ** (starts - 1)
        self._not_before_s = time.monotonic() + pause_s
        job.progress = msgspec.structs.replace(job.progress, state="queued")
        log.error(
            "job %s: its process ended with status %s; it goes on from its last checkpoint in "
            "%.1f s",
            job.job_id,
            status,
            pause_s,
        )

    def _end(self, job: _Job, state: Any, message: str) -> None:
        job.progress = msgspec.structs.replace(job.progress, state=state, message=message)
        try:
            job.folder.write_progress(job.progress)
        except TrainingError as error:
            log.error("after a restart of the daemon job %s is tried again: %s", job.job_id, error)
        self._ended(job)

    def _ended(self, job: _Job) -> None:
        level = logging.ERROR if job.progress.state == "failed" else logging.INFO
        log.log(level, "job %s: %s: %s", job.job_id, job.progress.state, job.progress.message)
        self._metrics.ended(job.record.spec.kind, job.progress)
        if job.progress.promoted:
            self._on_promoted()
        try:
            job.folder.remove_weights()
        except OSError as error:
            log.error("job %s: its checkpoint stays on disk: %s", job.job_id, error)
        self._forget_oldest()

    # -- what there is ------------------------------------------------------------------------

    def _find(self, job_id: str | None) -> _Job:
        if job_id is None or job_id not in self._jobs:
            raise ControlError(
                "not_found", f"there is no job {job_id or 'yet'}: see `ptycho-stream ctl jobs`"
            )
        return self._jobs[job_id]

    def _waiting(self) -> list[_Job]:
        """Jobs that are not over and do not run, oldest first."""
        return [
            job
            for _, job in sorted(self._jobs.items())
            if not job.progress.ended and job is not self._running
        ]

    def _load(self) -> None:
        """Find the jobs of former daemons; those that are not over go on."""
        root: Path = self._settings().data.directory / JOBS_FOLDER
        for path in sorted(root.iterdir()) if root.is_dir() else ():
            if not is_scan_id(path.name):
                continue
            folder = JobFolder(path)
            try:
                job = _Job(folder, folder.record(), folder.progress())
            except TrainingError as error:
                log.error("left out of the jobs: %s", error)
                continue
            if job.progress.state == "queued":  # it had been paused in order
                job.record = msgspec.structs.replace(job.record, starts=0)
            elif not job.progress.ended:
                _forget_overcome_deaths(job)
                job.progress = msgspec.structs.replace(job.progress, state="queued")
            self._jobs[path.name] = job
        for job in self._waiting():
            if job.record.cancelled:
                self._end(job, "cancelled", "cancelled; the daemon stopped meanwhile")
            elif job.record.starts >= MAX_STARTS:
                self._end(job, "failed", f"ended {job.record.starts} processes and daemons")
            else:
                log.info("job %s goes on at step %d", job.job_id, job.progress.step)

    def _forget_oldest(self) -> None:
        over = sorted(job_id for job_id, job in self._jobs.items() if job.progress.ended)
        for job_id in over[:-MAX_ENDED]:
            self._jobs.pop(job_id).folder.remove()


def _forget_overcome_deaths(job: _Job) -> None:
    """Where the newest process got further than those before it, only its own death counts."""
    if job.progress.step > job.record.furthest_step:
        job.record = msgspec.structs.replace(job.record, starts=1)
