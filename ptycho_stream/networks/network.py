"""What every network looks like from outside: frames and a probe in, object patches out.

The predictor, training and the registry know networks by this face only.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ptycho_stream.errors import ModelError

SIZE_MULTIPLE_PX = 32
"""Frame sizes must be multiples of this, for every architecture."""

CONFIDENCE_ERROR = 0.1
"""The expected error of a pixel, |estimate - object|, at which confidence is one half."""


class Prediction(NamedTuple):
    """What a network says of a batch.

    Attributes:
        obj: complex64 (B, N, N), the object patches.
        confidence: float32 (B, N, N) in (0, 1]: 1 / (1 + (e / 0.1)^2) for an expected error e of
            the pixel.
    """

    obj: Tensor
    confidence: Tensor


Inference = Callable[[Tensor, Tensor, Tensor], Prediction]
"""Amplitude, probe, valid, as :meth:`Network.stages` takes them, to the last estimate."""


class Network(nn.Module, ABC):
    """A network that the registry can hold.

    Attributes:
        group_frames: so many successive frames of a batch are reconstructed together; batches are
            a multiple of it.
        half_precision: whether its convolutions may run in bfloat16 for inference: measured to cost
            nothing in the score.
        uses_probe: whether the probe that it is given tells it more than where the patch lies.
    """

    group_frames: int = 1
    uses_probe: bool = True
    half_precision: bool = False

    @abstractmethod
    def settings_json(self) -> dict[str, Any]:
        """The settings that make a network of this shape again, for the manifest."""

    @abstractmethod
    def stages(self, amplitude: Tensor, probe: Tensor, valid: Tensor) -> list[Prediction]:
        """The estimates on the way to the last one, for losses on all of them.

        Args:
            amplitude: float32 (B, N, N), square root of the counts, zero frequency at [0, 0].
            probe: complex64 (B|1, modes, N, N), ortho normalisation, sqrt of photons.
            valid: bool (B|1, N, N), False where the detector pixel says nothing.

        Raises:
            ModelError: N is not a multiple of 32, or the shapes disagree.
        """

    def forward(self, amplitude: Tensor, probe: Tensor, valid: Tensor) -> Prediction:
        """The last of :meth:`stages`."""
        return self.stages(amplitude, probe, valid)[-1]

    def inference(self, dtype: torch.dtype) -> Inference:
        """The fastest form of :meth:`forward` that the architecture has, without gradients.

        It may keep buffers between calls, so each thread needs one of its own, and may copy the
        weights, so it is made anew when they change. Call it under ``torch.inference_mode``.

        Args:
            dtype: of the convolutions; float32 or, where ``half_precision`` allows it, bfloat16.

        Returns:
            A function that takes what :meth:`stages` takes, and raises what it raises.
        """
        low = dtype != torch.float32

        def plain(amplitude: Tensor, probe: Tensor, valid: Tensor) -> Prediction:
            with torch.autocast(amplitude.device.type, torch.bfloat16, enabled=low):
                return self(amplitude, probe, valid)

        return plain


def check_shapes(amplitude: Tensor, probe: Tensor, valid: Tensor) -> None:
    """Refuse what no network of any frame size takes; shapes as of :meth:`Network.stages`.

    Raises:
        ModelError: N is not a multiple of 32, or the shapes disagree.
    """
    size = amplitude.shape[-1]
    if amplitude.ndim != 3 or amplitude.shape[-2] != size or size % SIZE_MULTIPLE_PX:
        raise ModelError(
            f"networks take (B, N, N) frames with N a multiple of {SIZE_MULTIPLE_PX}, "
            f"got {tuple(amplitude.shape)}; crop or pad the frames in the scan's view"
        )
    if probe.ndim != 4 or probe.shape[-2:] != amplitude.shape[-2:]:
        raise ModelError(
            f"the probe has shape {tuple(probe.shape)}, the frames need (modes, {size}, {size}); "
            "load a probe sampled for this frame size"
        )
    if valid.ndim != 3 or valid.shape[-2:] != amplitude.shape[-2:]:
        raise ModelError(f"the valid mask has shape {tuple(valid.shape)}, the frames need {size}^2")
