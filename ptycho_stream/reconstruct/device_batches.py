"""Batches through a network on a GPU, without waiting for it between them.

Counts go into pinned memory, a stream of its own copies them while the batch before is computed,
and the kernels of a batch are recorded once for each of a few batch sizes (CUDA graphs) and then
started as one; smaller batches are filled up with empty frames. Patches stay on the device. Without
CUDA there is nothing to pin, to overlap or to record, and all else is the same: so the tests run it
on a CPU.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import nullcontext
from itertools import cycle
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ptycho_stream.reconstruct.collapse import judge
from ptycho_stream.reconstruct.forward_pass import ForwardPass

_SLOTS = 3
"""Batches that are on their way to the device, or there, at a time."""

_log = logging.getLogger(__name__)


class _Inputs(NamedTuple):
    """A batch on the device: counts float32 (B, N, N), zero frequency in the middle; shifts
    (B, 2); which of the frames are real, bool (B,); valid pixels bool (1, N, N) and the empty beam
    float32 (N, N), zero frequency at [0, 0].
    """

    counts: Tensor
    shifts: Tensor
    real: Tensor
    valid: Tensor
    empty: Tensor


class _Outputs(NamedTuple):
    """Patches and weights (B, N, N), 0 where they are no numbers; verdicts (4, B)."""

    patch: Tensor
    weight: Tensor
    judged: Tensor


class DeviceBatches:
    """A network and a probe on a device.

    Args:
        forward: makes a pass of its own for each batch size.
        batch_size: most frames in a batch, whole groups.
        group_frames: of the network.
        size_px: N.
        device: where to compute.
    """

    def __init__(
        self,
        forward: Callable[[], ForwardPass],
        batch_size: int,
        group_frames: int,
        size_px: int,
        device: torch.device,
    ) -> None:
        self._forward = forward
        self._sizes = bucket_sizes(batch_size, group_frames)
        self._size_px = size_px
        self._device = device
        self._batches: dict[int, _Batch] = {}
        self._slots = cycle([_Slot((batch_size, size_px, size_px), device) for _ in range(_SLOTS)])
        self._pool = torch.cuda.graph_pool_handle() if device.type == "cuda" else None

    def run(
        self, counts: NDArray[Any], shift_yx_px: NDArray[np.float32], valid: Tensor, empty: Tensor
    ) -> tuple[Tensor, Tensor, NDArray[np.float32]]:
        """Take frames through the network, as many as there are.

        Args:
            counts: any real dtype (n, N, N), zero frequency in the middle.
            shift_yx_px: (n, 2).
            valid: bool (1, N, N), on the device, zero frequency at [0, 0].
            empty: float32 (N, N), on the device: the beam's amplitude, 0 where not valid.

        Returns:
            Patches complex64 and weights float32 (n, N, N), on the device, 0 where they are no
            numbers, and what ``judge`` found (4, n).
        """
        shape = (len(counts), self._size_px, self._size_px)
        patches = torch.empty(shape, dtype=torch.complex64, device=self._device)
        weights = torch.empty(shape, device=self._device)
        judged = torch.empty((4, len(counts)), device=self._device)
        on_cuda = self._device.type == "cuda"
        with torch.cuda.device(self._device) if on_cuda else nullcontext():
            for start in range(0, len(counts), self._sizes[-1]):
                part = slice(start, min(start + self._sizes[-1], len(counts)))
                length = part.stop - part.start
                slot = next(self._slots)
                slot.fill(counts[part], shift_yx_px[part])
                found = self._batch(length).run(slot, length, valid, empty)
                patches[part], weights[part] = found.patch[:length], found.weight[:length]
                judged[:, part] = found.judged[:, :length]
            return patches, weights, judged.cpu().numpy()  # the only wait for the device

    def _batch(self, frames: int) -> _Batch:
        size = next(size for size in self._sizes if size >= frames)
        if size not in self._batches:
            self._batches[size] = _Batch(
                self._forward(), size, self._size_px, self._device, self._pool
            )
        return self._batches[size]


def bucket_sizes(most: int, group_frames: int) -> list[int]:
    """Batch sizes that are computed: one group, then twice as many, and so on, and the largest."""
    sizes = [group_frames]
    while 2 * sizes[-1] < most:
        sizes.append(2 * sizes[-1])
    return sizes if sizes[-1] == most else [*sizes, most]


class _Slot:
    """Room for a batch on its way: pinned on the host, and beside it on the device."""

    def __init__(self, shape: tuple[int, int, int], device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._counts = torch.zeros(shape, pin_memory=self._cuda)
        self._shifts = torch.zeros((shape[0], 2), pin_memory=self._cuda)
        self.counts = torch.zeros(shape, device=device)
        self.shifts = torch.zeros((shape[0], 2), device=device)
        if self._cuda:
            self._stream = torch.cuda.Stream(device)
            self._copied, self._used = torch.cuda.Event(), torch.cuda.Event()

    def fill(self, counts: NDArray[Any], shifts: NDArray[np.float32]) -> None:
        """Begin to copy a batch; the rest of the slot keeps what it held."""
        if self._cuda:
            self._copied.synchronize()  # of the batch before the last two: done for long
        length = len(counts)
        np.copyto(self._counts[:length].numpy(), counts, casting="unsafe")
        np.copyto(self._shifts[:length].numpy(), shifts)
        if not self._cuda:
            self._copy(length)
            return
        self._stream.wait_event(self._used)
        with torch.cuda.stream(self._stream):
            self._copy(length)
            self._copied.record()

    def _copy(self, length: int) -> None:
        self.counts[:length].copy_(self._counts[:length], non_blocking=True)
        self.shifts[:length].copy_(self._shifts[:length], non_blocking=True)

    def wait(self) -> None:
        """Let what the device does next begin when the copy has arrived."""
        if self._cuda:
            torch.cuda.current_stream().wait_event(self._copied)

    def release(self) -> None:
        """Let the next batch come when the device has done what it was told until now."""
        if self._cuda:
            self._used.record()


class _Batch:
    """A batch of one size: eager the first time, recorded the second, then played.

    Args:
        forward: of its own, since what is recorded holds on to the memory that it used.
        frames: in the batch.
        size_px: N.
        device: where to compute.
        pool: memory that recordings share, as torch has it; None: nothing is recorded.
    """

    def __init__(
        self,
        forward: ForwardPass,
        frames: int,
        size_px: int,
        device: torch.device,
        pool: Any,
    ) -> None:
        self._forward = forward
        self._frames = frames
        self._pool = pool
        self._runs = 0
        self._graph: torch.cuda.CUDAGraph | None = None
        self._outputs: _Outputs | None = None
        self._inputs = _Inputs(
            torch.zeros((frames, size_px, size_px), device=device),
            torch.zeros((frames, 2), device=device),
            torch.zeros(frames, dtype=torch.bool, device=device),
            torch.ones((1, size_px, size_px), dtype=torch.bool, device=device),
            torch.zeros((size_px, size_px), device=device),
        )

    def run(self, slot: _Slot, length: int, valid: Tensor, empty: Tensor) -> _Outputs:
        """Compute the first ``length`` frames of a slot; the next batch overwrites the answer."""
        inputs = self._inputs
        slot.wait()
        inputs.counts[:length].copy_(slot.counts[:length])
        inputs.shifts[:length].copy_(slot.shifts[:length])
        slot.release()
        inputs.counts[length:].zero_()
        inputs.shifts[length:].zero_()
        inputs.real[:length].fill_(True)
        inputs.real[length:].fill_(False)
        inputs.valid.copy_(valid)
        inputs.empty.copy_(empty)
        self._runs += 1
        if self._runs == 2 and self._pool is not None:
            self._record()
        if self._graph is None or self._outputs is None:
            return self._compute()
        self._graph.replay()
        return self._outputs

    def _record(self) -> None:
        """Record the kernels; if that fails they are started one by one, as the first time."""
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, self._pool, capture_error_mode="thread_local"):
                self._outputs = self._compute()
        except RuntimeError as error:
            reason = str(error).splitlines()[0]
            _log.warning("batches of %d are not recorded, slower: %s", self._frames, reason)
            return
        self._graph = graph

    def _compute(self) -> _Outputs:
        counts, shifts, real, valid, empty = self._inputs
        amplitude = torch.fft.ifftshift(counts, dim=(-2, -1)).clamp_min(0).sqrt()
        patch, weight, power, amplitude = self._forward(amplitude, shifts, valid)
        judged = judge(patch, power, amplitude, empty, real)
        finite = (judged[0] > 0)[:, None, None]
        return _Outputs(
            torch.where(finite, patch, patch.new_zeros(())),
            torch.where(finite, weight, weight.new_zeros(())),
            judged,
        )
