"""Helpers beside the reconstruct stage of a real daemon: the same image, whoever dies."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from daemon_harness import DaemonHarness, wait_for

from ptycho_stream.client import ResultStream
from ptycho_stream.files.npz import ScanFile
from ptycho_stream.reconstruct.recipe import load_recipe
from ptycho_stream.reconstruct.scan_image import ScanImage
from ptycho_stream.results import Image
from ptycho_stream.scans.catalogue import Catalogue
from ptycho_stream.simulate.detector import DetectorSimulator, PositionSimulator, play
from ptycho_stream.simulate.experiment import simulate_experiment
from ptycho_stream.simulate.scan_file import scan_file_of
from ptycho_streamd.helper import device_of

FRAMES = 600
FRAMES_OF_HELPER = 'ptycho_stream_helper_frames_total{helper="1"}'
pytestmark = [pytest.mark.timeout(120), pytest.mark.slow]


@pytest.fixture(scope="module")
def scan() -> ScanFile:
    """The same hundred frames again and again: what a sample looks like is no matter here."""
    few = scan_file_of(simulate_experiment(seed=8, frames=100, size_px=64))
    at = np.arange(FRAMES) % len(few)
    return replace(
        few,
        counts=few.counts[at],
        positions_yx_m=few.positions_yx_m[at],
        frame_numbers=np.arange(FRAMES),
    )


@pytest.fixture
def daemon(tmp_path: Path, scan: ScanFile) -> Iterator[DaemonHarness]:
    np.savez(tmp_path / "probe.npz", probe=scan.probe)
    settings = {"detector": {"dialect": "dectris-v1"}, "reconstruct": {"helpers": 1}}
    with DaemonHarness(tmp_path, settings) as harness:
        wait_for(lambda: helpers(harness) == 1, 30, "the helper's first word")
        yield harness


def helpers(daemon: DaemonHarness) -> int:
    return daemon.status()["stages"]["reconstruct"]["status"].get("helpers", 0)


def send(daemon: DaemonHarness, scan: ScanFile) -> None:
    with (
        DetectorSimulator(daemon.detector_endpoint) as detector,
        PositionSimulator(daemon.positions_endpoint) as positioner,
    ):
        detector.wait_for_receiver()
        positioner.wait_for_receiver()
        play(scan, detector, positioner)


def final_image(daemon: DaemonHarness) -> Image:
    settings = daemon.settings.results
    with ResultStream(settings.endpoint, settings.resync_endpoint) as results:
        return results.wait_complete(timeout_s=60)


def made_alone(daemon: DaemonHarness, scan_id: str) -> Image:
    """The image that one process makes of what the daemon has stored."""
    with Catalogue(daemon.data).open(scan_id) as reader:
        (reader.directory / "reconstruct.npz").unlink()
        settings = daemon.settings
        image = ScanImage(reader, load_recipe(settings), settings.reconstruct.tile_px)
        while image.has_work:
            image.step(16, list[int]().extend)
        return Image(image.image(final=True))


def check(daemon: DaemonHarness, image: Image) -> None:
    """Every frame once, and the object that one process makes."""
    assert sorted(image.frame_numbers.tolist()) == list(range(FRAMES))
    assert daemon.status()["stages"]["ingest"]["restarts"] == 0
    daemon.stop()
    wanted = made_alone(daemon, image.scan_id)
    seen = np.isfinite(wanted.object_yx)
    assert np.array_equal(seen, np.isfinite(image.object_yx))
    error = np.abs(image.object_yx - wanted.object_yx)[seen].max()
    assert error <= 1e-5 * np.abs(wanted.object_yx[seen]).max()


def test_a_scan_made_with_a_helper_is_the_image_of_one_process(daemon, scan):
    send(daemon, scan)
    image = final_image(daemon)
    wait_for(lambda: daemon.metrics().get(FRAMES_OF_HELPER, 0) > 0, what="frames of the helper")
    check(daemon, image)


@pytest.mark.parametrize("stage", ["helper-1", "reconstruct"])
def test_a_process_killed_in_mid_scan_costs_no_frame(daemon, scan, stage):
    send(daemon, scan)
    wait_for(lambda: daemon.metrics().get(FRAMES_OF_HELPER, 0) > 0, what="frames of the helper")
    daemon.kill(stage)
    image = final_image(daemon)
    assert daemon.status()["stages"][stage]["restarts"] == 1
    check(daemon, image)


def test_helpers_take_the_gpus_that_the_stage_leaves():
    assert [device_of("auto", number, 4) for number in (1, 2, 3, 4)] == [
        "cuda:1",
        "cuda:2",
        "cuda:3",
        "cuda:0",
    ]
    assert device_of("auto", 1, 1) == device_of("auto", 1, 0) == "auto"
    assert device_of("cuda:2", 1, 4) == "cuda:2"
