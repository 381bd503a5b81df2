"""Coverage: what a scan has lit, and how densely."""

import numpy as np
import pytest

from ptycho_stream.physics.probe import Probe
from ptycho_stream.reconstruct.coverage import coverage, probe_diameter_px

PIXEL = (1e-8, 1e-8)


def gaussian(sigma_px: float) -> Probe:
    y, x = np.indices((64, 64)) - 31.5
    return Probe(np.exp(-(y**2 + x**2) / (4 * sigma_px**2))[None].astype(np.complex64))


def raster(step_m: float, side: int = 20) -> np.ndarray:
    return np.stack(np.mgrid[:side, :side], -1).reshape(-1, 2) * step_m


def test_the_disc_of_a_gaussian_is_its_full_width_at_half_maximum():
    assert probe_diameter_px(gaussian(6)) == pytest.approx(2.355 * 6, rel=0.05)


def test_a_raster_covers_its_rectangle():
    probe = gaussian(6)
    found = coverage(raster(5e-8), probe, PIXEL)
    assert found is not None
    assert found.step_m == pytest.approx(5e-8)
    assert found.share > 0.95
    diameter = found.diameter_m
    assert found.area_um2 == pytest.approx((19 * 5e-8 + diameter) ** 2 * 1e12, rel=0.1)
    # Away from the border, each spot lies in so many discs.
    assert found.overlap == pytest.approx(np.pi / 4 * (diameter / 5e-8) ** 2, rel=0.25)
    assert found.linear_overlap == pytest.approx(1 - 5e-8 / diameter)


def test_discs_that_do_not_touch_overlap_once():
    found = coverage(raster(1e-6, 5), gaussian(4), PIXEL)
    assert found is not None
    assert found.overlap == pytest.approx(1)
    assert found.linear_overlap < 0
    assert found.share < 0.2


def test_positions_that_are_no_numbers_are_left_out():
    nowhere = np.full((3, 2), np.nan)
    assert coverage(nowhere, gaussian(4), PIXEL) is None
    assert coverage(np.empty((0, 2)), gaussian(4), PIXEL) is None
    one = coverage(np.concatenate([nowhere, [[1e-3, 2e-3]]]), gaussian(4), PIXEL)
    assert one is not None and np.isinf(one.step_m) and one.overlap == 1


def test_a_huge_area_takes_no_more_memory():
    found = coverage(raster(1e-2, 3), gaussian(4), PIXEL)
    assert found is not None and found.share < 1e-3
