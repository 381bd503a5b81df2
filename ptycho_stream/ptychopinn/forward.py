"""From object patches to frames, in the conventions of PtychoPINN's arrays.

The physics is that of ``ptycho_stream.physics``; this only puts channels, scale and the zero
frequency where PtychoPINN has them. Used by the autoencoder of a model.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ptycho_stream.physics.forward import intensity
from ptycho_stream.physics.fourier import centred


def expected_intensity(obj: Tensor, probe: Tensor, scale: Tensor | float = 1.0) -> Tensor:
    """Expected photons, sum over modes of |fftshift FFT_ortho(scale P O)|^2.

    Args:
        obj: complex (B, C, N, N).
        probe: complex (modes, N, N) or (N, N).
        scale: real (B,), or one number for all.

    Returns:
        Real (B, C, N, N), zero frequency at N // 2.
    """
    groups, channels, size, _ = obj.shape
    factor = torch.as_tensor(scale, device=obj.device).expand(groups)
    modes = probe.reshape(-1, size, size) * factor[:, None, None, None]
    frames = intensity(modes.repeat_interleave(channels, 0), obj.reshape(-1, size, size))
    return centred(frames).reshape(obj.shape)
