"""What ``docs/metrics.md`` says of each metric, for tests that compare it with something else."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from prometheus_client.parser import text_string_to_metric_families

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "metrics.md"
ROW = re.compile(r"^\| `(?P<name>\w+)` \| (?P<kind>\w+) \| (?P<labels>[^|]*) \|", re.MULTILINE)
EVERYWHERE = {"instance", "job", "detector"}
"""Labels of any sample: the first two are Prometheus's, the third a further detector's ingest's."""


@dataclass(frozen=True)
class Documented:
    """A row of the page."""

    kind: str
    labels: frozenset[str]


def documented() -> dict[str, Documented]:
    """All rows of the page by name; a histogram's series by the names that they have."""
    metrics: dict[str, Documented] = {}
    for row in ROW.finditer(PAGE.read_text()):
        labels = frozenset(re.findall(r"`(\w+)`", row["labels"]))
        if row["kind"] == "histogram":
            for series, more in (("_bucket", {"le"}), ("_sum", set()), ("_count", set())):
                metrics[row["name"] + series] = Documented("histogram", labels | more)
        else:
            metrics[row["name"]] = Documented(row["kind"], labels)
    return metrics


def undocumented(exposition: str) -> list[str]:
    """Samples of ``/metrics`` whose name, type or labels the page does not have."""
    metrics = documented()
    wrong: list[str] = []
    for family in text_string_to_metric_families(exposition):
        for sample in family.samples:
            known = metrics.get(sample.name)
            labels = frozenset(sample.labels) - EVERYWHERE
            if known is None or known != Documented(family.type, labels):
                wrong.append(f"{sample.name} ({family.type}) with {sorted(labels)}")
    return wrong
