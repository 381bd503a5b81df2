"""A scan file as the messages of one series in the DECTRIS version 2 dialect.

Used by :mod:`ptycho_stream.simulate.detector` and by tests.
"""

from __future__ import annotations

import time
from typing import Any, Final, cast

import numpy as np

from ptycho_stream.errors import SettingsError
from ptycho_stream.files.npz import ScanFile
from ptycho_stream.geometry import wavelength_m
from ptycho_stream.scans.ulid import new_scan_id
from ptycho_stream.simulate.series import NO_POSITIONS, DetectorOptions, masked_pixels
from ptycho_stream.wire.dectris_v2_encoder import Compression, DectrisV2Encoder

CHANNEL: Final = "threshold_1"


class DectrisV2Series:
    """The series of a detector with one threshold, whose frames carry no positions.

    The scan's metadata are the user's data in the start message.
    """

    def __init__(
        self, scan: ScanFile, series: int, options: DetectorOptions, inline_positions: bool = False
    ) -> None:
        if inline_positions:
            raise SettingsError(NO_POSITIONS)
        self._scan = scan
        self._tables = options.header_detail == "all"
        self._frame_ns = round(1e9 / (options.rate_hz or 1000))
        compression = cast("Compression", options.encoding or "bslz4")
        # Like the daemon's ids of scans, those of DECTRIS are ULIDs.
        self._encoder = DectrisV2Encoder(series, compression, new_scan_id(), time.time_ns())

    def start(self) -> list[bytes]:
        """The start message."""
        masks = None
        if self._tables:
            bad = self._scan.bad_pixels
            shape_yx = self._scan.frame_shape_yx
            masks = {CHANNEL: np.zeros(shape_yx, "<u4") if bad is None else bad.astype("<u4")}
        return self._encoder.start(self._told(), masks)

    def frame(self, index: int) -> list[bytes]:
        """The frame at ``index`` of the file."""
        number = int(self._scan.frame_numbers[index])
        start_ns = number * self._frame_ns
        pixels = {CHANNEL: masked_pixels(self._scan, index)}
        return self._encoder.frame(number, pixels, start_ns, start_ns + self._frame_ns)

    def end(self) -> list[bytes]:
        """The series' end."""
        return self._encoder.end()

    def _told(self) -> dict[str, Any]:
        scan = self._scan
        height, width = scan.frame_shape_yx
        told: dict[str, Any] = {
            "channels": [CHANNEL],
            "image_dtype": scan.counts.dtype.name,
            "image_size_x": width,
            "image_size_y": height,
            "number_of_images": len(scan),
            "beam_center_x": float(width // 2),
            "beam_center_y": float(height // 2),
            "count_time": self._frame_ns * 1e-9,
            "frame_time": self._frame_ns * 1e-9,
            "detector_description": "ptycho-stream simulated detector",
            "user_data": scan.metadata,
        }
        if scan.detector_pixel_yx_m is not None:
            told["pixel_size_y"], told["pixel_size_x"] = scan.detector_pixel_yx_m
        if scan.detector_distance_m is not None:
            told["detector_translation"] = [0.0, 0.0, -scan.detector_distance_m]
        if scan.photon_energy_eV is not None:
            told["incident_energy"] = scan.photon_energy_eV
            told["incident_wavelength"] = wavelength_m(scan.photon_energy_eV) * 1e10
        return told
