"""ptychodus 1.7 and cdtools open our files, and see what we mean; we read what they write.

Both simulate the frames from object, probe and positions with their own forward models: only the
right orientation, order of axes, sign and centre give the frames that were measured. Nothing in the
sample is symmetric (``result_samples.py``).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from result_samples import FRAMES, NUMBERS, SIZE, asymmetric_scan, good_counts, image_of

from ptycho_stream.files.measured import load_measured
from ptycho_stream.files.measured_choice import MeasuredChoice
from ptycho_stream.files.npz import ScanFile
from ptycho_stream.files.products import write_result
from ptycho_stream.files.stored_scan import store_scan
from ptycho_stream.geometry import wavelength_m
from ptycho_stream.messages import DetectorGeometry
from ptycho_stream.scans import ScanReader

pytestmark = [pytest.mark.interop, pytest.mark.timeout(120)]

HERE = Path(__file__).parent
READERS = HERE.parents[1] / ".readers"
GEOMETRY = DetectorGeometry(2.0, 8800.0, (75e-6, 55e-6), count_time_s=0.02)
Program = Callable[..., dict[str, Any]]


@pytest.fixture(scope="module")
def program() -> Program:
    """Runs a program with ptychodus and cdtools, which lie apart from all else; its answer."""
    if not READERS.is_dir():
        pytest.fail(f"{READERS} is missing: `make test-interop` installs ptychodus and cdtools")

    def run(name: str, *arguments: object) -> dict[str, Any]:
        ended = subprocess.run(
            [sys.executable, HERE / name, *map(str, arguments)],
            env={**os.environ, "PYTHONPATH": str(READERS)},
            capture_output=True,
            text=True,
            timeout=100,
        )
        assert ended.returncode == 0, ended.stderr
        return json.loads(ended.stdout.splitlines()[-1])

    return run


@dataclass(frozen=True)
class Files:
    """A result in the formats that others open."""

    product: Path
    diffraction: Path
    cxi: Path


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    root = tmp_path_factory.mktemp("files")
    with ScanReader.open(root, store_scan(root, asymmetric_scan())) as reader:
        image = image_of(asymmetric_scan(), reader.scan_id)
        for name, kind in (("product.h5", "ptychodus"), ("scan.cxi", "cxi")):
            losses = [(1, 0.5), (3, 0.25)]
            write_result(image, root / name, kind, reader, geometry=GEOMETRY, losses=losses)
    return Files(root / "product.h5", root / "diffraction.h5", root / "scan.cxi")


def misfit(simulated: np.ndarray, counts: np.ndarray) -> float:
    """R over good pixels."""
    good = ~asymmetric_scan().bad_pixels
    amplitude, measured = np.sqrt(simulated)[:, good], np.sqrt(counts)[:, good]
    return float(np.abs(amplitude - measured).sum() / measured.sum())


def assert_only_so(simulated: np.ndarray) -> None:
    """The frames are explained to their noise as they are, and in no other order or orientation."""
    counts = good_counts(asymmetric_scan())
    noise = misfit(np.random.default_rng(1).poisson(simulated), simulated)
    assert misfit(simulated, counts) < 1.06 * noise
    flipped_y = np.roll(simulated[:, ::-1], 1, 1)  # about zero frequency, at N // 2
    flipped_x = np.roll(simulated[:, :, ::-1], 1, 2)
    for wrong in (
        flipped_y,
        flipped_x,
        np.roll(flipped_y[:, :, ::-1], 1, 2),
        simulated.swapaxes(1, 2),
        np.roll(simulated, 1, 0),
        np.roll(simulated, 1, 1),
    ):
        assert misfit(wrong, counts) > 1.3 * noise


def test_ptychodus_opens_product_diffraction_and_cxi(program, files, tmp_path):
    out = tmp_path / "seen.npz"
    told = program("with_ptychodus.py", "read", files.product, files.diffraction, files.cxi, out)
    with np.load(out) as held:
        seen = {name: held[name] for name in held.files}
    scan = asymmetric_scan()
    image = image_of(scan)
    height, width = image.object_yx.shape
    center = np.array(scan.object_origin_yx_m) + np.multiply(
        scan.pixel_yx_m, ((height - 1) / 2, (width - 1) / 2)
    )
    for kind in ("h5", "cxi"):
        words = told[kind]
        assert words["name"] == "star" and words["comments"] == "a trial"
        assert words["distance_m"] == 2.0 and words["energy_eV"] == pytest.approx(8800.0)
        assert words["exposure_s"] == 0.02 and words["angle_deg"] == 12.5
        assert words["photons"] == pytest.approx(np.square(np.abs(scan.probe)).sum())
        assert words["losses"] == [[1, 0.5], [3, 0.25]]
        for pixel in ("object_pixel_yx_m", "probe_pixel_yx_m"):
            assert words[pixel] == pytest.approx(scan.pixel_yx_m)
        assert words["object_center_yx_m"] == pytest.approx(center)
        # Its own far field lands on our detector's pixels.
        assert words["simulated_pixel_yx_m"] == pytest.approx(scan.detector_pixel_yx_m, rel=1e-5)
        assert seen[f"{kind}.object"].shape == (1, height, width)
        measured = np.isfinite(image.object_yx)
        np.testing.assert_array_equal(
            seen[f"{kind}.object"][0][measured], image.object_yx[measured]
        )
        np.testing.assert_array_equal(seen[f"{kind}.probe"].reshape(1, SIZE, SIZE), scan.probe)
        np.testing.assert_array_equal(seen[f"{kind}.index"], NUMBERS)
        np.testing.assert_array_equal(seen[f"{kind}.y_m"], scan.positions_yx_m[:, 0])
        np.testing.assert_array_equal(seen[f"{kind}.x_m"], scan.positions_yx_m[:, 1])
        # Its wave fields are per area, ours per pixel: a factor that is the same for all frames.
        simulated = seen[f"{kind}.simulated"]
        good = ~scan.bad_pixels
        assert_only_so(simulated * (good_counts(scan).sum() / simulated[:, good].sum()))
    for pixel in ("detector_pixel_yx_m", "cxi_detector_pixel_yx_m"):
        assert told[pixel] == list(scan.detector_pixel_yx_m)
    assert told["cxi_energy_eV"] == pytest.approx(8800.0) and told["cxi_distance_m"] == 2.0
    np.testing.assert_array_equal(seen["patterns"], good_counts(scan))
    np.testing.assert_array_equal(seen["cxi_patterns"], good_counts(scan))
    np.testing.assert_array_equal(seen["indexes"], NUMBERS)
    np.testing.assert_array_equal(seen["bad_pixels"], scan.bad_pixels)
    np.testing.assert_array_equal(seen["cxi_bad_pixels"], scan.bad_pixels)


def test_cdtools_opens_cxi(program, files, tmp_path):
    scan, out = asymmetric_scan(), tmp_path / "seen.npz"
    position_px = (scan.positions_yx_m - scan.object_origin_yx_m) / scan.pixel_yx_m
    corner = position_px.min(0) - (SIZE - 1) / 2
    told = program("with_cdtools.py", "read", files.cxi, out, *corner)
    with np.load(out) as held:
        seen = {name: held[name] for name in held.files}
    assert told["wavelength_m"] == pytest.approx(wavelength_m(8800.0), rel=1e-5)
    assert told["distance_m"] == pytest.approx(2.0)
    assert told["pixel_yx_m"] == pytest.approx(scan.pixel_yx_m, rel=1e-5)
    assert told["sample"] == told["title"] == "star"
    np.testing.assert_array_equal(seen["patterns"], good_counts(scan))
    np.testing.assert_array_equal(seen["mask"], ~scan.bad_pixels)
    apart = seen["translation_yx_px"] - seen["translation_yx_px"][0]
    np.testing.assert_allclose(apart, position_px - position_px[0], atol=1e-3)
    assert_only_so(seen["simulated"])


def check(found: ScanFile, order: np.ndarray) -> None:
    scan = asymmetric_scan()
    np.testing.assert_array_equal(np.asarray(found.counts), good_counts(scan)[order])
    np.testing.assert_allclose(found.positions_yx_m, scan.positions_yx_m[order], rtol=1e-6)
    assert found.pixel_yx_m == pytest.approx(scan.pixel_yx_m, rel=1e-5)
    assert found.detector_distance_m == pytest.approx(2.0)
    assert found.photon_energy_eV == pytest.approx(8800.0, rel=1e-6)
    np.testing.assert_array_equal(found.bad_pixels, scan.bad_pixels)


def test_files_that_ptychodus_wrote_are_read(program, tmp_path):
    scan = asymmetric_scan()
    shape = np.array(scan.object.shape)
    given = {
        "numbers": NUMBERS,
        "counts": good_counts(scan),
        "bad_pixels": scan.bad_pixels,
        "position_yx_m": scan.positions_yx_m,
        "pixel_yx_m": scan.pixel_yx_m,
        "detector_pixel_yx_m": scan.detector_pixel_yx_m,
        "center_yx_m": scan.object_origin_yx_m + (shape - 1) / 2 * scan.pixel_yx_m,
        "distance_m": 2.0,
        "energy_eV": 8800.0,
        "probe": scan.probe,
        "object": scan.object,
    }
    np.savez(tmp_path / "scan.npz", **given)
    (tmp_path / "out").mkdir()
    program("with_ptychodus.py", "write", tmp_path / "scan.npz", tmp_path / "out")
    for name in ("product.h5", "diffraction.h5", "product.npz"):
        found = load_measured(tmp_path / "out" / name)
        check(found, np.arange(FRAMES))
        assert found.frame_numbers.tolist() == NUMBERS.tolist()
        assert found.object_origin_yx_m == pytest.approx(scan.object_origin_yx_m)
        np.testing.assert_array_equal(found.probe, scan.probe)
        assert found.metadata["comment"] == "by ptychodus"


def test_a_file_that_cdtools_wrote_is_read(program, files, tmp_path):
    program("with_cdtools.py", "write", files.cxi, tmp_path / "copy.cxi")
    choice = MeasuredChoice(photon_energy_eV=8800.0)  # theirs is float32
    check(load_measured(tmp_path / "copy.cxi", choice), np.arange(FRAMES))
