"""A whole simulated scan: counts, positions, probe, sample and a consistent geometry.

Numerics only; the detector simulators put it on sockets. Used by ``ptycho-stream simulate``, the
demo, the tests and the benchmarks. Positions are not on the pixel grid: their fractions move the
probe, as in the reconstruction.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ptycho_stream.errors import GeometryError, SettingsError
from ptycho_stream.geometry import object_pixel_yx_m
from ptycho_stream.physics.forward import intensity
from ptycho_stream.physics.fourier import centred
from ptycho_stream.physics.probe import Probe, shifted_modes, spectrum_of
from ptycho_stream.simulate.probes import zone_plate_probe
from ptycho_stream.simulate.samples import showcase_sample
from ptycho_stream.simulate.scan_paths import PATH_KINDS
from ptycho_stream.simulate.sensor import Sensor, SensorSettings, draw_sensor

SampleOf = Callable[[np.random.Generator, tuple[int, int]], NDArray[np.complex64]]
"""Draws a sample of so many rows and columns, :func:`showcase_sample` for one."""

_BATCH_FRAMES = 64


@dataclass(frozen=True)
class SimulatedExperiment:
    """A scan and the truth behind it.

    Attributes:
        counts: uint16 (M, N, N), zero frequency at [N // 2, N // 2]; uint32 where 65533 is too few
            (the two values above mark bad pixels).
        positions_yx_m: float64 (M, 2), world position of each window's centre, index (N - 1) / 2.
        probe: what illuminated the sample.
        object: complex64 (H, W), the sample's transmission.
        origin_yx_m: world position of the centre of object[0, 0], a whole number of pixels.
        pixel_yx_m: of the object.
        photon_energy_eV: of the beam.
        detector_distance_m: sample to detector.
        detector_pixel_yx_m: of the detector; pixel_yx_m = wavelength * distance / (N * this).
        bad_pixels: bool (N, N), True where counts say nothing of the sample; None: all are good.
        metadata: what a beamline would tell of the scan, and ``dose_photons``; JSON values.
    """

    counts: NDArray[np.uint16] | NDArray[np.uint32]
    positions_yx_m: NDArray[np.float64]
    probe: Probe
    object: NDArray[np.complex64]
    origin_yx_m: tuple[float, float]
    pixel_yx_m: tuple[float, float]
    photon_energy_eV: float
    detector_distance_m: float
    detector_pixel_yx_m: tuple[float, float]
    bad_pixels: NDArray[np.bool_] | None = None
    metadata: dict[str, str | int | float] = field(default_factory=dict[str, str | int | float])


def simulate_experiment(
    seed: int = 0,
    frames: int = 1000,
    size_px: int = 128,
    *,
    photons: float = 5e5,
    step_px: float | None = None,
    jitter: float | None = None,
    path: str = "jittered-raster",
    probe: Probe | None = None,
    sample: NDArray[np.complex64] | SampleOf = showcase_sample,
    sensor: SensorSettings | None = None,
    photon_energy_eV: float = 8800.0,
    detector_distance_m: float = 2.0,
    detector_pixel_yx_m: tuple[float, float] = (75e-6, 75e-6),
    notes: Mapping[str, str | int | float] | None = None,
) -> SimulatedExperiment:
    """Scan a sample and count Poisson photons.

    Args:
        seed: of sample, path, sensor and noise; the same arguments give the same counts.
        frames: number of diffraction frames M.
        size_px: window N.
        photons: of the unattenuated beam in each frame; a given probe is scaled to it.
        step_px: distance of neighbours; default N / 12, about 85 per cent overlap.
        jitter: displacement along each axis, in steps; default the path's own.
        path: a name of PATH_KINDS.
        probe: default a defocused zone plate's.
        sample: complex64, at least as large as the scanned area, or what draws one of the scanned
            area's shape; default a resolution target among grains.
        sensor: the detector's faults; default none.
        photon_energy_eV: with the next two, sets the pixel size.
        detector_distance_m: sample to detector.
        detector_pixel_yx_m: of the detector.
        notes: more metadata of the scan.

    Raises:
        GeometryError: ``frames`` or ``size_px`` is not positive, probe and window differ in size,
            or the sample is smaller than the scanned area.
        ProbeError: ``photons`` is not positive.
        SettingsError: there is no such path, or the faults leave no good pixel.
    """
    if frames < 1 or size_px < 8:
        raise GeometryError(f"cannot simulate {frames} frames of {size_px} px")
    if path not in PATH_KINDS:
        raise SettingsError(f"there is no path {path!r}; there are {', '.join(PATH_KINDS)}")
    pixel_yx_m = object_pixel_yx_m(
        photon_energy_eV, detector_distance_m, detector_pixel_yx_m, size_px
    )
    rng = np.random.default_rng(seed)
    beam = (probe or zone_plate_probe(size_px)).normalised(photons)
    if beam.size_px != size_px:
        raise GeometryError(f"the probe has {beam.size_px} px, the frames have {size_px}")
    kind = PATH_KINDS[path]
    points = kind.draw(
        rng,
        frames,
        size_px / 12 if step_px is None else step_px,
        kind.jitter if jitter is None else jitter,
    )
    top = np.floor(points.min(0) - (size_px - 1) / 2).astype(int) - 1
    bottom = np.ceil(points.max(0) + (size_px - 1) / 2).astype(int) + 2
    shape = (int(bottom[0] - top[0]), int(bottom[1] - top[1]))
    truth = sample(rng, shape) if callable(sample) else sample
    if truth.shape[0] < shape[0] or truth.shape[1] < shape[1]:
        raise GeometryError(
            f"the scanned area needs a sample of {shape} px, got {truth.shape}; scan fewer frames, "
            "smaller steps or a larger sample"
        )
    detector = draw_sensor(rng, size_px, sensor or SensorSettings())
    generator = torch.Generator().manual_seed(int(rng.integers(2**62)))
    counts = _count(generator, detector, beam, truth, points - top - (size_px - 1) / 2)
    bad = detector.bad if detector.bad.any() else None
    return SimulatedExperiment(
        counts=counts,
        positions_yx_m=points * pixel_yx_m,
        probe=beam,
        object=truth,
        origin_yx_m=(float(top[0] * pixel_yx_m[0]), float(top[1] * pixel_yx_m[1])),
        pixel_yx_m=pixel_yx_m,
        photon_energy_eV=photon_energy_eV,
        detector_distance_m=detector_distance_m,
        detector_pixel_yx_m=detector_pixel_yx_m,
        bad_pixels=bad,
        metadata={
            "sample": "simulated",
            "comment": f"simulated scan, seed {seed}",
            "seed": seed,
            "path": path,
            "photons": photons,
            **(notes or {}),
            "dose_photons": mean_dose(counts, bad),
        },
    )


def mean_dose(counts: NDArray[np.unsignedinteger[Any]], bad: NDArray[np.bool_] | None) -> float:
    """Measured dose: mean over the frames (M, N, N) of the sum of their good pixels."""
    good = slice(None) if bad is None else ~bad
    return float(np.mean([int(frame[good].sum(dtype=np.uint64)) for frame in counts]))


def _count(
    generator: torch.Generator,
    sensor: Sensor,
    probe: Probe,
    sample: NDArray[np.complex64],
    corner_yx_px: NDArray[np.float64],
) -> NDArray[np.uint16] | NDArray[np.uint32]:
    """Counts of windows whose first pixel is at ``corner_yx_px`` (M, 2) of the sample."""
    size = probe.size_px
    whole = np.floor(corner_yx_px + 0.5).astype(int)
    shift = torch.as_tensor((corner_yx_px - whole).astype(np.float32))
    spectrum = spectrum_of(probe)
    windows = np.lib.stride_tricks.sliding_window_view(sample, (size, size))
    counts = np.empty((len(whole), size, size), np.uint32)
    for start in range(0, len(whole), _BATCH_FRAMES):
        part = slice(start, start + _BATCH_FRAMES)
        patches = torch.as_tensor(windows[whole[part, 0], whole[part, 1]])
        expected = intensity(shifted_modes(spectrum, shift[part]), patches)
        counts[part] = sensor.count(centred(expected), generator).numpy()
    # A detector of 16 bits keeps its two highest values for pixels that are bad.
    return counts if counts.max() >= np.iinfo(np.uint16).max - 1 else counts.astype(np.uint16)
