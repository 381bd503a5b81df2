"""Pixel sizes, views and patch corners."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ptycho_stream.errors import GeometryError
from ptycho_stream.geometry import (
    ORIENTATIONS,
    View,
    object_pixel_yx_m,
    orient,
    patch_corners,
    wavelength_m,
)


def test_wavelength_of_12_4_keV_is_one_angstrom():
    assert wavelength_m(12398.42) == pytest.approx(1e-10, rel=1e-6)


def test_object_pixel_is_lambda_z_over_n_p():
    pixel = object_pixel_yx_m(8000.0, 2.0, (75e-6, 150e-6), 128)
    assert pixel == pytest.approx((1.549802e-10 * 2 / 128 / 75e-6, 1.549802e-10 * 2 / 128 / 150e-6))


@pytest.mark.parametrize(
    ("energy", "distance", "pixel"),
    [(0.0, 1.0, (1e-6, 1e-6)), (8e3, -1.0, (1e-6, 1e-6)), (8e3, 1.0, (1e-6, 0.0))],
)
def test_impossible_experiments_are_refused(energy, distance, pixel):
    with pytest.raises(GeometryError, match="set geometry"):
        object_pixel_yx_m(energy, distance, pixel, 128)


@pytest.mark.parametrize("orientation", ORIENTATIONS)
def test_every_orientation_keeps_the_zero_frequency_in_place(orientation):
    frame = np.zeros((40, 50), np.uint16)
    frame[21, 24] = 7
    view = View(32, center_yx_px=(21, 24), orientation=orientation)
    assert view.apply(frame)[16, 16] == 7


def test_orientations_are_the_eight_different_ones():
    frame = np.arange(16).reshape(4, 4)
    assert len({orient(frame, o).tobytes() for o in ORIENTATIONS}) == 8


@pytest.mark.parametrize("orientation", ORIENTATIONS)
def test_an_orientation_acts_on_frequencies_about_zero(orientation):
    """A frame turned by the detector and back by the view is the frame, at every frequency."""
    rng = np.random.default_rng(3)
    frequencies = rng.integers(0, 100, (31, 31))  # odd: zero frequency exactly in the middle
    even = np.pad(orient(frequencies, orientation), ((1, 0), (1, 0)))
    inverse = {"rotate90": "rotate270", "rotate270": "rotate90"}.get(orientation, orientation)
    seen = View(32, orientation=inverse).apply(even)
    assert np.array_equal(seen[1:, 1:], frequencies)


def test_a_view_beyond_the_border_marks_what_was_not_measured():
    view = View(32, center_yx_px=(4, 20))
    frames = np.ones((2, 40, 40), np.uint16)
    seen = view.apply(frames)
    valid = view.valid(frames[0], None)
    assert seen.shape == (2, 32, 32)
    assert not valid[:12].any() and valid[12:].all()
    assert seen[:, ~valid].sum() == 0


def test_a_view_that_sees_nothing_says_so():
    with pytest.raises(GeometryError, match=r"view\.center_yx_px"):
        View(32, center_yx_px=(500, 500)).apply(np.ones((40, 40)))


def test_bad_pixels_are_seen_through_the_view():
    bad = np.zeros((32, 32), bool)
    bad[16, 20] = True
    frame = np.zeros((32, 32), np.uint16)
    frame[8, 9] = 65534
    valid = View(32, orientation="transpose").valid(frame, bad)
    assert not valid[20, 16] and not valid[9, 8]
    assert valid.sum() == 32 * 32 - 2


def test_frames_stored_with_zero_frequency_in_the_corner():
    frame = np.zeros((32, 32))
    frame[0, 0] = 1
    assert View(32, dc="corner").apply(frame)[16, 16] == 1


@given(
    y=st.floats(-1e-3, 1e-3), x=st.floats(-1e-3, 1e-3), pixel=st.floats(1e-9, 1e-7),
    size=st.sampled_from([32, 64, 128]),
)  # fmt: skip
def test_corner_and_shift_give_the_position_back(y, x, pixel, size):
    corner, shift = patch_corners(np.array([[y, x]]), (pixel, pixel), size)
    center_px = corner[0] + shift[0].astype(float) + (size - 1) / 2
    assert np.abs(shift).max() <= 0.5 + 1e-6
    assert np.allclose(center_px * pixel, (y, x), atol=pixel * 1e-4)
