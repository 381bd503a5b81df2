"""The header of a scan: what is known of it besides its frames, kept as ``scan.json``.

Written by the scan's writer on rare changes (state, view, end), each time replaced as a whole; read
by the catalogue and by every reader.  The file carries a checksum and has a copy beside it, so that
a disk that forgets a bit neither turns frames into others nor takes them away.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final, Literal, cast, get_args

import numpy as np
import xxhash

from ptycho_stream.errors import ScanNotFound, StoreError
from ptycho_stream.geometry import View
from ptycho_stream.messages import DetectorGeometry
from ptycho_stream.scans.disk import copy_file, replace_file
from ptycho_stream.scans.ulid import is_scan_id

FORMAT_VERSION: Final = 2
HEADER_NAME: Final = "scan.json"
HEADER_COPY_NAME: Final = "scan.copy.json"
_CHECK_KEY: Final = "check"

_log = logging.getLogger(__name__)

ScanState = Literal[
    "armed", "running", "draining", "complete", "interrupted", "aborted", "unmatched"
]
SEALED_STATES: Final = frozenset({"complete", "interrupted", "aborted", "unmatched"})


@dataclass(frozen=True, slots=True)
class ScanHeader:
    """What is known of a scan.

    Attributes:
        scan_id: ours, a ULID; also the name of the scan's folder.
        source: which detector stream it came from.
        series: the detector's own name of it, not unique over time.
        frame_shape_yx: of a stored frame, after crop and binning.
        dtype: numpy name of the stored counts with byte order (``<u2``); the detector's, unless
            they are binned.
        detector_shape_yx: of a whole frame; None: neither cropped nor binned.
        crop_corner_yx_px: detector pixel of a stored frame's [0, 0].
        bin_px: so many detector pixels a side are summed into one stored pixel.
        detector_dtype: of the detector's counts where they are binned; None: as stored.
        geometry: as resolved from the stream and the settings, in detector pixels.
        size_px: N, the size of a reconstructed patch.
        pixel_yx_m: object pixel; None where the geometry is unknown.
        views: how frames are looked at, oldest first; the last is in use.
        metadata: sample, proposal, operator, ... (JSON values).
        joined_late: the daemon was started in mid-series.
        counts: the final accounting (missing, duplicate, ...), written when the scan is sealed.
        reason: why it ended as it did; empty when it is complete.
        detector: whose frames these are, where they are stored and never reconstructed; empty for
            those of the detector that is.
        beside: the scan of the reconstructed detector that it belongs to; None: it is not known.
        frames_per_file: frames in a batch file; set by the writer.
    """

    scan_id: str
    source: str
    series: str
    state: ScanState
    created_ns: int
    frame_shape_yx: tuple[int, int]
    dtype: str
    size_px: int
    ended_ns: int | None = None
    expected_frames: int | None = None
    detector_shape_yx: tuple[int, int] | None = None
    crop_corner_yx_px: tuple[int, int] = (0, 0)
    bin_px: int = 1
    detector_dtype: str | None = None
    geometry: DetectorGeometry = field(default_factory=DetectorGeometry)
    pixel_yx_m: tuple[float, float] | None = None
    views: tuple[View, ...] = ()
    metadata: Mapping[str, Any] = field(default_factory=dict[str, Any])
    joined_late: bool = False
    counts: Mapping[str, int] = field(default_factory=dict[str, int])
    reason: str = ""
    detector: str = ""
    beside: str | None = None
    frames_per_file: int = 1024
    format_version: int = FORMAT_VERSION

    def __post_init__(self) -> None:
        """Refuse values that no scan can have.

        Raises:
            StoreError: identity, state, shape, dtype or version makes no sense.
        """
        problem = self._problem()
        if problem:
            raise StoreError(f"scan {self.scan_id!r} has a wrong header: {problem}")

    def _problem(self) -> str:
        if not is_scan_id(self.scan_id):
            return "scan_id is not a ULID: make one with new_scan_id()"
        if self.state not in get_args(ScanState):
            return f"there is no state {self.state!r}"
        if len(self.frame_shape_yx) != 2 or min(self.frame_shape_yx) < 1:
            return f"frame_shape_yx {self.frame_shape_yx} is not two sizes above 0"
        try:
            kind = np.dtype(self.dtype).kind
        except TypeError:
            kind = ""
        if kind not in ("u", "i", "f"):
            return f"dtype {self.dtype!r} is no integer or float"
        if self.bin_px < 1:
            return f"bin_px is {self.bin_px}"
        if self.frames_per_file < 1:
            return f"frames_per_file is {self.frames_per_file}"
        if self.format_version != FORMAT_VERSION:
            return (
                f"it has format {self.format_version} and this program reads {FORMAT_VERSION}: "
                "use the version of ptycho-stream that wrote it"
            )
        return ""

    @property
    def sealed(self) -> bool:
        """Whether the scan is closed for writing."""
        return self.state in SEALED_STATES

    @property
    def frame_bytes(self) -> int:
        """Size of a stored frame."""
        return self.frame_shape_yx[0] * self.frame_shape_yx[1] * np.dtype(self.dtype).itemsize

    @property
    def stored_pixel_yx_m(self) -> tuple[float, float] | None:
        """Size of a stored pixel on the detector, binning included; None: it is not known."""
        pixel = self.geometry.detector_pixel_yx_m
        return None if pixel is None else (pixel[0] * self.bin_px, pixel[1] * self.bin_px)

    @property
    def view(self) -> View:
        """How frames are looked at now."""
        return self.views[-1] if self.views else View(size_px=self.size_px)

    def to_json(self) -> bytes:
        """This header as JSON text.

        Raises:
            StoreError: the metadata hold something that JSON has no words for.
        """
        try:
            return json.dumps(asdict(self), indent=1, ensure_ascii=False).encode()
        except (TypeError, ValueError, RecursionError) as error:
            raise StoreError(
                f"the metadata of scan {self.scan_id} cannot be JSON: {error}"
            ) from error

    @classmethod
    def from_json(cls, text: bytes) -> ScanHeader:
        """Read what :meth:`to_json` wrote.

        Raises:
            StoreError: it is not JSON, or not a scan header.
        """
        try:
            raw = cast("dict[str, Any]", json.loads(text))
            raw["geometry"] = DetectorGeometry(**_tuples(raw["geometry"]))
            raw["views"] = tuple(View(**_tuples(view)) for view in raw["views"])
            for name in ("frame_shape_yx", "detector_shape_yx", "crop_corner_yx_px", "pixel_yx_m"):
                raw[name] = None if raw[name] is None else tuple(raw[name])
            return cls(**raw)
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise StoreError(f"not a scan header: {error!r}") from error


def _tuples(fields: dict[str, Any]) -> dict[str, Any]:
    return {
        name: tuple(cast("list[Any]", value)) if isinstance(value, list) else value
        for name, value in fields.items()
    }


def read_header(directory: Path) -> ScanHeader:
    """The header of the scan in ``directory``; of its copy where it is damaged.

    Raises:
        ScanNotFound: there is none.
        StoreError: neither can be read.
    """
    try:
        return read_header_file(directory / HEADER_NAME)
    except FileNotFoundError:
        raise ScanNotFound(
            f"there is no scan {directory.name} in {directory.parent}: "
            "`ptycho-stream ctl scans` lists those that are there"
        ) from None
    except StoreError as error:
        try:
            header = read_header_file(directory / HEADER_COPY_NAME)
        except (FileNotFoundError, StoreError):
            raise error from None
        _log.warning("%s; its copy %s is used", error, HEADER_COPY_NAME)
        return header


def read_header_file(path: Path) -> ScanHeader:
    """The header in one file.

    Raises:
        FileNotFoundError: there is none.
        StoreError: it cannot be read, was altered, or is no header.
    """
    try:
        text = path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        raise FileNotFoundError(path) from None
    except OSError as error:
        raise StoreError(f"cannot read {path}: {error.strerror}") from error
    try:
        return ScanHeader.from_json(_without_check(text))
    except StoreError as error:
        raise StoreError(f"{path}: {error}") from error


def write_header(directory: Path, header: ScanHeader) -> None:
    """Replace the header of the scan in ``directory`` in one step, and then its copy.

    Raises:
        DiskFull: there is no room; the old header is as it was.
    """
    text = _with_check(header.to_json())
    replace_file(directory / HEADER_NAME, text)
    try:
        copy_file(directory / HEADER_COPY_NAME, text)
    except StoreError as error:  # the header itself is safe; its copy is one state older
        _log.warning("the header's copy is not renewed: %s", error)


def _with_check(text: bytes) -> bytes:
    raw: dict[str, Any] = json.loads(text)
    return json.dumps(raw | {_CHECK_KEY: _check(raw)}, indent=1, ensure_ascii=False).encode()


def _without_check(text: bytes) -> bytes:
    """What :func:`_with_check` was given; text without a check is as older versions wrote it.

    Raises:
        StoreError: it was altered.
    """
    try:
        raw = json.loads(text)
        if not isinstance(raw, dict) or _CHECK_KEY not in raw:
            return text
        held = cast("dict[str, Any]", raw)
        check = held.pop(_CHECK_KEY)
        if check == _check(held):
            return json.dumps(held).encode()
    except (ValueError, RecursionError) as error:
        raise StoreError(f"not a scan header: {error!r}") from error
    raise StoreError(
        "the header was altered since it was written, by the disk or by hand (whoever means it "
        f'removes the key "{_CHECK_KEY}")'
    )


def _check(raw: Mapping[str, Any]) -> str:
    """Of the values, however they are spelt."""
    return xxhash.xxh3_64_hexdigest(json.dumps(raw, sort_keys=True).encode())
