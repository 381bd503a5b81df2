"""How far each frame, and the image as a whole, can be trusted: misfit beside what noise gives.

Every frame is simulated back from the shown object with all probe modes; 2 % of the frames are held
out of refinement, and their misfit (R_free) cannot be bought by fitting noise. (They are stitched,
and choose how much of the network's image is shown: docs/decisions/0023.)
Used by the reconstruct stage with each published image and by anyone with an object and frames.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ptycho_stream.errors import GeometryError
from ptycho_stream.physics.forward import intensity
from ptycho_stream.physics.probe import Probe, shifted_modes, spectrum_of
from ptycho_stream.reconstruct.canvas import TileIndex
from ptycho_stream.reconstruct.frame_hash import in_share
from ptycho_stream.reconstruct.predict import corner_amplitude
from ptycho_stream.results import Tile

HELD_OUT_SHARE = 0.02
"""Of the frames; R_free is taken over them."""

_CORE = 1e-3
"""Pixels under more than this share of the probe's peak intensity must have been seen."""

_LEAST_ROOTS = 0.1
"""A frame that is darker than this share of its model (in amplitude) is compared with the share."""

_TABLE_STEP = 0.02
_TABLE_END = 12.0
_BATCH_FRAMES = 32


def held_out(
    frame_numbers: NDArray[np.integer[Any]], share: float = HELD_OUT_SHARE
) -> NDArray[np.bool_]:
    """Which frames stay out of stitching and refinement, bool (n,).

    By a hash of the number that knows nothing of the one that deals frames to the two
    half-canvases.
    """
    return in_share(frame_numbers, share, 1)


@dataclass(frozen=True, slots=True, eq=False)
class FrameFigures:
    """Sums over the valid pixels of each of n frames, all float64 (n,).

    NaN, all of a frame's, where the object was not seen under the bright part of the probe.

    Attributes:
        difference: sum |sqrt(counts) - sqrt(model)|.
        roots: sum sqrt(counts).
        noise: what ``difference`` is on average for Poisson noise around the model.
        noise_roots: what ``roots`` is on average for Poisson noise around the model.
        deviances: sum of the Poisson deviance.
        photons: that were counted.
        expected_photons: that the model expects.
        pixels: that were compared.
    """

    difference: NDArray[np.float64]
    roots: NDArray[np.float64]
    noise: NDArray[np.float64]
    noise_roots: NDArray[np.float64]
    deviances: NDArray[np.float64]
    photons: NDArray[np.float64]
    expected_photons: NDArray[np.float64]
    pixels: NDArray[np.float64]

    @property
    def usable(self) -> NDArray[np.bool_]:
        """Frames that could be compared, bool (n,)."""
        return np.isfinite(self.difference)

    @property
    def r_factor(self) -> NDArray[np.float64]:
        """Relative error of each frame's amplitudes (n,)."""
        floor = np.maximum(_LEAST_ROOTS * self.noise_roots, 1e-12)
        return self.difference / np.maximum(self.roots, floor)

    @property
    def r_poisson(self) -> NDArray[np.float64]:
        """What Poisson noise alone would give (n,)."""
        return self.noise / np.maximum(self.noise_roots, 1e-12)

    @property
    def excess(self) -> NDArray[np.float64]:
        """What the object gets wrong in each frame (n,): R beyond that of noise."""
        return self.r_factor - self.r_poisson

    @property
    def deviance(self) -> NDArray[np.float64]:
        """Poisson deviance a pixel (n,), about 1 at high counts for a perfect model."""
        return self.deviances / np.maximum(self.pixels, 1)

    @property
    def brightness(self) -> NDArray[np.float64]:
        """Photons counted for each one expected (n,)."""
        return self.photons / np.maximum(self.expected_photons, 1e-12)

    def chosen(self, which: NDArray[Any]) -> FrameFigures:
        """Those of some frames, by index or by a mask."""
        return FrameFigures(*(getattr(self, field.name)[which] for field in fields(self)))


SUMS = len(fields(FrameFigures))


@dataclass(frozen=True, slots=True)
class TotalFigures:
    """Figures of many frames together, as ``r_factor.py`` defines them; NaN without a frame.

    Attributes:
        frames: that could be compared.
        r_factor: sum |sqrt(counts) - sqrt(model)| / sum sqrt(counts).
        r_poisson: what Poisson noise alone would give.
        deviance: Poisson deviance a pixel.
    """

    frames: int
    r_factor: float
    r_poisson: float
    deviance: float

    @property
    def excess(self) -> float:
        """R beyond that of noise."""
        return self.r_factor - self.r_poisson


def total(figures: FrameFigures) -> TotalFigures:
    """The figures of all usable frames together."""
    used = figures.chosen(figures.usable)

    def quotient(a: NDArray[np.float64], b: NDArray[np.float64]) -> float:
        return float(a.sum() / b.sum()) if b.sum() > 0 else math.nan

    return TotalFigures(
        frames=len(used.difference),
        r_factor=quotient(used.difference, used.roots),
        r_poisson=quotient(used.noise, used.noise_roots),
        deviance=quotient(used.deviances, used.pixels),
    )


class FrameJudge:
    """Compares frames with what an object makes of them.

    Args:
        probe: in photons, all modes.
        valid: bool (N, N), zero frequency at N // 2; False where the detector says nothing. None:
            every pixel is valid.
        device: where to compute.
    """

    def __init__(
        self,
        probe: Probe,
        valid: NDArray[np.bool_] | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        size = probe.size_px
        mask = np.ones((size, size), bool) if valid is None else valid
        if mask.shape != (size, size):
            raise GeometryError(f"the mask is {mask.shape}, the probe has {size} pixels a side")
        self.size_px = size
        self._device = torch.device(device)
        self._good = torch.as_tensor(np.fft.ifftshift(mask).copy()).to(self._device)
        self._spectrum = spectrum_of(probe, self._device)
        self._core = probe.power_yx > _CORE * probe.power_yx.max()
        self._pixels = float(mask.sum())

    def judge(
        self,
        windows: NDArray[np.complex64],
        shift_yx_px: NDArray[np.floating[Any]],
        counts: NDArray[Any],
    ) -> FrameFigures:
        """Figures of each frame. No scale is fitted; masked pixels do not count.

        Args:
            windows: complex (n, N, N), the stitched object in each frame's window, NaN where never
                seen (:func:`object_windows`).
            shift_yx_px: (n, 2), by which the probe lies off the pixel grid, towards larger indices.
            counts: any real dtype (n, N, N), photons, zero frequency at N // 2.

        Raises:
            GeometryError: the shapes do not fit each other or the probe.
        """
        shape = (len(windows), self.size_px, self.size_px)
        if windows.shape != shape or counts.shape != shape or shift_yx_px.shape != (shape[0], 2):
            raise GeometryError(
                f"windows {windows.shape}, counts {counts.shape} and shifts {shift_yx_px.shape} "
                f"must be {shape}, {shape} and {(shape[0], 2)}"
            )
        sums = np.full((SUMS, len(windows)), np.nan)
        readable = np.asarray(np.isfinite(counts).all((1, 2)))
        seen = np.isfinite(windows) & readable[:, None, None]
        usable = np.flatnonzero(seen[:, self._core].all(1) & np.isfinite(shift_yx_px).all(1))
        for start in range(0, len(usable), _BATCH_FRAMES):
            part = usable[start : start + _BATCH_FRAMES]
            filled = np.where(seen[part], windows[part], 1).astype(np.complex64)
            root = corner_amplitude(counts[part]).to(self._device)
            model = self.expected(filled, shift_yx_px[part])
            sums[:-1, part] = _sums(model[:, self._good], root[:, self._good]).cpu().numpy()
            sums[-1, part] = self._pixels
        return FrameFigures(*sums)

    def expected(
        self, windows: NDArray[np.complex64], shift_yx_px: NDArray[np.floating[Any]]
    ) -> Tensor:
        """Photons (n, N, N) that finite ``windows`` (n, N, N) give, zero frequency at [0, 0]."""
        shift = torch.as_tensor(np.ascontiguousarray(shift_yx_px, np.float32)).to(self._device)
        modes = shifted_modes(self._spectrum, shift)
        return intensity(modes, torch.as_tensor(windows).to(self._device))


def object_windows(
    object_yx: NDArray[np.complexfloating[Any, Any]],
    corner_yx_px: NDArray[np.integer[Any]],
    size_px: int,
) -> NDArray[np.complex64]:
    """The object in the windows of frames, complex64 (n, N, N), NaN where it ends.

    Args:
        object_yx: complex (H, W).
        corner_yx_px: (n, 2), object pixel of each window's [0, 0]; may lie outside.
        size_px: N.
    """
    windows = np.full((len(corner_yx_px), size_px, size_px), complex(np.nan, np.nan), np.complex64)
    height, width = object_yx.shape
    for window, (top, left) in zip(windows, corner_yx_px.tolist(), strict=True):
        y0, y1 = max(top, 0), min(top + size_px, height)
        x0, x1 = max(left, 0), min(left + size_px, width)
        if y0 < y1 and x0 < x1:
            window[y0 - top : y1 - top, x0 - left : x1 - left] = object_yx[y0:y1, x0:x1]
    return windows


def tile_windows(
    tiles: Mapping[TileIndex, Tile],
    tile_px: int,
    corner_yx_px: NDArray[np.integer[Any]],
    size_px: int,
) -> NDArray[np.complex64]:
    """Windows complex64 (n, N, N) of an image in tiles, NaN where it has none.

    Args:
        tiles: of the image.
        tile_px: their side.
        corner_yx_px: (n, 2), canvas pixel of each window's [0, 0].
        size_px: N.
    """
    t = tile_px
    windows = np.full((len(corner_yx_px), size_px, size_px), complex(np.nan, np.nan), np.complex64)
    for window, (top, left) in zip(windows, corner_yx_px.tolist(), strict=True):
        for ty in range(top // t, (top + size_px - 1) // t + 1):
            y0, y1 = max(top, ty * t), min(top + size_px, (ty + 1) * t)
            for tx in range(left // t, (left + size_px - 1) // t + 1):
                tile = tiles.get((ty, tx))
                if tile is not None:
                    x0, x1 = max(left, tx * t), min(left + size_px, (tx + 1) * t)
                    part = tile.object_yx[y0 - ty * t : y1 - ty * t, x0 - tx * t : x1 - tx * t]
                    window[y0 - top : y1 - top, x0 - left : x1 - left] = part
    return windows


def _sums(model: Tensor, root: Tensor) -> Tensor:
    """The sums of :class:`FrameFigures` but the last, float64 (7, n), from (n, P)."""
    expected = model.sqrt()
    noise, noise_root = _noise_of(expected)
    counts, safe = root.square(), model.clamp_min(1e-9)
    term = torch.xlogy(counts, counts.clamp_min(1e-9) / safe) - (counts - safe)
    parts = ((root - expected).abs(), root, noise, noise_root, 2 * term, counts, model)
    return torch.stack([part.sum(1, dtype=torch.float64) for part in parts])


def _noise_of(expected: Tensor) -> tuple[Tensor, Tensor]:
    """E|sqrt(n) - e| and E sqrt(n) for Poisson n around e^2, from a table and, above, a series."""
    table = _noise_table().to(expected.device)
    place = (expected / _TABLE_STEP).clamp_max(table.shape[1] - 1.001)
    low = place.long()
    share = place - low
    noise, root = (torch.lerp(row[low], row[low + 1], share) for row in table)
    bright = expected > _TABLE_END
    # sqrt(n) has variance 1/4 and mean e - 1 / (8 e) - ... (Anscombe 1948, doi:10.2307/2332343).
    inverse = 1 / expected.clamp_min(_TABLE_END)
    noise = torch.where(bright, torch.full_like(noise, math.sqrt(1 / (2 * math.pi))), noise)
    return noise, torch.where(bright, expected - inverse / 8, root)


@cache
def _noise_table() -> Tensor:
    """E|sqrt(n) - e| and E sqrt(n), float32 (2, K), for e in steps of ``_TABLE_STEP``."""
    expected = np.arange(0, _TABLE_END + 2 * _TABLE_STEP, _TABLE_STEP)
    mean = np.maximum(expected**2, 1e-12)[:, None]
    number = np.arange(int(_TABLE_END**2 + 12 * _TABLE_END) + 1)
    log_factorial = np.concatenate([[0.0], np.cumsum(np.log(number[1:]))])
    chance = np.exp(number * np.log(mean) - mean - log_factorial)
    root = np.sqrt(number)
    noise = (chance * np.abs(root - expected[:, None])).sum(1)
    return torch.as_tensor(np.stack([noise, (chance * root).sum(1)]), dtype=torch.float32)
