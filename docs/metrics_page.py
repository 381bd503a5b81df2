"""Writes ``docs/metrics.md`` from the daemon's code: ``python docs/metrics_page.py``.

Every metric is made by a call such as ``Counter("ptycho_stream_frames_received", "Frames that
arrived")`` somewhere in ``ptycho_streamd``; the page lists these calls.  A test compares page and
code, and both with what a running daemon exposes.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from prometheus_client import CollectorRegistry, ProcessCollector

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "metrics.md"
KINDS = ("Counter", "Gauge", "Histogram")
UNITS = {
    "seconds": "s",
    "bytes": "bytes",
    "ratio": "ratio",
    "state": "0 or 1",
    "info": "1",
    "figure": "the figure's",
    "value": "none",
}
"""By the last word of a name; all others are counts."""
HEAD = """# Metrics

Written by `python docs/metrics_page.py` from the code; do not edit.

All that `http://HOST:9603/metrics` shows. Names are `ptycho_stream_<noun>_<verb>_<unit>`; a counter
ends in `_total`. A histogram is a counter for each bucket, `_bucket{le}`, and `_sum` and `_count`.
Counters survive restarts of the stages, and begin anew with the daemon; a dead stage's gauges
disappear. The metrics of a further detector's ingest (`[[more_detectors]]`) have the label
`detector` beside those given here. Alerts and dashboards use these metrics:
[operations.md](operations.md#dashboards-and-alerts).

| metric | type | labels | unit | meaning |
|---|---|---|---|---|
"""


@dataclass(frozen=True, order=True)
class Described:
    """A metric as Prometheus sees it."""

    name: str
    kind: str
    labels: tuple[str, ...]
    meaning: str

    @property
    def unit(self) -> str:
        """Of its values, as the page calls it."""
        return UNITS.get(self.name.removesuffix("_total").rpartition("_")[2], "count")

    @property
    def row(self) -> str:
        """Its line in the page's table."""
        labels = ", ".join(f"`{label}`" for label in self.labels)
        return f"| `{self.name}` | {self.kind} | {labels} | {self.unit} | {self.meaning} |\n"


def page(source: Path = ROOT / "daemon") -> str:
    """The whole page, as it should be for the code in the folder ``source``.

    Raises:
        ValueError: a metric is made in a way that cannot be read, or twice in different ways.
    """
    found = sorted({m for path in source.rglob("*.py") for m in _made_in(path)})
    for one, other in pairwise(found):
        if one.name == other.name:
            raise ValueError(f"{one.name} is described twice: as {one} and as {other}")
    return HEAD + "".join(metric.row for metric in found)


def _made_in(path: Path) -> Iterator[Described]:
    tree = ast.parse(path.read_text())
    imported = {
        name.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.module == "prometheus_client"
        for name in node.names
    }
    for node in ast.walk(tree):
        if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Name)):
            continue
        kind = node.func.id
        if kind not in imported:
            continue
        arguments = dict(zip(("name", "documentation", "labelnames"), node.args, strict=False))
        arguments |= {keyword.arg: keyword.value for keyword in node.keywords if keyword.arg}
        try:
            if kind in KINDS:
                yield _described(kind.lower(), arguments)
            elif kind == "ProcessCollector":
                yield from _of_process(ast.literal_eval(arguments["namespace"]))
        except (KeyError, ValueError) as error:
            raise ValueError(
                f"{path}:{node.lineno}: give name, meaning and labels of a metric as literals, so "
                "that docs/metrics_page.py can read them"
            ) from error


def _described(kind: str, arguments: dict[str, ast.expr]) -> Described:
    name = ast.literal_eval(arguments["name"])
    if kind == "counter":
        name = name.removesuffix("_total") + "_total"
    labels = ast.literal_eval(arguments["labelnames"]) if "labelnames" in arguments else ()
    return Described(name, kind, tuple(labels), ast.literal_eval(arguments["documentation"]))


def _of_process(namespace: str) -> Iterator[Described]:
    registry = CollectorRegistry()
    ProcessCollector(namespace=namespace, registry=registry)
    for metric in registry.collect():
        suffix = "_total" if metric.type == "counter" else ""
        meaning = metric.documentation.rstrip(".")
        yield Described(f"{metric.name}{suffix}", metric.type, (), meaning)


if __name__ == "__main__":
    PAGE.write_text(page())
