"""The Prometheus metrics of the supervisor itself: its stages and its own process."""

from __future__ import annotations

from collections.abc import Iterable

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    ProcessCollector,
    disable_created_metrics,
)


class SupervisorMetrics:
    """What the supervisor counts, in the registry that the daemon serves."""

    def __init__(self, registry: CollectorRegistry) -> None:
        # The time at which a counter was made would be a metric of its own beside each counter.
        disable_created_metrics()
        self.restarts = Counter(
            "ptycho_stream_stage_restarts",
            "Stages that ended unasked and were started again",
            ["stage"],
            registry=registry,
        )
        self.up = Gauge(
            "ptycho_stream_stage_up_state",
            "1 while the stage runs and sends heartbeats",
            ["stage"],
            registry=registry,
        )
        ProcessCollector(namespace="ptycho_stream_supervisor", registry=registry)

    def expect(self, stages: Iterable[str]) -> None:
        """Show these stages before anything is known of them.

        A counter that begins at 0 lets Prometheus see the first restart as an increase.
        """
        for stage in stages:
            self.restarts.labels(stage)
            self.up.labels(stage)
