"""How a new scan is laid out: crop, geometry, pixel and view from header and settings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from ptycho_stream.messages import DetectorGeometry, ScanStart
from ptycho_stream.scans.scan_events import OpenScan
from ptycho_stream.scans.scan_layout import ScanLayout, lay_out, start_of_header
from ptycho_stream.scans.stored_part import StoredPart
from ptycho_stream.scans.ulid import new_scan_id
from ptycho_stream.settings import Settings

KNOWN = DetectorGeometry(2.0, 8800.0, (75e-6, 75e-6))


def layout(
    shape: tuple[int, int], stream: DetectorGeometry = KNOWN, mask: Any = None, **tables: Any
) -> ScanLayout:
    values = {"probe": {"path": Path("p.npz")}, "reconstruct": {"size_px": 64}, **tables}
    start = ScanStart("s", "1", 10, shape, "<u2", stream, pixel_mask=mask)
    opening = OpenScan(new_scan_id(), start, "armed", joined_late=False)
    return lay_out(opening, Settings.model_validate(values), 1)


def test_the_pixel_follows_from_the_stream_or_the_settings():
    by_stream = layout((64, 64)).header.pixel_yx_m
    by_settings = layout(
        (64, 64),
        DetectorGeometry(),
        geometry={
            "photon_energy_eV": 8800.0,
            "detector_distance_m": 2.0,
            "detector_pixel_yx_m": (75e-6, 75e-6),
        },
    ).header.pixel_yx_m
    assert by_stream == by_settings
    assert by_stream == pytest.approx((5.8705e-8, 5.8705e-8), rel=1e-4)


@pytest.mark.parametrize(("override", "energy"), [(False, 8800.0), (True, 5000.0)])
def test_settings_override_the_stream_only_if_they_say_so(override, energy):
    told = {"photon_energy_eV": 5000.0, "override_stream": override}
    assert layout((64, 64), geometry=told).header.geometry.photon_energy_eV == energy


def test_without_geometry_frames_are_recorded_and_the_warning_says_what_to_set():
    found = layout((64, 64), DetectorGeometry())
    assert found.header.pixel_yx_m is None
    assert "[geometry]" in found.warning


@pytest.mark.parametrize(
    ("beam", "corner"),
    [((100, 120), (52, 72)), ((2, 2), (0, 0)), ((-1, 0), (80, 80)), (None, (80, 80))],
)
def test_a_crop_lies_about_the_beam_and_inside_the_frame(beam, corner):
    geometry = DetectorGeometry(2.0, 8800.0, (75e-6, 75e-6), beam)
    found = layout((256, 256), geometry, detector={"crop_yx_px": (96, 96)})
    assert found.header.frame_shape_yx == (96, 96)
    assert found.header.crop_corner_yx_px == corner
    y, x = corner
    assert StoredPart.of(found.header).window == (slice(y, y + 96), slice(x, x + 96))
    assert start_of_header(found.header).frame_shape_yx == (256, 256)


def test_a_beam_centre_is_believed_only_if_a_window_about_it_fits():
    for beam, center in (((40.0, 50.0), (40.0, 50.0)), ((0.0, 0.0), None)):
        geometry = DetectorGeometry(2.0, 8800.0, (75e-6, 75e-6), beam)
        assert layout((128, 128), geometry).header.view.center_yx_px == center


def test_a_mask_is_cropped_with_the_frames_and_refused_if_it_does_not_fit():
    mask = np.zeros((128, 128), bool)
    mask[64, 60] = True
    found = layout((128, 128), mask=mask, detector={"crop_yx_px": (64, 64)})
    assert found.bad_pixels is not None
    assert np.argwhere(found.bad_pixels).tolist() == [[32, 28]]
    other = layout((64, 64), mask=mask)
    assert other.bad_pixels is None
    assert "mask" in other.warning


def test_a_margin_is_stored_about_the_crop_as_far_as_the_detector_reaches():
    geometry = DetectorGeometry(2.0, 8800.0, (75e-6, 75e-6), (100.0, 30.0))
    found = layout((256, 256), geometry, detector={"crop_yx_px": (96, 96), "crop_margin_px": 16})
    assert found.header.frame_shape_yx == (128, 128)
    assert found.header.crop_corner_yx_px == (36, 0)
    assert found.header.view.center_yx_px == (64.0, 30.0) or found.header.view.center_yx_px is None


def test_bins_make_larger_pixels_and_keep_the_beam_where_it_is():
    geometry = DetectorGeometry(2.0, 8800.0, (75e-6, 75e-6), (130.0, 141.0))
    detector = {"crop_yx_px": (192, 192), "bin_px": 3}
    found = layout((300, 300), geometry, detector=detector)
    header, whole = found.header, layout((300, 300), geometry).header
    assert (header.frame_shape_yx, header.dtype, header.bin_px) == ((64, 64), "<u4", 3)
    assert header.stored_pixel_yx_m == pytest.approx((225e-6, 225e-6))
    assert header.pixel_yx_m == pytest.approx(np.asarray(whole.pixel_yx_m) / 3)
    # The pixel of the beam is the middle one of the bin at the view's centre.
    assert header.view.center_yx_px == (32.0, 32.0)
    assert np.add(header.crop_corner_yx_px, 3 * 32 + 1).tolist() == [130, 141]
    start = start_of_header(header)
    assert (start.frame_shape_yx, start.dtype, start.geometry) == ((300, 300), "<u2", geometry)
    assert found.warning == ""


def test_rows_that_fill_no_bin_are_left_out_and_the_warning_says_what_to_set():
    found = layout((130, 131), detector={"bin_px": 4})
    assert found.header.frame_shape_yx == (32, 32)
    assert found.header.detector_shape_yx == (130, 131)
    assert "128 x 128 pixels are stored" in found.warning and "bin_px" in found.warning
    tiny = layout((3, 100), detector={"bin_px": 4})
    assert tiny.header.frame_shape_yx == (3, 100) and "not binned" in tiny.warning


def test_a_binned_mask_marks_a_bin_with_a_single_bad_pixel():
    mask = np.zeros((128, 128), bool)
    mask[65, 60] = True
    found = layout((128, 128), mask=mask, detector={"bin_px": 2})
    assert found.bad_pixels is not None
    assert np.argwhere(found.bad_pixels).tolist() == [[32, 30]]


def test_the_count_that_marks_bad_pixels_is_one_of_the_detector():
    """Binned frames have marks of their own."""
    assert layout((128, 128), view={"bad_value_from": 9}).header.view.bad_value_from == 9
    binned = layout((128, 128), view={"bad_value_from": 9}, detector={"bin_px": 2})
    assert binned.header.view.bad_value_from is None


@pytest.mark.parametrize(
    ("detector", "says"),
    [
        ({"crop_margin_px": 4}, "no effect without crop_yx_px"),
        ({"crop_yx_px": (66, 64), "bin_px": 4}, "multiple of bin_px = 4"),
        ({"crop_yx_px": (64, 64), "crop_margin_px": 3, "bin_px": 4}, "70 x 70 pixels"),
        ({"bin_px": 17}, "less than or equal to 16"),
    ],
)
def test_crops_and_bins_that_do_not_go_together_are_refused(detector, says):
    with pytest.raises(ValidationError, match=says):
        layout((256, 256), detector=detector)
