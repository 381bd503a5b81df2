"""The unsupervised loss: patches of neighbouring frames, stitched and simulated back as one object.

A patch on its own can explain its frame and still be wrong; the object that many patches agree on
cannot as easily. Everything here is differentiable, so a network learns from the disagreement.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from ptycho_stream.networks.network import Prediction
from ptycho_stream.physics.forward import intensity
from ptycho_stream.reconstruct.forward_pass import in_gauge

OWN_SHARE = 0.1
"""Weight of each patch's own misfit: it reaches parts of a patch that no neighbour covers."""

_ALIGNMENT_ROUNDS = 3

_LEAST_WEIGHT = 1e-3
"""Where patches weigh less than this together, the object tends to 1 (vacuum)."""


class ScanBatch(NamedTuple):
    """Neighbouring frames of a scan; a tuple, as Lightning moves it to a device.

    Attributes:
        amplitude: float32 (B, N, N), square root of the counts, zero frequency at [0, 0].
        probe: complex64 (B, modes, N, N), shifted to each frame's position.
        valid: bool (1, N, N).
        weight: float32 (B, N, N), intensity of the shifted probe in units of its peak.
        corner_yx_px: int64 (B, 2), where the patches lie, from 0.
        scored: bool (B,), frames whose misfit counts; the others only add to the object.
    """

    amplitude: Tensor
    probe: Tensor
    valid: Tensor
    weight: Tensor
    corner_yx_px: Tensor
    scored: Tensor


_LARGEST_CANVAS = 4
"""Times the pixels of all patches; a larger canvas has none for places without a patch."""


class Mosaic:
    """Where the patches of a batch lie on a canvas just large enough for them.

    Args:
        corner_yx_px: int64 (B, 2), from 0.
        size_px: N.
    """

    def __init__(self, corner_yx_px: Tensor, size_px: int) -> None:
        height, width = (int(n) + size_px for n in corner_yx_px.amax(0).tolist())
        along = torch.arange(size_px, device=corner_yx_px.device)
        rows = corner_yx_px[:, 0, None] + along
        columns = corner_yx_px[:, 1, None] + along
        # Flat: adding and picking along one axis is fast, and on a CPU the same in every run.
        self._index = (rows[:, :, None] * width + columns[:, None, :]).reshape(-1)
        self._pixels = height * width
        if self._pixels > _LARGEST_CANVAS * len(self._index):
            covered, self._index = self._index.unique(return_inverse=True)
            self._pixels = len(covered)
        self._shape = (len(corner_yx_px), size_px, size_px)

    def add(self, values: Tensor) -> Tensor:
        """Sum of real or complex patches (B, N, N), flat."""
        if values.is_complex():
            parts = torch.view_as_real(values)
            return torch.complex(self.add(parts[..., 0]), self.add(parts[..., 1]))
        return values.new_zeros(self._pixels).index_add(0, self._index, values.reshape(-1))

    def pick(self, canvas: Tensor) -> Tensor:
        """Windows (B, N, N) of a flat real or complex canvas."""
        if canvas.is_complex():
            return torch.complex(self.pick(canvas.real), self.pick(canvas.imag))
        return canvas.index_select(0, self._index).reshape(self._shape)


def stitched_patches(obj: Tensor, weight: Tensor, mosaic: Mosaic) -> Tensor:
    """Each patch as the object shows it that all patches make together.

    Args:
        obj: complex (B, N, N), patches with a phase of their own each.
        weight: real (B, N, N), how much each counts where.
        mosaic: where they lie.

    Returns:
        Complex (B, N, N).
    """
    total = mosaic.add(weight) + _LEAST_WEIGHT
    patches = in_gauge(obj, weight)
    patches = patches * _alignment(patches.detach(), weight.detach(), mosaic, total.detach())
    return mosaic.pick((mosaic.add(patches * weight) + _LEAST_WEIGHT) / total)


def _alignment(patches: Tensor, weight: Tensor, mosaic: Mosaic, total: Tensor) -> Tensor:
    """Unit factors (B, 1, 1) that turn each patch to the phase of what lies around it."""
    turn = torch.ones_like(patches[:, :1, :1])
    for _ in range(_ALIGNMENT_ROUNDS):
        around = mosaic.pick(mosaic.add(patches * turn * weight) / total)
        inner = (weight * around * patches.conj()).sum((-2, -1), keepdim=True)
        turn = torch.polar(torch.ones_like(inner.real), inner.angle())
    return turn


def amplitude_misfit(probe: Tensor, obj: Tensor, amplitude: Tensor, valid: Tensor) -> Tensor:
    """Squared error of each frame's simulated amplitude, a photon of the frame, real (B,).

    The square root makes Poisson noise the same at all counts (Anscombe 1948), so this is the
    Gaussian approximation of the Poisson likelihood without its poles at dark pixels.
    """
    expected = intensity(probe, obj)
    # The root's gradient is infinite where nothing is expected; a tenth of a photon bounds it.
    difference = (expected + 0.1).sqrt() - (amplitude.square() + 0.1).sqrt()
    difference = torch.where(valid, difference, difference.new_zeros(()))
    return difference.square().sum((-2, -1)) / amplitude.square().sum((-2, -1)).clamp_min(1)


def overlap_misfits(prediction: Prediction, batch: ScanBatch) -> tuple[Tensor, Tensor]:
    """Misfits of the scored frames to the stitched object, and to their own patches.

    The confidence weighs the patches as it does on the image, but does not learn from here what
    errors are: that takes a known truth (``losses.confidence_loss``).

    Returns:
        Two real (n,) of the n scored frames, in squared amplitude a photon.
    """
    mosaic = Mosaic(batch.corner_yx_px, batch.amplitude.shape[-1])
    weight = batch.weight * prediction.confidence.detach()
    together = stitched_patches(prediction.obj, weight, mosaic)
    chosen = batch.scored
    measured = batch.amplitude[chosen], batch.valid
    misfit = amplitude_misfit(batch.probe[chosen], together[chosen], *measured)
    own = amplitude_misfit(batch.probe[chosen], prediction.obj[chosen], *measured)
    return misfit, own


def overlap_loss(prediction: Prediction, batch: ScanBatch) -> Tensor:
    """The unsupervised loss of a batch: its stitched misfit and a little of the patches' own."""
    together, own = overlap_misfits(prediction, batch)
    return together.mean() + OWN_SHARE * own.mean()
