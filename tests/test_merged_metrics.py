"""Metrics of several processes as one: sums that survive their processes, gauges that do not."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.exposition import generate_latest

from ptycho_streamd.metrics import MergedMetrics, snapshot


class Child:
    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.frames = Counter("frames", "f", ["reason"], registry=self.registry)
        self.open = Gauge("open_scans", "o", registry=self.registry)
        self.seconds = Histogram("seconds", "s", buckets=(1.0,), registry=self.registry)


def text(merged: MergedMetrics) -> str:
    registry = CollectorRegistry()
    registry.register(merged)
    return generate_latest(registry).decode()


def test_a_dead_childs_counters_stay_and_its_successors_add_to_them():
    merged = MergedMetrics()
    for pid, frames in ((1, 5), (2, 3)):
        child = Child()
        child.frames.labels("late").inc(frames)
        child.seconds.observe(0.5)
        child.open.set(7)
        merged.update("ingest", pid, snapshot(child.registry))
        merged.update("ingest", pid, snapshot(child.registry))
    assert 'frames_total{reason="late"} 8.0' in text(merged)
    assert "seconds_count 2.0" in text(merged)
    assert 'seconds_bucket{le="1.0"} 2.0' in text(merged)
    assert "open_scans 7.0" in text(merged)


def test_a_dead_childs_gauges_go():
    merged = MergedMetrics()
    child = Child()
    child.open.set(7)
    child.frames.labels("late").inc()
    merged.update("ingest", 1, snapshot(child.registry))
    merged.stage_ended("ingest")
    assert "open_scans" not in text(merged)
    assert 'frames_total{reason="late"} 1.0' in text(merged)


def test_counters_of_the_same_name_in_two_stages_are_summed():
    merged = MergedMetrics()
    for stage in ("ingest", "reconstruct"):
        child = Child()
        child.frames.labels("late").inc()
        merged.update(stage, 1, snapshot(child.registry))
    assert 'frames_total{reason="late"} 2.0' in text(merged)
