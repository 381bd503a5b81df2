"""What every network looks like from outside: frames and a probe in, object patches out.

The predictor, training and the registry know networks by this face only.
"""

from abc import ABC, abstractmethod
from typing import Any, NamedTuple

from torch import Tensor, nn

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


class Network(nn.Module, ABC):
    """A network that the registry can hold.

    Attributes:
        group_frames: so many successive frames of a batch are reconstructed together; batches are
            a multiple of it.
        half_precision: whether its convolutions may run in bfloat16 for inference: measured to cost
            nothing in the score.
    """

    group_frames: int = 1
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
