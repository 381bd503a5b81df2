"""Debian's Prometheus scrapes a running daemon, and answers every query of rules and dashboards.

The daemon reconstructs, refines and judges a simulated scan of 64 x 64 pixels meanwhile.
``make prometheus`` installs the server and its ``promtool``.
"""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zmq
from daemon_harness import DaemonHarness, free_port, wait_for
from prometheus_page import ROOT, undocumented
from test_end_to_end import line
from test_prometheus_configs import queries, rules

from ptycho_stream.files.npz import ScanFile
from ptycho_stream.simulate.experiment import simulate_experiment
from ptycho_stream.simulate.scan_file import scan_file_of

CONFIGS = ROOT / "configs" / "prometheus"
FRAMES, RATE_HZ = 150, 15.0
UNDECODABLE = "ptycho_stream_messages_undecodable"
NOT_A_NUMBER = "ptycho_stream_training_loss_value"
"""NaN where no job runs."""
pytestmark = [
    pytest.mark.interop,
    pytest.mark.timeout(240),
    pytest.mark.skipif(
        not (shutil.which("prometheus") and shutil.which("promtool")),
        reason="there is no prometheus: `make prometheus` installs Debian's",
    ),
]


def promtool(*arguments: object, text: str | None = None) -> str:
    """What promtool prints; it must find no fault."""
    answer = subprocess.run(
        ["promtool", *map(str, arguments)],
        input=text,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert answer.returncode == 0, answer.stdout + answer.stderr
    return answer.stdout + answer.stderr


def test_promtool_finds_no_fault_in_configuration_and_rules():
    promtool("check", "config", CONFIGS / "prometheus.yml")
    promtool("check", "rules", "--lint=all", "--lint-fatal", CONFIGS / "recording.yml")
    promtool("check", "rules", "--lint=all", "--lint-fatal", CONFIGS / "alerts.yml")


def test_each_alert_fires_when_it_should_and_else_does_not():
    assert "SUCCESS" in promtool("test", "rules", ROOT / "tests" / "prometheus" / "alerts.yml")


@pytest.fixture(scope="module")
def scan() -> ScanFile:
    return scan_file_of(simulate_experiment(seed=3, frames=FRAMES, size_px=64))


@pytest.fixture(scope="module")
def daemon(scan: ScanFile, tmp_path_factory: pytest.TempPathFactory) -> Iterator[DaemonHarness]:
    folder = tmp_path_factory.mktemp("daemon")
    np.savez(folder / "probe.npz", probe=scan.probe)
    settings = {
        "detector": {"dialect": "dectris-v1"},
        "refine": {"enabled": True, "seconds": 5.0, "modes": 1},
        "trust": {"enabled": True, "seconds": 20.0},
    }
    with DaemonHarness(folder, settings) as harness:
        yield harness


class Server:
    """Prometheus with the configuration of the project, but for the address and a faster clock."""

    def __init__(self, folder: Path, target: str) -> None:
        self.target = target
        self.url = f"http://127.0.0.1:{free_port()}"
        for name in ("recording.yml", "alerts.yml"):
            shutil.copy(CONFIGS / name, folder)
        config = (CONFIGS / "prometheus.yml").read_text()
        config = config.replace("localhost:9603", target).replace(": 5s", ": 1s")
        (folder / "prometheus.yml").write_text(config)
        self._log = folder / "prometheus.log"
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                [
                    "prometheus",
                    f"--config.file={folder / 'prometheus.yml'}",
                    f"--storage.tsdb.path={folder / 'data'}",
                    f"--web.listen-address={self.url.removeprefix('http://')}",
                ],
                stdout=log,
                stderr=subprocess.STDOUT,
            )

    def wait_scraping(self) -> None:
        """Until it has seen the daemon."""
        try:
            wait_for(lambda: self.has_data("up == 1"), 30, "a scrape")
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self._log.read_text()}") from None

    def get(self, path: str, **parameters: str) -> Any:
        """The data of an answer of Prometheus' HTTP API."""
        url = f"{self.url}/api/v1/{path}?{urllib.parse.urlencode(parameters)}"
        with urllib.request.urlopen(url, timeout=10) as answer:
            return json.load(answer)["data"]

    def has_data(self, query: str) -> bool:
        """Whether a query is answered by at least one number."""
        try:
            result = self.get("query", query=query.replace("$instance", self.target))["result"]
        except urllib.error.URLError:  # it does not listen yet
            return False
        if NOT_A_NUMBER in query:
            return bool(result)
        return any(math.isfinite(float(series["value"][1])) for series in result)

    def close(self) -> None:
        self._process.terminate()
        self._process.wait(20)


@pytest.fixture(scope="module")
def server(daemon: DaemonHarness, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    made = Server(tmp_path_factory.mktemp("prometheus"), daemon.url("").removeprefix("http://"))
    with closing(made):
        made.wait_scraping()
        yield made


@pytest.fixture(scope="module")
def scanned(daemon: DaemonHarness, server: Server, scan: ScanFile) -> Server:
    """The server, after a scan, and nonsense in the positions' stream before one scrape or more."""
    with line(daemon, rate_hz=RATE_HZ) as beamline:
        beamline.play(scan)
        beamline.results.wait_complete(timeout_s=60)
    with zmq.Context() as context, context.socket(zmq.PUSH) as socket:
        socket.bind(daemon.positions_endpoint)
        for count in (1, 2):
            socket.send(b"nonsense")
            daemon.metric(f'{UNDECODABLE}_total{{reason="malformed"}}', count)
            seen = f"{UNDECODABLE}_total == {count}"
            wait_for(partial(server.has_data, seen), what=seen)
    return server


def test_the_daemon_shows_nothing_that_promtool_or_the_page_of_metrics_do_not_like(
    daemon: DaemonHarness, scanned: Server
):
    with urllib.request.urlopen(daemon.url("/metrics"), timeout=5) as answer:
        text = answer.read().decode()
    assert promtool("check", "metrics", text=text) == ""
    assert undocumented(text) == []


def test_each_query_of_rules_and_dashboards_is_answered_with_data(scanned: Server):
    wanted = {place: query for place, query in queries() if not place.startswith("PtychoStream")}
    wanted |= {rule["record"]: rule["record"] for rule in rules("recording.yml")}

    def unanswered() -> list[str]:
        return [place for place, query in wanted.items() if not scanned.has_data(query)]

    try:
        wait_for(lambda: not unanswered(), 30, "data")
    except AssertionError:
        assert unanswered() == []


def test_all_rules_are_evaluated_and_what_is_wrong_is_told(scanned: Server):
    def evaluated() -> dict[str, dict[str, Any]]:
        groups = scanned.get("rules")["groups"]
        return {rule["name"]: rule for group in groups for rule in group["rules"]}

    wait_for(lambda: all(r["health"] == "ok" for r in evaluated().values()), what="all rules")
    both = [*rules("recording.yml"), *rules("alerts.yml")]
    assert set(evaluated()) == {rule.get("alert") or rule["record"] for rule in both}
    wait_for(lambda: evaluated()["PtychoStreamMessagesUndecodable"]["alerts"], what="the alert")
