"""A bundle's two models as functions: frames to object patches, and on to frames again.

Channels come second, as PtychoPINN's torch flavour has them. Used for inference by this package and
by people's programs.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any, NamedTuple

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
from ptycho_stream.ptychopinn.raw_data import GroupedData
from ptycho_stream.reconstruct.predict import in_gauge
from ptycho_stream.reconstruct.recipe import usable_device

Array = Tensor | NDArray[Any]

_PASS_PX = {"cpu": 8 * 128 * 128, "cuda": 512 * 128 * 128}
"""Pixels that go through the network at a time."""

_MEAN_PX = 0.01
"""Relative positions of a group add up to 0; float32 loses no more than this of them."""


class _Inputs(NamedTuple):
    """Checked: amplitude (B, C, N, N), probe (modes, N, N), scale (B,)."""

    amplitude: Tensor
    probe: Tensor
    scale: Tensor


class PtychoModel:
    """The models of a bundle.

    Args:
        bundle: its network is copied to the device.
        execution: where and how to compute.
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
            x: float32 (B, C, N, N), amplitudes in any unit, zero frequency at N // 2; of grouped
                data ``X_full``, with the channels moved to the second axis.
            positions: float32 (B, C, 1, 2), relative to the group's mean: ``coords_relative``. The
                networks here make every patch relative to its own frame, so these are only checked.
            probe: complex (N, N) or (modes, N, N). Its scale does not matter: the beam has
                ``bundle.beam_ratio`` times the photons of the mean frame.
            input_scale_factor: (B,), makes ``x`` the root of photons; ``bundle.input_scale_factor``
                for ``X_full``.
            valid: bool (N, N), False where a pixel is bad and ``x`` says nothing; None: none is.

        Returns:
            complex64 (B, C, N, N) on the CPU, each with a real and positive mean under the probe.

        Raises:
            PtychoPinnError: shapes do not fit, a number is not finite, or the positions are not
                relative.
        """
        given = self._checked(x, positions, probe, input_scale_factor)
        amplitude = given.amplitude
        groups, channels, size, _ = amplitude.shape
        found = torch.empty(amplitude.shape, dtype=torch.complex64)
        mask = self._mask(valid, size)
        step = max(_PASS_PX[self.device.type] // (channels * size**2), 1)
        with self.execution.applied(), torch.inference_mode():
            for first in range(0, groups, step):
                part = slice(first, first + step)
                seen = amplitude[part].reshape(-1, size, size).to(self.device)
                beam = self._beam(given, part).repeat_interleave(channels, 0).to(self.device)
                said = self._network(torch.fft.ifftshift(seen, dim=(-2, -1)), beam, mask)
                turned = in_gauge(said.obj, mode_sum(beam) * said.confidence)
                found[part] = turned.reshape(-1, channels, size, size).cpu()
        return found

    def autoencoder(
        self,
        x: Array,
        positions: Array,
        probe: Array,
        input_scale_factor: Array,
        valid: NDArray[np.bool_] | None = None,
    ) -> Tensor:
        """Frames as the model's own patches explain them, arguments as of the other.

        Returns:
            float32 (B, C, N, N), photons, zero frequency at N // 2.
        """
        given = self._checked(x, positions, probe, input_scale_factor)
        patches = self.diffraction_to_obj(x, positions, probe, input_scale_factor, valid)
        unit = given.probe / given.probe.abs().square().sum().sqrt()
        return expected_intensity(patches, unit, self._photons(given.scale).sqrt())

    def _mask(self, valid: NDArray[np.bool_] | None, size: int) -> Tensor:
        mask = np.ones((size, size), bool) if valid is None else np.asarray(valid)
        if mask.shape != (size, size) or mask.dtype.kind != "b":
            raise PtychoPinnError(f"valid is {mask.dtype} {mask.shape}, not bool ({size}, {size})")
        return torch.as_tensor(np.fft.ifftshift(mask)[None].copy()).to(self.device)

    def _photons(self, scale: Tensor) -> Tensor:
        """Of the unattenuated beam in frames of groups (B,)."""
        half = self.bundle.config.model.N / 2
        return self.bundle.beam_ratio * (half * scale).square()

    def _beam(self, given: _Inputs, part: slice) -> Tensor:
        """Probes (b, modes, N, N) in the root of photons."""
        power = given.probe.abs().square().sum()
        factor = (self._photons(given.scale[part]) / power).sqrt()
        return given.probe * factor[:, None, None, None]

    def _checked(
        self, x: Array, positions: Array, probe: Array, input_scale_factor: Array
    ) -> _Inputs:
        model = self.bundle.config.model
        channels, size = model.gridsize**2, model.N
        seen = torch.as_tensor(x).float()
        if seen.ndim != 4 or seen.shape[1:] != (channels, size, size):
            raise PtychoPinnError(
                f"x is {tuple(seen.shape)}, this model takes (B, {channels}, {size}, {size}): move "
                "the channels of grouped data to the second axis (model_inputs does)"
            )
        groups = len(seen)
        place, scale = torch.as_tensor(positions).float(), torch.as_tensor(input_scale_factor)
        waves = torch.as_tensor(probe).to(torch.complex64)
        if place.shape != (groups, channels, 1, 2):
            raise PtychoPinnError(
                f"positions are {tuple(place.shape)}, not ({groups}, {channels}, 1, 2)"
            )
        if scale.shape != (groups,) or not (torch.isfinite(scale) & (scale > 0)).all():
            raise PtychoPinnError(f"input_scale_factor has to be {groups} numbers above 0")
        if waves.ndim not in (2, 3) or waves.shape[-2:] != (size, size):
            raise PtychoPinnError(f"the probe is {tuple(waves.shape)}, not (modes, {size}, {size})")
        if not all(
            torch.isfinite(torch.view_as_real(each) if each.is_complex() else each).all()
            for each in (seen, place, waves)
        ):
            raise PtychoPinnError("x, positions or probe hold NaN or infinity")
        if not waves.abs().any():
            raise PtychoPinnError("the probe is 0 everywhere")
        if place.mean(1).abs().max() > _MEAN_PX:
            raise PtychoPinnError(
                "the positions of a group do not add up to 0: give coords_relative, not positions "
                "on the sample"
            )
        amplitude = seen * scale.float()[:, None, None, None]
        return _Inputs(amplitude, waves.reshape(-1, size, size), scale.float())


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


def model_inputs(grouped: GroupedData) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """``x`` (B, C, N, N) and ``positions`` (B, C, 1, 2) of grouped data, for a model."""
    x = np.ascontiguousarray(np.moveaxis(grouped["X_full"], -1, 1))
    return x, grouped["coords_relative"].transpose(0, 3, 1, 2).astype(np.float32)
