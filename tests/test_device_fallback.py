"""A GPU that fails amid a scan costs freshness: the stage starts again, then the CPU takes over."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from daemon_harness import DaemonHarness, wait_for
from live_scan import FRAMES, line, playing, simulated

from ptycho_stream.files.npz import ScanFile

pytestmark = pytest.mark.timeout(120)
STAND_IN = Path(__file__).parent / "stand_in_gpu"


@pytest.fixture(scope="module")
def scan() -> ScanFile:
    return simulated(seed=3)


@contextmanager
def daemon_with_gpu(folder: Path, scan: ScanFile, **reconstruct: object) -> Iterator[DaemonHarness]:
    """``folder / "gpu"`` says how the GPU is."""
    np.savez(folder / "probe.npz", probe=scan.probe)
    (folder / "gpu").write_text("fine")
    settings = {
        "detector": {"dialect": "dectris-v1"},
        "reconstruct": {"device": "cuda", "save_interval_s": 0.3, **reconstruct},
    }
    environment = {
        "PTYCHO_STREAM_TEST_GPU": str(folder / "gpu"),
        "PYTHONPATH": os.pathsep.join([str(STAND_IN), os.environ.get("PYTHONPATH", "")]),
    }
    with DaemonHarness(folder, settings, environment=environment) as harness:
        yield harness


def reconstruct_status(daemon: DaemonHarness) -> dict[str, object]:
    return daemon.status()["stages"]["reconstruct"]["status"]


@pytest.mark.slow
def test_a_gpu_that_keeps_failing_is_replaced_by_the_cpu(tmp_path: Path, scan: ScanFile) -> None:
    with daemon_with_gpu(tmp_path, scan) as daemon:
        wait_for(lambda: reconstruct_status(daemon).get("device") == "cuda")
        with line(daemon, rate_hz=60) as beamline:
            with playing(beamline, scan):
                wait_for(lambda: daemon.metrics().get("ptycho_stream_frames_reconstructed_total"))
                (tmp_path / "gpu").write_text("failing")
            final = beamline.results.wait_complete(timeout_s=60)
        assert sorted(final.frame_numbers.tolist()) == list(range(FRAMES))
        status = reconstruct_status(daemon)
        assert status["device"] == "cpu"
        assert re.match("cuda has failed 3 times .*CUDA error: an illegal", str(status["problem"]))
        daemon.metric("ptycho_stream_device_fallback_state", 1)
        metrics = daemon.metrics()
        assert metrics['ptycho_stream_stage_restarts_total{stage="ingest"}'] == 0
        assert 1 <= metrics['ptycho_stream_stage_restarts_total{stage="reconstruct"}'] <= 3
        assert metrics["ptycho_stream_frames_missing_total"] == 0
        (tmp_path / "gpu").write_text("fine")
        with daemon.control() as control:
            control.reload()
        wait_for(lambda: reconstruct_status(daemon).get("device") == "cuda")
        assert reconstruct_status(daemon)["problem"] == ""
        daemon.metric("ptycho_stream_device_fallback_state", 0)


@pytest.mark.long
def test_without_leave_to_fall_back_frames_are_stored_until_the_gpu_is_there(
    tmp_path: Path, scan: ScanFile
) -> None:
    with daemon_with_gpu(tmp_path, scan, fallback_to_cpu=False) as daemon:
        (tmp_path / "gpu").write_text("lost")
        daemon.kill("reconstruct")
        wait_for(
            lambda: "cannot be used here" in str(reconstruct_status(daemon).get("problem")), 30
        )
        with line(daemon) as beamline:
            beamline.play(scan)
            daemon.metric("ptycho_stream_frames_committed_total", FRAMES)
            wait_for(lambda: daemon.metrics().get("ptycho_stream_recipes_failed_total", 0) >= 4, 20)
            (tmp_path / "gpu").write_text("fine")
            final = beamline.results.wait_complete(timeout_s=40)
        assert sorted(final.frame_numbers.tolist()) == list(range(FRAMES))
        assert reconstruct_status(daemon)["device"] == "cuda"
