"""NPZ files as maps: the arrays that were saved, and nothing of a damaged or hostile file."""

from __future__ import annotations

import zipfile
from pathlib import Path

import numpy as np
import pytest

from ptycho_stream.errors import FileFormatError
from ptycho_stream.files.npz_members import map_npz

ARRAYS = {
    "rows": np.arange(12.0).reshape(3, 4),
    "columns": np.asfortranarray(np.arange(6).reshape(2, 3)),
    "text": np.asarray("héllo"),
    "none": np.zeros((0, 2), np.float32),
    "complex": np.full((2, 2), 1 + 2j, np.complex64),
}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    np.savez(tmp_path / "a.npz", allow_pickle=False, **ARRAYS)
    return tmp_path / "a.npz"


def test_arrays_are_those_that_were_saved(path):
    held = map_npz(path)
    assert held.keys() == ARRAYS.keys()
    for name, array in ARRAYS.items():
        assert held[name].dtype == array.dtype and not held[name].flags.writeable
        np.testing.assert_array_equal(held[name], array)


def test_a_file_that_is_replaced_stays_readable(path):
    held = map_npz(path)
    other = path.with_name("b.npz")
    np.savez(other, rows=np.zeros(3))
    other.replace(path)
    np.testing.assert_array_equal(held["rows"], ARRAYS["rows"])


def test_what_is_missing_damaged_or_not_to_be_opened_is_refused(path, tmp_path):
    with pytest.raises(FileFormatError, match="there is no"):
        map_npz(tmp_path / "never.npz")
    content = path.read_bytes()
    bad = tmp_path / "bad.npz"
    for damaged in (b"", b"PK", content[: len(content) // 2], content[:-30] + bytes(30)):
        bad.write_bytes(damaged)
        with pytest.raises(FileFormatError, match=r"bad\.npz"):
            map_npz(bad)
    np.savez_compressed(bad, rows=np.zeros(100))
    with pytest.raises(FileFormatError, match="compressed"):
        map_npz(bad)
    np.savez(bad, rows=np.array([{}], dtype=object), allow_pickle=True)
    with pytest.raises(FileFormatError, match="Python objects"):
        map_npz(bad)
    with zipfile.ZipFile(bad, "w") as archive, zipfile.ZipFile(path) as good:
        archive.writestr("rows.npy", good.read("rows.npy")[:-8])
    with pytest.raises(FileFormatError, match="promises"):
        map_npz(bad)
