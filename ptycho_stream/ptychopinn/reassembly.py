"""Cut patches out of an object and put them back together, at fractions of a pixel.

PtychoPINN's barycentric reassembly on this project's canvas: a patch is added to the four nearest
whole-pixel places with bilinear weights, and the sums of patches are divided by the sums of the
same weights. Coordinates are [x, y] in pixels and count from the edge of the first pixel: a window
of N has its centre at x covers columns x - N/2 to x + N/2. Used with the patches of a model, and to
get known patches from a known object.
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ptycho_stream.errors import PtychoPinnError
from ptycho_stream.reconstruct.canvas import Canvas
from ptycho_stream.reconstruct.workers import Workers
from ptycho_stream.results import MAX_STITCHED_PX

_TILE_PX = 256


@dataclass(frozen=True, slots=True, eq=False)
class Reassembled:
    """Patches put together.

    Attributes:
        object_yx: complex64 (H, W), 0 where there is no patch.
        weight_yx: float32 (H, W), the summed weights.
        corner_yx_px: row and column, in the coordinates of the patches, of the edge of
            object_yx[0, 0].
    """

    object_yx: NDArray[np.complex64]
    weight_yx: NDArray[np.float32]
    corner_yx_px: tuple[int, int]


def reassemble(
    patches: NDArray[np.complexfloating[Any, Any]],
    centre_xy_px: NDArray[np.floating[Any]],
    M: int,
    *,
    power: NDArray[np.floating[Any]] | None = None,
    workers: int = 1,
) -> Reassembled:
    """Put the central M x M of patches together; the result holds every one of them whole.

    Args:
        patches: complex (n, N, N).
        centre_xy_px: (n, 2), of each patch.
        M: side of the part in use; N - M is even.
        power: the probe's intensity, summed over its modes, (N, N), which weighs the patches;
            None: every pixel weighs 1.
        workers: threads that share the patches; their canvases are added.

    Raises:
        PtychoPinnError: shapes do not fit each other, a position is not finite, or the positions
            span more pixels than an image may have.
    """
    patches = np.asarray(patches, np.complex64)
    centre_xy_px = np.asarray(centre_xy_px, np.float64)
    central = _central(patches, M)
    weight = np.ones((M, M), np.float32) if power is None else _weight(power, patches, M)
    if centre_xy_px.shape != (len(patches), 2):
        raise PtychoPinnError(
            f"{len(patches)} patches need ({len(patches)}, 2) centres, not {centre_xy_px.shape}"
        )
    if not len(patches) or not np.isfinite(centre_xy_px).all():
        raise PtychoPinnError("reassembly needs patches, each with a finite position")
    top = centre_xy_px[:, ::-1] - M / 2
    low, high = np.floor(top.min(0)), np.ceil(top.max(0)) + M
    height, width = (high - low).tolist()
    if height * width > MAX_STITCHED_PX:
        raise PtychoPinnError(
            f"the positions span {height:.0f} x {width:.0f} pixels: some are far off, or in "
            "another unit than object pixels"
        )
    corner = (int(low[0]), int(low[1]))
    parts = [part for part in np.array_split(np.arange(len(patches)), workers) if len(part)]
    with Workers(len(parts)) as pool:
        canvases = [pool.submit(_canvas, central[part], top[part], weight) for part in parts]
        whole = canvases[0].result()
        for canvas in canvases[1:]:
            whole.merge(canvas.result())
    return _quotient(whole, corner, (int(height), int(width)))


def reassemble_position(
    obj: NDArray[np.complexfloating[Any, Any]],
    global_offsets: NDArray[np.floating[Any]],
    M: int = 20,
) -> NDArray[np.complex64]:
    """Put the central M x M of a model's patches together, every pixel of weight 1.

    Args:
        obj: complex (B, C, N, N), as ``diffraction_to_obj`` gives it.
        global_offsets: (B, 1, 2, C), [x, y] of each patch: ``coords_nn`` of the grouped data.
        M: side of the part in use.

    Returns:
        complex64 (H, W), just as large as the patches ask for, 0 where there is none.

    Raises:
        PtychoPinnError: the shapes do not fit each other, or as of :func:`reassemble`.
    """
    patches, centre_xy_px = listed(obj, global_offsets)
    return reassemble(patches, centre_xy_px, M).object_yx


def listed(
    obj: NDArray[np.complexfloating[Any, Any]], global_offsets: NDArray[np.floating[Any]]
) -> tuple[NDArray[np.complex64], NDArray[np.float64]]:
    """Patches (B * C, N, N) and their centres (B * C, 2) from a model's arrays.

    Raises:
        PtychoPinnError: the shapes do not fit each other.
    """
    obj, offsets = np.asarray(obj), np.asarray(global_offsets)
    if obj.ndim != 4 or obj.shape[-1] != obj.shape[-2]:
        raise PtychoPinnError(
            f"patches are {obj.shape}, not (B, C, N, N): move the channels to the second axis"
        )
    groups, channels, size, _ = obj.shape
    if offsets.shape != (groups, 1, 2, channels):
        raise PtychoPinnError(
            f"global_offsets are {offsets.shape}, patches {obj.shape} need ({groups}, 1, 2, "
            f"{channels}): give coords_nn, the position of each patch, not the groups' means"
        )
    patches = obj.reshape(-1, size, size).astype(np.complex64)
    return patches, offsets[:, 0].transpose(0, 2, 1).reshape(-1, 2).astype(np.float64)


def extract(
    object_yx: NDArray[np.complexfloating[Any, Any]],
    centre_xy_px: NDArray[np.floating[Any]],
    N: int,
) -> NDArray[np.complex64]:
    """Windows of an object, bilinearly: the transpose of how :func:`reassemble` adds patches.

    Args:
        object_yx: complex (H, W).
        centre_xy_px: (n, 2), counted from the edge of object_yx[0, 0].
        N: side of a window.

    Returns:
        complex64 (n, N, N).

    Raises:
        PtychoPinnError: a window leaves the object (:func:`windows_inside` tells).
    """
    if not windows_inside(object_yx.shape, centre_xy_px, N):
        raise PtychoPinnError(
            f"a window of {N} pixels leaves the object of {object_yx.shape}: the positions are not "
            "in its pixels, or the object is cut too small"
        )
    windows = np.zeros((len(centre_xy_px), N, N), np.complex64)
    top = np.asarray(centre_xy_px, np.float64)[:, ::-1] - N / 2
    for rows, corner, share in _nearest(top):
        for row, (y, x), part in zip(rows.tolist(), corner.tolist(), share.tolist(), strict=True):
            windows[row] += part * object_yx[y : y + N, x : x + N]
    return windows


def windows_inside(
    shape_yx: tuple[int, ...], centre_xy_px: NDArray[np.floating[Any]], N: int
) -> bool:
    """Whether all windows of N pixels lie in an object of (H, W)."""
    top = np.asarray(centre_xy_px)[:, ::-1] - N / 2
    return bool((top >= 0).all() and (np.ceil(top) + N <= shape_yx).all())


def _central(patches: NDArray[np.complex64], M: int) -> NDArray[np.complex64]:
    size = patches.shape[-1]
    if patches.ndim != 3 or patches.shape[-2] != size:
        raise PtychoPinnError(f"patches are {patches.shape}, not (n, N, N)")
    if not 1 <= M <= size or (size - M) % 2:
        raise PtychoPinnError(
            f"M is {M} and patches have {size} pixels: give M from 1 to {size}, even or odd as "
            f"{size} is, so that the part in use has a middle"
        )
    margin = (size - M) // 2
    return patches[:, margin : size - margin, margin : size - margin]


def _weight(
    power: NDArray[np.floating[Any]], patches: NDArray[np.complex64], M: int
) -> NDArray[np.float32]:
    if power.shape != patches.shape[1:] or not (np.isfinite(power) & (power >= 0)).all():
        raise PtychoPinnError(
            f"the probe's intensity is {power.shape} and has to be {patches.shape[1:]}, finite and "
            "not negative"
        )
    margin = (power.shape[0] - M) // 2
    weight = power[margin : margin + M, margin : margin + M].astype(np.float32)
    if not weight.max() > 0:
        raise PtychoPinnError(f"the probe is 0 in its central {M} x {M}: take a larger M")
    return weight / weight.max()


def _nearest(
    top: NDArray[np.float64],
) -> Generator[tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float32]]]:
    """The whole-pixel places about ``top`` (n, 2): rows of it, corners (k, 2), shares (k,)."""
    whole = np.floor(top)
    fraction = top - whole
    for step in ((0, 0), (0, 1), (1, 0), (1, 1)):
        share = np.where(step, fraction, 1 - fraction).prod(1)
        rows = np.flatnonzero(share)
        yield rows, (whole[rows] + step).astype(np.int64), share[rows].astype(np.float32)


def _canvas(
    patches: NDArray[np.complex64], top: NDArray[np.float64], weight: NDArray[np.float32]
) -> Canvas:
    """Patches (n, M, M) at ``top`` (n, 2), added with bilinear shares of ``weight`` (M, M)."""
    canvas = Canvas(_TILE_PX)
    for rows, corner, share in _nearest(top):
        weights = share[:, None, None] * weight
        canvas.add(patches[rows], weights, corner, np.zeros(len(rows), np.int64))
    return canvas


def _quotient(canvas: Canvas, corner: tuple[int, int], shape: tuple[int, int]) -> Reassembled:
    """The sums of a canvas, divided, in the rectangle of ``shape`` at ``corner``."""
    numerator, denominator = np.zeros(shape, np.complex64), np.zeros(shape, np.float32)
    t = canvas.tile_px
    for ty, tx in canvas.versions:
        to, of = zip(
            *(
                _overlap(at * t - low, t, length)
                for at, low, length in zip((ty, tx), corner, shape, strict=True)
            ),
            strict=True,
        )
        sums = canvas.sums((ty, tx))
        numerator[to], denominator[to] = sums.numerator.sum(0)[of], sums.denominator.sum(0)[of]
    found = np.zeros(shape, np.complex64)
    np.divide(numerator, denominator, out=found, where=denominator > 0)
    return Reassembled(found, denominator, corner)


def _overlap(start: int, size: int, length: int) -> tuple[slice, slice]:
    """Where [start, start + size) meets [0, length): in the latter, and in the former."""
    low, high = max(start, 0), min(start + size, length)
    return slice(low, high), slice(low - start, high - start)
