"""The counters and gauges of the ingest stage, under their Prometheus names.

Frames are counted in plain integers on the hot path and handed over once a batch: a Prometheus
counter takes a lock.
"""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector

from ptycho_stream.scans.header import SEALED_STATES, ScanHeader
from ptycho_streamd.recorder import PositionCounts


class IngestMetrics:
    """All metrics of one ingest process, in ``registry``."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        self.received = Counter(
            "ptycho_stream_frames_received", "Frames that arrived", registry=registry
        )
        self.committed = Counter(
            "ptycho_stream_frames_committed", "Frames that readers can see", registry=registry
        )
        self.duplicate = Counter(
            "ptycho_stream_frames_duplicate",
            "Frames whose number had come before (dropped)",
            registry=registry,
        )
        self.out_of_order = Counter(
            "ptycho_stream_frames_out_of_order",
            "Frames that came after a later one (stored)",
            registry=registry,
        )
        self.missing = Counter(
            "ptycho_stream_frames_missing", "Holes in sealed scans", registry=registry
        )
        self.unpositioned = Counter(
            "ptycho_stream_frames_unpositioned",
            "Frames of sealed scans that never got a position",
            registry=registry,
        )
        self.gated = Counter(
            "ptycho_stream_frames_gated",
            "Frames of sealed scans that are to be left out of the image (stored)",
            registry=registry,
        )
        self.dark = Counter(
            "ptycho_stream_frames_dark",
            "Frames of sealed scans that were taken without beam (stored)",
            registry=registry,
        )
        self.dropped = Counter(
            "ptycho_stream_frames_dropped",
            "Frames that arrived and were not stored: wrong_shape, closed (the scan is over), "
            "disk_full; duplicates have their own counter",
            ["reason"],
            registry=registry,
        )
        self.undecodable = Counter(
            "ptycho_stream_messages_undecodable",
            "Messages or frames that no codec understood (docs/protocol.md, What is refused)",
            ["reason"],
            registry=registry,
        )
        self.positions_received = Counter(
            "ptycho_stream_positions_received", "Scan positions that arrived", registry=registry
        )
        self.positions_orphaned = Counter(
            "ptycho_stream_positions_orphaned",
            "Scan positions whose scan was closed or never came (dropped)",
            registry=registry,
        )
        self.positions_invalid = Counter(
            "ptycho_stream_positions_invalid",
            "Scan positions that are NaN, of impossible numbers or too many to wait for frames",
            registry=registry,
        )
        self.positions_flagged = Counter(
            "ptycho_stream_positions_flagged",
            "Scan positions out of the allowed extent, or that jump further than a step may (jump)",
            ["reason"],
            registry=registry,
        )
        self.scans = Counter(
            "ptycho_stream_scans_sealed",
            "Scans that ended, by their last state (docs/operations.md)",
            ["state"],
            registry=registry,
        )
        self.recovered = Counter(
            "ptycho_stream_scans_recovered", "Scans found open at the start", registry=registry
        )
        self.unrecoverable = Counter(
            "ptycho_stream_scans_unrecoverable",
            "Scans found open at the start that could not be recovered",
            registry=registry,
        )
        self.torn = Counter(
            "ptycho_stream_frames_torn",
            "Torn or damaged frame records that recovery cut or marked",
            registry=registry,
        )
        self.open_scans = Gauge(
            "ptycho_stream_open_scans", "Scans that are not sealed", registry=registry
        )
        self.free = Gauge(
            "ptycho_stream_store_free_bytes", "Room on the store's disk", registry=registry
        )
        self.refusing = Gauge(
            "ptycho_stream_scans_refused_state",
            "1 while new scans are refused for want of room",
            registry=registry,
        )
        self.commit_seconds = Histogram(
            "ptycho_stream_frames_commit_seconds",
            "Time from a batch's first frame to its commit",
            buckets=(0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.5, 2.0),
            registry=registry,
        )
        ProcessCollector(namespace="ptycho_stream_ingest", registry=registry)
        # Counters that begin at 0 let Prometheus see the first event as an increase.
        for reason in ("wrong_shape", "closed", "disk_full"):
            self.dropped.labels(reason)
        for reason in ("extent", "jump"):
            self.positions_flagged.labels(reason)
        for state in SEALED_STATES:
            self.scans.labels(state)

    def count_positions(self, new: PositionCounts) -> None:
        """Count positions that came inline, or are not to be trusted."""
        self.positions_received.inc(new.inline)
        self.positions_invalid.inc(new.invalid)
        self.positions_flagged.labels("extent").inc(new.out_of_extent)
        self.positions_flagged.labels("jump").inc(new.jumps)

    def count_sealed(self, header: ScanHeader) -> None:
        """Count what is known of a scan at its end."""
        self.missing.inc(max(header.counts.get("missing", 0), 0))
        self.unpositioned.inc(max(header.counts.get("unpositioned", 0), 0))
        self.gated.inc(header.counts.get("gated", 0))
        self.dark.inc(header.counts.get("dark", 0))
        self.scans.labels(header.state).inc()
