"""Positions from NPZ and CSV files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from ptycho_stream.errors import FileFormatError
from ptycho_stream.wire.positions_file import load_positions

WHERE = np.array([[1e-6, 2e-6], [3e-6, 0.1 + 0.2], [np.nan, 0.0]])


def npz(folder: Path, **keys: object) -> Path:
    np.savez(folder / "p.npz", **keys)
    return folder / "p.npz"


def table(folder: Path, text: str) -> Path:
    (folder / "p.csv").write_text(text)
    return folder / "p.csv"


def test_an_npz_is_read(tmp_path: Path) -> None:
    positions = load_positions(npz(tmp_path, positions_yx_m=WHERE), epoch="e", series="4")
    assert (positions.epoch, positions.series) == ("e", "4")
    np.testing.assert_array_equal(positions.numbers, [0, 1, 2])
    np.testing.assert_array_equal(positions.position_yx_m, WHERE)
    numbered = load_positions(npz(tmp_path, positions_yx_m=WHERE, frame_numbers=[7, 5, 9]))
    np.testing.assert_array_equal(numbered.numbers, [7, 5, 9])


def test_a_csv_is_read_bit_exact_in_any_order_of_columns(tmp_path: Path) -> None:
    rows = "".join(f"{x!r}, {k}, {y!r}, note\n" for k, (y, x) in enumerate(WHERE.tolist()))
    positions = load_positions(table(tmp_path, "x_m,frame,y_m,comment\n" + rows + "\n"))
    np.testing.assert_array_equal(positions.numbers, [0, 1, 2])
    np.testing.assert_array_equal(positions.position_yx_m, WHERE)


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"positions": WHERE}, "positions_yx_m"),
        ({"positions_yx_m": WHERE.T}, r"not \(M, 2\)"),
        ({"positions_yx_m": np.empty((0, 2))}, "no position"),
        ({"positions_yx_m": WHERE.astype(complex)}, "numbers"),
        ({"positions_yx_m": np.array([[None, 1]])}, "numbers"),
        ({"positions_yx_m": np.full((3, 2), np.nan)}, "y positions are all NaN"),
        ({"positions_yx_m": [[np.nan, 1.0], [1.0, np.nan]]}, "no frame has both y and x"),
        ({"positions_yx_m": WHERE, "frame_numbers": [0, 1]}, "frame_numbers"),
        ({"positions_yx_m": WHERE, "frame_numbers": [0, 1, 1]}, "twice"),
        ({"positions_yx_m": WHERE, "frame_numbers": [0, 1, -2]}, "negative"),
        ({"positions_yx_m": WHERE, "frame_numbers": [0.0, 1.0, 2.0]}, "integers"),
    ],
)
def test_what_is_wrong_in_an_npz_is_said(tmp_path: Path, keys: dict, words: str) -> None:
    with pytest.raises(FileFormatError, match=words):
        load_positions(npz(tmp_path, **keys))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "no column frame, y_m, x_m"),
        ("frame,y,x\n0,1,2\n", "no column y_m, x_m"),
        ("frame,y_m,x_m\n", "no position"),
        ("frame,y_m,x_m\n0,1,2\n1,2\n", "line 3"),
        ("frame,y_m,x_m\n0,one,2\n", "line 2.*one"),
        ("frame,y_m,x_m\n0,nan,2\n", "y positions are all NaN"),
        ("frame,y_m,x_m\n99999999999999999999,1,2\n", "numbers"),
        ("\0\0", "p.csv"),
    ],
)
def test_what_is_wrong_in_a_csv_is_said(tmp_path: Path, text: str, words: str) -> None:
    with pytest.raises(FileFormatError, match=words):
        load_positions(table(tmp_path, text))


def test_a_missing_or_broken_file_is_said(tmp_path: Path) -> None:
    with pytest.raises(FileFormatError, match="there is no positions file"):
        load_positions(tmp_path / "none.npz")
    (tmp_path / "p.npz").write_bytes(b"PK broken")
    with pytest.raises(FileFormatError):
        load_positions(tmp_path / "p.npz")
