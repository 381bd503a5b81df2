"""What is stored of a detector frame: windows, bins that hold every count, marks of bad ones."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scan_samples import make_header

from ptycho_stream.errors import GeometryError
from ptycho_stream.scans.stored_part import Binning, StoredPart, bad_value, binned_dtype


def part(shape=(3, 4), bin_px=2, corner=(0, 0), detector=None) -> StoredPart:
    whole = detector or (shape[0] * bin_px, shape[1] * bin_px)
    return StoredPart(whole, corner, shape, bin_px)


def binned(pixels: np.ndarray, bin_px: int, **options) -> np.ndarray:
    shape = (pixels.shape[0] // bin_px, pixels.shape[1] // bin_px)
    out = np.empty(shape, binned_dtype(pixels.dtype.str))
    options = {"bad_value_from": None, "bad_pixels": None} | options
    Binning(part(shape, bin_px), pixels.dtype.str, **options).into(pixels, out)
    return out


@settings(max_examples=100, deadline=None)
@given(
    dtype=st.sampled_from(["|u1", "<u2", "<u4", ">u2"]),
    bin_px=st.integers(2, 16),
    seed=st.integers(0, 99),
)
def test_a_bin_holds_the_sum_of_its_counts_whatever_they_are(dtype, bin_px, seed):
    rng = np.random.default_rng(seed)
    largest = np.iinfo(dtype).max - 2
    pixels = rng.integers(largest // 2, largest, (3 * bin_px, 2 * bin_px), endpoint=True)
    expected = pixels.reshape(3, bin_px, 2, bin_px).astype(object).sum((1, 3))
    found = binned(pixels.astype(dtype), bin_px)
    assert found.tolist() == expected.tolist()
    assert found.max() < bad_value(found.dtype.str)


@pytest.mark.parametrize("value", [65535, 65534])
def test_a_bin_with_a_bad_pixel_is_bad_as_a_whole(value):
    pixels = np.ones((6, 8), "<u2")
    pixels[3, 4] = value
    found = binned(pixels, 2)
    assert found[1, 2] == np.iinfo("<u4").max
    assert np.count_nonzero(found == 4) == found.size - 1


def test_pixels_are_bad_by_the_count_that_is_set_and_by_the_mask():
    pixels = np.ones((6, 8), "<u2")
    pixels[0, 7] = 900
    mask = np.zeros((3, 4), bool)
    mask[2, 0] = True
    found = binned(pixels, 2, bad_value_from=900, bad_pixels=mask)
    marked = np.argwhere(found == np.iinfo("<u4").max).tolist()
    assert marked == [[0, 3], [2, 0]]


def test_floats_are_summed_as_floats_and_marked_by_nan():
    mask = np.zeros((2, 2), bool)
    mask[0, 1] = True
    found = binned(np.full((4, 4), 0.25, "<f4"), 2, bad_pixels=mask)
    assert found.dtype == np.float64
    assert np.array_equal(found, [[1.0, np.nan], [1.0, 1.0]], equal_nan=True)


def test_maps_of_the_detector_become_maps_of_what_is_stored():
    cropped = part((2, 3), 2, corner=(1, 2), detector=(8, 9))
    assert cropped.window == (slice(1, 5), slice(2, 8))
    marks = np.zeros((8, 9), bool)
    marks[4, 7] = True  # the last pixel of the window
    assert np.argwhere(cropped.any(marks)).tolist() == [[1, 2]]
    values = np.arange(72.0).reshape(8, 9)
    assert cropped.sum(values)[0, 0] == values[1:3, 2:4].sum()
    assert cropped.mean(values)[1, 2] == values[3:5, 6:8].mean()
    assert cropped.detector_pixels(np.array([[1, 2]])).tolist() == [[3, 6]]
    stored = np.arange(6).reshape(2, 3)
    assert np.array_equal(cropped.mean(stored), stored)
    assert np.array_equal(cropped.sum(stored), stored)
    with pytest.raises(GeometryError, match=r"\(8, 9\) and stored frames are \(2, 3\)"):
        cropped.mean(np.zeros((9, 8)))


def test_a_scan_that_stores_whole_frames_has_no_window():
    header = make_header()
    assert StoredPart.of(header).window is None
    cropped = make_header(detector_shape_yx=(100, 90), crop_corner_yx_px=(3, 4), bin_px=2)
    (h, w) = cropped.frame_shape_yx
    assert StoredPart.of(cropped).window == (slice(3, 3 + 2 * h), slice(4, 4 + 2 * w))
