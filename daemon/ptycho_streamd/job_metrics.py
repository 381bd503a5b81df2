"""The Prometheus metrics of training jobs: the supervisor keeps them, beyond the jobs' ends."""

from __future__ import annotations

from itertools import product
from typing import get_args

from prometheus_client import CollectorRegistry, Counter, Gauge

from ptycho_stream.training.job import ENDED_STATES, JobKind, JobProgress


class JobMetrics:
    """Counters of jobs and gauges of the one that runs, in the supervisor's registry."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._ended = Counter(
            "ptycho_stream_training_jobs_ended",
            "Training jobs that are over: done, failed or cancelled",
            ["kind", "state"],
            registry=registry,
        )
        self._promoted = Counter(
            "ptycho_stream_training_models_promoted",
            "Models that a training job has taken into use",
            registry=registry,
        )
        self.deaths = Counter(
            "ptycho_stream_training_processes_died",
            "Training processes that ended unasked; their jobs go on or fail",
            registry=registry,
        )
        self.automatic = Counter(
            "ptycho_stream_training_jobs_triggered",
            "Training jobs that a high misfit has started",
            registry=registry,
        )
        self.queued = Gauge(
            "ptycho_stream_training_queued_jobs", "Jobs that wait for their turn", registry=registry
        )
        self._running = Gauge(
            "ptycho_stream_training_running_state", "1 while a job runs", registry=registry
        )
        self._step = Gauge(
            "ptycho_stream_training_steps", "Steps of the job that runs", registry=registry
        )
        self._fraction = Gauge(
            "ptycho_stream_training_progress_ratio",
            "Share of its budget that the running job has spent",
            registry=registry,
        )
        self._loss = Gauge(
            "ptycho_stream_training_loss_value",
            "Loss of the running job's newest steps; NaN before the first",
            registry=registry,
        )
        self._seconds = Gauge(
            "ptycho_stream_training_elapsed_seconds",
            "Time that the running job has trained",
            registry=registry,
        )
        # Counters that begin at 0 let Prometheus see the first event as an increase.
        for kind, state in product(get_args(JobKind), ENDED_STATES):
            self._ended.labels(kind, state)
        self.show(None)

    def show(self, progress: JobProgress | None) -> None:
        """How the job that runs is; None: none does."""
        self._running.set(progress is not None)
        held = progress or JobProgress()
        self._step.set(held.step)
        self._fraction.set(held.fraction)
        self._loss.set(float("nan") if held.loss is None else held.loss)
        self._seconds.set(held.elapsed_s)

    def ended(self, kind: str, progress: JobProgress) -> None:
        """A job is over."""
        self._ended.labels(kind, progress.state).inc()
        if progress.promoted:
            self._promoted.inc()
