"""``ptycho-stream demo`` as a program: what it writes, and when its exit status is 1."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import urllib.request
from pathlib import Path

import numpy as np
import pytest
from daemon_harness import wait_for
from PIL import Image as Picture

from ptycho_stream.cli.demo import _problem
from ptycho_stream.settings import load_settings

CONFIG = Path(__file__).parents[1] / "configs" / "demo.toml"
MAIN = "import sys; from ptycho_stream.cli import main; sys.exit(main())"
NEVER_GOOD = f"import ptycho_stream.cli.demo as demo; demo.GOOD_NRMSE = 0.0; {MAIN}"
FRAME_WITHOUT_PIXELS = f"""
from ptycho_stream.simulate.series import DectrisSeries
whole = DectrisSeries.frame
def frame(self, index):
    head, array, blob, times = whole(self, index)
    return [head, array, b"" if index == 7 else blob, times]
DectrisSeries.frame = frame
{MAIN}
"""
FIGURES = {
    "sent",
    "received",
    "reconstructed",
    "frames_per_s",
    "latency_p50_ms",
    "latency_p99_ms",
    "first_image_s",
    "nrmse",
}

pytestmark = [pytest.mark.timeout(150), pytest.mark.slow]


@pytest.fixture
def demo_ports() -> None:
    """The demo's ports are fixed: another program on one of them is said by name."""
    settings = load_settings(CONFIG)
    endpoints = [
        settings.detector.endpoint,
        settings.positions.endpoint,
        settings.results.endpoint,
        settings.results.resync_endpoint,
        settings.control.endpoint,
        f"tcp://127.0.0.1:{settings.http.port}",
        f"tcp://127.0.0.1:{settings.viewer.port}",
    ]
    for endpoint in endpoints:
        assert endpoint is not None
        port = int(endpoint.rsplit(":", 1)[1])
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", port))
            except OSError as error:
                pytest.fail(f"port {port} of configs/demo.toml is not free: {error}")


def demo(out: Path, code: str = MAIN, frames: int = 120) -> subprocess.CompletedProcess[str]:
    options = ["--out", str(out), "--frames", str(frames), "--rate", "30"]
    return subprocess.run(
        [sys.executable, "-c", code, "demo", *options],
        capture_output=True,
        text=True,
        timeout=120,
    )


def demo_with_page(out: Path) -> str:
    """A demo whose page is opened, until somebody presses Ctrl-C; what the browser was given."""
    opened = out / "opened"
    browser = out / "browser.py"
    browser.write_text(
        f"import pathlib, sys; pathlib.Path({str(opened)!r}).write_text(sys.argv[1])"
    )
    options = ["demo", "--viewer", "--out", str(out), "--frames", "120", "--rate", "30"]
    with (out / "output").open("w+") as output:
        program = subprocess.Popen(
            [sys.executable, "-c", MAIN, *options],
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, "BROWSER": f"{sys.executable} {browser} %s"},
        )
        try:
            wait_for(lambda: "until Ctrl-C" in (out / "output").read_text(), 120, "the end")
            with urllib.request.urlopen(opened.read_text(), timeout=5) as page:
                assert b"ptycho-stream" in page.read()
            program.send_signal(signal.SIGINT)
            assert program.wait(30) == 0, (out / "output").read_text()
        finally:
            program.kill()
            program.wait()
    return opened.read_text()


@pytest.mark.usefixtures("demo_ports")
def test_it_writes_a_good_image_and_its_report(tmp_path: Path) -> None:
    assert demo_with_page(tmp_path) == f"http://127.0.0.1:{load_settings(CONFIG).viewer.port}/"
    report = json.loads((tmp_path / "report.json").read_text())
    assert set(report) >= FIGURES
    assert report["sent"] == report["received"] == report["reconstructed"] == 120
    assert 0 < report["frames_per_s"] < 40
    assert 0 < report["latency_p50_ms"] <= report["latency_p99_ms"]
    assert 0 < report["first_image_s"] < 120 / 30  # while the scan ran
    assert 0 < report["nrmse"] <= 0.2
    with Picture.open(tmp_path / "preview.png") as picture:
        picture.load()
        assert min(picture.size) > 50
    with np.load(tmp_path / "object.npz", allow_pickle=False) as held:
        assert held["object"].dtype == np.complex64
        assert held["object"].shape == held["weight"].shape
        assert np.isfinite(held["object"][held["weight"] > 0]).all()
        assert held["origin_yx_m"].shape == held["pixel_yx_m"].shape == (2,)
        assert held["probe"].shape[1:] == (128, 128)
        assert sorted(held["frame_numbers"].tolist()) == list(range(120))
        assert held["positions_yx_m"].shape == (120, 2)
        assert json.loads(str(held["metadata"]))["sample"] == "simulated"


@pytest.mark.usefixtures("demo_ports")
@pytest.mark.parametrize(
    ("code", "says", "received"),
    [(NEVER_GOOD, "image is bad", 50), (FRAME_WITHOUT_PIXELS, "frames were lost", 49)],
    ids=["bad image", "lost frame"],
)
def test_what_is_bad_is_exit_status_1_with_a_report(
    code: str, says: str, received: int, tmp_path: Path
) -> None:
    done = demo(tmp_path, code, frames=50)
    assert done.returncode == 1, done.stdout + done.stderr
    assert says in done.stdout + done.stderr
    report = json.loads((tmp_path / "report.json").read_text())
    assert set(report) >= FIGURES
    assert (report["sent"], report["received"]) == (50, received)


GOOD = {"sent": 100, "received": 100, "reconstructed": 100, "nrmse": 0.1}


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({}, "^$"),
        ({"nrmse": 0.3}, "image is bad"),
        ({"nrmse": float("nan")}, "image is bad"),
        ({"received": 99, "reconstructed": 99}, "frames were lost"),
        ({"reconstructed": 99}, "frames were lost"),
    ],
)
def test_a_report_is_judged(change: dict[str, float], says: str) -> None:
    assert re.search(says, _problem(GOOD | change))
