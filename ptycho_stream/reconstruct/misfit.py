"""How badly a stitched object explains measured frames: R, what noise alone gives, and deviance.

Every frame is simulated back from the *stitched* object with all probe modes; a patch's own misfit
says nothing. Used to judge training candidates and by whoever asks how far an image can be trusted.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import astuple, dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ptycho_stream.physics.forward import intensity
from ptycho_stream.physics.probe import Probe, shifted_modes, spectrum_of
from ptycho_stream.reconstruct.predict import corner_amplitude

_CORE = 1e-3
"""Pixels under more than this share of the probe's peak intensity must have been seen."""

_BATCH_FRAMES = 32

_COMPARED_SIZE_PX = 128
"""Larger frames are compared so few that they have as many pixels together."""


def compared_frames(size_px: int, most: int) -> int:
    """How many frames of ``size_px`` a side are compared instead of ``most`` small ones.

    So that a look takes no longer.
    """
    return max(1, min(most, most * _COMPARED_SIZE_PX**2 // size_px**2))


@dataclass(frozen=True, slots=True)
class Misfit:
    """Sums over the frames that could be simulated; those of several objects may be added.

    Attributes:
        difference: sum |sqrt(counts) - sqrt(model)|.
        roots: sum sqrt(counts).
        noise: sum |sqrt(noise) - sqrt(model)| for Poisson noise around the model.
        noise_roots: sum sqrt(noise).
        deviances: sum of the Poisson deviance.
        pixels: that were compared.
        frames: that were used.
        skipped: frames whose window leaves the seen part of the object.
    """

    difference: float = 0.0
    roots: float = 0.0
    noise: float = 0.0
    noise_roots: float = 0.0
    deviances: float = 0.0
    pixels: int = 0
    frames: int = 0
    skipped: int = 0

    def __add__(self, other: Misfit) -> Misfit:
        mine, others = astuple(self), astuple(other)
        return Misfit(*(a + b for a, b in zip(mine, others, strict=True)))

    @property
    def r_factor(self) -> float:
        """Relative error of all amplitudes; NaN without a frame."""
        return self.difference / self.roots if self.roots else math.nan

    @property
    def r_poisson(self) -> float:
        """What :attr:`r_factor` would be if noise were all; NaN without a frame."""
        return self.noise / self.noise_roots if self.noise_roots else math.nan

    @property
    def excess(self) -> float:
        """What the object gets wrong: R beyond that of noise alone."""
        return self.r_factor - self.r_poisson

    @property
    def deviance(self) -> float:
        """Poisson deviance a pixel, about 1 at high counts for a perfect model."""
        return self.deviances / self.pixels if self.pixels else math.nan


def stitched_misfit(
    object_yx: NDArray[np.complex64],
    corner_yx_px: NDArray[np.int64],
    shift_yx_px: NDArray[np.floating[Any]],
    counts: Callable[[NDArray[np.int64]], NDArray[Any]],
    probe: Probe,
    valid: NDArray[np.bool_] | None = None,
    *,
    device: torch.device | str = "cpu",
    seed: int = 0,
) -> Misfit:
    """Compare frames with what a stitched object and all probe modes make of them.

    No scale is fitted. Masked pixels do not count.

    Args:
        object_yx: complex (H, W), NaN where never seen.
        corner_yx_px: (M, 2), object pixel of each frame's window's [0, 0].
        shift_yx_px: (M, 2), by which the probe lies off the pixel grid, towards larger indices.
        counts: gives the counts (n, N, N) of frames by their index below M, zero frequency at
            N // 2; asked for a few at a time.
        probe: in photons.
        valid: bool (N, N), ordered as the counts; None: every pixel is.
        device: where to compute.
        seed: of the noise that R is compared with.

    Returns:
        Without a frame, and its figures NaN, if no window lies inside the seen part of the object.
    """
    size = probe.size_px
    inside = seen_windows(object_yx, corner_yx_px, probe)
    if not len(inside):
        return Misfit(skipped=len(corner_yx_px))
    mask = np.ones((size, size), bool) if valid is None else valid
    good = torch.as_tensor(np.fft.ifftshift(mask).copy()).to(device)
    filled = np.where(np.isfinite(object_yx), object_yx, np.complex64(1)).astype(np.complex64)
    windows = np.lib.stride_tricks.sliding_window_view(filled, (size, size))
    spectrum = spectrum_of(probe, device)
    generator = torch.Generator(device).manual_seed(seed)
    sums = torch.zeros(5, dtype=torch.float64, device=device)
    for start in range(0, len(inside), _BATCH_FRAMES):
        part = inside[start : start + _BATCH_FRAMES]
        corner = corner_yx_px[part]
        patches = torch.as_tensor(windows[corner[:, 0], corner[:, 1]]).to(device)
        shift = torch.as_tensor(shift_yx_px[part].astype(np.float32)).to(device)
        model = intensity(shifted_modes(spectrum, shift), patches)[:, good]
        root = corner_amplitude(counts(part)).to(device)[:, good]
        sums += _sums(model, root, generator)
    return Misfit(
        *sums.tolist(),
        pixels=len(inside) * int(mask.sum()),
        frames=len(inside),
        skipped=len(corner_yx_px) - len(inside),
    )


def _sums(model: Tensor, root: Tensor, generator: torch.Generator) -> Tensor:
    """What the figures are made of, float64 (5,), from intensities and roots of counts (B, P)."""
    model, root = model.double(), root.double()
    noise = torch.poisson(model, generator).sqrt()
    expected = model.sqrt()
    counts, safe = root.square(), model.clamp_min(1e-9)
    term = torch.xlogy(counts, counts.clamp_min(1e-9) / safe) - (counts - safe)
    return torch.stack(
        [
            (root - expected).abs().sum(),
            root.sum(),
            (noise - expected).abs().sum(),
            noise.sum(),
            2 * term.sum(),
        ]
    )


def seen_windows(
    object_yx: NDArray[np.complex64], corner_yx_px: NDArray[np.int64], probe: Probe
) -> NDArray[np.int64]:
    """Indices (n,) of the windows that lie on the object, seen wherever the probe is bright.

    Of the arguments of :func:`stitched_misfit`.
    """
    size = probe.size_px
    last = np.asarray(object_yx.shape) - size
    within = np.flatnonzero(((corner_yx_px >= 0) & (corner_yx_px <= last)).all(1))
    core = probe.power_yx > _CORE * probe.power_yx.max()
    seen = np.isfinite(object_yx)
    complete = [
        bool(seen[y : y + size, x : x + size][core].all()) for y, x in corner_yx_px[within].tolist()
    ]
    return within[np.array(complete, bool)].astype(np.int64)
