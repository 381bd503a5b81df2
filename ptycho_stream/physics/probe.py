"""The illumination: incoherent modes, their normalisation, reading them and moving them.

Used by the predictor, refinement, the simulators and everything that compares a model with
frames. The window's centre is index (N - 1) / 2 on both axes.
"""

import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self, cast

import h5py  # pyright: ignore[reportMissingTypeStubs]
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ptycho_stream.errors import ProbeError
from ptycho_stream.geometry import wavelength_m
from ptycho_stream.physics.fourier import fft2_ortho, frequencies, ifft2_ortho

_NPZ_KEYS = ("probe", "probeGuess")


@dataclass(frozen=True)
class Probe:
    """Incoherent probe modes.

    Attributes:
        modes: complex64 (modes, N, N), sqrt(photons) in the ortho convention: the squared modulus,
            summed over modes and pixels, is the photons of the unattenuated beam.
    """

    modes: NDArray[np.complex64]

    def __post_init__(self) -> None:
        modes = self.modes
        if modes.ndim != 3 or modes.shape[1] != modes.shape[2] or 0 in modes.shape:
            raise ProbeError(f"a probe is (modes, N, N) and square, got {modes.shape}")
        if not np.isfinite(modes).all():
            raise ProbeError("the probe holds NaN or infinity; write it again from its source")
        if not np.abs(modes).any():
            raise ProbeError("the probe is zero everywhere; write it again from its source")

    @property
    def size_px(self) -> int:
        """Window size N."""
        return self.modes.shape[-1]

    @property
    def photons(self) -> float:
        """Sum of |P|^2 over modes and pixels."""
        return float(self.power_yx.sum(dtype=np.float64))

    @property
    def power_yx(self) -> NDArray[np.float32]:
        """Sum of |P|^2 over the modes, float32 (N, N), photons a pixel."""
        return (self.modes.real**2 + self.modes.imag**2).sum(0, dtype=np.float32)

    def normalised(self, photons: float) -> Self:
        """The same modes, scaled so that the beam carries ``photons``.

        Raises:
            ProbeError: ``photons`` is not a positive number.
        """
        if not (np.isfinite(photons) and photons > 0):
            raise ProbeError(f"a beam cannot carry {photons} photons; give a positive number")
        factor = np.float32(np.sqrt(photons / self.photons))
        return type(self)((self.modes * factor).astype(np.complex64))

    def leading(self, count: int) -> Self:
        """The first ``count`` modes only, not rescaled.

        Raises:
            ProbeError: there are fewer modes than that, or ``count`` is not positive.
        """
        if not 1 <= count <= len(self.modes):
            raise ProbeError(f"the probe has {len(self.modes)} modes, {count} were asked for")
        return type(self)(self.modes[:count])

    def overlap(self, other: Self) -> float:
        """How alike the leading modes are, 0 to 1, whatever their photons, phase and place."""
        one, two = (np.fft.fft2(p.modes[0].astype(np.complex128)) for p in (self, other))
        lengths = np.linalg.norm(one) * np.linalg.norm(two)
        match = np.abs(np.fft.ifft2(one * two.conj())).max() * one.size
        return float(match / lengths)


def load_probe(path: Path | str) -> Probe:
    """Read a probe from an NPZ (``probe`` or ``probeGuess``) or a ptychodus product (HDF5).

    Leading axes of length 1 are dropped; of several orthogonal probe relaxation (OPR) modes of a
    product the first, which is the mean probe, is taken.

    Raises:
        ProbeError: the file is missing, not of these kinds, or the probe in it is unusable.
    """
    path = Path(path)
    if not path.is_file():
        raise ProbeError(f"no probe file at {path}; correct the path in the settings")
    try:
        array = _read_npz(path) if zipfile.is_zipfile(path) else _read_hdf5(path)
    except (OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile, zlib.error) as error:
        raise ProbeError(
            f"{path} holds no probe that can be read ({error}); expected an NPZ with one of "
            f"{list(_NPZ_KEYS)} or a ptychodus product with the dataset 'probe'"
        ) from error
    while array.ndim > 3 and array.shape[0] == 1:
        array = array[0]
    if array.ndim == 2:
        array = array[None]
    if not np.iscomplexobj(array):
        raise ProbeError(f"the probe in {path} is {array.dtype}, not complex; it needs its phase")
    try:
        return Probe(np.ascontiguousarray(array, np.complex64))
    except ProbeError as error:
        raise ProbeError(f"{path}: {error}") from error


def _read_npz(path: Path) -> NDArray[Any]:
    with np.load(path, allow_pickle=False) as held:
        for key in _NPZ_KEYS:
            if key in held.files:
                return held[key]
        raise KeyError(f"its keys are {held.files}")


def _read_hdf5(path: Path) -> NDArray[Any]:
    with h5py.File(path, "r") as file:
        dataset = cast("Any", file["probe"])
        if not isinstance(dataset, h5py.Dataset):
            raise KeyError("'probe' is a group, not a dataset")
        held = cast("Any", dataset)
        return held[:1] if held.ndim == 4 else held[()]


def _squared(size_px: int, pixel_yx: tuple[float, float]) -> NDArray[np.float64]:
    """Squared frequencies (N, N), zero first, of pixels of that size."""
    ky, kx = (np.fft.fftfreq(size_px, pixel) for pixel in pixel_yx)
    return ky[:, None] ** 2 + kx**2


def square_frequency(probe: Probe, pixel_yx: tuple[float, float] = (1.0, 1.0)) -> float:
    """Mean square frequency of the light, in the unit of the pixels' size."""
    power = (np.abs(np.fft.fft2(probe.modes.astype(np.complex128))) ** 2).sum(0)
    return float((power * _squared(probe.size_px, pixel_yx)).sum() / power.sum())


def defocused(probe: Probe, phase_rad: float, pixel_yx: tuple[float, float] = (1.0, 1.0)) -> Probe:
    """The probe some way along the beam: ``phase_rad`` more at its root mean square frequency.

    ``pixel_yx`` are sizes of its pixels in any unit.

    Over a distance z downstream that is -pi wavelength z times the mean square frequency, square
    cycles a metre (Fresnel's transfer function; Goodman, Introduction to Fourier Optics, 3rd ed.
    2005, eq. 4-21).
    """
    squared = _squared(probe.size_px, pixel_yx)
    squared /= max(square_frequency(probe, pixel_yx), 1e-9 * squared.max())
    spectrum = np.fft.fft2(probe.modes.astype(np.complex128))
    moved = np.fft.ifft2(spectrum * np.exp(1j * phase_rad * squared))
    return Probe(moved.astype(np.complex64))


def distance_m(
    probe: Probe, phase_rad: float, photon_energy_eV: float, pixel_yx_m: tuple[float, float]
) -> float:
    """How far downstream :func:`defocused` moves the probe, metres."""
    square = square_frequency(probe, pixel_yx_m)
    return -phase_rad / (np.pi * wavelength_m(photon_energy_eV) * square)


def spectrum_of(probe: Probe, device: torch.device | str = "cpu") -> Tensor:
    """Fourier transform of the modes, complex64 (modes, N, N), as ``shifted_modes`` takes it."""
    return fft2_ortho(torch.as_tensor(probe.modes).to(device))


def shifted_modes(spectrum: Tensor, shift_yx_px: Tensor) -> Tensor:
    """Move all modes by a fraction of a pixel, one shift a frame.

    Args:
        spectrum: complex64 (modes, N, N) from ``spectrum_of``.
        shift_yx_px: float32 (B, 2); positive moves the probe towards larger indices.

    Returns:
        complex64 (B, modes, N, N).
    """
    frequency = frequencies(spectrum.shape[-1], spectrum.device)
    angle = -2 * torch.pi * shift_yx_px[:, :, None] * frequency
    ramp = torch.polar(torch.ones_like(angle), angle)
    moved = spectrum * (ramp[:, 0, :, None] * ramp[:, 1, None, :]).unsqueeze(1)
    return ifft2_ortho(moved)
