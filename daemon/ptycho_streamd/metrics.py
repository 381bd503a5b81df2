"""Prometheus metrics of several processes as one: children send snapshots, the supervisor merges.

A dead child's gauges go with it; its counters and histograms stay and its successor's add to them,
so that ``rate()`` sees no reset.  Names are ``ptycho_stream_<noun>_<verb>_<unit>``.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Mapping

from prometheus_client import CollectorRegistry, Metric
from prometheus_client.registry import Collector

Sample = tuple[str, dict[str, str], float]
Family = tuple[str, str, str, list[Sample]]
_SampleKey = tuple[str, tuple[tuple[str, str], ...]]
_LASTING = ("counter", "histogram", "summary")


def snapshot(registry: CollectorRegistry, labels: Mapping[str, str] | None = None) -> list[Family]:
    """All of ``registry`` as plain values: (name, documentation, type, samples).

    ``labels`` are given to each sample beside its own.
    """
    more = labels or {}
    return [
        (
            metric.name,
            metric.documentation,
            metric.type,
            [
                (sample.name, {**sample.labels, **more}, float(sample.value))
                for sample in metric.samples
                if not sample.name.endswith("_created")
            ],
        )
        for metric in registry.collect()
    ]


class MergedMetrics(Collector):
    """The children's metrics, as the supervisor's registry collects them.

    Thread-safe: the supervisor's loop updates it, the HTTP server's threads collect.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._live: dict[str, list[Family]] = {}
        self._pids: dict[str, int] = {}
        self._past: dict[str, dict[_SampleKey, float]] = {}
        self._families: dict[str, tuple[str, str]] = {}

    def update(self, stage: str, pid: int, families: Iterable[Family]) -> None:
        """Take the newest snapshot of a stage; a new ``pid`` closes the former incarnation."""
        with self._lock:
            if self._pids.get(stage, pid) != pid:
                self._retire(stage)
            self._pids[stage] = pid
            self._live[stage] = list(families)

    def stage_ended(self, stage: str) -> None:
        """Drop a stage's gauges and keep the sums of its counters and histograms."""
        with self._lock:
            self._retire(stage)

    def collect(self) -> Iterator[Metric]:
        """All families, as the sums over stages and their past incarnations."""
        with self._lock:
            sums, kinds = self._sum()
        for name, samples in sums.items():
            documentation, kind = kinds[name]
            metric = Metric(name, documentation, kind)
            for (sample_name, labels), value in samples.items():
                metric.add_sample(sample_name, dict(labels), value)
            yield metric

    def _retire(self, stage: str) -> None:
        self._pids.pop(stage, None)
        for name, documentation, kind, samples in self._live.pop(stage, ()):
            if kind not in _LASTING:
                continue
            self._families[name] = (documentation, kind)
            past = self._past.setdefault(name, {})
            for sample_name, labels, value in samples:
                key = (sample_name, tuple(labels.items()))
                past[key] = past.get(key, 0.0) + value

    def _sum(self) -> tuple[dict[str, dict[_SampleKey, float]], dict[str, tuple[str, str]]]:
        sums = {name: dict(samples) for name, samples in self._past.items()}
        kinds = dict(self._families)
        for families in self._live.values():
            for name, documentation, kind, samples in families:
                kinds[name] = (documentation, kind)
                into = sums.setdefault(name, {})
                for sample_name, labels, value in samples:
                    key = (sample_name, tuple(labels.items()))
                    into[key] = into.get(key, 0.0) + value
        return sums, kinds
