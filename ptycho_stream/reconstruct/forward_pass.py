"""One pass of a batch through a network: amplitudes and shifts in, patches to stitch out.

The predictor has one of these for each worker of a CPU, and for each batch size on a GPU.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ptycho_stream.networks.network import Inference, Network
from ptycho_stream.physics.forward import mode_sum
from ptycho_stream.physics.probe import Probe, shifted_modes, spectrum_of
from ptycho_stream.reconstruct.devices import has_bfloat16


class Passed(NamedTuple):
    """What comes out of a pass.

    Attributes:
        patch: complex64 (B, N, N), turned as they are stitched.
        weight: float32 (B, N, N), ``power`` times the network's confidence.
        power: float32 (B, N, N), the shifted probe's intensity over the peak of the unshifted one.
        amplitude: float32 (B, N, N), as it was shown to the network.
    """

    patch: Tensor
    weight: Tensor
    power: Tensor
    amplitude: Tensor


class Beam:
    """A probe on a device, and what of it every pass needs.

    Attributes:
        spectrum: complex64 (modes, N, N), see ``spectrum_of``.
        peak: of its intensity.
        empty: float32 (N, N), the amplitude that it makes without a sample.
    """

    def __init__(self, probe: Probe, device: torch.device) -> None:
        self.spectrum = spectrum_of(probe, device)
        self.peak = float(probe.power_yx.max())
        self.empty = mode_sum(self.spectrum[None])[0].sqrt()


class ForwardPass:
    """A network's inference for one probe; for one thread at a time.

    Args:
        inference: of the network, see :meth:`Network.inference`.
        beam: its probe.
    """

    def __init__(self, inference: Inference, beam: Beam) -> None:
        self._inference = inference
        self._beam = beam

    def __call__(self, amplitude: Tensor, shift_yx_px: Tensor, valid: Tensor) -> Passed:
        """Take a batch through the network.

        Args:
            amplitude: float32 (B, N, N), square root of the counts, zero frequency at [0, 0].
            shift_yx_px: float32 (B, 2), by which the probe is shifted.
            valid: bool (1, N, N), zero frequency at [0, 0].
        """
        amplitude = torch.where(valid, amplitude, amplitude.new_zeros(()))
        modes = shifted_modes(self._beam.spectrum, shift_yx_px)
        power = mode_sum(modes) / self._beam.peak
        found = self._inference(amplitude, modes, valid)
        weight = power * found.confidence
        return Passed(in_gauge(found.obj, weight), weight, power, amplitude)


def prepared(network: Network, device: torch.device) -> tuple[Network, torch.dtype]:
    """A network moved to a device for inference, and the precision that its convolutions take."""
    network = network.to(device).eval()
    # channels_last: three times faster convolutions on a CPU, tensor cores on a GPU.
    network.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    low = network.half_precision and has_bfloat16(device)
    return network, torch.bfloat16 if low else torch.float32


def in_gauge(patch: Tensor, weight: Tensor) -> Tensor:
    """Turn each patch so that its weighted mean has no phase.

    On the measured siemens star, and on simulated scans, this makes patches agree better than the
    phases that the network happens to choose (docs/models.md).
    """
    mean = (patch * weight).sum((-2, -1), keepdim=True)
    # In double, or the last digit depends on the patch's place in the batch.
    angle = -mean.to(torch.complex128).angle()
    return patch * torch.polar(torch.ones_like(angle), angle).to(patch.dtype)
