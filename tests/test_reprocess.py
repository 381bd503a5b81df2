"""A scan is looked at otherwise, or made with another probe, while or after it runs: whole daemon.

The old image is shown until the new one is complete, and a snapshot keeps it.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from daemon_harness import DaemonHarness, wait_for
from test_end_to_end import error, line, playing

from ptycho_stream.client import ResultStream
from ptycho_stream.errors import ControlError
from ptycho_stream.files.image_npz import load_image
from ptycho_stream.files.npz import ScanFile
from ptycho_stream.geometry import View
from ptycho_stream.results import Image
from ptycho_stream.scans import Catalogue
from ptycho_stream.simulate.experiment import simulate_experiment
from ptycho_stream.simulate.scan_file import scan_file_of

FRAMES = 120
SIZE_PX = 64
pytestmark = [pytest.mark.timeout(150), pytest.mark.slow]


@pytest.fixture(scope="module")
def scan() -> ScanFile:
    return scan_file_of(simulate_experiment(seed=3, frames=FRAMES, size_px=SIZE_PX))


@pytest.fixture(scope="module")
def mirrored(scan: ScanFile) -> ScanFile:
    """The same scan from a detector that is read from right to left."""
    counts = View(size_px=SIZE_PX, orientation="flip_x").apply(scan.counts)
    return replace(scan, counts=np.ascontiguousarray(counts))


@pytest.fixture
def daemon(tmp_path: Path, scan: ScanFile) -> Iterator[DaemonHarness]:
    np.savez(tmp_path / "probe.npz", probe=scan.probe)
    settings = {"detector": {"dialect": "dectris-v1"}, "refine": {"seconds": 1.0}}
    with DaemonHarness(tmp_path, settings) as harness:
        yield harness


@contextmanager
def seen_meanwhile(daemon: DaemonHarness) -> Iterator[list[Image]]:
    """Every image that a subscriber gets while the body runs."""
    results = daemon.settings.results
    images: list[Image] = []
    over = threading.Event()

    def follow() -> None:
        with ResultStream(results.endpoint, results.resync_endpoint) as stream:
            while not over.is_set():
                image = stream.latest(10)
                if image is not None:
                    images.append(image)
                over.wait(0.05)

    thread = threading.Thread(target=follow)
    thread.start()
    try:
        yield images
    finally:
        over.set()
        thread.join()


def newest(daemon: DaemonHarness) -> Image:
    results = daemon.settings.results
    with ResultStream(results.endpoint, results.resync_endpoint) as stream:
        image = stream.latest(10)
    assert image is not None
    return image


def made_again(daemon: DaemonHarness, generation: int) -> Image | None:
    """The final image of a later generation, if it is there."""
    image = newest(daemon)
    return image if image.final and image.content.generation > generation else None


def recorded(daemon: DaemonHarness, scan: ScanFile) -> Image:
    """Play a scan; its final image."""
    with line(daemon) as beamline:
        beamline.play(scan)
        return beamline.results.wait_complete(timeout_s=60)


def test_a_mirrored_scan_that_is_over_is_made_again_behind_the_old_image(
    daemon: DaemonHarness, scan: ScanFile, mirrored: ScanFile
) -> None:
    wrong = recorded(daemon, mirrored)
    assert wrong.frame_numbers.size == FRAMES
    with daemon.control() as control, seen_meanwhile(daemon) as images:
        kept = control.snapshot("mirrored")
        told = control.reprocess(wrong.scan_id, orientation="flip_x")
        assert told["scan_id"] == wrong.scan_id
        assert (told["view"]["version"], told["view"]["orientation"]) == (2, "flip_x")
        right = wait_for(lambda: made_again(daemon, wrong.content.generation), 60, "the new image")
        assert [held["name"] for held in control.snapshots()] == ["mirrored"]
        assert control.scan()["views"][-1]["orientation"] == "flip_x"
    assert right.scan_id == wrong.scan_id and right.frame_numbers.size == FRAMES
    assert error(right, scan) < 0.8 * error(wrong, scan)
    assert images and all(image.frame_numbers.size == FRAMES for image in images)
    generations = [image.content.generation for image in images]
    assert generations == sorted(generations)
    snapshot = load_image(Path(kept["path"]))
    np.testing.assert_array_equal(snapshot.object_yx, wrong.object_yx)
    assert snapshot.content.generation == wrong.content.generation


def test_a_running_scan_is_corrected_without_losing_a_frame(
    daemon: DaemonHarness, scan: ScanFile, mirrored: ScanFile
) -> None:
    with line(daemon, rate_hz=20.0) as beamline, playing(beamline, mirrored):
        catalogue = Catalogue(daemon.data)
        wait_for(lambda: catalogue.latest(), 20, "scan")
        early = wait_for(
            lambda: image if (image := beamline.results.latest(10)) else None, 30, "image"
        )
        with daemon.control() as control:
            told = control.reprocess(orientation="flip_x")
        assert told["view"]["version"] == 2
        final = beamline.results.wait_complete(timeout_s=60)
    assert final.content.generation > early.content.generation
    assert final.complete and final.frame_numbers.size == FRAMES
    assert error(final, scan) < 0.35


def test_a_scan_is_made_again_with_another_probe(
    tmp_path: Path, daemon: DaemonHarness, scan: ScanFile
) -> None:
    assert scan.probe is not None
    wrong_probe = np.roll(scan.probe[:, ::-1, ::-1], (9, -7), (1, 2)) * np.exp(1j)
    np.savez(tmp_path / "other.npz", probe=wrong_probe.astype(np.complex64))
    first = recorded(daemon, scan)
    with daemon.control() as control:
        told = control.reprocess(first.scan_id, probe=str(tmp_path / "other.npz"))
        assert told["scan_id"] == first.scan_id
        second = wait_for(lambda: made_again(daemon, first.content.generation), 60, "new image")
        assert error(second, scan) > error(first, scan)
        # Without a probe, that of the settings.
        control.reprocess(first.scan_id)
        third = wait_for(lambda: made_again(daemon, second.content.generation), 60, "new image")
    assert error(third, scan) < error(second, scan)
    assert third.frame_numbers.size == FRAMES


def test_what_cannot_be_done_is_refused_and_the_image_stays(
    tmp_path: Path, daemon: DaemonHarness, scan: ScanFile
) -> None:
    image = recorded(daemon, scan)
    with daemon.control() as control:
        for arguments, code, named in (
            ({"probe": str(tmp_path / "none.npz")}, "failed", "none.npz"),
            ({"model": "no-such-model"}, "failed", "no-such-model"),
            ({"center_yx_px": (900.0, 3.0)}, "bad_arguments", "outside"),
            ({"orientation": "upside-down"}, "bad_arguments", "orientation"),
            ({"probe": "relative.npz"}, "bad_arguments", "probe"),
        ):
            with pytest.raises(ControlError, match=named) as refused:
                control.reprocess(image.scan_id, **arguments)
            assert refused.value.code == code
        with pytest.raises(ControlError) as refused:
            control.snapshot("../outside")
        assert refused.value.code == "bad_arguments"
        control.snapshot("a")
        with pytest.raises(ControlError) as refused:
            control.snapshot("a")
        assert refused.value.code == "exists"
        control.snapshot("a", force=True)
        with pytest.raises(ControlError) as refused:
            control.snapshot("b", "01JBQ3N8Z5T0V6W7X8Y9ZABCDE")
        assert refused.value.code == "not_found"
    assert newest(daemon).content.generation == image.content.generation
    assert len(Catalogue(daemon.data).scans()[0].views) == 1
