"""The Prometheus metrics of the reconstruct stage, and the rates that its status shows."""

from __future__ import annotations

import time
from collections import deque

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector

from ptycho_stream.reconstruct.trust_watch import TrustReport

LATENCY_BUCKETS_S = (0.005, 0.01, 0.02, 0.05, 0.1, 0.15, 0.2, 0.25, 0.35, 0.5, 1, 2, 5, 10, 30)
BATCH_BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
RATE_WINDOW_S = 3.0


class ReconstructMetrics:
    """All metrics of the stage, in a registry of their own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.frames_reconstructed = Counter(
            "ptycho_stream_frames_reconstructed",
            "Frames predicted and stitched into the image that subscribers see",
            registry=self.registry,
        )
        self.helpers = Gauge(
            "ptycho_stream_helpers",
            "Processes that predict a part of the frames beside the reconstruct stage",
            registry=self.registry,
        )
        self.frames_damaged = Counter(
            "ptycho_stream_frames_damaged",
            "Stored frames left out of the image because their checksum did not match",
            registry=self.registry,
        )
        self.patches_collapsed = Counter(
            "ptycho_stream_patches_collapsed",
            "Predicted patches that vary far less than their frames say they must",
            registry=self.registry,
        )
        self.patches_not_finite = Counter(
            "ptycho_stream_patches_not_finite",
            "Predicted patches with NaN or infinity, left out of the image",
            registry=self.registry,
        )
        self._frames_refined = Counter(
            "ptycho_stream_frame_refinements",
            "Visits of frames by refinement",
            registry=self.registry,
        )
        self._refinements_failed = Counter(
            "ptycho_stream_refinements_failed",
            "Scans whose refinement ended with an error; their predicted images are kept",
            registry=self.registry,
        )
        self._refinement_sweeps = Gauge(
            "ptycho_stream_refinement_sweeps",
            "Visits of a frame by refinement, on average, in the newest refined image",
            registry=self.registry,
        )
        self._judgements_failed = Counter(
            "ptycho_stream_judgements_failed",
            "Scans whose image could not be judged to the end",
            registry=self.registry,
        )
        self._trust = Gauge(
            "ptycho_stream_trust_figure",
            "Figures of trust of the newest judged image (docs/trust.md)",
            ["figure"],
            registry=self.registry,
        )
        self._verdict = Gauge(
            "ptycho_stream_verdict_info",
            "1 for what is thought of the newest judged image",
            ["verdict"],
            registry=self.registry,
        )
        self.scans_failed = Counter(
            "ptycho_stream_scans_failed",
            "Scans that could not be reconstructed; their frames are kept",
            registry=self.registry,
        )
        self.scan_faults = Counter(
            "ptycho_stream_scan_faults",
            "Batches that failed; the scan is tried again",
            registry=self.registry,
        )
        self._recipe_failures = Counter(
            "ptycho_stream_recipes_failed",
            "Attempts to load the network and the probe that failed",
            registry=self.registry,
        )
        self.subscribers = Gauge(
            "ptycho_stream_results_subscribers",
            "Subscribers of the results socket",
            registry=self.registry,
        )
        self.published_bytes = Counter(
            "ptycho_stream_results_published_bytes",
            "Updates of images that were published, each counted once for all subscribers",
            registry=self.registry,
        )
        self.resyncs = Counter(
            "ptycho_stream_results_resyncs",
            "Answers to subscribers that had missed something, or had just come",
            registry=self.registry,
        )
        self.refusals = Counter(
            "ptycho_stream_results_refusals",
            "Resync requests that were refused, by reason",
            ["reason"],
            registry=self.registry,
        )
        self.fallen_back = Gauge(
            "ptycho_stream_device_fallback_state",
            "1 while images are made on the CPU because the GPU has failed",
            registry=self.registry,
        )
        self.saves_failed = Counter(
            "ptycho_stream_image_saves_failed",
            "States of an image that could not be written to disk",
            registry=self.registry,
        )
        self.exports_written = Counter(
            "ptycho_stream_exports_written",
            "Files of images that were written",
            registry=self.registry,
        )
        self.exports_failed = Counter(
            "ptycho_stream_exports_failed",
            "Files of images that could not be written",
            registry=self.registry,
        )
        self.latency = Histogram(
            "ptycho_stream_frame_latency_seconds",
            "From the receipt of a frame and its position, whichever came last, to publication",
            buckets=LATENCY_BUCKETS_S,
            registry=self.registry,
        )
        self.batch_frames = Histogram(
            "ptycho_stream_batch_frames",
            "Frames in a batch of the network",
            buckets=BATCH_BUCKETS,
            registry=self.registry,
        )
        self.backlog = Gauge(
            "ptycho_stream_backlog_frames",
            "Frames with positions that wait to be reconstructed",
            registry=self.registry,
        )
        self.save_seconds = Gauge(
            "ptycho_stream_image_save_seconds",
            "Time that the last save of an image's state took",
            registry=self.registry,
        )
        self.misfit_excess = Gauge(
            "ptycho_stream_misfit_excess_ratio",
            "R of the newest frames beyond Poisson noise, where training.automatic_above is set",
            registry=self.registry,
        )
        self._model = Gauge(
            "ptycho_stream_model_in_use_info",
            "1 for the model that patches are predicted with",
            ["model", "sha256"],
            registry=self.registry,
        )
        self._model_stale = Gauge(
            "ptycho_stream_model_stale_state",
            "1 while the network or probe that is set does not load and the former or none is used",
            registry=self.registry,
        )
        ProcessCollector(namespace="ptycho_stream_reconstruct", registry=self.registry)
        self._batches: deque[tuple[float, int]] = deque()

    def model_in_use(self, name: str, sha256: str) -> None:
        """Patches are predicted with this model from now on, the one that was asked for."""
        self._model_stale.set(0)
        self._model.clear()
        self._model.labels(name, sha256[:12]).set(1)

    def recipe_failed(self) -> None:
        """Network or probe did not load; those in use stay."""
        self._recipe_failures.inc()
        self._model_stale.set(1)

    def refined(self, visits: int) -> None:
        """Frames were visited by refinement so many times."""
        self._frames_refined.inc(visits)

    def shown(self, sweeps: float) -> None:
        """A newly refined image may be seen; ``sweeps``: visits of a frame on average."""
        self._refinement_sweeps.set(sweeps)

    def refinement_failed(self) -> None:
        """A scan is not refined any more."""
        self._refinements_failed.inc()

    def judgement_failed(self) -> None:
        """A scan's image is not judged any more."""
        self._judgements_failed.inc()

    def judged(self, report: TrustReport) -> None:
        """This is what is known of the newest image."""
        self._trust.clear()
        for name, value in report.figures.items():
            self._trust.labels(name).set(value)
        self._verdict.clear()
        self._verdict.labels(report.verdict).set(1)

    def count_batch(self, frames: int) -> None:
        """A batch of ``frames`` is in the image."""
        self.frames_reconstructed.inc(frames)
        self.batch_frames.observe(frames)
        self._batches.append((time.monotonic(), frames))

    def frames_per_s(self) -> float:
        """Frames reconstructed a second, over the last three."""
        since_s = time.monotonic() - RATE_WINDOW_S
        while self._batches and self._batches[0][0] < since_s:
            self._batches.popleft()
        return sum(frames for _, frames in self._batches) / RATE_WINDOW_S
