"""The default network: unrolled data-consistency steps with the known probe, and small CNNs.

Each stage projects the estimate on the measured modulus a few times, with momentum, and lets a
three-level residual CNN correct it; projections have the last word. The probe is an input and the
physics is inside, so one set of weights serves any probe, photon count and frame size. Used by
training and by the predictor.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, NamedTuple, Self, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from ptycho_stream.errors import ModelError
from ptycho_stream.networks.network import Inference, Network, Prediction, check_shapes
from ptycho_stream.networks.unrolled_inference import UnrolledInference
from ptycho_stream.physics.forward import mode_sum, modulus_correction

_OBJECT_CHANNELS = 5
"""Re and Im of the estimate, Re and Im of the last update, probe intensity."""


@dataclass(frozen=True)
class UnrolledSettings:
    """Shape of the network; written to the model's manifest as JSON.

    Attributes:
        stages: pairs of (projection steps, CNN), each with weights of its own.
        steps: modulus projections in a stage, and after the last one.
        channels: CNN features at half, quarter and eighth resolution.
        memory: features handed from one stage's CNN to the next.
    """

    stages: int = 5
    steps: int = 5
    channels: tuple[int, int, int] = (24, 40, 48)
    memory: int = 12

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values, as kept in a manifest."""
        return asdict(self) | {"channels": list(self.channels)}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Self:
        """Read what ``to_json`` wrote.

        Raises:
            ModelError: a name is unknown or a value is not a positive integer.
        """
        known = {field.name for field in fields(cls)}
        if unknown := sorted(values.keys() - known):
            raise ModelError(
                f"unrolled settings have unknown names {unknown}; known: {sorted(known)}"
            )
        given = dict(values)
        for name, value in values.items():
            wanted = 3 if name == "channels" else 1
            several = isinstance(value, list | tuple)
            numbers = tuple(cast("Sequence[Any]", value)) if several else (value,)
            if len(numbers) != wanted or not all(isinstance(n, int) and n > 0 for n in numbers):
                raise ModelError(f"unrolled setting {name} needs {wanted} positive, got {value!r}")
            if name == "channels":
                given[name] = numbers
        return cls(**given)


class Block(nn.Module):
    """Residual 3x3 convolution: x + conv(silu(conv(x))) would cost twice; one is enough here."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, channels, H, W) to the same."""
        return x + functional.silu(self.conv(x))


class Corrector(nn.Module):
    """Three-level residual CNN from half to eighth resolution and back.

    Input (B, 20 + memory, N/2, N/2): the full-resolution channels folded 2x2, then the memory.
    Output (B, 8 + memory, N/2, N/2), zero at initialisation, so an untrained network is plain
    alternating projection; and the last features (B, fine, N/2, N/2).  ``bias`` (B, fine, 1, 1)
    tells it how noisy the frame is.
    """

    def __init__(self, channels: tuple[int, int, int], memory: int) -> None:
        super().__init__()
        fine, middle, coarse = channels
        self.enter = nn.Conv2d(4 * _OBJECT_CHANNELS + memory, fine, 3, padding=1)
        self.fine_in = Block(fine)
        self.down1 = nn.Conv2d(fine, middle, 2, stride=2)
        self.middle_in = Block(middle)
        self.down2 = nn.Conv2d(middle, coarse, 2, stride=2)
        self.coarse = nn.Sequential(Block(coarse), Block(coarse))
        self.up2 = nn.ConvTranspose2d(coarse, middle, 2, stride=2)
        self.middle_out = Block(middle)
        self.up1 = nn.ConvTranspose2d(middle, fine, 2, stride=2)
        self.fine_out = Block(fine)
        self.leave = nn.Conv2d(fine, 8 + memory, 3, padding=1)
        nn.init.zeros_(self.leave.weight)
        if self.leave.bias is not None:
            nn.init.zeros_(self.leave.bias)

    def coarse_blocks(self) -> list[Block]:
        """The blocks at eighth resolution, in order."""
        return [cast("Block", one) for one in self.coarse]

    def forward(self, x: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        """The answer and the last features."""
        fine = self.fine_in(functional.silu(self.enter(x) + bias))
        middle = self.middle_in(functional.silu(self.down1(fine)))
        coarse = self.coarse(functional.silu(self.down2(middle)))
        middle = self.middle_out(middle + self.up2(coarse))
        fine = self.fine_out(fine + self.up1(middle))
        return self.leave(fine), fine


def _fold(x: Tensor) -> Tensor:
    """(B, N, N, C) to (B, 4 C, N/2, N/2) in channels-last memory, as oneDNN and cuDNN like it."""
    batch, height, width, channels = x.shape
    x = x.reshape(batch, height // 2, 2, width // 2, 2, channels)
    x = x.permute(0, 1, 3, 2, 4, 5).reshape(batch, height // 2, width // 2, 4 * channels)
    return x.permute(0, 3, 1, 2)


def _unfold_complex(x: Tensor) -> Tensor:
    """(B, 8, N/2, N/2) to complex (B, N, N)."""
    batch, _, height, width = x.shape
    x = x.permute(0, 2, 3, 1).reshape(batch, height, width, 2, 2, 2)
    x = x.permute(0, 1, 3, 2, 4, 5).reshape(batch, 2 * height, 2 * width, 2)
    return torch.view_as_complex(x.float().contiguous())


class _NoiseLevel(nn.Module):
    """What the photons of a frame mean for every stage: step sizes, damping, bias of the CNN.

    A frame of few photons wants short steps, or noise is fitted; one of many wants long ones.
    Zero at initialisation.
    """

    def __init__(self, settings: UnrolledSettings) -> None:
        super().__init__()
        self._rows = settings.stages + 1
        columns = settings.steps + 1 + settings.channels[0]
        self.widen = nn.Linear(2, 32)
        self.tell = nn.Linear(32, self._rows * columns)
        nn.init.zeros_(self.tell.weight)
        nn.init.zeros_(self.tell.bias)

    def forward(self, total: Tensor, peak: Tensor) -> Tensor:
        """Mean and peak photons of the probe (B,), to (B, rows, columns, 1, 1)."""
        levels = torch.stack((total.log10(), peak.log10()), -1) / 3  # about -1 to 1
        # In double: how a matrix product rounds depends on the batch, and a last digit more or
        # less flips roundings to bfloat16 all over the patch (0.01 of the object).
        wide = functional.linear(levels.double(), *_double(self.widen))
        told = functional.linear(functional.silu(wide), *_double(self.tell)).float()
        return told.reshape(len(levels), self._rows, -1, 1, 1)


class _Data(NamedTuple):
    """A batch in units of the probe's peak; ``power`` (B|1, N, N) is 1 there."""

    amplitude: Tensor
    valid: Tensor
    probe: Tensor
    conj: Tensor
    power: Tensor


def _seen(obj: Tensor, change: Tensor, data: _Data) -> Tensor:
    """What a CNN is shown: (B, 20, N/2, N/2)."""
    power = data.power.unsqueeze(-1).expand(*obj.shape, 1)
    return _fold(torch.cat((torch.view_as_real(obj), torch.view_as_real(change), power), -1))


def _double(layer: nn.Linear) -> tuple[Tensor, Tensor]:
    return layer.weight.double(), layer.bias.double()


class UnrolledNetwork(Network):
    """One diffraction frame and its probe to the object patch under it.

    Amplitude and probe are in the root of photons, whose number tells the noise; inside they are
    divided by the probe's peak. The global phase of a patch is what the start estimate, object = 1,
    makes of it; stitching solves it.
    """

    half_precision = True

    intensity_floor = 1e-5
    """Added under the root of the modelled intensity, in units of the probe's peak intensity."""

    def __init__(self, settings: UnrolledSettings | None = None) -> None:
        super().__init__()
        self.settings = settings or UnrolledSettings()
        s = self.settings
        self.correctors = nn.ModuleList(Corrector(s.channels, s.memory) for _ in range(s.stages))
        # One row a stage, and one for the projections after the last.
        self.step_size = nn.Parameter(torch.ones(s.stages + 1, s.steps))
        self.momentum = nn.Parameter(torch.full((s.stages + 1, s.steps), 0.2))
        # Logit of the share of max|P|^2 in the update's denominator; 0 is the half of rPIE-like
        # updates (Maiden, Johnson & Li 2017, doi:10.1364/OPTICA.4.000736).
        self.damping = nn.Parameter(torch.zeros(s.stages + 1))
        self.noise = _NoiseLevel(s)
        seen = 4 * _OBJECT_CHANNELS + s.channels[0]
        self.confidence = nn.Sequential(
            nn.Conv2d(seen, 32, 3, padding=1), nn.SiLU(), nn.Conv2d(32, 4, 3, padding=1)
        )

    def settings_json(self) -> dict[str, Any]:
        """The settings, for the manifest."""
        return self.settings.to_json()

    def inference(self, dtype: torch.dtype) -> Inference:
        """A faster :meth:`forward` without gradients; see :meth:`Network.inference`."""
        return UnrolledInference(self, dtype)

    def each_corrector(self) -> list[Corrector]:
        """The CNNs, first stage first."""
        return [cast("Corrector", one) for one in self.correctors]

    def stages(self, amplitude: Tensor, probe: Tensor, valid: Tensor) -> list[Prediction]:
        """The estimate after every CNN and at the end, all with the confidence in the last."""
        check_shapes(amplitude, probe, valid)
        batch, size, _ = amplitude.shape
        power = mode_sum(probe)
        peak = power.amax((-2, -1), keepdim=True).clamp_min(1e-30)
        noise = self.noise(power.mean((-2, -1)).clamp_min(1e-30), peak[:, 0, 0])
        probe = probe / peak.sqrt().unsqueeze(1)
        data = _Data(
            amplitude=amplitude / peak.sqrt(),
            valid=valid,
            probe=probe,
            conj=probe.conj().resolve_conj(),
            power=power / peak,
        )
        obj = torch.ones(amplitude.shape, dtype=probe.dtype, device=amplitude.device)
        memory = amplitude.new_zeros((batch, self.settings.memory, size // 2, size // 2))
        memory = memory.to(memory_format=torch.channels_last)
        features = memory
        estimates: list[Tensor] = []
        for number, corrector in enumerate(self.correctors):
            obj, change = self._project(obj, data, number, noise)
            bias = noise[:, number, self.settings.steps + 1 :]
            out, features = corrector(torch.cat((_seen(obj, change, data), memory), 1), bias)
            memory = out[:, 8:]
            obj = obj + _unfold_complex(out[:, :8])
            estimates.append(obj)
        obj, change = self._project(obj, data, len(self.correctors), noise)
        estimates.append(obj)
        # Detached: how sure the network is must not change what it says.
        known = torch.cat((_seen(obj, change, data), features), 1).detach()
        logit = functional.pixel_shuffle(self.confidence(known).float(), 2)
        confidence = torch.sigmoid(logit.squeeze(1))
        return [Prediction(estimate, confidence) for estimate in estimates]

    def _project(self, obj: Tensor, data: _Data, row: int, noise: Tensor) -> tuple[Tensor, Tensor]:
        """The modulus projections of a stage; returns the estimate and the last change."""
        steps = self.settings.steps
        sizes = self.step_size[row, :, None, None] * noise[:, row, :steps].exp()
        damping = torch.sigmoid(self.damping[row] + noise[:, row, steps])
        gain = 1 / ((1 - damping) * data.power + damping)
        velocity = change = obj
        for step in range(steps):
            change = modulus_correction(
                data.probe, data.conj, obj, data.amplitude, data.valid, self.intensity_floor
            )
            moved = change * (gain * sizes[:, step])
            velocity = moved if step == 0 else velocity * self.momentum[row, step] + moved
            obj = obj + velocity
        change = change * gain
        return obj, change
