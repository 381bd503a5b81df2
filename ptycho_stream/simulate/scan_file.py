"""A simulated experiment as a scan file, so that it can be saved, replayed and compared.

Used by ``ptycho-stream simulate``, the demo and the tests.
"""

from __future__ import annotations

import numpy as np

from ptycho_stream.files.npz import ScanFile
from ptycho_stream.simulate.experiment import SimulatedExperiment


def scan_file_of(experiment: SimulatedExperiment) -> ScanFile:
    """``experiment`` with the truth behind it: frames numbered from 0."""
    return ScanFile(
        counts=experiment.counts,
        positions_yx_m=experiment.positions_yx_m,
        frame_numbers=np.arange(len(experiment.counts), dtype=np.int64),
        detector_distance_m=experiment.detector_distance_m,
        photon_energy_eV=experiment.photon_energy_eV,
        detector_pixel_yx_m=experiment.detector_pixel_yx_m,
        probe=experiment.probe.modes,
        object=experiment.object,
        object_origin_yx_m=experiment.origin_yx_m,
        pixel_yx_m=experiment.pixel_yx_m,
        bad_pixels=experiment.bad_pixels,
        metadata=experiment.metadata,
    )
