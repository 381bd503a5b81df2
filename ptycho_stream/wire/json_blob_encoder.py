"""Messages of the JSON-header-and-blob family, as its senders make them.

Used by the detector simulator (:mod:`ptycho_stream.simulate.series_json_blob`) and by tests; the
other direction is :mod:`ptycho_stream.wire.json_blob` and :mod:`ptycho_stream.wire.slsdet`.  Each
method returns the parts of one ZeroMQ message, none where a dialect has no such message.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, Protocol

import msgspec
import numpy as np
from numpy.typing import NDArray

from ptycho_stream.wire.compression import encode

_to_json = msgspec.json.Encoder().encode

Encoding = Literal["raw", "lz4", "bslz4"]


class JsonBlobEncoder(Protocol):
    """What each of the encoders below does."""

    def start(self, metadata: Mapping[str, Any] | None = None) -> list[bytes]:
        """The beginning of a series; ``metadata`` where the dialect has a place for it."""
        ...

    def frame(self, number: int, pixels: NDArray[np.generic]) -> list[bytes]:
        """One frame (y, x)."""
        ...

    def end(self) -> list[bytes]:
        """The end of the series."""
        ...


class StinsEncoder:
    """MAX IV STINS; messages are numbered through from ``first_message``."""

    def __init__(
        self, filename: str = "", encoding: Encoding = "bslz4", first_message: int = 0
    ) -> None:
        self.next_message = first_message
        self._filename = filename
        self._encoding: Encoding = encoding

    def start(self, metadata: Mapping[str, Any] | None = None) -> list[bytes]:
        """The header, and a second part with ``metadata`` if there are any."""
        parts = [self._head("header", {"filename": self._filename})]
        return [*parts, _to_json(dict(metadata))] if metadata else parts

    def frame(self, number: int, pixels: NDArray[np.generic]) -> list[bytes]:
        """One frame (y, x)."""
        little = _little(pixels)
        head = {
            "frame": number,
            "shape": list(pixels.shape),
            "type": little.dtype.name,
            "compression": "none" if self._encoding == "raw" else self._encoding,
        }
        return [self._head("image", head), encode(little, self._encoding)]

    def end(self) -> list[bytes]:
        """The series' end."""
        return [self._head("series_end", {})]

    def _head(self, htype: str, keys: Mapping[str, Any]) -> bytes:
        number, self.next_message = self.next_message, self.next_message + 1
        return _to_json({"htype": htype, "msg_number": number, **keys})


class PsiEncoder:
    """PSI ``array-1.0``, of little-endian or big-endian pixels."""

    def __init__(self, byte_order: Literal["little", "big"] = "little") -> None:
        self._byte_order = byte_order

    def start(self, metadata: Mapping[str, Any] | None = None) -> list[bytes]:
        """Nothing: the dialect has no start."""
        return []

    def frame(self, number: int, pixels: NDArray[np.generic]) -> list[bytes]:
        """One frame (y, x)."""
        order = "<" if self._byte_order == "little" else ">"
        ordered = pixels.astype(pixels.dtype.newbyteorder(order), copy=False)
        head = {
            "htype": "array-1.0",
            "frame": number,
            "shape": list(pixels.shape),
            "type": pixels.dtype.newbyteorder("=").name,
            "encoding": self._byte_order,
        }
        return [_to_json(head), ordered.tobytes()]

    def end(self) -> list[bytes]:
        """Nothing: the dialect has no end."""
        return []


class OdinEncoder:
    """Odin live view: lengths are text, as its sender writes them."""

    def __init__(
        self,
        acquisition_id: str = "",
        encoding: Encoding = "bslz4",
        dataset: str = "data",
        shape_order: Literal["xy", "yx"] = "xy",
    ) -> None:
        self._acquisition_id = acquisition_id
        self._encoding: Encoding = encoding
        self._dataset = dataset
        self._shape_order = shape_order

    def start(self, metadata: Mapping[str, Any] | None = None) -> list[bytes]:
        """Nothing: the dialect has no start."""
        return []

    def frame(self, number: int, pixels: NDArray[np.generic]) -> list[bytes]:
        """One frame (y, x)."""
        blob = encode(_little(pixels), self._encoding)
        sizes = [str(size) for size in pixels.shape]
        name = pixels.dtype.newbyteorder("=").name
        head = {
            "frame_num": number,
            "acquisition_id": self._acquisition_id,
            "dtype": "float" if name == "float32" else name,
            "dsize": len(blob),
            "dataset": self._dataset,
            "compression": "none" if self._encoding == "raw" else self._encoding.upper(),
            "shape": sizes if self._shape_order == "yx" else sizes[::-1],
        }
        return [_to_json(head), blob]

    def end(self) -> list[bytes]:
        """Nothing: the dialect has no end."""
        return []


class SlsdetEncoder:
    """slsReceiver of one module.

    Args:
        fname: of the file that the receiver writes.
        file_index: of the acquisition.
        modules_yx: rows and columns of modules.
        place: row and column of this one.
        flipped: its rows come from the bottom up.
    """

    def __init__(
        self,
        fname: str = "/run",
        file_index: int = 0,
        modules_yx: tuple[int, int] = (1, 1),
        place: tuple[int, int] = (0, 0),
        flipped: bool = False,
    ) -> None:
        self._fname = fname
        self._file_index = file_index
        self._modules_yx = modules_yx
        self._place = place
        self._flipped = flipped

    def start(self, metadata: Mapping[str, Any] | None = None) -> list[bytes]:
        """Nothing: the dialect has no start."""
        return []

    def frame(self, number: int, pixels: NDArray[np.generic], complete: bool = True) -> list[bytes]:
        """This module (y, x) of a frame; ``complete``: no packet of it was lost."""
        little = _little(pixels[::-1] if self._flipped else pixels)
        height, width = pixels.shape
        head = self._head(data=1) | {
            "bitmode": little.dtype.itemsize * 8,
            "shape": [width, height],
            "size": little.nbytes,
            "acqIndex": number,
            "frameIndex": number,
            "frameNumber": number + 1,
            "completeImage": int(complete),
        }
        return [_to_json(head) + b"\n", little.tobytes()]

    def end(self) -> list[bytes]:
        """The dummy header, in which next to everything is 0."""
        empty = {"fname": "", "fileIndex": 0, "detshape": [0, 0], "row": 0, "column": 0}
        return [_to_json(self._head(data=0) | empty) + b"\n"]

    def _head(self, data: int) -> dict[str, Any]:
        return {
            "jsonversion": 4,
            "bitmode": 0,
            "fileIndex": self._file_index,
            "detshape": list(self._modules_yx[::-1]),
            "shape": [0, 0],
            "size": 0,
            "acqIndex": 0,
            "frameIndex": 0,
            "progress": 0.0,
            "fname": self._fname,
            "data": data,
            "completeImage": 0,
            "frameNumber": 0,
            "row": self._place[0],
            "column": self._place[1],
            "flipRows": int(self._flipped),
            "quad": 0,
        }


def _little(pixels: NDArray[np.generic]) -> NDArray[np.generic]:
    return np.ascontiguousarray(pixels.astype(pixels.dtype.newbyteorder("<"), copy=False))
