"""The page of metrics says what the code has, and what a running daemon shows."""

from __future__ import annotations

import re
import runpy
import urllib.request

import pytest
from daemon_harness import DaemonHarness
from prometheus_page import PAGE, ROOT, documented, undocumented

REGENERATE = "run `python docs/metrics_page.py`"
COUNTED = ("_total", "_bucket", "_sum", "_count")
page = runpy.run_path(str(ROOT / "docs" / "metrics_page.py"))["page"]


def test_the_page_is_what_the_code_says():
    assert PAGE.read_text() == page(), f"docs/metrics.md is old: {REGENERATE}"


def test_names_are_as_prometheus_and_our_pages_want_them():
    """What ``promtool check metrics`` says too, where it is installed."""
    for name, metric in documented().items():
        assert re.fullmatch("ptycho_stream(_[a-z0-9]+)+", name), name
        assert not re.search("gauge|counter|histogram|_(ms|s|milliseconds|minutes|kb|mb)$", name)
        if metric.kind == "gauge":
            assert not name.endswith(COUNTED), f"{name}: a gauge must not look like a counter"


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ('NAME = "a"\nGauge(NAME, "b")', "as literals"),
        ('Gauge("a", "other")\nGauge("a", "b", ["c"])', "described twice"),
    ],
)
def test_what_cannot_be_read_is_refused(tmp_path, source, says):
    (tmp_path / "made.py").write_text(f"from prometheus_client import Gauge\n{source}\n")
    with pytest.raises(ValueError, match=says):
        page(tmp_path)


def test_what_a_running_daemon_shows_is_documented(tmp_path):
    with (
        DaemonHarness(tmp_path, stages=("ingest",)) as daemon,
        urllib.request.urlopen(daemon.url("/metrics"), timeout=5) as answer,
    ):
        text = answer.read().decode()
    assert undocumented(text) == [], REGENERATE
    assert "ptycho_stream_frames_received_total 0.0" in text
    assert 'ptycho_stream_stage_restarts_total{stage="ingest"} 0.0' in text
    assert "_created" not in text
    extra = text + "# TYPE other gauge\nother 1\n"
    assert undocumented(extra) == ["other (gauge) with []"]
