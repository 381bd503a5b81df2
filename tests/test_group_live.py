"""A daemon whose network takes four frames at a time: every frame in, once, killed or not."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from daemon_harness import DaemonHarness, wait_for

from ptycho_stream.client import ResultStream
from ptycho_stream.files.npz import ScanFile
from ptycho_stream.models.manifest import Manifest
from ptycho_stream.models.registry import ModelRegistry
from ptycho_stream.networks.cnn import CnnNetwork, CnnSettings
from ptycho_stream.results import Image
from ptycho_stream.simulate.detector import DetectorSimulator, PositionSimulator, play
from ptycho_stream.simulate.experiment import simulate_experiment
from ptycho_stream.simulate.scan_file import scan_file_of
from ptycho_stream.simulate.series import DetectorOptions

FRAMES = 120
pytestmark = [pytest.mark.timeout(120), pytest.mark.slow]


@pytest.fixture(scope="module")
def scan() -> ScanFile:
    return scan_file_of(simulate_experiment(seed=1, frames=FRAMES, size_px=64, photons=1e6))


@pytest.fixture
def daemon(tmp_path: Path, scan: ScanFile) -> Iterator[DaemonHarness]:
    np.savez(tmp_path / "probe.npz", probe=scan.probe)
    torch.manual_seed(0)
    network = CnnNetwork(CnnSettings(size_px=64, gridsize=2, n_filters_scale=1))
    registry = ModelRegistry(tmp_path / "models")
    registry.save(network, Manifest("grouped", "cnn", network.settings_json()))
    settings = {
        "detector": {"dialect": "dectris-v1"},
        "model": {"name": "grouped", "registry": str(tmp_path / "models")},
        "reconstruct": {"save_interval_s": 0.2},
    }
    with DaemonHarness(tmp_path, settings) as harness:
        yield harness


def final_image(daemon: DaemonHarness, scan: ScanFile, kills: int) -> Image:
    """Of the scan, played live, with the stage killed on the way."""
    settings = daemon.settings.results
    with (
        DetectorSimulator(daemon.detector_endpoint, DetectorOptions(rate_hz=40)) as detector,
        PositionSimulator(daemon.positions_endpoint) as positioner,
        ResultStream(settings.endpoint, settings.resync_endpoint, timeout_s=60) as results,
    ):
        detector.wait_for_receiver()
        positioner.wait_for_receiver()
        player = threading.Thread(target=play, args=(scan, detector, positioner))
        player.start()
        for number in range(kills):
            seen = 20 + 30 * number
            # Nothing is known of ingest before its first beat.
            wait_for(lambda n=seen: daemon.ingest().get("frames_received", 0) >= n, 30, "frames")
            daemon.kill("reconstruct")
        image = results.wait_complete(timeout_s=80)
        player.join(timeout=30)
        assert not player.is_alive()
    return image


@pytest.mark.parametrize("kills", [0, 2])
def test_every_frame_of_a_live_scan_is_in_the_image_once(daemon, scan, kills):
    image = final_image(daemon, scan, kills)
    assert image.complete and image.content.model == "grouped"
    assert sorted(image.frame_numbers.tolist()) == list(range(FRAMES))
    assert image.counts["reconstructed"] == FRAMES and "waiting" not in image.counts
    assert image.spread is not None and 0 < image.spread < 0.3
    weight = image.weight_yx.sum(dtype=np.float64)
    power = np.abs(scan.probe) ** 2
    each = power.sum() / power.sum(0).max()
    # The edges fall below the least weight that counts; a patch twice or missing is 0.8 %.
    assert weight == pytest.approx(FRAMES * each, rel=0.004)
