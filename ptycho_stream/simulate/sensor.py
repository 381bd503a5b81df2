"""The detector's pixels: gaps between modules, hot and dead ones, a beam stop, background, limits.

A sensor turns the photons that a model expects into counts. Used by the scan simulator;
:mod:`ptycho_stream.simulate.detector` sends what it counted. Images have zero frequency at their
middle, [N // 2, N // 2], as detectors do.
"""

from dataclasses import dataclass, fields
from math import isfinite

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ptycho_stream.errors import SettingsError

Mask = NDArray[np.bool_]


@dataclass(frozen=True)
class SensorSettings:
    """What is wrong with a detector; the defaults are an ideal one.

    Attributes:
        gap_px: width of the gaps between modules, along both axes; 0 for one module.
        module_px: width of a module; None for half of the frame. Where the first gap lies is drawn.
        hot: share of pixels that count by themselves, 100 to 10,000 a frame.
        dead: share of pixels that never count.
        beam_stop_px: radius of the beam stop; 0 for none.
        background: mean counts a pixel that are not the sample's.
        saturation: largest count of a pixel; None for no limit.
    """

    gap_px: int = 0
    module_px: int | None = None
    hot: float = 0.0
    dead: float = 0.0
    beam_stop_px: float = 0.0
    background: float = 0.0
    saturation: int | None = None

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if value is not None and not (isfinite(value) and value >= 0):
                raise SettingsError(f"a sensor's {field.name} is 0 or more, not {value}")
        for name in ("hot", "dead"):
            if getattr(self, name) > 0.5:
                raise SettingsError(
                    f"a sensor's {name} is a share of its pixels, at most 0.5: "
                    f"{getattr(self, name)} is too many"
                )
        if self.module_px is not None and not self.gap_px:
            raise SettingsError("module_px does nothing without gap_px, the gaps' width")
        if self.module_px == 0 or self.saturation == 0:
            raise SettingsError("a sensor's module_px and saturation are above 0")


@dataclass(frozen=True)
class Sensor:
    """One detector, drawn from the settings.

    Attributes:
        gaps: bool (N, N), True between modules; so are ``hot``, ``dead`` and ``stop``.
        gain: float32 (N, N), counts a photon: 0 where nothing arrives, else 1.
        dark: float32 (N, N), mean counts without sample.
        saturation: largest count, None for no limit.
    """

    gaps: Mask
    hot: Mask
    dead: Mask
    stop: Mask
    gain: NDArray[np.float32]
    dark: NDArray[np.float32]
    saturation: int | None

    @property
    def bad(self) -> Mask:
        """Pixels (N, N) whose counts say nothing of the sample."""
        return self.gaps | self.hot | self.dead | self.stop

    def count(self, expected: Tensor, generator: torch.Generator) -> Tensor:
        """Poisson counts of frames, on the device of ``expected``.

        Args:
            expected: float32 (B, N, N), photons that arrive, zero frequency at the middle.
            generator: the source of randomness, on the same device.

        Returns:
            float32 (B, N, N), whole numbers.
        """
        device = expected.device
        rate = expected * torch.as_tensor(self.gain, device=device)
        rate += torch.as_tensor(self.dark, device=device)
        counts = torch.poisson(rate, generator)
        return counts if self.saturation is None else counts.clamp_max(self.saturation)


def draw_sensor(rng: np.random.Generator, size_px: int, settings: SensorSettings) -> Sensor:
    """A sensor of ``size_px`` squared with the faults that the settings ask for.

    Raises:
        SettingsError: the faults leave hardly a good pixel.
    """
    gaps = _gaps(rng, size_px, settings)
    f = np.arange(size_px) - size_px // 2
    stop = np.hypot(f[:, None], f[None, :]) < settings.beam_stop_px
    chance = rng.random((size_px, size_px))
    dead = (chance < settings.dead) & ~gaps
    hot = (chance > 1 - settings.hot) & ~gaps & ~dead
    dark = np.where(stop | dead | gaps, 0, settings.background).astype(np.float32)
    dark[hot] += 10 ** rng.uniform(2, 4, int(hot.sum())).astype(np.float32)
    sensor = Sensor(
        gaps=gaps,
        hot=hot,
        dead=dead,
        stop=stop,
        gain=np.where(stop | dead | gaps, 0, 1).astype(np.float32),
        dark=dark,
        saturation=settings.saturation,
    )
    if sensor.bad.mean() > 0.9:
        raise SettingsError(
            f"gaps, hot and dead pixels and the beam stop cover {sensor.bad.mean():.0%} of a "
            f"{size_px} px frame: make them smaller"
        )
    return sensor


def _gaps(rng: np.random.Generator, size_px: int, settings: SensorSettings) -> Mask:
    gaps = np.zeros((size_px, size_px), bool)
    if settings.gap_px >= size_px:
        raise SettingsError(
            f"gap_px {settings.gap_px} is no gap in a frame of {size_px} px: make it smaller"
        )
    if settings.gap_px:
        module = settings.module_px or size_px // 2
        period = module + settings.gap_px
        for axis in range(2):
            # The first gap begins inside the frame, so that there is at least one.
            first = int(rng.integers(0, min(period, size_px - settings.gap_px // 2)))
            lines = (np.arange(size_px) - first) % period < settings.gap_px
            np.moveaxis(gaps, axis, 0)[lines] = True
    return gaps
