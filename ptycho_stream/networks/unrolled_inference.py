"""The unrolled network's forward pass for inference: the same answer with less traffic in memory.

No gradients are kept, so everything happens in place in buffers that outlive a call (fresh memory
costs more page faults than the arithmetic costs time), weights are cast and ordered once, and the
residual streams of the CNN stay in the precision of its convolutions. The predictor's workers use
it; ``UnrolledNetwork.stages`` is the readable, differentiable form, and tests compare the two.
"""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from ptycho_stream.networks.network import Prediction, check_shapes
from ptycho_stream.physics.forward import mode_sum
from ptycho_stream.physics.fourier import fft2_ortho, ifft2_ortho

if TYPE_CHECKING:
    from ptycho_stream.networks.unrolled import Corrector, UnrolledNetwork

_SEEN = 20
"""Channels that a CNN is shown besides its memory: 5 of the object, at four pixels each."""

_ORDER = [
    5 * pixel + part for parts in ((0, 1), (2, 3), (4,)) for pixel in range(4) for part in parts
]
"""Where the network's channels (pixel by pixel) are in ours: estimate, update, probe."""

_Layer = Callable[[Tensor], Tensor]


class UnrolledInference:
    """What :meth:`UnrolledNetwork.inference` gives; for one thread at a time.

    Views are made once, too: every call into torch lets go of the interpreter's lock, and threads
    side by side wait for each other as often as they take it back.

    Args:
        network: its weights are copied as they are now.
        dtype: of the convolutions, float32 or bfloat16.
    """

    def __init__(self, network: UnrolledNetwork, dtype: torch.dtype) -> None:
        settings = network.settings
        self._dtype = dtype
        self._steps = settings.steps
        self._channels = (_SEEN + settings.memory, _SEEN + settings.channels[0])
        self._half_floor = network.step_size.new_tensor(network.intensity_floor / 2)
        self._noise = deepcopy(network.noise)
        with torch.no_grad():
            self._step_size = network.step_size.detach().clone()[:, :, None, None]
            self._damping = network.damping.detach().clone()[:, None, None]
            self._momentum = cast("list[list[float]]", network.momentum.tolist())
            self._correctors = [_CorrectorLayers(one, dtype) for one in network.each_corrector()]
            enter, leave = (cast("nn.Conv2d", network.confidence[index]) for index in (0, 2))
            self._confidence_in = _convolution(enter, dtype, reordered=True)
            self._confidence_out = _convolution(leave, dtype)
        self._space: _Workspace | None = None

    def __call__(self, amplitude: Tensor, probe: Tensor, valid: Tensor) -> Prediction:
        """Like the network's ``forward``; see :meth:`Network.inference`."""
        check_shapes(amplitude, probe, valid)
        space = self._workspace(amplitude, probe)
        power = mode_sum(probe)
        peak = power.amax((-2, -1), keepdim=True).clamp_min(1e-30)
        noise = self._noise(power.mean((-2, -1)).clamp_min(1e-30), peak[:, 0, 0])
        # In double: torch rounds a function of a few numbers by their place in the batch.
        exact = noise[:, :, : self._steps + 1].double()
        sizes = (self._step_size * exact[:, :, :-1].exp().float()).unbind(1)
        damping = torch.sigmoid(self._damping + exact[:, :, -1]).float().unbind(1)
        biases = noise[:, :, self._steps + 1 :, 0, 0].to(self._dtype).unbind(1)
        power.div_(peak)
        torch.div(probe, peak.sqrt().unsqueeze(1), out=space.probe)
        torch.mul(space.probe.conj(), 1, out=space.conj)
        minus_valid = valid.float().neg_()
        torch.mul(amplitude, peak.rsqrt(), out=space.amplitude).masked_fill_(~valid, 0)
        space.fold_power(power)
        space.memory.zero_()
        space.obj.fill_(1)
        features = space.seen
        for row, corrector in enumerate(self._correctors):
            space.damp(power, damping[row])
            self._project(space, minus_valid, sizes[row].unbind(1), self._momentum[row])
            space.fold(space.seen_quads)
            out, features = corrector(space.seen_planes, biases[row])
            space.correct(out)
        space.damp(power, damping[-1])
        self._project(space, minus_valid, sizes[-1].unbind(1), self._momentum[-1])
        space.fold(space.known_quads)
        space.features.copy_(features)
        hidden = functional.silu(self._confidence_in(space.known_planes), inplace=True)
        logit = functional.pixel_shuffle(self._confidence_out(hidden).float(), 2)
        return Prediction(space.obj.clone(), torch.sigmoid_(logit.squeeze(1)))

    def _workspace(self, amplitude: Tensor, probe: Tensor) -> _Workspace:
        shape = (len(amplitude), len(probe), probe.shape[1], amplitude.shape[-1])
        if self._space is None or self._space.shape != shape:
            self._space = None  # first, so that two are never held
            self._space = _Workspace(shape, self._channels, self._dtype, amplitude.device)
        return self._space

    def _project(
        self,
        space: _Workspace,
        minus_valid: Tensor,
        sizes: tuple[Tensor, ...],
        momenta: list[float],
    ) -> None:
        """The modulus projections of a stage: moves ``space.obj``, leaves ``space.change``."""
        for step, (size, momentum) in enumerate(zip(sizes, momenta, strict=True)):
            last = step == len(sizes) - 1
            waves = fft2_ortho(torch.mul(space.probe, space.each_obj, out=space.waves))
            ratio = space.intensity(waves, self._half_floor).rsqrt_()
            # A / sqrt(I) - 1 where valid, and 0 elsewhere.
            torch.addcmul(minus_valid, space.amplitude, ratio, out=ratio)
            if not last:  # a CNN is shown the last change as it is before its step size
                ratio.mul_(size)
            change = ifft2_ortho(waves.mul_(space.each_ratio)).unbind(1)
            if last:
                space.add_modes(change, space.change, fresh=True)
                if step:
                    space.obj_parts.add_(space.velocity_parts, alpha=momentum)
                space.obj_parts.addcmul_(space.change_parts, size.unsqueeze(-1))
            else:
                if step:
                    space.velocity_parts.mul_(momentum)
                space.add_modes(change, space.velocity, fresh=step == 0)
                space.obj_parts.add_(space.velocity_parts)


class _Workspace:
    """The buffers of one shape (frames, frames or 1 of the probe, modes, N), and views of them.

    Attributes:
        obj, velocity, change: complex64 (B, N, N); their ``_parts`` are real (B, N, N, 2).
        waves: complex64 (B, modes, N, N); probe and conj: the same, or (1, modes, N, N).
        amplitude: float32 (B, N, N), 0 where invalid.
        seen, known: (B, N/2, N/2, channels), what the CNNs and the confidence are shown; their
            ends are ``memory`` and ``features``; their ``_planes`` have the channels first.
    """

    def __init__(
        self,
        shape: tuple[int, int, int, int],
        channels: tuple[int, int],
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.shape = shape
        frames, probes, modes, size = shape
        half = size // 2

        def empty(*lengths: int, of: torch.dtype = torch.float32) -> Tensor:
            return torch.empty(lengths, dtype=of, device=device)

        self.obj, self.velocity, self.change = (
            empty(frames, size, size, of=torch.complex64) for _ in range(3)
        )
        self.obj_parts, self.velocity_parts, self.change_parts = (
            torch.view_as_real(one) for one in (self.obj, self.velocity, self.change)
        )
        self.each_obj = self.obj.unsqueeze(1)
        self.waves = empty(frames, modes, size, size, of=torch.complex64)
        self.probe = empty(probes, modes, size, size, of=torch.complex64)
        self.conj, self._back = torch.empty_like(self.probe), torch.empty_like(self.probe)
        self._back_modes = self._back.unbind(1)
        self._gain = empty(probes, size, size)
        self._each_gain = self._gain.unsqueeze(1)
        self.amplitude = empty(frames, size, size)
        self._square = empty(frames, size, size, 2)
        self._squares = self._square.unbind(-1)
        self._sum = empty(frames, size, size)
        self.each_ratio = self._sum.unsqueeze(1)
        # Rows of whole quads, whatever the number of channels.
        self.seen, self.known = (
            empty(frames, half, half, -(-count // 4) * 4, of=dtype)[..., :count]
            for count in channels
        )
        self.seen_planes, self.known_planes = _planes(self.seen), _planes(self.known)
        self.seen_quads, self.known_quads = (
            _quads(shown[..., :16]).unbind(-1) for shown in (self.seen, self.known)
        )
        self.memory, self.features = self.seen[..., _SEEN:], self.known[..., _SEEN:]
        self._pairs = empty(frames, size, size, 2, of=dtype)
        quads = _quads(self._pairs.view(frames, size, half, 4))[..., 0]
        self._quad_rows = (quads[:, 0::2], quads[:, 1::2])

    def damp(self, power: Tensor, damping: Tensor) -> None:
        """Prepare the way back to the object: P* / ((1 - damping) |P|^2 + damping)."""
        torch.mul(power, 1 - damping, out=self._gain).add_(damping).reciprocal_()
        torch.mul(self.conj, self._each_gain, out=self._back)

    def intensity(self, waves: Tensor, half_floor: Tensor) -> Tensor:
        """Sum of |psi|^2 over the modes, and twice ``half_floor``: (B, N, N)."""
        first, *others = torch.view_as_real(waves).unbind(1)
        torch.addcmul(half_floor, first, first, out=self._square)
        for other in others:
            self._square.addcmul_(other, other)
        return torch.add(*self._squares, out=self._sum)

    def add_modes(self, change: tuple[Tensor, ...], total: Tensor, fresh: bool) -> None:
        """Bring changes (B, N, N) of the waves back to the object and sum them up in ``total``."""
        for back, one in zip(self._back_modes, change, strict=True):
            if fresh:
                torch.mul(back, one, out=total)
            else:
                total.addcmul_(back, one)
            fresh = False

    def fold_power(self, power: Tensor) -> None:
        """Show the probe's intensity (B|1, N, N); it stays for all stages."""
        for shown in (self.seen, self.known):
            for pixel in range(4):
                shown[..., 16 + pixel] = power[:, pixel // 2 :: 2, pixel % 2 :: 2]

    def fold(self, quads: tuple[Tensor, ...]) -> None:
        """Show the estimate and the last change, as they are now."""
        for first, parts in ((0, self.obj_parts), (2, self.change_parts)):
            self._pairs.copy_(parts)
            for row in range(2):
                quads[first + row].copy_(self._quad_rows[row])

    def correct(self, out: Tensor) -> None:
        """Add a CNN's answer (B, N/2, N/2, 8 and more) to the estimate; the rest is its memory."""
        self.memory.copy_(out[..., 8:])
        quads = _quads(out if out.shape[-1] % 4 == 0 else out[..., :8].contiguous())
        for row in range(2):
            self._quad_rows[row].copy_(quads[..., row])
        self.obj_parts.add_(self._pairs)


def _quads(x: Tensor) -> Tensor:
    """(..., 4 C) seen as (..., C): Re and Im of two neighbours then move as one number, fast."""
    return x.view(torch.int64 if x.itemsize == 2 else torch.complex128)


class _CorrectorLayers:
    """The CNN of one stage; features lie channels-last."""

    def __init__(self, corrector: Corrector, dtype: torch.dtype) -> None:
        self.enter = _convolution(corrector.enter, dtype, reordered=True)
        self.fine_in = _convolution(corrector.fine_in.conv, dtype)
        self.down1 = _convolution(corrector.down1, dtype)
        self.middle_in = _convolution(corrector.middle_in.conv, dtype)
        self.down2 = _convolution(corrector.down2, dtype)
        self.coarse = [_convolution(block.conv, dtype) for block in corrector.coarse_blocks()]
        self.up2 = _transposed(corrector.up2, dtype)
        self.middle_out = _convolution(corrector.middle_out.conv, dtype)
        self.up1 = _transposed(corrector.up1, dtype)
        self.fine_out = _convolution(corrector.fine_out.conv, dtype)
        self.leave = _convolution(corrector.leave, dtype)

    def __call__(self, seen: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        """(B, channels, N/2, N/2) and (B, fine) to the answer and the features, channels last."""
        fine = self.enter(seen)
        # A row of pixels at a time: a broadcast over single pixels is ten times slower.
        frames, channels, height, width = fine.shape
        rows = fine.permute(0, 2, 3, 1).view(frames, height, width * channels)
        rows.add_(bias.repeat(1, width).unsqueeze(1))
        fine = _block(self.fine_in, functional.silu(fine, inplace=True))
        middle = _block(self.middle_in, functional.silu(self.down1(fine), inplace=True))
        coarse = functional.silu(self.down2(middle), inplace=True)
        for convolution in self.coarse:
            coarse = _block(convolution, coarse)
        middle = _block(self.middle_out, middle.add_(self.up2(coarse)))
        fine = _block(self.fine_out, fine.add_(self.up1(middle)))
        return self.leave(fine).permute(0, 2, 3, 1), fine.permute(0, 2, 3, 1)


def _block(convolution: _Layer, x: Tensor) -> Tensor:
    return x.add_(functional.silu(convolution(x), inplace=True))


def _planes(x: Tensor) -> Tensor:
    """(B, H, W, C) to (B, C, H, W) in channels-last memory."""
    return x.permute(0, 3, 1, 2)


def _convolution(layer: nn.Conv2d, dtype: torch.dtype, reordered: bool = False) -> _Layer:
    """The layer with weights of its own; ``reordered``: for input channels of our order."""
    weight = layer.weight.detach()
    if reordered:
        weight = weight[:, [*_ORDER, *range(_SEEN, weight.shape[1])]]
    weight, bias = _cast(weight, layer.bias, dtype)
    stride, padding = cast("int", layer.stride), cast("int", layer.padding)
    return lambda x: functional.conv2d(x, weight, bias, stride, padding)


def _transposed(layer: nn.ConvTranspose2d, dtype: torch.dtype) -> _Layer:
    weight, bias = _cast(layer.weight.detach(), layer.bias, dtype)
    stride = cast("int", layer.stride)
    return lambda x: functional.conv_transpose2d(x, weight, bias, stride)


def _cast(weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    assert bias is not None
    copied = weight.to(dtype, memory_format=torch.channels_last, copy=True)
    return copied, bias.detach().to(dtype, copy=True)
