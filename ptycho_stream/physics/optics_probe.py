"""Probes made from optics instead of read from a file.

Used by whoever goes by the settings' ``[probe.optics]`` and by the simulators.
"""

import numpy as np

from ptycho_stream.physics.optics import Optic, optic_of, to_sample
from ptycho_stream.physics.probe import Probe
from ptycho_stream.settings import OpticsSettings


def probe_behind(optic: Optic, size_px: int, photons: float = 1e6) -> Probe:
    """The probe that an optic makes.

    Args:
        optic: it.
        size_px: window size N.
        photons: of the unattenuated beam.

    Returns:
        One mode, centred on (N - 1) / 2; the same for every call.

    Raises:
        ProbeError: the beam does not fit into the window, or is finer than its pixels.
    """
    wave = to_sample(optic.wave(size_px), np.full(2, (size_px - 1) / 2))
    return Probe(wave[None].astype(np.complex64)).normalised(photons)


def probe_of_optics(
    optics: OpticsSettings,
    photon_energy_eV: float,
    pixel_yx_m: tuple[float, float],
    size_px: int,
    photons: float = 1e6,
) -> Probe:
    """The probe that the settings' optics make of a beam; as :func:`probe_behind`.

    Args:
        optics: of the settings.
        photon_energy_eV: of the beam.
        pixel_yx_m: of the object.
        size_px: window size N.
        photons: of the unattenuated beam.

    Raises:
        ProbeError: as :func:`probe_behind`.
        GeometryError: the energy is not above 0.
    """
    return probe_behind(optic_of(optics, photon_energy_eV, pixel_yx_m), size_px, photons)
