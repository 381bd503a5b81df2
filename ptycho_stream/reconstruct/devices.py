"""What the reconstruction asks of a device, and how numbers get there."""

from __future__ import annotations

from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


def computes_on_host(device: torch.device) -> bool:
    """Whether patches are made and added by worker threads in the host's memory.

    Otherwise they stay on the device: :mod:`~ptycho_stream.reconstruct.device_batches` makes them,
    :mod:`~ptycho_stream.reconstruct.device_canvas` adds them.
    """
    return device.type == "cpu"


def on_device(values: NDArray[Any] | Tensor, device: torch.device) -> Tensor:
    """Values on a device, copied without waiting for what the device is doing."""
    held = values if isinstance(values, Tensor) else torch.from_numpy(np.ascontiguousarray(values))
    to_gpu = device.type == "cuda"
    if to_gpu and held.device.type == "cpu":
        held = held.pin_memory()
    return held.to(device, non_blocking=to_gpu)


def has_bfloat16(device: torch.device) -> bool:
    """Whether the device multiplies in bfloat16; elsewhere it is emulated, and slow."""
    if device.type == "cuda":
        # torch's own answer takes emulation, which its convolutions do not have, for support.
        return bool(torch.version.hip) or torch.cuda.get_device_capability(device) >= (8, 0)
    told = getattr(torch.cpu, "get_capabilities", None)  # not in the oldest torch we take
    known = cast("dict[str, Any]", told()) if told is not None else {}
    return bool(known.get("avx512_bf16") or known.get("amx_bf16"))
