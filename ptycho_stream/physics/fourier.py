"""The project's only Fourier transform: two-dimensional, over the last two axes, ortho.

Ortho means that photons are the same in both planes. Used wherever torch transforms a wave.
"""

from typing import Any, cast

import torch
from torch import Tensor

# torch.fft has no type stubs.
_FFT = cast("Any", torch.fft)


def fft2_ortho(waves: Tensor) -> Tensor:
    """Complex (..., N, N) to its spectrum, zero frequency at [0, 0]."""
    return _FFT.fft2(waves, norm="ortho")


def ifft2_ortho(spectrum: Tensor) -> Tensor:
    """The inverse of ``fft2_ortho``."""
    return _FFT.ifft2(spectrum, norm="ortho")


def frequencies(size_px: int, device: torch.device) -> Tensor:
    """Frequency of each index in cycles a pixel, float32 (N,), zero first."""
    return _FFT.fftfreq(size_px, device=device)


def centred(images: Tensor) -> Tensor:
    """Move zero frequency from [0, 0] to [N // 2, N // 2]."""
    return _FFT.fftshift(images, dim=(-2, -1))
