"""A scan file as the messages of one series in a dialect of the JSON-header-and-blob family.

Used by :mod:`ptycho_stream.simulate.detector` and by tests.  A detector of several modules has a
series for each, because each has a socket of its own.
"""

from __future__ import annotations

from typing import Any, Final, cast

from ptycho_stream.errors import SettingsError
from ptycho_stream.files.npz import ScanFile
from ptycho_stream.simulate.series import (
    NO_POSITIONS,
    DetectorOptions,
    Series,
    masked_pixels,
    simplon_config,
)
from ptycho_stream.wire.json_blob_encoder import (
    Encoding,
    JsonBlobEncoder,
    OdinEncoder,
    PsiEncoder,
    SlsdetEncoder,
    StinsEncoder,
)
from ptycho_stream.wire.module_frames import Layout, Place

RUN_NAME: Final = "run"
"""Of the files that slsReceiver writes, to which it appends the acquisition's number."""


class JsonBlobSeries:
    """Frames that are sent whole: STINS, PSI and Odin.

    Only STINS has a header, which holds the scan's configuration and metadata.
    """

    def __init__(self, scan: ScanFile, encoder: JsonBlobEncoder, config: dict[str, Any]) -> None:
        self._scan = scan
        self._encoder = encoder
        self._config = config

    def start(self) -> list[bytes]:
        """The header, where the dialect has one."""
        return self._encoder.start(self._config)

    def frame(self, index: int) -> list[bytes]:
        """The frame at ``index`` of the file."""
        number = int(self._scan.frame_numbers[index])
        return self._encoder.frame(number, masked_pixels(self._scan, index))

    def end(self) -> list[bytes]:
        """The series' end, where the dialect has one."""
        return self._encoder.end()


class ModuleSeries:
    """What the receiver of one module sends: its part of every frame."""

    def __init__(self, scan: ScanFile, series: int, layout: Layout, place: Place) -> None:
        self._scan = scan
        self._area = layout.area(place)
        self._encoder = SlsdetEncoder(f"/data/{RUN_NAME}", series, layout.modules_yx, place)

    def start(self) -> list[bytes]:
        """Nothing: the dialect has no start."""
        return self._encoder.start()

    def frame(self, index: int) -> list[bytes]:
        """The module's part of the frame at ``index`` of the file."""
        number = int(self._scan.frame_numbers[index])
        return self._encoder.frame(number, masked_pixels(self._scan, index)[self._area])

    def end(self) -> list[bytes]:
        """The header without an image that ends an acquisition."""
        return self._encoder.end()


def json_blob_series(
    scan: ScanFile, series: int, options: DetectorOptions, inline_positions: bool = False
) -> list[Series]:
    """A series for each of the detector's sockets.

    Raises:
        SettingsError: inline positions, or frames that cannot be cut into the modules.
    """
    if inline_positions:
        raise SettingsError(NO_POSITIONS)
    if options.dialect == "slsdet":
        layout = _layout(scan, options.modules_yx)
        rows, columns = layout.modules_yx
        places = [(row, column) for row in range(rows) for column in range(columns)]
        return [ModuleSeries(scan, series, layout, place) for place in places]
    config = simplon_config(scan, round(1e9 / (options.rate_hz or 1000)))
    return [JsonBlobSeries(scan, _encoder(series, options), config)]


def acquisition_id(series: int) -> str:
    """By which Odin calls a series."""
    return f"scan-{series}"


def _encoder(series: int, options: DetectorOptions) -> JsonBlobEncoder:
    encoding = cast("Encoding", options.encoding or "bslz4")
    match options.dialect:
        case "stins":
            return StinsEncoder(f"/data/scan_{series:06d}.h5", encoding)
        case "psi":
            return PsiEncoder()
        case "odin":
            return OdinEncoder(acquisition_id(series), encoding)
        case other:
            raise SettingsError(f"{other} is no dialect of a JSON header and a blob")


def _layout(scan: ScanFile, modules_yx: tuple[int, int]) -> Layout:
    (height, width), (rows, columns) = scan.frame_shape_yx, modules_yx
    if height % rows or width % columns:
        raise SettingsError(
            f"frames of {height} x {width} pixels cannot be cut into {rows} x {columns} modules"
        )
    return Layout(modules_yx, (height // rows, width // columns), scan.counts.dtype.str)
