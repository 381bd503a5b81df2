"""What networks learn from groups of frames: to explain them, or to give patches that are known.

The losses and figures of training on groups (``group_fit``).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from ptycho_stream.networks.network import Network, Prediction
from ptycho_stream.physics.forward import intensity, mode_sum, poisson_nll
from ptycho_stream.reconstruct.collapse import judge
from ptycho_stream.reconstruct.forward_pass import in_gauge
from ptycho_stream.training.losses import frame_errors
from ptycho_stream.training.overlap import OWN_SHARE, Mosaic, ScanBatch, stitched_patches

_FLOOR_PHOTONS = 0.1
"""Added to model and counts: bounds the likelihood's gradient where nothing is expected."""


class GroupBatch(NamedTuple):
    """Groups of frames, one after another, and what is known of them.

    Attributes:
        measured: the frames.
        truth: complex64 (B, N, N), the patches under them, or None.
    """

    measured: ScanBatch
    truth: Tensor | None


class Misfit(nn.Module):
    """How badly patches explain the frames that they were made from.

    A weighted sum of the Poisson deviance, a photon, and of the absolute error of amplitudes, a
    unit of amplitude.

    Args:
        nll_weight: of the former.
        mae_weight: of the latter.
        stitched: patches that overlap in a batch are stitched before they are compared; else each
            stands alone.
        fit_flux: the beam's photons are learnt, beginning with those that the probe says.
    """

    def __init__(
        self, *, nll_weight: float, mae_weight: float, stitched: bool, fit_flux: bool
    ) -> None:
        super().__init__()
        self._nll_weight, self._mae_weight = nll_weight, mae_weight
        self._stitched = stitched
        self.log_scale = nn.Parameter(torch.zeros(()), requires_grad=fit_flux)

    @property
    def flux(self) -> float:
        """The beam's photons over what the probe said."""
        return float((2 * self.log_scale.detach()).exp())

    def loss(self, network: Network, batch: GroupBatch) -> Tensor:
        """The misfit of a batch, of all its photons together."""
        seen, prediction = self._seen(network, batch)
        return self._misfits(prediction, seen).mean()

    def figures(self, network: Network, batch: GroupBatch) -> dict[str, Tensor]:
        """The misfit of single frames, and whether their patches can be true."""
        seen, prediction = self._seen(network, batch)
        return {"val_loss": self._misfits(prediction, seen)} | spread_of(prediction, seen)

    def _seen(self, network: Network, batch: GroupBatch) -> tuple[ScanBatch, Prediction]:
        seen = batch.measured._replace(probe=batch.measured.probe * self.log_scale.exp())
        return seen, network(seen.amplitude, seen.probe, seen.valid)

    def _misfits(self, prediction: Prediction, seen: ScanBatch) -> Tensor:
        own = self._misfits_of(prediction.obj, seen)
        if not self._stitched:
            return own
        mosaic = Mosaic(seen.corner_yx_px, seen.amplitude.shape[-1])
        weight = seen.weight * prediction.confidence.detach()
        together = self._misfits_of(stitched_patches(prediction.obj, weight, mosaic), seen)
        # A little of their own: it reaches parts of a patch that no neighbour covers.
        return together + OWN_SHARE * own

    def _misfits_of(self, patches: Tensor, seen: ScanBatch) -> Tensor:
        """Misfits (B,) of patches (B, N, N)."""
        counts = seen.amplitude.square() + _FLOOR_PHOTONS
        expected = intensity(seen.probe, patches) + _FLOOR_PHOTONS
        valid = seen.valid.expand(counts.shape)
        total = counts.new_zeros(len(counts))
        if self._nll_weight:
            rows = zip(expected, counts, valid, strict=True)
            excess = torch.stack([poisson_nll(e, k, v) - poisson_nll(k, k, v) for e, k, v in rows])
            total = total + self._nll_weight * excess / counts.sum((-2, -1))
        if self._mae_weight:
            root = counts.sqrt()
            off = torch.where(valid, (expected.sqrt() - root).abs(), 0.0)
            total = total + self._mae_weight * off.sum((-2, -1)) / root.sum((-2, -1))
        return total


class KnownPatches(nn.Module):
    """How far patches are from known ones, apart from the phase that a frame does not tell.

    The error is that of squares: by absolute ones an empty patch is best where a sample is mostly
    empty, and a network that has learnt this learns nothing more.
    """

    flux: float = 1.0
    """Known patches say nothing of the beam."""

    def loss(self, network: Network, batch: GroupBatch) -> Tensor:
        """The probe-weighted relative root mean square error."""
        return self._errors(network, batch)[1].mean()

    def figures(self, network: Network, batch: GroupBatch) -> dict[str, Tensor]:
        """The errors of single patches, and whether they can be true."""
        prediction, errors = self._errors(network, batch)
        return {"val_loss": errors} | spread_of(prediction, batch.measured)

    def _errors(self, network: Network, batch: GroupBatch) -> tuple[Prediction, Tensor]:
        assert batch.truth is not None
        seen = batch.measured
        prediction = network(seen.amplitude, seen.probe, seen.valid)
        weight = seen.weight.sqrt().expand(batch.truth.shape)
        return prediction, frame_errors(prediction.obj, batch.truth, weight)[1]


def spread_of(prediction: Prediction, seen: ScanBatch) -> dict[str, Tensor]:
    """How much patches vary, and which vary less than their frames demand (``collapse``)."""
    power = mode_sum(seen.probe)
    patches = in_gauge(prediction.obj, power)
    beam = intensity(seen.probe[:1], torch.ones_like(patches[:1]))[0]
    empty = torch.where(seen.valid[0], beam, 0.0).sqrt()
    judged = judge(patches, power.expand(patches.shape), seen.amplitude, empty)
    return {"val_spread": judged[1], "val_collapsed": judged[3]}
