"""Batched inference: counts and sub-pixel shifts in, object patches and stitching weights out.

Used by the reconstruct stage for every frame, and by anyone who wants patches without a daemon.
The canvas is an integer grid: the fraction of a position is put into the probe, not interpolated.
"""

from collections import deque
from concurrent.futures import Future
from dataclasses import dataclass
from queue import LifoQueue
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ptycho_stream.errors import ModelError
from ptycho_stream.networks.network import Network
from ptycho_stream.physics.probe import Probe
from ptycho_stream.reconstruct import devices
from ptycho_stream.reconstruct.collapse import Verdicts, judge, verdicts
from ptycho_stream.reconstruct.device_batches import DeviceBatches
from ptycho_stream.reconstruct.devices import on_device
from ptycho_stream.reconstruct.forward_pass import Beam, ForwardPass, Passed, prepared
from ptycho_stream.reconstruct.workers import Workers

_CPU_PASS_PX = 8 * 128 * 128
"""Pixels that a CPU takes through the network at a time: about what its caches hold."""

_BATCHES_AHEAD = 2
"""So many batches are begun before the oldest has to be done; bounds the memory."""


@dataclass(frozen=True, slots=True)
class Predicted:
    """Patches complex64 (B, N, N), their weights float32 (B, N, N), and whether they can be true.

    Both lie on the device that made them. Weights and patches that are not finite are 0, and the
    verdict says so.
    """

    patches: Tensor
    weights: Tensor
    verdicts: Verdicts


class Predictor:
    """A network bound to a probe and a device.

    On a CPU as many workers as torch has threads when this is made share the frames; their number
    does not change the result by a bit. They end with :meth:`close`, or with this object.

    Args:
        network: moved to ``device``; its weights are taken as they are now.
        probe: in the photons of the counts.
        device: where to compute.
        batch_size: most frames that are judged together and, on a GPU, in one pass of the network;
            rounded down to whole groups, but one group at least. Larger inputs are cut.
    """

    def __init__(
        self,
        network: Network,
        probe: Probe,
        device: torch.device | str = "cpu",
        batch_size: int = 16,
    ) -> None:
        if batch_size < 1:
            raise ModelError(f"the batch size is {batch_size}; it must be at least 1")
        self.probe = probe
        self.device = torch.device(device)
        self.group_frames = network.group_frames
        self.batch_size = max(batch_size // self.group_frames, 1) * self.group_frames
        network, dtype = prepared(network, self.device)
        self._beam = beam = Beam(probe, self.device)

        def forward() -> ForwardPass:
            return ForwardPass(network.inference(dtype), beam)

        on_host = devices.computes_on_host(self.device)
        self._workers = Workers(torch.get_num_threads() if on_host else 1)
        self._passes: LifoQueue[ForwardPass] = LifoQueue()
        self._on_device: DeviceBatches | None = None
        if on_host:
            for _ in range(self._workers.count):
                self._passes.put(forward())
        else:
            self._on_device = DeviceBatches(
                forward, self.batch_size, self.group_frames, probe.size_px, self.device
            )

    def close(self) -> None:
        """End the workers and let go of the device's memory; nothing can be predicted then."""
        self._workers.close()
        self._on_device = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def warm_up(self) -> None:
        """Give every worker something, so that the first frame of a scan waits for no set-up."""
        size = self.probe.size_px
        counts = np.zeros((self.batch_size, size, size), np.float32)
        self.predict(counts, np.zeros((self.batch_size, 2), np.float32))

    def predict(
        self,
        counts: NDArray[Any],
        shift_yx_px: NDArray[np.floating[Any]],
        valid: NDArray[np.bool_] | None = None,
    ) -> tuple[NDArray[np.complex64], NDArray[np.float32]]:
        """Reconstruct frames, many at a time.

        Args:
            counts: any real dtype (B, N, N), photons, zero frequency at [N // 2, N // 2].
                Negative and masked pixels may hold anything finite. Groups are successive frames.
            shift_yx_px: (B, 2), the part of the position that the patch's corner, a whole pixel,
                leaves over; about [-0.5, 0.5].
            valid: bool (N, N), the same order as ``counts``; None: every pixel is.

        Returns:
            (patches complex64 (B, N, N), weights float32 (B, N, N)); the weight is the shifted
            probe's intensity over the peak of the unshifted one, times the network's confidence.
            One frame does not tell the phase of its patch: it is chosen so that the weighted mean
            of the patch is real and positive.

        Raises:
            ModelError: the shapes do not fit each other or the probe, or a group is not whole.
        """
        found = self.predict_judged(counts, shift_yx_px, valid)
        return found.patches.numpy(force=True), found.weights.numpy(force=True)

    def predict_judged(
        self,
        counts: NDArray[Any],
        shift_yx_px: NDArray[np.floating[Any]],
        valid: NDArray[np.bool_] | None = None,
    ) -> Predicted:
        """Like :meth:`predict`, and judge whether the patches can be true."""
        self._check_shapes(counts, shift_yx_px)
        mask = self._mask(valid)
        shifts = np.ascontiguousarray(shift_yx_px, np.float32)
        with torch.inference_mode():
            empty = torch.where(mask[0], self._beam.empty, self._beam.empty.new_zeros(()))
            if self._on_device is not None:
                patches, weights, judged = self._on_device.run(counts, shifts, mask, empty)
                return Predicted(patches, weights, verdicts(judged))
        return self._by_workers(counts, torch.from_numpy(shifts), mask, empty)

    def _by_workers(
        self, counts: NDArray[Any], shifts: Tensor, mask: Tensor, empty: Tensor
    ) -> Predicted:
        patches = np.empty(counts.shape, np.complex64)
        weights = np.empty(counts.shape, np.float32)
        judged = np.empty((4, len(counts)), np.float32)
        begun: deque[tuple[slice, list[Future[Passed]]]] = deque()
        judging: list[Future[None]] = []
        for batch in _cut(0, len(counts), self.batch_size):
            parts = [
                self._workers.submit(
                    self._pass, counts[part], shifts[part], mask, patches[part], weights[part]
                )
                for part in _cut(batch.start, batch.stop, self._pass_frames(batch))
            ]
            begun.append((batch, parts))
            if len(begun) > _BATCHES_AHEAD:
                judging.append(self._begin_to_judge(*begun.popleft(), empty, judged))
        judging += [self._begin_to_judge(*one, empty, judged) for one in begun]
        for one in judging:
            one.result()
        found = verdicts(judged)
        if not found.finite.all():
            patches[~found.finite], weights[~found.finite] = 0, 0
        return Predicted(torch.from_numpy(patches), torch.from_numpy(weights), found)

    def _pass_frames(self, batch: slice) -> int:
        """How many frames of a batch go through the network at a time; whole groups."""
        frames = batch.stop - batch.start
        share = -(-frames // self._workers.count)
        # Even: for an odd one oneDNN takes other float32 convolutions, which round otherwise.
        frames = min(share + share % 2, max(_CPU_PASS_PX // self.probe.size_px**2, 1))
        return max(frames // self.group_frames, 1) * self.group_frames

    def _pass(
        self,
        counts: NDArray[Any],
        shifts: Tensor,
        mask: Tensor,
        patches: NDArray[np.complex64],
        weights: NDArray[np.float32],
    ) -> Passed:
        """Take frames through the network once, into ``patches`` and ``weights``."""
        forward = self._passes.get()
        try:
            with torch.inference_mode():
                passed = forward(corner_amplitude(counts), shifts, mask)
                patches[...], weights[...] = passed.patch.numpy(), passed.weight.numpy()
                return passed
        finally:
            self._passes.put(forward)

    def _begin_to_judge(
        self,
        batch: slice,
        parts: list[Future[Passed]],
        empty: Tensor,
        judged: NDArray[np.float32],
    ) -> Future[None]:
        """Have a batch judged as a whole when all of its parts are done."""
        done = [part.result() for part in parts]
        return self._workers.submit(_judge, done, empty, judged[:, batch])

    def _check_shapes(self, counts: NDArray[Any], shift_yx_px: NDArray[np.floating[Any]]) -> None:
        size = self.probe.size_px
        if counts.ndim != 3 or counts.shape[1:] != (size, size):
            raise ModelError(f"frames are {counts.shape}, the probe needs (B, {size}, {size})")
        if shift_yx_px.shape != (len(counts), 2):
            raise ModelError(
                f"{len(counts)} frames need ({len(counts)}, 2) shifts, not {shift_yx_px.shape}"
            )
        if len(counts) % self.group_frames:
            raise ModelError(
                f"{len(counts)} frames are no whole number of groups of {self.group_frames}, as "
                "this network takes them"
            )

    def _mask(self, valid: NDArray[np.bool_] | None) -> Tensor:
        size = self.probe.size_px
        if valid is None:
            return torch.ones((1, size, size), dtype=torch.bool, device=self.device)
        if valid.shape != (size, size):
            raise ModelError(f"the mask is {valid.shape}, the frames are ({size}, {size})")
        return on_device(np.fft.ifftshift(valid)[None], self.device)


def _cut(start: int, stop: int, most: int) -> list[slice]:
    """Slices of at most ``most`` from ``start`` to ``stop``."""
    return [slice(at, min(at + most, stop)) for at in range(start, stop, most)]


def _judge(parts: list[Passed], empty: Tensor, judged: NDArray[np.float32]) -> None:
    """Judge the patches of one batch, into ``judged`` (4, B)."""
    with torch.inference_mode():
        patch = torch.cat([part.patch for part in parts])
        power = torch.cat([part.power for part in parts])
        amplitude = torch.cat([part.amplitude for part in parts])
        judged[...] = judge(patch, power, amplitude, empty).numpy()


def corner_amplitude(counts: NDArray[Any]) -> Tensor:
    """Square root, float32, and zero frequency to [0, 0], in one pass over the counts."""
    size = counts.shape[-1]
    half = size // 2
    out = np.empty(counts.shape, np.float32)
    low, high = slice(0, half), slice(half, size)
    to_low, to_high = slice(0, size - half), slice(size - half, size)
    for source_y, target_y in ((high, to_low), (low, to_high)):
        for source_x, target_x in ((high, to_low), (low, to_high)):
            out[:, target_y, target_x] = counts[:, source_y, source_x]
    np.maximum(out, 0, out=out)
    return torch.as_tensor(np.sqrt(out, out=out))
