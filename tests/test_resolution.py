"""Live resolution: two halves of the frames agree as far as the image is true, and no farther."""

from dataclasses import replace

import numpy as np
import pytest
from trust_scans import cutoffs, scan_of

from ptycho_stream.models.registry import ModelRegistry
from ptycho_stream.reconstruct.canvas import Canvas
from ptycho_stream.reconstruct.halves import CanvasHalves, frames_of_halves, refining_halves
from ptycho_stream.reconstruct.neighbourhood import finished
from ptycho_stream.reconstruct.resolution import (
    MIN_AREA_PX,
    ring_correlation,
)
from ptycho_stream.simulate.probes import random_probe
from ptycho_stream.simulate.samples import random_sample

PIXEL = (1e-8, 1e-8)


@pytest.fixture(scope="module")
def network():
    return ModelRegistry().load()[0]


def image_of(seed: int, side: int = 96) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return (rng.normal(size=(side, side)) + 1j * rng.normal(size=(side, side))).astype(np.complex64)


def disc(side: int = 96) -> np.ndarray:
    y, x = np.indices((side, side)) - side // 2
    return (np.hypot(y, 1.3 * x) < side / 2.2).astype(np.float32)


def test_equal_images_agree_to_nyquist_whatever_their_phase_and_ramp():
    y, x = np.indices((96, 96))
    image = image_of(0)
    other = image * np.exp(1j * (0.7 + 0.31 * y - 0.17 * x))
    seen = disc()
    found = ring_correlation(image, other, seen, seen, PIXEL)
    assert found.cutoff_of_nyquist == 1
    assert found.resolution_nm == pytest.approx(10)
    assert found.correlation.min() > 0.99


def test_different_images_do_not_agree_at_all():
    found = ring_correlation(image_of(1), image_of(2), disc(), disc(), PIXEL)
    assert found.cutoff_of_nyquist is not None and found.cutoff_of_nyquist < 0.15


def test_the_cutoff_is_where_the_common_part_ends():
    spectrum = np.fft.fft2(image_of(3, 256))
    radius = np.hypot(*np.meshgrid(np.fft.fftfreq(256), np.fft.fftfreq(256))) * 2
    common = np.fft.ifft2(spectrum * (radius < 0.4))
    seen = disc(256)
    first, second = (common + 0.3 * image_of(k, 256) for k in (4, 5))
    found = ring_correlation(first, second, seen, seen, PIXEL)
    assert found.cutoff_of_nyquist == pytest.approx(0.4, abs=0.04)


def test_too_small_a_region_gives_a_reason_instead():
    seen = np.zeros((96, 96), np.float32)
    seen[:20, :40] = 1
    found = ring_correlation(image_of(0), image_of(0), seen, seen, PIXEL)
    assert found.resolution_nm is None
    assert str(MIN_AREA_PX) in found.reason
    nothing = ring_correlation(image_of(0), image_of(0), 0 * seen, 0 * seen, PIXEL)
    assert nothing.resolution_nm is None and nothing.area_px == 0


def test_pixels_that_one_has_not_seen_do_not_matter():
    image = image_of(0)
    holed = image.copy()
    holed[30:50, 40:70] = np.nan
    found = ring_correlation(image, holed, disc(), disc(), PIXEL)
    assert found.cutoff_of_nyquist == 1


@pytest.mark.parametrize(("seed", "photons"), [(2, 1e4), (3, 6e4), (6, 1e4), (4, 1e6)])
def test_the_live_cutoff_is_within_a_fifth_of_the_true_one(network, seed, photons):
    """Of the refined layer; benchmarks/trust.py has more doses, and the predicted layer."""
    probe = random_probe(np.random.default_rng((5, seed)), 64)
    scan = scan_of(network, seed, photons=photons, probe=probe, sample=random_sample)
    found = cutoffs(scan)
    assert found["refined"] == pytest.approx(found["refined, true"], rel=0.2)


def test_the_networks_halves_alone_would_claim_too_much(network):
    """Why halves are refined: what a network makes up, it makes up in both."""
    probe = random_probe(np.random.default_rng((5, 2)), 64)
    scan = scan_of(network, 2, photons=1e6, probe=probe, sample=random_sample)
    found = cutoffs(scan)
    assert found["network's halves"] > 1.2 * found["predicted, true"]
    assert found["predicted"] < 1.3 * found["predicted, true"]


def test_halves_come_from_the_best_covered_region(network):
    scan = scan_of(network, frames=100)
    halves = CanvasHalves(scan.canvas, 128).images()
    assert halves is not None
    assert halves.object_yx.shape == (2, 128, 128)
    chosen = frames_of_halves(halves, scan.corner_yx_px, scan.half, 64, 10)
    assert np.bincount(scan.half[chosen]).tolist() == [10, 10]
    relative = scan.corner_yx_px[chosen] - halves.corner_yx_px
    assert relative.min() >= 0 and relative.max() + 64 <= 128


def test_an_empty_canvas_has_no_halves():
    assert CanvasHalves(Canvas(64)).images() is None


def test_frames_without_photons_leave_the_halves_unseen(network):
    scan = scan_of(network, frames=36)
    halves = CanvasHalves(scan.canvas).images()
    assert halves is not None
    position = scan.position_yx_m / np.asarray(scan.truth.pixel_yx_m)
    work = refining_halves(halves, 0 * scan.counts, position, scan.half, scan.beam)
    dark = finished(work)
    assert not dark.weight_yx.any()
    kept = replace(dark, weight_yx=dark.weight_yx + 1)
    assert ring_correlation(*kept.object_yx, *kept.weight_yx, PIXEL).resolution_nm is None
