"""What a simulated detector says: a scan file as the messages of one series, in each dialect.

Used by :mod:`ptycho_stream.simulate.detector`, which sends them, and by tests and scripts that
write recorded streams without a socket.  Other dialects have files of their own:
:mod:`~ptycho_stream.simulate.dectris_v2_series`, :mod:`~ptycho_stream.simulate.series_json_blob`
and :mod:`~ptycho_stream.simulate.pva_detector`.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any, Final, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from ptycho_stream.errors import MalformedMessage, SettingsError
from ptycho_stream.files.npz import ScanFile
from ptycho_stream.geometry import wavelength_m
from ptycho_stream.messages import DetectorGeometry
from ptycho_stream.wire.compression import ENCODINGS
from ptycho_stream.wire.dectris_v1_encoder import DectrisV1Encoder
from ptycho_stream.wire.dectris_v1_parts import HeaderDetail, split_encoding
from ptycho_stream.wire.dectris_v2_encoder import COMPRESSIONS
from ptycho_stream.wire.native import NativeEncoder

Dialect = Literal["dectris-v1", "dectris-v2", "native", "stins", "psi", "slsdet", "odin", "pva"]
NO_POSITIONS: Final = "frames carry no positions in this dialect: those of native and pva do"
# Those of dectris-v1 are too many to list.
ENCODINGS_OF: Final = {
    "dectris-v2": COMPRESSIONS,
    "native": ENCODINGS,
    "stins": ("bslz4", "lz4", "raw"),
    "psi": ("raw",),
    "slsdet": ("raw",),
    "odin": ("bslz4", "lz4", "raw"),
    "pva": ENCODINGS,
}


@dataclass(frozen=True)
class DetectorOptions:
    """How a simulated detector behaves.

    Attributes:
        dialect: that it speaks.
        encoding: in the dialect's own words; if None bit-shuffled LZ4, or what the dialect has.
        header_detail: of the DECTRIS series header.
        rate_hz: frames a second; as fast as they are taken if None.
        one_part_each: send every part as a message of its own, as some proxies do.
        modules_yx: rows and columns of modules that an slsReceiver detector is made of; each has
            a socket of its own.
    """

    dialect: Dialect = "dectris-v1"
    encoding: str | None = None
    header_detail: HeaderDetail = "basic"
    rate_hz: float | None = None
    one_part_each: bool = False
    modules_yx: tuple[int, int] = (1, 1)

    def __post_init__(self) -> None:
        known = ENCODINGS_OF.get(self.dialect)
        if known is not None and self.encoding not in (None, *known):
            raise SettingsError(
                f"encoding {self.encoding!r} is none of the dialect {self.dialect}: "
                f"{', '.join(known)}"
            )
        if self.dialect == "dectris-v1" and self.encoding is not None:
            try:
                split_encoding(self.encoding, "uint16")
            except MalformedMessage as error:
                raise SettingsError(str(error)) from error
        if self.dialect != "dectris-v1" and self.one_part_each:
            raise SettingsError(f"the dialect {self.dialect} cannot be broken up into parts")
        if self.rate_hz is not None and not self.rate_hz > 0:
            raise SettingsError(f"rate_hz is {self.rate_hz}: give frames a second above 0")
        if self.dialect != "slsdet" and self.modules_yx != (1, 1):
            raise SettingsError(f"the dialect {self.dialect} has no modules: only slsdet has")
        if min(self.modules_yx) < 1:
            raise SettingsError(f"a detector of {self.modules_yx} modules has none")


class Series(Protocol):
    """What one socket of a detector sends of a series; no parts: no message."""

    def start(self) -> list[bytes]:
        """The header."""
        ...

    def frame(self, index: int) -> list[bytes]:
        """The frame at ``index`` of the file."""
        ...

    def end(self) -> list[bytes]:
        """The series' end."""
        ...


def masked_pixels(scan: ScanFile, index: int) -> NDArray[np.generic]:
    """Counts (y, x) as an EIGER sends them: bad pixels hold the largest value of their type."""
    pixels = scan.counts[index]
    if scan.bad_pixels is None:
        return pixels
    return np.where(scan.bad_pixels, np.iinfo(pixels.dtype).max, pixels)


def simplon_config(scan: ScanFile, frame_ns: int) -> dict[str, Any]:
    """The scan's configuration in the words of the SIMPLON interface, with its metadata."""
    height, width = scan.frame_shape_yx
    # Receivers that know no appendix read flat configurations with keys they do not know.
    config: dict[str, Any] = {
        **scan.metadata,
        "nimages": len(scan),
        "ntrigger": 1,
        "trigger_mode": "ints",
        "x_pixels_in_detector": width,
        "y_pixels_in_detector": height,
        "bit_depth_image": scan.counts.dtype.itemsize * 8,
        "compression": "bslz4",
        "beam_center_x": float(width // 2),
        "beam_center_y": float(height // 2),
        "count_time": frame_ns * 1e-9,
        "frame_time": frame_ns * 1e-9,
        "description": "ptycho-stream simulated detector",
    }
    if scan.detector_pixel_yx_m is not None:
        config["y_pixel_size"], config["x_pixel_size"] = scan.detector_pixel_yx_m
    if scan.detector_distance_m is not None:
        config["detector_distance"] = scan.detector_distance_m
    if scan.photon_energy_eV is not None:
        config["photon_energy"] = scan.photon_energy_eV
        config["wavelength"] = wavelength_m(scan.photon_energy_eV) * 1e10
    return config


class DectrisSeries:
    """A scan file in the DECTRIS version 1 dialect, whose frames carry no positions.

    The scan's metadata go into the header's configuration. Bad pixels hold the largest value of
    the pixels' type, as an EIGER has it, and make the header's pixel mask.
    """

    def __init__(
        self, scan: ScanFile, series: int, options: DetectorOptions, inline_positions: bool = False
    ) -> None:
        if inline_positions:
            raise SettingsError(NO_POSITIONS)
        bits = scan.counts.dtype.itemsize * 8
        self._scan = scan
        self._options = options
        self._frame_ns = round(1e9 / (options.rate_hz or 1000))
        self._encoder = DectrisV1Encoder(series, options.encoding or f"bs{bits}-lz4<")

    def start(self) -> list[bytes]:
        """The header."""
        return self._encoder.start(
            self._options.header_detail,
            simplon_config(self._scan, self._frame_ns),
            self._scan.bad_pixels,
        )

    def frame(self, index: int) -> list[bytes]:
        """The frame at ``index`` of the file."""
        number = int(self._scan.frame_numbers[index])
        start_ns = number * self._frame_ns
        pixels = masked_pixels(self._scan, index)
        return self._encoder.frame(number, pixels, start_ns, start_ns + self._frame_ns)

    def end(self) -> list[bytes]:
        """The series' end."""
        return self._encoder.end()


class NativeSeries:
    """A scan file in the native dialect."""

    def __init__(
        self, scan: ScanFile, series: int, options: DetectorOptions, inline_positions: bool = False
    ) -> None:
        self._scan = scan
        self._inline = inline_positions
        self._encoder = NativeEncoder(str(series), encoding=options.encoding or "bslz4")

    def start(self) -> list[bytes]:
        """The header."""
        scan = self._scan
        height, width = scan.frame_shape_yx
        geometry = DetectorGeometry(
            detector_distance_m=scan.detector_distance_m,
            photon_energy_eV=scan.photon_energy_eV,
            detector_pixel_yx_m=scan.detector_pixel_yx_m,
            beam_center_yx_px=(float(height // 2), float(width // 2)),
        )
        return self._encoder.scan_start(
            expected_frames=len(scan),
            frame_shape_yx=scan.frame_shape_yx,
            dtype=scan.counts.dtype.str,
            geometry=geometry,
            metadata=scan.metadata,
            pixel_mask=scan.bad_pixels,
        )

    def frame(self, index: int) -> list[bytes]:
        """The frame at ``index`` of the file."""
        scan = self._scan
        y_m, x_m = scan.positions_yx_m[index]
        position = (float(y_m), float(x_m)) if self._inline else None
        now_ns = time.time_ns()
        return self._encoder.frame(
            int(scan.frame_numbers[index]), scan.counts[index], position, now_ns, now_ns
        )

    def end(self) -> list[bytes]:
        """The series' end."""
        return self._encoder.scan_end()
