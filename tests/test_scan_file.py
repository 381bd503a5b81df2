"""The scan file: what is written is read back, and what is wrong is said."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest

from ptycho_stream.errors import FileFormatError
from ptycho_stream.files.npz import ScanFile, load_scan, save_scan
from ptycho_stream.simulate.experiment import simulate_experiment
from ptycho_stream.simulate.scan_file import scan_file_of

MINIMAL = {
    "diffraction": np.ones((3, 4, 5), np.uint16),
    "measurement_domain": "counts",
    "positions_yx_m": np.zeros((3, 2)),
}


def written(path: Path, **changes: object) -> Path:
    keys = {key: value for key, value in {**MINIMAL, **changes}.items() if value is not None}
    np.savez(path / "scan.npz", **keys)
    return path / "scan.npz"


def test_a_simulated_scan_round_trips(tmp_path: Path) -> None:
    scan = scan_file_of(simulate_experiment(seed=1, frames=6, size_px=32))
    save_scan(tmp_path / "scan.npz", scan)
    again = load_scan(tmp_path / "scan.npz")
    for name in ScanFile.__dataclass_fields__:
        np.testing.assert_array_equal(getattr(again, name), getattr(scan, name), err_msg=name)
    assert again.counts.dtype == scan.counts.dtype
    assert list(tmp_path.iterdir()) == [tmp_path / "scan.npz"], "nothing else is left behind"


def test_only_frames_and_positions_are_needed(tmp_path: Path) -> None:
    scan = load_scan(written(tmp_path))
    assert len(scan) == 3 and scan.frame_shape_yx == (4, 5)
    np.testing.assert_array_equal(scan.frame_numbers, [0, 1, 2])
    assert scan.probe is None and scan.metadata == {}


@pytest.mark.parametrize("dtype", ["<i4", "<i8", ">u2", "u1", "<u4"])
def test_counts_of_any_integer_type_become_unsigned(tmp_path: Path, dtype: str) -> None:
    scan = load_scan(written(tmp_path, diffraction=np.full((3, 4, 5), 200, dtype)))
    assert scan.counts.dtype.kind == "u" and scan.counts.dtype.isnative
    assert (scan.counts == 200).all()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"diffraction": None}, "diffraction is missing"),
        ({"positions_yx_m": None}, "positions_yx_m is missing"),
        ({"measurement_domain": None}, "measurement_domain"),
        ({"measurement_domain": "amplitude"}, "squared"),
        ({"diffraction": np.ones((3, 4, 5), "f4")}, "integer counts"),
        ({"diffraction": -np.ones((3, 4, 5), "i4")}, "holds -1"),
        ({"diffraction": np.ones((4, 5), "u2")}, "not \\(M, h, w\\)"),
        ({"diffraction": np.ones((0, 4, 5), "u2"), "positions_yx_m": np.ones((0, 2))}, "shape"),
        ({"positions_yx_m": np.zeros((2, 2))}, "positions_yx_m has shape"),
        ({"positions_yx_m": np.zeros((3, 2), complex)}, "safely|rule|cast"),
        ({"frame_numbers": [0, 1, 1]}, "repeated"),
        ({"frame_numbers": [-1, 1, 2]}, "negative"),
        ({"frame_numbers": [0.5, 1, 2]}, "not integers"),
        ({"photon_energy_eV": -1.0}, "photon_energy_eV"),
        ({"detector_pixel_yx_m": [1.0]}, "detector_pixel_yx_m"),
        ({"probe": np.ones((4, 4), complex)}, "probe is complex"),
        ({"metadata": "{not json"}, "metadata"),
        ({"metadata": "[1]"}, "metadata"),
    ],
)
def test_what_is_wrong_is_said(tmp_path: Path, changes: dict, words: str) -> None:
    with pytest.raises(FileFormatError, match=words) as caught:
        load_scan(written(tmp_path, **changes))
    assert "scan.npz" in str(caught.value)


def test_no_pickle_is_ever_opened(tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self):
            return (pytest.fail, ("a pickle was executed",))

    path = written(tmp_path, positions_yx_m=np.array([{"a": 1}], dtype=object))
    with pytest.raises(FileFormatError):
        load_scan(path)
    path.write_bytes(pickle.dumps(Trap()))
    with pytest.raises(FileFormatError):
        load_scan(path)


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 broken", b"text"])
def test_a_file_that_is_no_npz_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "scan.npz").write_bytes(content)
    with pytest.raises(FileFormatError):
        load_scan(tmp_path / "scan.npz")
    with pytest.raises(FileFormatError, match="no scan file"):
        load_scan(tmp_path / "missing.npz")


def test_a_folder_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileFormatError, match="cannot write"):
        save_scan(tmp_path / "none" / "scan.npz", load_scan(written(tmp_path)))
