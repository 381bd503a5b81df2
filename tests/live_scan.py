"""A simulated beamline in front of a whole daemon, and what must be true of what comes out.

Used by the tests that disturb a daemon while a scan runs: what is committed is compared bit by bit
with what was sent, and the image with that of an undisturbed run over the same frames.
"""

from __future__ import annotations

import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from daemon_harness import DaemonHarness

from ptycho_stream.client import ResultStream
from ptycho_stream.files.npz import ScanFile
from ptycho_stream.reconstruct.recipe import load_recipe
from ptycho_stream.reconstruct.saved_image import STATE_FILE
from ptycho_stream.reconstruct.scan_image import ScanImage
from ptycho_stream.results import Image
from ptycho_stream.scans import Catalogue, ScanReader
from ptycho_stream.settings import Settings
from ptycho_stream.simulate.detector import DetectorSimulator, PositionSimulator, play
from ptycho_stream.simulate.experiment import simulate_experiment
from ptycho_stream.simulate.scan_file import scan_file_of
from ptycho_stream.simulate.series import DetectorOptions

FRAMES = 150


def simulated(seed: int, moved_px: float = 0.0) -> ScanFile:
    """A sample and a scan path of its own, ``moved_px`` down and to the right."""
    made = scan_file_of(simulate_experiment(seed=seed, frames=FRAMES, size_px=64))
    assert made.pixel_yx_m is not None and made.object_origin_yx_m is not None
    moved_yx_m = moved_px * np.array(made.pixel_yx_m)
    origin_y_m, origin_x_m = made.object_origin_yx_m + moved_yx_m
    return replace(
        made,
        positions_yx_m=made.positions_yx_m + moved_yx_m,
        object_origin_yx_m=(float(origin_y_m), float(origin_x_m)),
    )


class Line:
    """The simulated beamline in front of a daemon, and a subscriber behind it."""

    def __init__(self, daemon: DaemonHarness, rate_hz: float | None) -> None:
        self.detector = DetectorSimulator(
            daemon.detector_endpoint, DetectorOptions(rate_hz=rate_hz)
        )
        self.positions = PositionSimulator(daemon.positions_endpoint)
        settings = daemon.settings.results
        self.results = ResultStream(settings.endpoint, settings.resync_endpoint)

    def play(self, scan: ScanFile, **options: object) -> None:
        self.detector.wait_for_receiver()
        self.positions.wait_for_receiver()
        play(scan, self.detector, self.positions, **options)  # type: ignore[arg-type]


@contextmanager
def line(daemon: DaemonHarness, rate_hz: float | None = None) -> Iterator[Line]:
    made = Line(daemon, rate_hz)
    with made.detector, made.positions, made.results:
        yield made


@contextmanager
def playing(beamline: Line, scan: ScanFile, **options: object) -> Iterator[threading.Thread]:
    """A scan that is being played while the body runs; waits for its end."""
    player = threading.Thread(target=beamline.play, args=(scan,), kwargs=options)
    player.start()
    try:
        yield player
    finally:
        player.join(timeout=60)
        assert not player.is_alive()


def newest_scan(daemon: DaemonHarness) -> str:
    header = Catalogue(daemon.data).latest()
    assert header is not None
    return header.scan_id


def undisturbed(settings: Settings, scan_id: str, folder: Path) -> Image:
    """What one quiet run makes of a scan's committed frames."""
    torch.set_num_threads(1)
    source = settings.data.directory / "scans" / scan_id
    shutil.copytree(
        source,
        folder / "scans" / scan_id,
        ignore=shutil.ignore_patterns(f"{STATE_FILE}*", "*.partial", "*.done", "lease*"),
    )
    recipe = load_recipe(settings)
    with ScanReader.open(folder, scan_id) as reader:
        image = ScanImage(reader, recipe, settings.reconstruct.tile_px)
        while image.has_work:
            image.step(recipe.batch_frames, list[int]().extend)
        state = image.image(final=True)
    assert state is not None
    return Image(state)


def assert_same_image(found: Image, expected: Image) -> None:
    assert sorted(found.frame_numbers.tolist()) == sorted(expected.frame_numbers.tolist())
    assert found.origin_yx_m == expected.origin_yx_m
    a, b = found.object_yx, expected.object_yx
    assert np.array_equal(np.isfinite(a), np.isfinite(b))
    seen = np.isfinite(b)
    assert np.linalg.norm(a[seen] - b[seen]) <= 1e-4 * np.linalg.norm(b[seen])


def check_committed_frames(settings: Settings, scan_id: str, scan: ScanFile) -> list[int]:
    """Assert that every committed frame is bit-exact and there once; their numbers."""
    with ScanReader.open(settings.data.directory, scan_id) as reader:
        records = reader.records()
        assert reader.verify() == []
        for slot, number in enumerate(records["number"].tolist()):
            np.testing.assert_array_equal(reader.frame(slot), scan.counts[number])
    numbers = records["number"].tolist()
    assert len(set(numbers)) == len(numbers)
    return sorted(numbers)
