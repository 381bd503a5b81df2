"""The result of a scan: versioned tiles of an image, and the picture that is stitched from them.

The reconstruct stage makes an :class:`ImageState` for the publisher and for exports; clients get an
:class:`Image`, which joins the tiles and writes the NPZ file.  Plain values: no sockets, no torch.
"""

from __future__ import annotations

import base64
import html
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ptycho_stream.atomic_file import atomic_file
from ptycho_stream.errors import FileFormatError
from ptycho_stream.pictures import draw_object, extent_um, new_axes, png, shrunk

if TYPE_CHECKING:
    from matplotlib.axes import Axes

TileKey = tuple[int, int]

MISFIT_BIN_PX = 4
"""Canvas pixels along each side of a pixel of the misfit map."""

# A few frames with far-off positions can span a rectangle that no memory holds; this is 12 GiB.
MAX_STITCHED_PX = 1 << 30
NOTEBOOK_SIDE_PX = 512
"""Jupyter shows a larger image shrunk: it travels to the browser with every update."""


def _no_frames() -> NDArray[np.int64]:
    return np.zeros(0, np.int64)


def _no_positions() -> NDArray[np.float64]:
    return np.zeros((0, 2), np.float64)


def _no_probe() -> NDArray[np.complex64]:
    return np.zeros((0, 0, 0), np.complex64)


@dataclass(frozen=True, slots=True, eq=False)
class Tile:
    """One square of the canvas, an immutable snapshot.

    Attributes:
        version: grows with every change of this tile within a generation; above 0.
        object_yx: complex64 (T, T), NaN where nothing was seen.
        weight_yx: float32 (T, T), 0 where nothing was seen.
    """

    version: int
    object_yx: NDArray[np.complex64]
    weight_yx: NDArray[np.float32]

    @property
    def size_bytes(self) -> int:
        """Bytes of both arrays."""
        return self.object_yx.nbytes + self.weight_yx.nbytes


@dataclass(frozen=True, slots=True, eq=False)
class MisfitTile:
    """The misfit map over one square of the canvas, an immutable snapshot.

    Attributes:
        version: grows with every change of this tile within a generation; above 0.
        excess_yx: float32 (T / MISFIT_BIN_PX, T / MISFIT_BIN_PX), mean excess R of the frames that
            lit each spot, NaN where none was judged.
    """

    version: int
    excess_yx: NDArray[np.float32]

    @property
    def size_bytes(self) -> int:
        """Bytes of the array."""
        return self.excess_yx.nbytes


@dataclass(frozen=True, slots=True, eq=False)
class ImageState:
    """All that is known of a scan's image at one moment; its arrays are never written again.

    Attributes:
        scan_id: identity of the scan in the store.
        state: of the scan (``running``, ``draining``, ``complete`` ...).
        generation: of model, probe, view and pixel size; tiles of two generations never mix.
        pixel_yx_m: size of an object pixel, metres; the centre of canvas pixel (0, 0) is the
            stage's origin.
        tile_px: T; tile (ty, tx) covers canvas pixels [ty*T, (ty+1)*T) x [tx*T, (tx+1)*T).
        tiles: by (ty, tx), which may be negative.
        frame_numbers: int64 (n,) of the frames in the image; only ever appended to.
        position_yx_m: float64 (n, 2), world positions of the probe's centre for those frames.
        probe: complex64 (modes, N, N).
        model: name of the network's weights.
        layer: ``predicted``: what the network made; ``refined``: polished by physics wherever that
            has been, and what the network made elsewhere.
        sweeps: how often refinement has visited a frame, on average.
        counts: committed, paired, reconstructed, expected, missing ...
        metadata: of the scan, JSON values.
        final: nothing will be added to this image.
        trust: figures of how far the image can be relied on, by name (docs/trust.md).
        verdict: what is thought of the scan, in a word or two; empty before it was looked at.
        reasons: of the verdict, in words, the weightiest first.
        spread: relative standard deviation within a patch, median of the newest; None: not known.
        collapsed: the network answers frames that must differ with patches that do not: the image
            is worth nothing.
        predicted: what the network made, where ``tiles`` are refined; empty where they are not.
        misfit: where on the sample the image does not explain the frames, as far as that was
            looked at; these two are not sent with updates, but to who asks for them.
    """

    scan_id: str
    state: str
    generation: int
    pixel_yx_m: tuple[float, float]
    tile_px: int
    tiles: Mapping[TileKey, Tile]
    frame_numbers: NDArray[np.int64] = field(default_factory=_no_frames)
    position_yx_m: NDArray[np.float64] = field(default_factory=_no_positions)
    probe: NDArray[np.complex64] = field(default_factory=_no_probe)
    model: str = ""
    layer: str = "predicted"
    sweeps: float = 0.0
    counts: Mapping[str, int] = field(default_factory=dict[str, int])
    metadata: Mapping[str, Any] = field(default_factory=dict[str, Any])
    final: bool = False
    trust: Mapping[str, float] = field(default_factory=dict[str, float])
    verdict: str = ""
    reasons: tuple[str, ...] = ()
    spread: float | None = None
    collapsed: bool = False
    predicted: Mapping[TileKey, Tile] = field(default_factory=dict[TileKey, Tile])
    misfit: Mapping[TileKey, MisfitTile] = field(default_factory=dict[TileKey, MisfitTile])


@dataclass(frozen=True)
class Image:
    """The picture of a scan as of one update.

    Attributes:
        content: what it was made of.
        received_ns: UTC nanoseconds of the last update in it; 0 if it did not come over a socket.
        latency_s: the time that update took from being sent, by the UTC clocks; 0 likewise.
        settled: no update that the sender made before this one is missing.
    """

    content: ImageState
    received_ns: int = 0
    latency_s: float = 0.0
    settled: bool = True

    @property
    def scan_id(self) -> str:
        """Identity of the scan."""
        return self.content.scan_id

    @property
    def state(self) -> str:
        """Of the scan: ``running``, ``draining``, ``complete`` ..."""
        return self.content.state

    @property
    def final(self) -> bool:
        """Whether nothing will be added to this image any more."""
        return self.content.final and self.settled

    @property
    def complete(self) -> bool:
        """Whether this is the final image of a scan that ran to its end."""
        return self.final and self.state == "complete"

    @property
    def metadata(self) -> Mapping[str, Any]:
        """Sample, proposal, operator ..."""
        return self.content.metadata

    @property
    def counts(self) -> Mapping[str, int]:
        """Frames committed, paired, reconstructed, expected, missing ..."""
        return self.content.counts

    @property
    def layer(self) -> str:
        """``refined`` where physics has polished what the network made, else ``predicted``."""
        return self.content.layer

    @property
    def sweeps(self) -> float:
        """How often refinement has visited a frame, on average."""
        return self.content.sweeps

    @property
    def trust(self) -> Mapping[str, float]:
        """Figures of how far the image can be relied on, by name (docs/trust.md)."""
        return self.content.trust

    @property
    def verdict(self) -> str:
        """What is thought of the scan, in a word or two; empty before it was looked at."""
        return self.content.verdict

    @property
    def reasons(self) -> tuple[str, ...]:
        """Of the verdict, in words, the weightiest first."""
        return self.content.reasons

    @property
    def spread(self) -> float | None:
        """Relative standard deviation within a patch, median of the newest; None: not known."""
        return self.content.spread

    @property
    def collapsed(self) -> bool:
        """Whether the network answers frames that must differ with patches that do not."""
        return self.content.collapsed

    @property
    def probe(self) -> NDArray[np.complex64]:
        """Probe modes, complex64 (modes, N, N)."""
        return self.content.probe

    @property
    def frame_numbers(self) -> NDArray[np.int64]:
        """Int64 (n,), the frames in the image in the order of their coming."""
        return self.content.frame_numbers

    @property
    def positions_yx_m(self) -> NDArray[np.float64]:
        """Float64 (n, 2), world positions of the probe's centre for ``frame_numbers``."""
        return self.content.position_yx_m

    @property
    def pixel_yx_m(self) -> tuple[float, float]:
        """Size of a pixel, metres."""
        return self.content.pixel_yx_m

    @cached_property
    def _stitched(self) -> tuple[NDArray[np.complex64], NDArray[np.float32], tuple[int, int]]:
        return stitch(self.content.tiles, self.content.tile_px)

    @property
    def object_yx(self) -> NDArray[np.complex64]:
        """Complex64 (H, W): the smallest rectangle that holds all that was seen, NaN elsewhere."""
        return self._stitched[0]

    @property
    def weight_yx(self) -> NDArray[np.float32]:
        """Float32 (H, W): illumination that each pixel of ``object_yx`` got."""
        return self._stitched[1]

    @cached_property
    def _misfit(self) -> tuple[NDArray[np.float32], tuple[int, int]]:
        return stitch_misfit(self.content.misfit, self.content.tile_px)

    @property
    def misfit_yx(self) -> NDArray[np.float32]:
        """Float32 (h, w): where the image does not explain the frames, excess R, NaN elsewhere.

        Each value is of ``MISFIT_BIN_PX`` squared pixels of the canvas, the first of those that
        begin at :attr:`misfit_corner_yx_px`. Images that came over a socket have none.
        """
        return self._misfit[0]

    @property
    def misfit_corner_yx_px(self) -> tuple[int, int]:
        """Canvas pixel (y, x) at which ``misfit_yx[0, 0]`` begins; a multiple of its bins."""
        return self._misfit[1]

    @property
    def corner_yx_px(self) -> tuple[int, int]:
        """Canvas pixel (y, x) of ``object_yx[0, 0]``."""
        return self._stitched[2]

    @property
    def origin_yx_m(self) -> tuple[float, float]:
        """World position of the centre of ``object_yx[0, 0]``, metres."""
        corner, pixel = self._stitched[2], self.content.pixel_yx_m
        return corner[0] * pixel[0], corner[1] * pixel[1]

    def save(self, path: Path | str) -> None:
        """Write the image as NPZ; the file is there whole or not at all.

        Keys: ``object``, ``weight``, ``origin_yx_m``, ``pixel_yx_m``, ``probe``,
        ``positions_yx_m``, ``frame_numbers``, ``scan_id`` and ``metadata``, which is JSON text with
        the scan's own metadata and under ``ptycho_stream`` the image's state, counts and model.
        Where it is known also ``misfit``, whose pixels are ``MISFIT_BIN_PX`` times as large, and
        ``misfit_origin_yx_m``, where the centre of its first pixel lies.

        Raises:
            FileFormatError: the path cannot be written.
        """
        arrays: dict[str, Any] = {
            "object": self.object_yx,
            "weight": self.weight_yx,
            "origin_yx_m": np.asarray(self.origin_yx_m, np.float64),
            "pixel_yx_m": np.asarray(self.pixel_yx_m, np.float64),
            "probe": self.probe,
            "positions_yx_m": self.positions_yx_m,
            "frame_numbers": self.frame_numbers,
            "scan_id": np.asarray(self.scan_id),
            "metadata": np.asarray(json.dumps(self.described(), default=str)),
        }
        if self.misfit_yx.size:
            middle = np.asarray(self.misfit_corner_yx_px) + (MISFIT_BIN_PX - 1) / 2
            arrays["misfit"] = self.misfit_yx
            arrays["misfit_origin_yx_m"] = middle * np.asarray(self.pixel_yx_m)
        with atomic_file(Path(path)) as file:
            np.savez(file, allow_pickle=False, **arrays)

    def described(self) -> dict[str, Any]:
        """The scan's own metadata, and under ``ptycho_stream`` what is known of the image."""
        return {**self.content.metadata, "ptycho_stream": self.known()}

    def known(self) -> dict[str, Any]:
        """What is known of the image beside its arrays, as plain values."""
        content = self.content
        return {
            "state": content.state,
            "final": self.final,
            "generation": content.generation,
            "layer": content.layer,
            "sweeps": content.sweeps,
            "model": content.model,
            "counts": dict(content.counts),
            "trust": dict(content.trust),
            "verdict": content.verdict,
            "reasons": list(content.reasons),
            "spread": content.spread,
            "collapsed": content.collapsed,
        }

    def plot(self, axes: Sequence[Axes] | None = None) -> tuple[Axes, Axes]:
        """Draw phase (in radians about its mean) and amplitude with matplotlib.

        The axes are in micrometres of the stage, y down the rows.  In Jupyter the figure appears
        below the cell, in a program after ``matplotlib.pyplot.show()``;
        ``axes[0].figure.savefig(path)`` writes it to a file.

        Args:
            axes: the two to draw into; None: in a new figure of ``matplotlib.pyplot``.

        Returns:
            The axes of phase and amplitude.

        Raises:
            MissingPackage: matplotlib is not installed; it comes with the extra ``report``.
        """
        of_phase, of_amplitude = new_axes(str(self)) if axes is None else axes
        extent = extent_um(self.object_yx.shape, self.origin_yx_m, self.pixel_yx_m)
        draw_object((of_phase, of_amplitude), self.object_yx, extent)
        return of_phase, of_amplitude

    def _repr_png_(self) -> bytes | None:
        """For Jupyter: phase and amplitude side by side; None if nothing was seen yet."""
        if not self.object_yx.size:
            return None
        return png(shrunk(self.object_yx, NOTEBOOK_SIDE_PX, NOTEBOOK_SIDE_PX))

    def _repr_html_(self) -> str:
        """For Jupyter: the same picture, and what there is to know of it in words."""
        shown = "nothing seen yet"
        try:
            picture = self._repr_png_()
        except FileFormatError as error:
            picture, shown = None, html.escape(str(error))
        if picture is not None:
            data = base64.b64encode(picture).decode("ascii")
            shown = (
                f'<img src="data:image/png;base64,{data}" style="max-width: 100%" '
                'alt="phase and amplitude">'
            )
        lines = ["Phase and amplitude. " + str(self), *self.reasons]
        words = "<br>".join(html.escape(line) for line in lines)
        return f"<div>{shown}</div><div>{words}</div>"

    def __str__(self) -> str:
        """Scan, state, frames, size, layer, verdict and resolution, as far as they are known."""
        pixel_y_nm, pixel_x_nm = (f"{side_m * 1e9:.3g}" for side_m in self.pixel_yx_m)
        try:
            height, width = self.object_yx.shape
            size = f"{height} x {width} px of {pixel_y_nm} x {pixel_x_nm} nm"
        except FileFormatError:
            size = f"{len(self.content.tiles)} tiles too far apart for one array"
        said = [f"{self.frame_numbers.size} frames", size, self.layer]
        if self.verdict:
            said.append(self.verdict)
        if "resolution_nm" in self.trust:
            said.append(f"resolution {self.trust['resolution_nm']:.3g} nm")
        return f"scan {self.scan_id} ({self.state}): {', '.join(said)}"

    def __repr__(self) -> str:
        return f"<Image of {self}>"


def stitch(
    tiles: Mapping[TileKey, Tile], tile_px: int
) -> tuple[NDArray[np.complex64], NDArray[np.float32], tuple[int, int]]:
    """Join tiles into the smallest rectangle that holds every pixel with a weight.

    Returns:
        ``object_yx`` complex64 (H, W) with NaN where nothing was seen, ``weight_yx`` float32
        (H, W), and the canvas pixel (y, x) of ``object_yx[0, 0]``; (0, 0) arrays if all is unseen.

    Raises:
        FileFormatError: the rectangle would hold more than ``MAX_STITCHED_PX`` pixels.
    """
    if not tiles:
        return np.zeros((0, 0), np.complex64), np.zeros((0, 0), np.float32), (0, 0)
    rows, columns = [key[0] for key in tiles], [key[1] for key in tiles]
    top, left = min(rows), min(columns)
    shape = ((max(rows) - top + 1) * tile_px, (max(columns) - left + 1) * tile_px)
    if shape[0] * shape[1] > MAX_STITCHED_PX:
        raise FileFormatError(
            f"the image's {len(tiles)} tiles span {shape[0]} x {shape[1]} pixels, too many for one "
            "array: look for stray positions (lower reconstruct.max_extent_m), or use the tiles"
        )
    obj = np.full(shape, complex(np.nan, np.nan), np.complex64)
    weight = np.zeros(shape, np.float32)
    for (ty, tx), tile in tiles.items():
        y, x = (ty - top) * tile_px, (tx - left) * tile_px
        obj[y : y + tile_px, x : x + tile_px] = tile.object_yx
        weight[y : y + tile_px, x : x + tile_px] = tile.weight_yx
    seen = weight > 0
    seen_rows, seen_columns = np.flatnonzero(seen.any(1)), np.flatnonzero(seen.any(0))
    if not seen_rows.size:
        return np.zeros((0, 0), np.complex64), np.zeros((0, 0), np.float32), (0, 0)
    y0, y1 = int(seen_rows[0]), int(seen_rows[-1]) + 1
    x0, x1 = int(seen_columns[0]), int(seen_columns[-1]) + 1
    corner = (top * tile_px + y0, left * tile_px + x0)
    return obj[y0:y1, x0:x1], weight[y0:y1, x0:x1], corner


def stitch_misfit(
    tiles: Mapping[TileKey, MisfitTile], tile_px: int
) -> tuple[NDArray[np.float32], tuple[int, int]]:
    """Join the tiles of a misfit map, whose canvas has tiles of ``tile_px``.

    Returns:
        ``excess_yx`` float32 (h, w), NaN where nothing is known, and the canvas pixel (y, x) at
        which it begins; a (0, 0) array if there is no tile.

    Raises:
        FileFormatError: the array would hold more than ``MAX_STITCHED_PX`` values.
    """
    if not tiles:
        return np.zeros((0, 0), np.float32), (0, 0)
    rows, columns = [key[0] for key in tiles], [key[1] for key in tiles]
    top, left = min(rows), min(columns)
    side = tile_px // MISFIT_BIN_PX
    shape = ((max(rows) - top + 1) * side, (max(columns) - left + 1) * side)
    if shape[0] * shape[1] > MAX_STITCHED_PX:
        raise FileFormatError(
            f"the misfit map spans {shape[0]} x {shape[1]} values, too many for one array: look "
            "for stray positions (lower reconstruct.max_extent_m), or use the tiles"
        )
    excess = np.full(shape, np.nan, np.float32)
    for (ty, tx), tile in tiles.items():
        y, x = (ty - top) * side, (tx - left) * side
        excess[y : y + side, x : x + side] = tile.excess_yx
    return excess, (top * tile_px, left * tile_px)
