"""The PtychoPINN encoder-decoder: amplitudes of a group of frames in, their object patches out.

For people who have, or want, a plain convolutional network of this kind (Hoidn, Mishra & Mehta,
Scientific Reports 13, 22789, 2023). It does not see the probe, so it must be trained for the one
it serves. Used by training and by the predictor, behind the same face as the unrolled network.
"""

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from itertools import pairwise
from typing import Any, Literal, Self, cast, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional

from ptycho_stream.errors import ModelError
from ptycho_stream.networks.network import SIZE_MULTIPLE_PX, Network, Prediction

AmpActivation = Literal["sigmoid", "swish", "softplus", "relu"]

_COARSEST_PX = 8
"""The encoder halves the frame until the next halving would leave less than this."""

_MAX_LEVELS = 5
"""Frames are a multiple of 2^5 pixels, so that so many halvings always come out even."""

_COARSEST_FILTERS = 128
"""Filters at the coarsest level, in units of ``n_filters_scale``; each finer level has half."""

_START_AMPLITUDE = 0.9
"""Modulus of an untrained network's patches: most of a sample lets most of the beam through."""

_START_SPREAD = 0.05
"""About the pixel-to-pixel variation of an untrained network's output before its activation."""

_ACTIVATIONS: dict[AmpActivation, tuple[Callable[[Tensor], Tensor], float]] = {
    # The bias that makes the amplitude start at _START_AMPLITUDE.
    "sigmoid": (torch.sigmoid, math.log(_START_AMPLITUDE / (1 - _START_AMPLITUDE))),
    "swish": (functional.silu, 1.1773),
    "softplus": (functional.softplus, math.log(math.expm1(_START_AMPLITUDE))),
    "relu": (torch.relu, _START_AMPLITUDE),
}

_LOG_ERROR_RANGE = 5.0
"""The confidence head's log error stays so close to that of
``network.CONFIDENCE_ERROR``, where it starts."""


@dataclass(frozen=True)
class CnnSettings:
    """Shape of the network; written to the model's manifest as JSON.

    Attributes:
        size_px: N; the number of levels follows from it: 3 at 64, 4 at 128, 5 at 256.
        gridsize: frames are taken in groups of its square.
        n_filters_scale: factor on the filters of every layer; 2 at N = 64 are 2.33 M weights.
        amp_activation: makes the amplitude; ``sigmoid`` keeps it below 1.
        confidence: whether a head of its own predicts the error of each pixel.
        probe_center_yx_px: how far from the window's centre the centre of intensity of the probe
            lay that the model was trained with, if its patches are relative to the window, as
            those of foreign models are; (0, 0): they are relative to the centre of intensity.
    """

    size_px: int = 64
    gridsize: int = 1
    n_filters_scale: int = 2
    amp_activation: AmpActivation = "sigmoid"
    confidence: bool = False
    probe_center_yx_px: tuple[float, float] = (0.0, 0.0)

    def __post_init__(self) -> None:
        for name in ("size_px", "gridsize", "n_filters_scale"):
            value: object = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ModelError(f"cnn setting {name} needs a positive integer, got {value!r}")
        if self.size_px % SIZE_MULTIPLE_PX:
            raise ModelError(
                f"cnn setting size_px needs a multiple of {SIZE_MULTIPLE_PX}, got {self.size_px}"
            )
        known = get_args(AmpActivation)
        if self.amp_activation not in known:
            raise ModelError(
                f"cnn setting amp_activation is one of {known}, not {self.amp_activation!r}"
            )
        if not isinstance(cast("object", self.confidence), bool):
            raise ModelError(f"cnn setting confidence is true or false, not {self.confidence!r}")
        center = self.probe_center_yx_px
        if len(center) != 2 or not all(math.isfinite(value) for value in center):
            raise ModelError(f"cnn setting probe_center_yx_px needs two numbers, got {center!r}")

    @property
    def levels(self) -> int:
        """How often the encoder halves the frame."""
        return min(int(math.log2(self.size_px / _COARSEST_PX)), _MAX_LEVELS)

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values, as kept in a manifest."""
        return asdict(self) | {"probe_center_yx_px": list(self.probe_center_yx_px)}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Self:
        """Read what ``to_json`` wrote.

        Raises:
            ModelError: a name is unknown or a value makes no sense.
        """
        known = {field.name for field in fields(cls)}
        if unknown := sorted(values.keys() - known):
            raise ModelError(f"cnn settings have unknown names {unknown}; known: {sorted(known)}")
        given = dict(values)
        try:
            if "probe_center_yx_px" in given:
                given["probe_center_yx_px"] = tuple(float(v) for v in given["probe_center_yx_px"])
            return cls(**given)
        except (TypeError, ValueError) as error:
            raise ModelError(f"cnn settings {values!r} make no sense: {error}") from error


class CnnNetwork(Network):
    """A group's diffraction amplitudes to its object patches, one channel a frame.

    The encoder halves the frame level by level (two 3x3 convolutions and a maximum each); two
    decoders of mirrored shape lead back to N, one to the amplitude, one to the phase, pi tanh.
    Without batch normalisation: it would make a patch depend on its batch in training, and on
    old averages afterwards.

    The patches come relative to the probe, which this network cannot see in the frames. They are
    then moved to the pixel grid on which the given probe, shifted by the fraction of the position,
    has its centre of intensity.
    """

    uses_probe = False

    def __init__(self, settings: CnnSettings | None = None) -> None:
        super().__init__()
        self.settings = settings or CnnSettings()
        s = self.settings
        self.group_frames = s.gridsize**2
        # From fine to coarse; at N = 64 and scale 1: 32, 64, 128.
        coarsest = s.n_filters_scale * _COARSEST_FILTERS
        filters = [max(1, coarsest >> level) for level in reversed(range(s.levels))]
        self.encoder = nn.ModuleList(
            _pair(before, after) for before, after in pairwise([self.group_frames, *filters])
        )
        down = [max(1, coarsest >> level) for level in range(s.levels + 1)]
        self.amplitude = _Decoder(down, self.group_frames)
        self.phase = _Decoder(down, self.group_frames)
        self.log_error = (
            nn.Conv2d(2 * down[-1], self.group_frames, 3, padding=1) if s.confidence else None
        )
        self._initialise()

    def settings_json(self) -> dict[str, Any]:
        """The settings, for the manifest."""
        return self.settings.to_json()

    def stages(self, amplitude: Tensor, probe: Tensor, valid: Tensor) -> list[Prediction]:
        """The one estimate of this network; see :meth:`Network.stages`.

        Raises:
            ModelError: the frames are not of the settings' size, do not make whole groups, or the
                shapes disagree.
        """
        self._check_shapes(amplitude, probe, valid)
        batch, size, _ = amplitude.shape
        power = torch.view_as_real(probe).square().sum((1, -1))
        photons = power.sum((-2, -1), keepdim=True).clamp_min(1e-30)
        # The normalisation of PtychoPINN, by the beam instead of the mean frame.
        x = amplitude * (size / 2 / photons.sqrt())
        x = torch.where(valid, x, x.new_zeros(()))
        x = torch.fft.fftshift(x, dim=(-2, -1))
        x = x.reshape(batch // self.group_frames, self.group_frames, size, size)
        for block in self.encoder:
            x = functional.max_pool2d(block(x), 2)
        modulus, modulus_features = self.amplitude(x)
        phase, phase_features = self.phase(x)
        modulus = _ACTIVATIONS[self.settings.amp_activation][0](modulus.float())
        obj = torch.polar(modulus, math.pi * torch.tanh(phase.float()))
        seen = [obj.real, obj.imag]
        if self.log_error is not None:
            seen.append(self._confidence(torch.cat((modulus_features, phase_features), 1)))
        planes = torch.stack([plane.reshape(batch, size, size) for plane in seen], 1)
        planes = _moved(planes, self._offset_px(power, batch))
        moved = torch.complex(planes[:, 0].contiguous(), planes[:, 1].contiguous())
        confidence = planes[:, 2] if self.log_error is not None else torch.ones_like(moved.real)
        return [Prediction(moved, confidence)]

    def _confidence(self, features: Tensor) -> Tensor:
        assert self.log_error is not None
        # Relative to the error of confidence one half; the tanh keeps exp() in bounds, and its
        # gradient alive.
        raw: Tensor = self.log_error(features).float()
        relative = torch.exp(_LOG_ERROR_RANGE * torch.tanh(raw / _LOG_ERROR_RANGE))
        return 1 / (1 + relative.square())

    def _offset_px(self, power: Tensor, batch: int) -> Tensor:
        """How far (B, 2) the patches have to be moved, for probes of ``power`` (B|1, N, N)."""
        y, x = self.settings.probe_center_yx_px  # no tensor: recordings take nothing from the host
        centre_yx = center_of_intensity(power)
        return torch.stack((centre_yx[:, 0] - y, centre_yx[:, 1] - x), -1).expand(batch, 2)

    def _initialise(self) -> None:
        """Start with patches that vary from pixel to pixel and from frame to frame.

        Weights by He et al. (arXiv 1502.01852), so that signals keep their size through the
        rectifiers; the last layers smaller, so that neither activation starts saturated.
        """
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
                assert module.bias is not None
                nn.init.zeros_(module.bias)
        for decoder in (self.amplitude, self.phase):
            nn.init.normal_(
                decoder.leave.weight, std=_START_SPREAD / math.sqrt(9 * decoder.leave.in_channels)
            )
        assert self.amplitude.leave.bias is not None
        nn.init.constant_(self.amplitude.leave.bias, _ACTIVATIONS[self.settings.amp_activation][1])
        if self.log_error is not None:
            nn.init.zeros_(self.log_error.weight)

    def _check_shapes(self, amplitude: Tensor, probe: Tensor, valid: Tensor) -> None:
        size = self.settings.size_px
        if amplitude.ndim != 3 or amplitude.shape[-2:] != (size, size):
            raise ModelError(
                f"this cnn was made for (B, {size}, {size}) frames, got {tuple(amplitude.shape)}; "
                "use a model of the frames' size, or crop the frames in the scan's view"
            )
        if len(amplitude) % self.group_frames:
            raise ModelError(
                f"this cnn takes groups of {self.group_frames} frames; {len(amplitude)} are no "
                "whole number of groups"
            )
        if probe.ndim != 4 or probe.shape[-2:] != (size, size):
            raise ModelError(
                f"the probe has shape {tuple(probe.shape)}, the frames need (modes, {size}, "
                f"{size}); load a probe sampled for this frame size"
            )
        if valid.ndim != 3 or valid.shape[-2:] != (size, size):
            raise ModelError(
                f"the valid mask has shape {tuple(valid.shape)}, the frames need {size}^2"
            )


def center_of_intensity(power: Tensor) -> Tensor:
    """Where probes (B, N, N) have their centre of intensity, (B, 2), relative to the window's.

    The centre on a circle, from the phase of the lowest frequency: when a probe is shifted by a
    fraction of a pixel in Fourier space it moves by exactly that fraction.
    """
    size = power.shape[-1]
    turn = torch.arange(size, device=power.device, dtype=torch.float32) * (2 * math.pi / size)
    centers: list[Tensor] = []
    for axis in (-1, -2):
        profile = power.float().sum(axis)
        angle = torch.atan2((profile * turn.sin()).sum(-1), (profile * turn.cos()).sum(-1))
        centers.append(torch.remainder(angle, 2 * math.pi) * (size / (2 * math.pi)))
    return torch.stack(centers, -1) - (size - 1) / 2


class _Decoder(nn.Module):
    """From the coarsest level back to N: two convolutions and a doubling for each level.

    ``filters`` from coarse to fine, one more than there are levels. Gives the output (B, channels,
    N, N) before its activation, and the features that it was made of.
    """

    def __init__(self, filters: list[int], channels: int) -> None:
        super().__init__()
        self.levels = nn.ModuleList(_pair(before, after) for before, after in pairwise(filters))
        finest = filters[-1]
        self.finest = nn.Conv2d(finest, finest, 3, padding=1)
        self.leave = nn.Conv2d(finest, channels, 3, padding=1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        for level in self.levels:
            x = functional.interpolate(level(x), scale_factor=2.0, mode="nearest")
        x = torch.relu(self.finest(x))
        return self.leave(x), x


def _pair(before: int, after: int) -> nn.Sequential:
    """Two rectified 3x3 convolutions."""
    return nn.Sequential(
        nn.Conv2d(before, after, 3, padding=1),
        nn.ReLU(inplace=True),
        nn.Conv2d(after, after, 3, padding=1),
        nn.ReLU(inplace=True),
    )


def _moved(planes: Tensor, offset_yx_px: Tensor) -> Tensor:
    """``planes`` (B, P, N, N) moved by (B, 2) pixels, bilinearly; the border is continued."""
    batch, _, size, _ = planes.shape
    theta = planes.new_zeros((batch, 2, 3))
    theta[:, 0, 0] = theta[:, 1, 1] = 1
    # affine_grid wants (x, y), in units of half the window, of where each pixel comes from.
    theta[:, :, 2] = -offset_yx_px.flip(-1) * (2 / size)
    grid = functional.affine_grid(theta, [batch, 1, size, size], align_corners=False)
    return functional.grid_sample(
        planes, grid, mode="bilinear", padding_mode="border", align_corners=False
    )
