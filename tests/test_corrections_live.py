"""A scan with everything that can be wrong with its pixels gives the image of the clean one.

What is wrong is made so that it can be undone exactly: counts are split over bins, multiplied by
whole numbers (flat field, beam monitor), and lie on a background of whole numbers.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from beamline import Beamline
from daemon_harness import DaemonHarness, wait_for
from numpy.typing import NDArray
from test_end_to_end import assert_same_image

from ptycho_stream.client import ResultStream
from ptycho_stream.files.npz import ScanFile
from ptycho_stream.files.stored_scan import store_scan
from ptycho_stream.messages import DetectorGeometry
from ptycho_stream.reconstruct.recipe import load_recipe
from ptycho_stream.reconstruct.scan_image import ScanImage
from ptycho_stream.results import Image
from ptycho_stream.scans import Catalogue, ScanReader
from ptycho_stream.settings import Settings
from ptycho_stream.simulate.experiment import simulate_experiment
from ptycho_stream.simulate.scan_file import scan_file_of
from ptycho_stream.wire import NativeEncoder

pytestmark = [pytest.mark.timeout(120), pytest.mark.slow]
FRAMES, SIZE = 60, 64
DETECTOR, CORNER = (150, 170), (9, 20)
DARKS = 6
SKIPPED_BY_FRAME, SKIPPED_BY_POSITIONER, LISTED = (20, 21), (33,), (40, 41)


class Dirty:
    """The clean scan as a larger detector with faults sees it, two pixels for one."""

    def __init__(self, clean: ScanFile) -> None:
        rng = np.random.default_rng(5)
        self._rng, self._clean = rng, clean
        # Most are 1, so that what they are scaled to is 1 too.
        self.flat = self._wide(rng.choice([1, 2], (SIZE, SIZE), p=[0.7, 0.3]))
        self.background = np.zeros(DETECTOR, np.int64)
        self.background[...] = rng.integers(0, 4, DETECTOR)
        self.i0 = rng.choice([1.0, 2.0, 4.0], FRAMES, p=[0.6, 0.2, 0.2])
        self.bad = np.zeros(DETECTOR, bool)
        y, x = CORNER
        assert clean.bad_pixels is not None
        for row, column in np.argwhere(clean.bad_pixels):
            self.bad[y + 2 * row + 1, x + 2 * column] = True

    def _wide(self, values: NDArray[np.int64]) -> NDArray[np.int64]:
        wide = np.ones(DETECTOR, np.int64)
        y, x = CORNER
        wide[y : y + 2 * SIZE, x : x + 2 * SIZE] = np.kron(values, np.ones((2, 2), np.int64))
        return wide

    def frame(self, index: int, number: int) -> NDArray[np.uint32]:
        """Frame ``index`` of the clean scan, sent as ``number``."""
        counts, (y, x) = self._clean.counts[index].astype(np.int64), CORNER
        split = self._rng.multinomial(counts.ravel(), [0.1, 0.2, 0.3, 0.4])
        split = split.reshape(SIZE, SIZE, 2, 2).transpose(0, 2, 1, 3).reshape(2 * SIZE, 2 * SIZE)
        pixels = self._rng.poisson(50.0, DETECTOR)
        pixels[y : y + 2 * SIZE, x : x + 2 * SIZE] = split
        pixels = pixels * self.flat * int(self.i0[number]) + self.background
        pixels[self.bad] = 4_000_000
        return pixels.astype("<u4")

    def dark(self) -> NDArray[np.uint32]:
        return self.background.astype("<u4")


@pytest.fixture(scope="module")
def clean() -> ScanFile:
    made = scan_file_of(simulate_experiment(seed=3, frames=FRAMES, size_px=SIZE))
    bad = np.zeros((SIZE, SIZE), bool)
    bad[[3, 30, 40], [8, 29, 60]] = True
    return replace(made, bad_pixels=bad)


def settings_for(folder: Path, clean: ScanFile, dirty: Dirty) -> dict[str, dict[str, object]]:
    np.savez(folder / "probe.npz", probe=clean.probe)
    np.save(folder / "bad.npy", dirty.bad)
    np.save(folder / "flat.npy", 0.03 * dirty.flat)
    (folder / "frames.txt").write_text("number\n999\n")
    return {
        "detector": {
            "dialect": "native",
            "crop_yx_px": [120, 120],
            "crop_margin_px": 4,
            "bin_px": 2,
        },
        "view": {
            "bad_pixels_path": str(folder / "bad.npy"),
            "flat_field_path": str(folder / "flat.npy"),
            "background": "dark-frames",
            "bad_frames_path": str(folder / "frames.txt"),
        },
    }


def image_of(settings: Settings, clean: ScanFile, numbers: list[int], root: Path) -> Image:
    """What these frames of the clean scan give, without a daemon."""
    torch.set_num_threads(1)
    chosen = replace(
        clean,
        counts=clean.counts[numbers],
        positions_yx_m=clean.positions_yx_m[numbers],
        frame_numbers=np.array(numbers, np.int64),
        pixel_yx_m=None,  # else positions half-way between two pixels may go to either
    )
    recipe = load_recipe(settings)
    with ScanReader.open(root, store_scan(root, chosen)) as reader:
        image = ScanImage(reader, recipe, settings.reconstruct.tile_px)
        while image.has_work:
            image.step(recipe.batch_frames, list[int]().extend)
        return Image(image.image(final=True))


def geometry_of(clean: ScanFile) -> DetectorGeometry:
    """Pixels half as large, and a beam in the middle of the crop."""
    assert clean.detector_pixel_yx_m is not None
    py, px = clean.detector_pixel_yx_m
    center = (CORNER[0] + SIZE + 1.0, CORNER[1] + SIZE + 1.0)
    return DetectorGeometry(
        clean.detector_distance_m, clean.photon_energy_eV, (py / 2, px / 2), center
    )


def send(beamline: Beamline, clean: ScanFile, dirty: Dirty) -> None:
    """Dark frames first and in between; two frames say that they are to be left out, and one's
    positioner does."""
    encoder = NativeEncoder("1", "e1", encoding="bslz4")
    beamline.send(encoder.scan_start(None, DETECTOR, "<u4", geometry_of(clean)))
    beamline.positioner.send_multipart(encoder.positions_start())
    for number in range(DARKS):
        beamline.send(encoder.frame(1000 + number, dirty.dark(), gate="dark"))
    numbers = np.arange(FRAMES)
    for number in numbers.tolist():
        pixels = dirty.frame(number, number)
        gate = "skip" if number in SKIPPED_BY_FRAME else "open"
        i0 = float(dirty.i0[number]) if number % 2 else None
        beamline.send(encoder.frame(number, pixels, gate=gate, i0=i0))  # type: ignore[arg-type]
        if number == 30:
            beamline.send(encoder.frame(1000 + DARKS, dirty.dark(), gate="dark"))
    i0 = np.where(numbers % 2, np.nan, dirty.i0[:FRAMES])
    skip = np.isin(numbers, SKIPPED_BY_POSITIONER)
    for at in range(0, FRAMES, 7):
        part = slice(at, at + 7)
        beamline.positioner.send_multipart(
            encoder.positions(
                numbers[part], clean.positions_yx_m[part], i0=i0[part], skip=skip[part]
            )
        )
    beamline.positioner.send_multipart(encoder.positions_end())
    beamline.send(encoder.scan_end())


def test_a_scan_with_every_fault_gives_the_image_of_the_clean_one(clean, tmp_path):
    dirty = Dirty(clean)
    left_out = {*SKIPPED_BY_FRAME, *SKIPPED_BY_POSITIONER}
    kept = [n for n in range(FRAMES) if n not in left_out]
    with DaemonHarness(tmp_path, settings_for(tmp_path, clean, dirty)) as daemon:
        told = daemon.settings.results
        with (
            Beamline(daemon.detector_endpoint, daemon.positions_endpoint) as beamline,
            ResultStream(told.endpoint, told.resync_endpoint) as results,
        ):
            send(beamline, clean, dirty)
            final = results.wait_complete(timeout_s=60)
            catalogue = Catalogue(daemon.data)
            header = catalogue.scans()[0]
            assert (header.frame_shape_yx, header.dtype, header.bin_px) == ((64, 64), "<u8", 2)
            assert header.crop_corner_yx_px == CORNER
            counts = dict(header.counts)
            expected = {
                "frames": FRAMES + DARKS + 1,
                "dark": DARKS + 1,
                "gated": 3,
                "positioned": FRAMES,
                "unpositioned": 0,
                "duplicate": 0,
            }
            assert {name: counts[name] for name in expected} == expected
            assert sorted(final.frame_numbers.tolist()) == kept
            assert_same_image(final, image_of(daemon.settings, clean, kept, tmp_path / "a"))

            (tmp_path / "frames.txt").write_text("40-41")
            with daemon.control() as control:
                control.reprocess(bad_frames=str(tmp_path / "frames.txt"))

            def made_anew() -> Image | None:
                image = results.latest(timeout_s=1)
                if image is None or image.content.generation == final.content.generation:
                    return None
                return image if image.final else None

            again = wait_for(made_anew, 30, "the image without two more frames")
        fewer = [n for n in kept if n not in LISTED]
        assert sorted(again.frame_numbers.tolist()) == fewer
        assert_same_image(again, image_of(daemon.settings, clean, fewer, tmp_path / "b"))
