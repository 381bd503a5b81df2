"""The terminal commands against a real daemon, from an empty store to the file in one's hand."""

import json
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
from daemon_harness import DaemonHarness

from ptycho_stream.simulate.detector import (
    DetectorOptions,
    DetectorSimulator,
    PositionSimulator,
    play,
)
from ptycho_stream.simulate.experiment import simulate_experiment
from ptycho_stream.simulate.scan_file import scan_file_of

FRAMES = 120
PROGRAM = "import sys; from ptycho_stream.cli import main; sys.exit(main())"
pytestmark = [pytest.mark.timeout(120), pytest.mark.slow]


@pytest.fixture
def scan():
    return scan_file_of(simulate_experiment(seed=5, frames=FRAMES, size_px=64))


@pytest.fixture
def daemon(tmp_path, scan):
    np.savez(tmp_path / "probe.npz", probe=scan.probe)
    with DaemonHarness(tmp_path, {"detector": {"dialect": "dectris-v1"}}) as harness:
        yield harness


def words(daemon, *given):
    return [sys.executable, "-c", PROGRAM, *map(str, given), "--config", str(daemon.config)]


def run(daemon, *given):
    return subprocess.run(words(daemon, *given), capture_output=True, text=True, timeout=60)


def answer(daemon, *given):
    done = run(daemon, "ctl", *given, "--json")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def stream(daemon, scan):
    detector = DetectorSimulator(daemon.detector_endpoint, DetectorOptions(rate_hz=60.0))
    positions = PositionSimulator(daemon.positions_endpoint)
    with detector, positions:
        detector.wait_for_receiver()
        positions.wait_for_receiver()
        play(scan, detector, positions)


def test_a_watcher_gets_the_final_image_though_the_publisher_is_killed(daemon, scan, tmp_path):
    out = tmp_path / "image.npz"
    watcher = subprocess.Popen(
        words(daemon, "watch", "--until-complete", "--json", "--timeout", 90, "--out", out),
        stdout=subprocess.PIPE,
        text=True,
    )
    player = threading.Thread(target=stream, args=(daemon, scan))
    player.start()
    first = json.loads(watcher.stdout.readline())
    time.sleep(0.5)
    daemon.kill("reconstruct")
    said, _ = watcher.communicate(timeout=90)
    player.join()
    assert watcher.returncode == 0
    last = json.loads(said.splitlines()[-1])
    assert last["scan_id"] == first["scan_id"]
    assert (last["state"], last["final"], last["frames"]) == ("complete", True, FRAMES)
    with np.load(out, allow_pickle=False) as saved:
        assert sorted(saved["frame_numbers"].tolist()) == list(range(FRAMES))
        assert str(saved["scan_id"]) == first["scan_id"]
    written = answer(daemon, "export", "--format", "npz", "--format", "png")
    assert [path.rsplit(".", 1)[1] for path in written["paths"]] == ["npz", "png"]
    with np.load(written["paths"][0], allow_pickle=False) as exported, np.load(out) as saved:
        np.testing.assert_array_equal(exported["object"], saved["object"])


def test_every_control_command_on_a_daemon_that_has_seen_nothing(daemon):
    status = answer(daemon, "status")
    assert status["state"] == "ready" and set(status["stages"]) == {"ingest", "reconstruct"}
    assert answer(daemon, "scans") == []
    assert answer(daemon, "endpoints")
    assert {"applied", "needs_restart"} <= set(answer(daemon, "reload"))
    armed = answer(daemon, "start", "--meta", "sample=star", "--frames", 10)
    assert answer(daemon, "abort", armed["scan_id"]) == armed
    for given in (("scan", "no-such-scan"), ("stop",), ("export",)):
        done = run(daemon, "ctl", *given)
        assert done.returncode == 1 and done.stderr.startswith("error: "), given
        assert done.stderr.count("\n") == 1, done.stderr
    assert run(daemon, "watch", "--once").returncode == 1
