"""What becomes of a probe: refined in one scan, saved with it, and the start of the next one.

Used by the reconstruct stage. A probe goes on only to scans with the same beam, and only while the
settings name the same probe as when it began.
"""

from __future__ import annotations

import logging
import math
import zipfile
import zlib
from pathlib import Path

import numpy as np

from ptycho_stream.errors import ProbeError
from ptycho_stream.files.npz import save_arrays
from ptycho_stream.physics.probe import Probe, load_probe
from ptycho_stream.scans.catalogue import Catalogue
from ptycho_stream.scans.folders import scan_directory
from ptycho_stream.scans.header import ScanHeader

PROBE_FILE = "probe.npz"

_log = logging.getLogger(__name__)
_UNREADABLE = (ProbeError, OSError, EOFError, KeyError, ValueError, zipfile.BadZipFile, zlib.error)
_LOOK_BACK = 20
"""So many scans back a probe is looked for."""
_SAME = 1e-3
"""Relative difference of energies and pixel sizes that are the same."""


def save_probe(directory: Path, probe: Probe, descends_from: str) -> None:
    """Save a refined probe with the scan in ``directory``.

    Args:
        directory: of the scan.
        probe: in photons.
        descends_from: digest of the probe in the settings that it began as.

    Raises:
        FileFormatError: the disk refused.
    """
    arrays = {"probe": probe.modes, "descends_from": np.asarray(descends_from)}
    save_arrays(directory / PROBE_FILE, arrays)


def probe_of_scan_before(
    catalogue: Catalogue, root: Path, header: ScanHeader, descends_from: str
) -> Probe | None:
    """The probe that was saved with the newest scan before one, if it is of the same beam.

    Args:
        catalogue: of the scans.
        root: where they are stored.
        header: of the scan that needs a probe.
        descends_from: digest of the probe in the settings.
    """
    scans = catalogue.scans()
    before = [s for s in scans if s.scan_id < header.scan_id and not s.detector]
    for other in before[:_LOOK_BACK]:
        path = scan_directory(root, other.scan_id) / PROBE_FILE
        if not path.exists() or not _same_beam(header, other):
            continue
        try:
            with path.open("rb") as file, np.load(file, allow_pickle=False) as held:
                origin = str(held["descends_from"])
            probe = load_probe(path) if origin == descends_from else None
        except _UNREADABLE as error:
            # Damaged, or its scan is being deleted: the one before will do.
            _log.warning("the probe %s is unusable (%r)", path, error)
            continue
        if probe is not None:
            _log.info("scan %s: its probe is that of scan %s", header.scan_id, other.scan_id)
        return probe
    return None


def _same_beam(one: ScanHeader, other: ScanHeader) -> bool:
    if one.size_px != other.size_px or one.pixel_yx_m is None or other.pixel_yx_m is None:
        return False
    pairs = list(zip(one.pixel_yx_m, other.pixel_yx_m, strict=True))
    energies = one.geometry.photon_energy_eV, other.geometry.photon_energy_eV
    if energies[0] is not None and energies[1] is not None:
        pairs.append((energies[0], energies[1]))
    return all(math.isclose(a, b, rel_tol=_SAME) for a, b in pairs)
