"""What a model is given, checked: shapes, channels, relative positions, photons.

Each of these was once handed over in another order, sign or unit and gave an image all the same.
Used by ``model``.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ptycho_stream.errors import PtychoPinnError
from ptycho_stream.ptychopinn.config import ModelConfig
from ptycho_stream.ptychopinn.raw_data import GroupedData

Array = Tensor | NDArray[Any]

_MOST_OFF = 10.0
"""Factor by which the photons of a call's mean frame may differ from the model's."""

_MEAN_PX = 0.01
"""Relative positions of a group add up to 0; float32 loses no more than this of them."""


class Inputs(NamedTuple):
    """A model's input.

    Attributes:
        amplitude: float32 (B, C, N, N), root of photons, 0 where bad, zero frequency at N // 2.
        probe: complex64 (modes, N, N), in any unit.
        valid: bool (N, N), zero frequency at N // 2.
    """

    amplitude: Tensor
    probe: Tensor
    valid: Tensor


def model_inputs(grouped: GroupedData) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """``x`` (B, C, N, N) and ``positions`` (B, C, 1, 2) of grouped data, for a model."""
    x = np.ascontiguousarray(np.moveaxis(grouped["X_full"], -1, 1))
    return x, grouped["coords_relative"].transpose(0, 3, 1, 2).astype(np.float32)


def checked_inputs(
    x: Array,
    positions: Array,
    probe: Array,
    input_scale_factor: Array,
    valid: NDArray[np.bool_] | None,
    *,
    model: ModelConfig,
    nphotons: float,
) -> Inputs:
    """The arguments of a model's functions, if they are what they have to be.

    Args:
        x: see :meth:`~ptycho_stream.ptychopinn.model.PtychoModel.diffraction_to_obj`.
        positions: likewise.
        probe: likewise.
        input_scale_factor: likewise.
        valid: likewise.
        model: whose input this is.
        nphotons: of a mean frame that it is for.

    Raises:
        PtychoPinnError: one is not.
    """
    channels, size = model.gridsize**2, model.N
    seen = torch.as_tensor(x).float()
    if seen.ndim != 4 or seen.shape[1:] != (channels, size, size):
        raise PtychoPinnError(
            f"x is {tuple(seen.shape)}, this model takes (B, {channels}, {size}, {size}): move "
            "the channels of grouped data to the second axis (model_inputs does)"
        )
    groups = len(seen)
    _check_positions(torch.as_tensor(positions).float(), (groups, channels, 1, 2))
    scale = torch.as_tensor(input_scale_factor).float()
    if scale.shape != (groups,) or not (torch.isfinite(scale) & (scale > 0)).all():
        raise PtychoPinnError(f"input_scale_factor has to be {groups} finite numbers above 0")
    mask = _mask(valid, size)
    amplitude = torch.where(mask, seen * scale[:, None, None, None], 0.0)
    if not torch.isfinite(amplitude).all():
        raise PtychoPinnError("x holds NaN or infinity: mark such pixels in valid")
    found = float(amplitude.square().sum((-2, -1), dtype=torch.float64).mean())
    if not nphotons / _MOST_OFF < found < nphotons * _MOST_OFF:
        raise PtychoPinnError(
            f"x times input_scale_factor has {found:.4g} photons in a frame on average, this "
            f"model's frames have {nphotons:.4g}: give X_full and bundle.input_scale_factor"
        )
    return Inputs(amplitude, _probe(probe, size), mask)


def _check_positions(positions: Tensor, shape: tuple[int, ...]) -> None:
    if positions.shape != shape:
        raise PtychoPinnError(f"positions are {tuple(positions.shape)}, not {shape}")
    if not torch.isfinite(positions).all():
        raise PtychoPinnError("positions hold NaN or infinity: leave such groups out")
    if positions.mean(1).abs().max() > _MEAN_PX:
        raise PtychoPinnError(
            "the positions of a group do not add up to 0: give coords_relative, not positions "
            "on the sample"
        )


def _probe(probe: Array, size: int) -> Tensor:
    waves = torch.as_tensor(probe).to(torch.complex64)
    if waves.ndim not in (2, 3) or waves.shape[-2:] != (size, size):
        raise PtychoPinnError(f"the probe is {tuple(waves.shape)}, not (modes, {size}, {size})")
    if not torch.isfinite(waves).all() or not waves.abs().any():
        raise PtychoPinnError("the probe holds NaN or infinity, or is 0 everywhere")
    return waves.reshape(-1, size, size)


def _mask(valid: NDArray[np.bool_] | None, size: int) -> Tensor:
    mask = np.ones((size, size), bool) if valid is None else np.asarray(valid)
    if mask.shape != (size, size) or mask.dtype.kind != "b":
        raise PtychoPinnError(f"valid is {mask.dtype} {mask.shape}, not bool ({size}, {size})")
    return torch.as_tensor(mask)
