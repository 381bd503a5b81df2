"""A probe that was refined in one scan begins the next one of the same beam, or none."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from scan_samples import make_header, make_scan

from ptycho_stream.errors import FileFormatError
from ptycho_stream.messages import DetectorGeometry
from ptycho_stream.physics.probe import Probe
from ptycho_stream.reconstruct.probe_life import PROBE_FILE, probe_of_scan_before, save_probe
from ptycho_stream.scans.catalogue import Catalogue
from ptycho_stream.scans.folders import scan_directory
from ptycho_stream.scans.ulid import new_scan_id

PROBE = Probe(np.random.default_rng(1).normal(size=(2, 32, 32)).astype(np.complex64))
OTHER = Probe(PROBE.modes * 2)
BEAM = {"pixel_yx_m": (1e-8, 1.1e-8), "geometry": DetectorGeometry(photon_energy_eV=8800.0)}


def scan(root: Path, probe: Probe | None = None, descends_from: str = "set", **changes) -> Path:
    """A scan in the store, with the probe that was refined in it; its folder."""
    scan_id = make_scan(root, 1, **BEAM | {"scan_id": new_scan_id()} | changes)
    folder = scan_directory(root, scan_id)
    if probe is not None:
        save_probe(folder, probe, descends_from)
    return folder


def found(root: Path, descends_from: str = "set", **changes) -> Probe | None:
    header = make_header(**BEAM | {"scan_id": new_scan_id()} | changes)
    return probe_of_scan_before(Catalogue(root), root, header, descends_from)


def same(probe: Probe | None, expected: Probe) -> bool:
    return probe is not None and np.array_equal(probe.modes, expected.modes)


def test_the_newest_probe_before_a_scan_is_its_beginning(tmp_path, caplog):
    caplog.set_level("INFO")
    assert found(tmp_path) is None
    scan(tmp_path, OTHER)
    newest = scan(tmp_path, PROBE)
    scan(tmp_path)  # did not go well: its probe was not kept
    assert same(found(tmp_path), PROBE)
    assert f"its probe is that of scan {newest.name}" in caplog.text


def test_later_scans_and_the_scan_itself_say_nothing(tmp_path):
    early = new_scan_id()
    scan(tmp_path, PROBE)
    assert found(tmp_path, scan_id=early) is None
    folder = scan(tmp_path, OTHER)
    assert same(found(tmp_path, scan_id=folder.name), PROBE)


@pytest.mark.parametrize(
    "change",
    [
        {"geometry": DetectorGeometry(photon_energy_eV=8820.0)},
        {"pixel_yx_m": (1.01e-8, 1.1e-8)},
        {"pixel_yx_m": (1e-8, 1e-8)},
        {"pixel_yx_m": None},
        {"size_px": 64},
    ],
)
def test_another_beam_is_not_begun_with_it(tmp_path, change):
    scan(tmp_path, PROBE)
    assert found(tmp_path, **change) is None
    scan(tmp_path, OTHER, **change)
    assert same(found(tmp_path), PROBE)  # the newest of the same beam


def test_energies_that_are_the_same_or_not_known_are_no_other_beam(tmp_path):
    scan(tmp_path, PROBE)
    assert same(found(tmp_path, geometry=DetectorGeometry(photon_energy_eV=8800.5)), PROBE)
    assert same(found(tmp_path, geometry=DetectorGeometry()), PROBE)


def test_another_probe_in_the_settings_begins_anew(tmp_path):
    scan(tmp_path, PROBE, descends_from="set before")
    assert found(tmp_path) is None
    assert same(found(tmp_path, "set before"), PROBE)


@pytest.mark.parametrize("damage", [b"", b"not a file of ours", 60, -100])
def test_a_damaged_probe_is_passed_over_for_the_one_before(tmp_path, damage, caplog):
    scan(tmp_path, PROBE)
    path = scan(tmp_path, OTHER) / PROBE_FILE
    content = path.read_bytes()
    path.write_bytes(damage if isinstance(damage, bytes) else content[:damage])
    assert same(found(tmp_path), PROBE)
    assert str(path) in caplog.text


@pytest.mark.parametrize("where", [0.2, 0.5, 0.8])
def test_flipped_bits_are_noticed(tmp_path, where):
    scan(tmp_path, PROBE)
    path = scan(tmp_path, OTHER) / PROBE_FILE
    content = bytearray(path.read_bytes())
    at = int(where * len(content))
    content[at : at + 8] = bytes(byte ^ 0xFF for byte in content[at : at + 8])
    path.write_bytes(content)
    assert same(found(tmp_path), PROBE)


def test_a_folder_that_cannot_be_written_is_an_error_that_says_so(tmp_path):
    with pytest.raises(FileFormatError, match="gone"):
        save_probe(tmp_path / "gone", PROBE, "set")
