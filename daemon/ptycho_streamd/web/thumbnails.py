"""Small pictures of scans for the list of them: drawn one after the other, kept in memory.

Of a scan that is over from the image that is kept with it, of one that runs from the newest image.
"""

from __future__ import annotations

import io
import time
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image as PngImage

from ptycho_stream.bins import bin_means
from ptycho_stream.client import AsyncDaemon
from ptycho_stream.errors import ControlError, PtychoStreamError
from ptycho_stream.pictures import coloured, phase
from ptycho_stream.results import Image

SIDE_PX = 96
MAX_DRAWN_PX = 1024
"""A side of what a picture is drawn from: stray tiles can span far more."""
MAX_KEPT = 500
RUNNING_S = 4.0
"""Between pictures of the scan that runs."""
MISSING_S = 60.0
"""A scan without an image is looked at again after so long."""


@dataclass(frozen=True, slots=True)
class Thumbnail:
    """A picture.

    Attributes:
        version: of it, for the address that a browser keeps it under; empty: there is none.
        verdict: on the scan.
        png: the picture.
        drawn_at_s: monotonic.
        final: it will not change.
    """

    version: str
    verdict: str
    png: bytes
    drawn_at_s: float
    final: bool


class Thumbnails:
    """Pictures by scan.

    Args:
        daemon: to read kept images from.
    """

    def __init__(self, daemon: AsyncDaemon) -> None:
        self._daemon = daemon
        self._held: OrderedDict[str, Thumbnail] = OrderedDict()
        self._wanted: dict[str, tuple[Any, ...]] = {}
        self._drawn_of: dict[str, tuple[Any, ...]] = {}

    def of(self, headers: list[dict[str, Any]]) -> None:
        """These scans are listed, newest first."""
        self._wanted = {
            header["scan_id"]: (header["state"], header["ended_ns"], len(header["views"]))
            for header in headers
        }

    def known(self, scan_id: str) -> tuple[str, str]:
        """Version and verdict of a scan's picture, both empty if there is none."""
        held = self._held.get(scan_id)
        return ("", "") if held is None else (held.version, held.verdict)

    def png(self, scan_id: str) -> bytes | None:
        """The picture of a scan."""
        held = self._held.get(scan_id)
        return held.png if held is not None and held.version else None

    async def draw(self, newest: Image | None) -> bool:
        """Draw the next picture that is due; whether there was one.

        Args:
            newest: the newest image.
        """
        now_s = time.monotonic()
        for scan_id, state in self._wanted.items():
            held = self._held.get(scan_id)
            if newest is not None and newest.scan_id == scan_id:
                if held is None or self._outdated(held, newest, now_s):
                    return self._keep(scan_id, state, of_image(newest))
                continue
            same = self._drawn_of.get(scan_id) == state
            if held is not None and same and (held.final or now_s - held.drawn_at_s < MISSING_S):
                continue
            return self._keep(scan_id, state, await self._of_kept(scan_id))
        return False

    @staticmethod
    def _outdated(held: Thumbnail, newest: Image, now_s: float) -> bool:
        changed = held.version != version_of(newest)
        return changed and (newest.final or now_s - held.drawn_at_s >= RUNNING_S)

    def _keep(self, scan_id: str, state: tuple[Any, ...], drawn: Thumbnail) -> bool:
        before = self._held.get(scan_id)
        self._held[scan_id], self._drawn_of[scan_id] = drawn, state
        self._held.move_to_end(scan_id)
        while len(self._held) > MAX_KEPT:
            forgotten, _ = self._held.popitem(last=False)
            self._drawn_of.pop(forgotten, None)
        return before is None or before.version != drawn.version

    async def _of_kept(self, scan_id: str) -> Thumbnail:
        try:
            words = (await self._daemon.image(scan_id)).words
            longest = max(*words["shape_yx"], 1)
            bin_px = 1 << max(0, int(np.ceil(np.log2(longest / SIDE_PX))))
            image = await self._daemon.image(scan_id, parts=["object"], bin_px=min(bin_px, 4096))
        except ControlError:
            return Thumbnail("", "", b"", time.monotonic(), final=False)
        except PtychoStreamError:  # the daemon is busy or away: try again soon
            return Thumbnail("", "", b"", time.monotonic() - MISSING_S + 2, final=False)
        assert image.object is not None
        return Thumbnail(
            version=f"{words['generation']}-{words['frames']}-{words['sweeps']:.0f}",
            verdict=words["verdict"],
            png=png_of(image.object.values_yx),
            drawn_at_s=time.monotonic(),
            final=True,
        )


def of_image(image: Image) -> Thumbnail:
    """The picture of an image as it is now."""
    return Thumbnail(
        version=version_of(image),
        verdict=image.verdict,
        png=png_of(_small(image)),
        drawn_at_s=time.monotonic(),
        final=image.final,
    )


def version_of(image: Image) -> str:
    """Grows with what an image shows."""
    return f"{image.content.generation}-{image.frame_numbers.size}-{image.sweeps:.0f}"


def _small(image: Image) -> NDArray[np.complex64]:
    """A smaller version of an image, made tile by tile, of bounded size however far they lie."""
    tiles, tile_px = image.content.tiles, image.content.tile_px
    if not tiles:
        return np.full((1, 1), np.nan, np.complex64)
    rows, columns = [key[0] for key in tiles], [key[1] for key in tiles]
    top, left = min(rows), min(columns)
    across = max(max(rows) - top, max(columns) - left) + 1
    bin_px = 1
    while across * tile_px > SIDE_PX * bin_px and tile_px % (2 * bin_px) == 0:
        bin_px *= 2
    side = tile_px // bin_px
    step = max(1, -(-across * side // MAX_DRAWN_PX))
    size = -(-across * side // step) + 1
    small = np.full((size, size), np.nan, np.complex64)
    for (ty, tx), tile in tiles.items():
        values = bin_means(tile.object_yx, bin_px)[::step, ::step]
        y, x = (ty - top) * side // step, (tx - left) * side // step
        room = small[y : y + len(values), x : x + len(values)]
        room[:] = values[: room.shape[0], : room.shape[1]]
    return small


def png_of(object_yx: NDArray[np.complex64]) -> bytes:
    """The phase of an object, cut to what was seen, as a PNG of at most ``SIDE_PX`` a side."""
    seen = np.isfinite(object_yx)
    rows, columns = np.flatnonzero(seen.any(1)), np.flatnonzero(seen.any(0))
    if len(rows):
        object_yx = object_yx[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    step = -(-max(object_yx.shape) // SIDE_PX)
    file = io.BytesIO()
    PngImage.fromarray(coloured(phase(object_yx[::step, ::step]))).save(file, format="PNG")
    return file.getvalue()
