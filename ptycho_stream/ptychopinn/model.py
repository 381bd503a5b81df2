"""A bundle's two models as functions: frames to object patches, and on to frames again.

Channels come second, as PtychoPINN's torch flavour has them. Used for inference by this package and
by people's programs.
"""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ptycho_stream.errors import PtychoPinnError
from ptycho_stream.physics.forward import mode_sum
from ptycho_stream.ptychopinn.bundle import Bundle, load_bundle
from ptycho_stream.ptychopinn.config import TrainingConfig
from ptycho_stream.ptychopinn.execution import ExecutionConfig
from ptycho_stream.ptychopinn.forward import expected_intensity
from ptycho_stream.ptychopinn.model_inputs import Array, Inputs, checked_inputs
from ptycho_stream.reconstruct.forward_pass import in_gauge
from ptycho_stream.reconstruct.recipe import usable_device

_PASS_PX = {"cpu": 8 * 128 * 128, "cuda": 512 * 128 * 128}
"""Pixels that go through the network at a time."""


class PtychoModel:
    """The models of a bundle; for one thread at a time.

    Args:
        bundle: its network is copied to the device.
        execution: where and how to compute.

    Raises:
        ModelError: this machine lacks the device.
        PtychoPinnError: the precision is for training only.
    """

    def __init__(self, bundle: Bundle, execution: ExecutionConfig | None = None) -> None:
        self.bundle = bundle
        self.execution = execution or ExecutionConfig()
        self.device = usable_device(self.execution.device, "ExecutionConfig.device")
        if self.execution.precision == "16-mixed":
            raise PtychoPinnError("16-mixed is for training: use 32-true or bf16-mixed")
        network = copy.deepcopy(bundle.network).to(self.device).eval()
        # Three times faster convolutions on a CPU, tensor cores on a GPU.
        network.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
        low = self.execution.precision == "bf16-mixed"
        self._network = network.inference(torch.bfloat16 if low else torch.float32)

    def diffraction_to_obj(
        self,
        x: Array,
        positions: Array,
        probe: Array,
        input_scale_factor: Array,
        valid: NDArray[np.bool_] | None = None,
    ) -> Tensor:
        """Object patches of groups of frames.

        Args:
            x: float32 (B, C, N, N), amplitudes, zero frequency at N // 2; of grouped data
                ``X_full``, with the channels moved to the second axis.
            positions: float32 (B, C, 1, 2), relative to the group's mean: ``coords_relative``. The
                networks here make every patch relative to its own frame, so these are only checked.
            probe: complex (N, N) or (modes, N, N). Its scale does not matter: the beam has the
                photons that the bundle says.
            input_scale_factor: (B,), makes ``x`` the root of photons, of which a frame has
                ``bundle.config.nphotons`` on average; ``bundle.input_scale_factor`` for ``X_full``.
            valid: bool (N, N), False where a pixel is bad; ``x`` may hold anything there. None: all
                are good.

        Returns:
            complex64 (B, C, N, N) on the CPU, each with a real and positive mean under the probe.

        Raises:
            PtychoPinnError: shapes do not fit, a number is not finite, the positions are not
                relative, or the frames have far more or fewer photons than the model's.
        """
        return self._patches(self._checked(x, positions, probe, input_scale_factor, valid))

    def autoencoder(
        self,
        x: Array,
        positions: Array,
        probe: Array,
        input_scale_factor: Array,
        valid: NDArray[np.bool_] | None = None,
    ) -> Tensor:
        """Frames as the model's own patches explain them; arguments and errors as of the other.

        Returns:
            float32 (B, C, N, N), photons, zero frequency at N // 2.
        """
        given = self._checked(x, positions, probe, input_scale_factor, valid)
        return expected_intensity(self._patches(given), self._beam(given))

    def _checked(
        self,
        x: Array,
        positions: Array,
        probe: Array,
        scale: Array,
        valid: NDArray[np.bool_] | None,
    ) -> Inputs:
        config = self.bundle.config
        return checked_inputs(
            x, positions, probe, scale, valid, model=config.model, nphotons=config.nphotons
        )

    def _beam(self, given: Inputs) -> Tensor:
        """The probe (modes, N, N) in the root of photons."""
        photons = self.bundle.beam_ratio * self.bundle.config.nphotons
        return given.probe * (photons / given.probe.abs().square().sum()).sqrt()

    def _patches(self, given: Inputs) -> Tensor:
        groups, channels, size, _ = given.amplitude.shape
        found = torch.empty(given.amplitude.shape, dtype=torch.complex64)
        beam = self._beam(given)[None].to(self.device)
        mask = torch.fft.ifftshift(given.valid)[None].to(self.device)
        step = max(_PASS_PX[self.device.type] // (channels * size**2), 1)
        with self.execution.applied(), torch.inference_mode():
            for first in range(0, groups, step):
                part = slice(first, first + step)
                seen = given.amplitude[part].reshape(-1, size, size).to(self.device)
                said = self._network(torch.fft.ifftshift(seen, dim=(-2, -1)), beam, mask)
                turned = in_gauge(said.obj, mode_sum(beam) * said.confidence)
                found[part] = turned.reshape(-1, channels, size, size).cpu()
        return found


def load_inference_bundle(
    folder: Path | str, execution: ExecutionConfig | None = None
) -> tuple[PtychoModel, TrainingConfig]:
    """Read the model in a folder; see :func:`~ptycho_stream.ptychopinn.bundle.load_bundle`.

    Returns:
        The model, and the configuration that it was trained with.

    Raises:
        ModelError: it cannot be read, or this machine lacks the device.
    """
    bundle = load_bundle(folder)
    return PtychoModel(bundle, execution), bundle.config
