"""Batches through a network on a GPU, without waiting for it between them.

Counts go into pinned memory, a second stream copies them while the batch before is computed, and
the kernels of a batch are recorded once for each of a few batch sizes (CUDA graphs) and then
started as one; smaller batches are filled up with empty frames. Patches stay on the device. Without
CUDA there is nothing to pin, to overlap or to record, and all else is the same: so the tests run it
on a CPU.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
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
        self._size_px = size_px
        self._device = device
        recorder = _Recorder(device) if device.type == "cuda" else None
        sizes = bucket_sizes(batch_size, group_frames)
        self._batches = [_Batch(forward(), size, size_px, device, recorder) for size in sizes]
        with self._in_use():
            self._copying = torch.cuda.Stream(device) if recorder else None
            slots = [_Slot((batch_size, size_px, size_px), device) for _ in range(_SLOTS)]
        self._slots = cycle(slots)

    def _in_use(self) -> AbstractContextManager[object]:
        """Makes the device the current one."""
        return torch.cuda.device(self._device) if self._device.type == "cuda" else nullcontext()

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
        most = self._batches[-1].frames
        with self._in_use():
            for start in range(0, len(counts), most):
                part = slice(start, start + most)
                length = len(counts[part])
                batch = next(batch for batch in self._batches if batch.frames >= length)
                slot = next(self._slots)
                slot.fill(counts[part], shift_yx_px[part], self._copying)
                found = batch.run(slot, length, valid, empty)
                patches[part], weights[part] = found.patch[:length], found.weight[:length]
                judged[:, part] = found.judged[:, :length]
            return patches, weights, judged.cpu().numpy()  # the only wait for the device


def bucket_sizes(most: int, group_frames: int) -> list[int]:
    """Batch sizes that are computed: one group, four, sixteen and so on, and the largest.

    Each holds memory of its own and is recorded by itself; empty frames cost a GPU little.
    """
    sizes = [group_frames]
    while 4 * sizes[-1] < most:
        sizes.append(4 * sizes[-1])
    return sizes if sizes[-1] == most else [*sizes, most]


class _Slot:
    """Room for a batch on its way: pinned on the host, and beside it on the device.

    To be made and used while the device is the current one.
    """

    def __init__(self, shape: tuple[int, int, int], device: torch.device) -> None:
        cuda = device.type == "cuda"
        self._counts = torch.empty(shape, pin_memory=cuda)
        self._shifts = torch.empty((shape[0], 2), pin_memory=cuda)
        self.counts = torch.empty(shape, device=device)
        self.shifts = torch.empty((shape[0], 2), device=device)
        self._copied, self._used = (torch.cuda.Event() if cuda else None for _ in range(2))
        self.release()  # what used this memory before has to be over, too

    def fill(
        self,
        counts: NDArray[Any],
        shifts: NDArray[np.float32],
        stream: torch.cuda.Stream | None,
    ) -> None:
        """Begin to copy a batch, on ``stream``; the rest of the slot is left as it is."""
        if self._copied is not None:
            self._copied.synchronize()  # of the batch before the last two: done for long
        length = len(counts)
        np.copyto(self._counts[:length].numpy(), counts, casting="unsafe")
        np.copyto(self._shifts[:length].numpy(), shifts)
        if stream is None or self._copied is None or self._used is None:
            self._copy(length)
            return
        stream.wait_event(self._used)
        with torch.cuda.stream(stream):
            self._copy(length)
            self._copied.record()

    def _copy(self, length: int) -> None:
        self.counts[:length].copy_(self._counts[:length], non_blocking=True)
        self.shifts[:length].copy_(self._shifts[:length], non_blocking=True)

    def wait(self) -> None:
        """Let what the device does next begin when the copy has arrived."""
        if self._copied is not None:
            torch.cuda.current_stream().wait_event(self._copied)

    def release(self) -> None:
        """Let the next batch come when the device has done what it was told until now."""
        if self._used is not None:
            self._used.record()


class _Recorder:
    """Records kernels of one device, with memory that the recordings share.

    When one fails, nothing more is recorded.
    """

    def __init__(self, device: torch.device) -> None:
        # Torch's own stream for this is that of the device on which the process recorded first.
        self._stream = torch.cuda.Stream(device)
        self._pool = torch.cuda.graph_pool_handle()
        self._works = True

    def record(self, compute: Callable[[], _Outputs]) -> _Recording | None:
        """What ``compute`` tells the device, to be played again; it must have run before."""
        if not self._works:
            return None
        graph, stream = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
        try:
            with torch.cuda.graph(
                graph, self._pool, stream=self._stream, capture_error_mode="thread_local"
            ):
                outputs = compute()
        except RuntimeError as error:
            self._works = False
            torch.cuda.set_stream(stream)  # torch stays on the other one where the end fails
            reason = str(error.__context__ or error).splitlines()[0]
            _log.warning("kernels are started one by one, which is slower: %s", reason)
            return None
        return _Recording(graph, outputs)


class _Recording(NamedTuple):
    """Recorded kernels, and what they write."""

    graph: torch.cuda.CUDAGraph
    outputs: _Outputs


class _Batch:
    """A batch of one size: its kernels are started one by one the first time, then played.

    Args:
        forward: of its own, since what is recorded holds on to the memory that it used.
        frames: in the batch.
        size_px: N.
        device: where to compute.
        recorder: None: nothing is recorded.
    """

    def __init__(
        self,
        forward: ForwardPass,
        frames: int,
        size_px: int,
        device: torch.device,
        recorder: _Recorder | None,
    ) -> None:
        self.frames = frames
        self._forward = forward
        self._recorder = recorder
        self._recording: _Recording | None = None
        shape = (frames, size_px, size_px)
        self._inputs = _Inputs(
            torch.empty(shape, device=device),
            torch.empty((frames, 2), device=device),
            torch.empty(frames, dtype=torch.bool, device=device),
            torch.empty((1, *shape[1:]), dtype=torch.bool, device=device),
            torch.empty(shape[1:], device=device),
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
        if self._recording is not None:
            self._recording.graph.replay()
            return self._recording.outputs
        outputs = self._compute()
        if self._recorder is not None:
            self._recording = self._recorder.record(self._compute)
        return outputs

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
