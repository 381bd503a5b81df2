"""Pictures of a reconstructed object for people: grey levels, PNG, and plots with matplotlib.

Used by images themselves, the report, the terminal's coarse picture and exports.  Arrays come in
and pictures go out; matplotlib (the extra ``report``) is imported only where something is plotted.
"""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from ptycho_stream.errors import MissingPackage

if TYPE_CHECKING:
    from matplotlib.axes import Axes

UNSEEN_RGB = (32, 40, 64)
GAP_PX = 8
# Grey levels span these percentiles, so that a few wild pixels at the rim do not hide the rest.
PERCENTILES = (1.0, 99.0)
PLOT_SIZE_INCHES = (10.0, 4.5)


def phase(object_yx: NDArray[np.complex64]) -> NDArray[np.float32]:
    """Phase in radians about its mean direction; float32 (H, W), NaN where unseen.

    An object's mean phase is arbitrary; taking it out keeps the picture away from the wrap at pi.
    """
    seen = np.isfinite(object_yx)
    if not seen.any():
        return np.full(object_yx.shape, np.nan, np.float32)
    mean = object_yx[seen].sum(dtype=np.complex128)
    turn = np.complex64(np.conj(mean) / abs(mean)) if mean else np.complex64(1)
    angles = np.angle(np.where(seen, object_yx, 1) * turn)
    return np.where(seen, angles, np.float32(np.nan)).astype(np.float32)


def grey_range(values: NDArray[np.float32]) -> tuple[float, float]:
    """The values (H, W) that are black and white; (0, 1) if nothing was seen."""
    seen = np.isfinite(values)
    if not seen.any():
        return 0.0, 1.0
    low, high = np.percentile(values[seen], PERCENTILES)
    return float(low), float(max(high, low + 1e-6))


def grey_levels(values: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Values (H, W) as uint8 grey levels between their percentiles; NaN becomes 0."""
    low, high = grey_range(values)
    filled = np.where(np.isfinite(values), values, low)
    return (np.clip((filled - low) / (high - low), 0, 1) * 255).astype(np.uint8)


def coloured(values: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Values (H, W) as uint8 (H, W, 3): grey, and a dark blue where NaN says unseen."""
    rgb = np.repeat(grey_levels(values)[:, :, None], 3, axis=2)
    rgb[~np.isfinite(values)] = UNSEEN_RGB
    return rgb


def shrunk(
    object_yx: NDArray[np.complex64], height_px: int, width_px: int
) -> NDArray[np.complex64]:
    """Means over square blocks, so that the result fits; NaN where a block saw nothing."""
    height, width = object_yx.shape
    step = max(1, math.ceil(height / height_px), math.ceil(width / width_px))
    padded_shape = (-(-height // step) * step, -(-width // step) * step)
    padded = np.full(padded_shape, complex(np.nan, np.nan), np.complex64)
    padded[:height, :width] = object_yx
    seen = np.isfinite(padded)
    blocks = (padded_shape[0] // step, step, padded_shape[1] // step, step)
    count = seen.reshape(blocks).sum((1, 3))
    total = np.where(seen, padded, 0).reshape(blocks).sum((1, 3))
    result = np.full(count.shape, complex(np.nan, np.nan), np.complex64)
    np.divide(total, count, out=result, where=count > 0)
    return result


def png(object_yx: NDArray[np.complex64]) -> bytes:
    """Phase (left) and amplitude of an object (H, W) of at least one pixel, side by side."""
    from PIL import Image as Picture  # takes 0.1 s, which few of those who import this need

    gap = np.full((object_yx.shape[0], GAP_PX, 3), 255, np.uint8)
    halves = (coloured(phase(object_yx)), gap, coloured(np.abs(object_yx)))
    held = io.BytesIO()
    Picture.fromarray(np.concatenate(halves, axis=1)).save(held, format="PNG")
    return held.getvalue()


def extent_um(
    shape_yx: tuple[int, ...], origin_yx_m: tuple[float, float], pixel_yx_m: tuple[float, float]
) -> tuple[float, float, float, float]:
    """Left, right, bottom and top edge of a picture in the stage's micrometres; y grows down."""
    (y_m, x_m), (height_m, width_m) = origin_yx_m, pixel_yx_m
    left, top = (x_m - width_m / 2) * 1e6, (y_m - height_m / 2) * 1e6
    return (
        left,
        left + shape_yx[1] * width_m * 1e6,
        top + shape_yx[0] * height_m * 1e6,
        top,
    )


def new_axes(title: str) -> tuple[Axes, Axes]:
    """Axes for phase and amplitude in a figure of pyplot's.

    Raises:
        MissingPackage: matplotlib is not installed.
    """
    try:
        from matplotlib import pyplot
    except ModuleNotFoundError as error:
        raise MissingPackage("a plot", "report", error) from error
    figure, (left, right) = pyplot.subplots(
        1, 2, figsize=PLOT_SIZE_INCHES, layout="constrained", sharex=True, sharey=True
    )
    figure.suptitle(title, fontsize="medium", parse_math=False)
    return left, right


def draw_object(
    axes: Sequence[Axes],
    object_yx: NDArray[np.complex64],
    extent_um: tuple[float, float, float, float],
) -> None:
    """Draw phase and amplitude of an object into two axes, with colour bars; µm of the stage."""
    pictures = (("phase / rad", phase(object_yx)), ("amplitude", np.abs(object_yx)))
    for ax, (title, values) in zip(axes, pictures, strict=True):
        ax.set_title(title)
        if not values.size:
            say(ax, "nothing seen yet")
            continue
        low, high = grey_range(values)
        ax.set_facecolor("#" + bytes(UNSEEN_RGB).hex())
        shown = ax.imshow(
            values, extent=extent_um, cmap="gray", vmin=low, vmax=high, interpolation="nearest"
        )
        ax.figure.colorbar(shown, ax=ax)
        ax.set_xlabel("x / µm")
        ax.set_ylabel("y / µm")


def say(ax: Axes, text: str) -> None:
    """Words instead of a plot."""
    ax.text(0.5, 0.5, text, ha="center", va="center", transform=ax.transAxes, color="grey")
    ax.set_axis_off()
