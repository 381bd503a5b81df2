"""Scans whose probe is made from the optics of the settings, in the whole daemon."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from daemon_harness import DaemonHarness, wait_for
from test_end_to_end import error, line, record

from ptycho_stream.files.npz import ScanFile
from ptycho_stream.geometry import object_pixel_yx_m
from ptycho_stream.physics.optics_probe import probe_of_optics
from ptycho_stream.physics.probe import load_probe
from ptycho_stream.reconstruct.probe_life import PROBE_FILE
from ptycho_stream.scans import Catalogue
from ptycho_stream.scans.folders import scan_directory
from ptycho_stream.settings import ZonePlateSettings
from ptycho_stream.simulate.experiment import simulate_experiment
from ptycho_stream.simulate.scan_file import scan_file_of

SIZE_PX, FRAMES = 64, 64
PLATE = ZonePlateSettings(
    diameter_m=160e-6, outer_zone_width_m=110e-9, central_stop_m=50e-6, defocus_m=1.2e-3
)
pytestmark = [pytest.mark.timeout(90), pytest.mark.slow]


def scan_at(energy_eV: float, seed: int) -> ScanFile:
    """A scan under the probe that the zone plate makes at an energy."""
    pixel_yx_m = object_pixel_yx_m(energy_eV, 2.0, (75e-6, 75e-6), SIZE_PX)
    probe = probe_of_optics(PLATE, energy_eV, pixel_yx_m, SIZE_PX)
    made = simulate_experiment(
        seed=seed, frames=FRAMES, size_px=SIZE_PX, probe=probe, photon_energy_eV=energy_eV
    )
    return scan_file_of(made)


def test_a_zone_plate_of_the_settings_makes_good_images_at_every_energy(tmp_path: Path) -> None:
    settings = {
        "detector": {"dialect": "dectris-v1"},
        "probe": {"path": None},
        "probe.optics": PLATE.model_dump(),
        "refine": {"enabled": True, "seconds": 20.0, "sweeps": 8.0, "modes": 1},
        "trust": {"enabled": True, "seconds": 20.0, "diagnosis": "off"},
    }
    first, same, other = scan_at(8800.0, 1), scan_at(8800.0, 2), scan_at(7000.0, 3)
    with DaemonHarness(tmp_path, settings) as daemon:
        images = [record(daemon, scan) for scan in (first, same, other)]
        for image, scan in zip(images, (first, same, other), strict=True):
            assert sorted(image.frame_numbers.tolist()) == list(range(FRAMES))
            assert image.content.verdict == "good", image.content.reasons
            assert image.content.generation == 1
            assert error(image, scan) < 0.1
        # Refined probes go on to scans of the same energy.
        begun = "scan {}: its probe is that of scan {}".format
        assert begun(images[1].scan_id, images[0].scan_id) in daemon.log
        assert f"scan {images[2].scan_id}: its probe" not in daemon.log
        kept = scan_directory(daemon.data, images[2].scan_id) / PROBE_FILE
        wait_for(kept.exists, what="the refined probe of the last scan")
        refined, told = load_probe(kept).modes[0], other.probe
        assert told is not None
        alike = abs(np.vdot(refined, told[0])) / np.linalg.norm(refined) / np.linalg.norm(told[0])
        assert alike > 0.95


def test_optics_that_do_not_suit_a_scan_are_said_and_its_frames_kept(tmp_path: Path) -> None:
    fine = PLATE.model_dump() | {"outer_zone_width_m": 40e-9}
    settings = {
        "detector": {"dialect": "dectris-v1"},
        "probe": {"path": None},
        "probe.optics": fine,
    }
    scan = scan_at(8800.0, 1)
    with DaemonHarness(tmp_path, settings) as daemon:
        with line(daemon) as beamline:
            beamline.play(scan)
            wait_for(lambda: "is not reconstructed" in daemon.log, 20, "the error")
            wait_for(lambda: Catalogue(daemon.data).scans()[0].sealed, 20, "the scan's end")
        assert "[probe.optics] does not suit scan" in daemon.log
        assert "wider outermost zone" in daemon.log
        header = Catalogue(daemon.data).scans()[0]
        with Catalogue(daemon.data).open(header.scan_id) as reader:
            assert reader.committed == FRAMES
        assert daemon.status()["stages"]["reconstruct"]["restarts"] == 0
