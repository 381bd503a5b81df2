"""What networks are trained towards: synthetic objects, measured frames, or both.

An objective turns a batch into a loss and, for validation, into figures. The Lightning module
knows objectives by the protocol only.
"""

from typing import Any, Protocol

from torch import Tensor

from ptycho_stream.networks.network import Network
from ptycho_stream.training.losses import frame_errors, supervised_loss
from ptycho_stream.training.overlap import overlap_loss, overlap_misfits
from ptycho_stream.training.scan_data import JobBatch
from ptycho_stream.training.synthetic import FRAMES_OF_A_SAMPLE, TrainingBatch

_MEASURED_SHARE = 10.0
"""Misfits are squared amplitudes a photon, about 0.01 where supervised losses are about 0.3."""


class Objective(Protocol):
    """A loss, and figures to follow it by."""

    def loss(self, network: Network, batch: Any) -> Tensor:
        """The loss of a training batch, a scalar."""
        ...

    def figures(self, network: Network, batch: Any) -> dict[str, Tensor]:
        """Validation figures of a batch by name, each (n,) for n frames."""
        ...


class SyntheticObjective:
    """Objects of synthetic frames, as pre-training learns them."""

    def loss(self, network: Network, batch: TrainingBatch) -> Tensor:
        """The error of all stages."""
        return supervised_loss(network.stages(batch.amplitude, batch.probe, batch.valid), batch)

    def figures(self, network: Network, batch: TrainingBatch) -> dict[str, Tensor]:
        """Absolute and relative error, and the latter with one phase for frames of a sample."""
        estimate, _ = network(batch.amplitude, batch.probe, batch.valid)
        absolute, relative = frame_errors(estimate, batch.obj, batch.weight)
        _, together = frame_errors(estimate, batch.obj, batch.weight, FRAMES_OF_A_SAMPLE)
        return {"val_error": absolute, "val_nrmse": relative, "val_nrmse_one_phase": together}


class ScanObjective:
    """Measured frames of scans through the forward model, and synthetic ones if there are any.

    Args:
        frames_of_a_sample: so many successive synthetic frames show one sample.
    """

    def __init__(self, frames_of_a_sample: int) -> None:
        self._frames_of_a_sample = frames_of_a_sample

    def loss(self, network: Network, batch: JobBatch) -> Tensor:
        """The stitched misfit, the synthetic error, or their weighted sum."""
        parts: list[Tensor] = []
        if batch.measured is not None:
            seen = batch.measured
            prediction = network(seen.amplitude, seen.probe, seen.valid)
            parts.append(_MEASURED_SHARE * overlap_loss(prediction, seen))
        if batch.synthetic is not None:
            made = batch.synthetic
            stages = network.stages(made.amplitude, made.probe, made.valid)
            parts.append(supervised_loss(stages, made, self._frames_of_a_sample))
        total = parts[0]
        for part in parts[1:]:
            total = total + part
        return total

    def figures(self, network: Network, batch: JobBatch) -> dict[str, Tensor]:
        """The misfit of held-out frames to the object that they and their neighbours make."""
        assert batch.measured is not None
        seen = batch.measured
        together, own = overlap_misfits(network(seen.amplitude, seen.probe, seen.valid), seen)
        return {"val_loss": together, "val_own_misfit": own}
