"""The Prometheus metrics of the supervisor itself: its stages and its own process."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, ProcessCollector


class SupervisorMetrics:
    """What the supervisor counts, in the registry that the daemon serves."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.restarts = Counter(
            "ptycho_stream_stage_restarts",
            "Stages that ended unasked and were started again, by stage",
            ["stage"],
            registry=registry,
        )
        self.up = Gauge(
            "ptycho_stream_stage_up_state",
            "1 while the stage runs and sends heartbeats, by stage",
            ["stage"],
            registry=registry,
        )
        ProcessCollector(namespace="ptycho_stream_supervisor", registry=registry)
