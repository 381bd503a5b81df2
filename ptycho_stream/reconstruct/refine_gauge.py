"""What ptychography cannot know: the object's phase and phase ramp, held to the network's image.

O exp(i (k r + c)) with P exp(-i (k r + c)) explains the frames as well as O with P. Refinement
drifts along this freedom; without a hold, refined tiles would not fit their predicted neighbours.
What is given away is turned back, and a predicted image is turned as the refined one has drifted
before it is taken in; the arrays that are refined are never turned: a part of them would not be,
and frames do not mend a wall of phase. The scale is held by the probe's photons, the translation by
the positions' mean. Used by :class:`~ptycho_stream.reconstruct.refine_model.Model`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

_SAMPLES = 1 << 19
"""The ramp is measured on about so many pixels of a large object."""


@dataclass(frozen=True, slots=True)
class Drift:
    """Phase of an object against its anchor: ``phase`` + ``ramp_yx`` . (y, x) radians.

    y and x are canvas pixels, which stay what they are when the object's array grows.
    """

    phase: float
    ramp_yx: tuple[float, float]

    def turned(self, image: Tensor, corner_yx_px: tuple[int, int], turns: int) -> Tensor:
        """A part of the object, complex (..., h, w), turned ``turns`` times as it has drifted.

        ``corner_yx_px`` is the canvas pixel of the part's [0, 0]; -1 turns back.
        """
        rows, columns = (
            (torch.arange(size, device=image.device, dtype=torch.float64) + first) * slope
            for size, first, slope in zip(image.shape[-2:], corner_yx_px, self.ramp_yx, strict=True)
        )
        angle = torch.remainder(rows[:, None] + columns + self.phase, 2 * torch.pi).float() * turns
        return image * torch.polar(torch.ones_like(angle), angle)


def drift(
    obj: Tensor, anchor: Tensor, weight: Tensor, corner_yx_px: tuple[int, int]
) -> Drift | None:
    """Weighted phase and ramp of an object against the image that holds its gauge.

    The ramp is the phase of the summed products of neighbours, which needs no unwrapping.

    Args:
        obj: complex (H, W).
        anchor: the same; 0 where there is none.
        weight: real (H, W), of each pixel.
        corner_yx_px: canvas pixel of their [0, 0].

    Returns:
        None where nothing can be compared.
    """
    shape = obj.shape
    if min(shape) < 2:
        return None
    step = max(1, round((shape[0] * shape[1] / _SAMPLES) ** 0.5))
    ratio = _ratio(obj, anchor, weight, slice(0, shape[0] - 1, step), slice(0, shape[1] - 1, step))
    below = _ratio(obj, anchor, weight, slice(1, shape[0], step), slice(0, shape[1] - 1, step))
    right = _ratio(obj, anchor, weight, slice(0, shape[0] - 1, step), slice(1, shape[1], step))
    ky, kx = (float((other * ratio.conj()).sum().angle()) for other in (below, right))
    rows = torch.arange(0, shape[0] - 1, step, device=obj.device) * ky
    columns = torch.arange(0, shape[1] - 1, step, device=obj.device) * kx
    angle = -(rows[:, None] + columns[None, :]).float()
    total = (ratio * torch.polar(torch.ones_like(angle), angle)).sum()
    if not float(total.abs()) > 0:
        return None
    return Drift(float(total.angle()) - ky * corner_yx_px[0] - kx * corner_yx_px[1], (ky, kx))


def _ratio(obj: Tensor, anchor: Tensor, weight: Tensor, rows: slice, columns: slice) -> Tensor:
    return obj[rows, columns] * anchor[rows, columns].conj() * weight[rows, columns]
