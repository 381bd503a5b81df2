"""The history of a scan's image: appended to, and read although a crash has torn a line."""

from __future__ import annotations

import pytest

from ptycho_stream.errors import StoreError
from ptycho_stream.reconstruct.history import (
    HISTORY_FILE,
    HistoryEntry,
    append_history,
    read_history,
)


def entry(frames: int) -> HistoryEntry:
    figures = {"r_factor": 0.25, "excess": -0.001}
    reasons = ("a reason: ü",)
    return HistoryEntry(frames * 7, 2, frames, "refined", 1.5, "m", figures, "good", reasons)


def test_entries_are_read_as_they_were_written(tmp_path):
    assert read_history(tmp_path) == []
    for frames in (3, 4, 5):
        append_history(tmp_path, entry(frames))
    assert read_history(tmp_path) == [entry(3), entry(4), entry(5)]


@pytest.mark.parametrize("left", [1, 20, -2, -1])
def test_a_torn_line_costs_itself_only(tmp_path, left, caplog):
    append_history(tmp_path, entry(3))
    path = tmp_path / HISTORY_FILE
    whole = path.read_bytes()
    path.write_bytes(whole + whole[:left])
    append_history(tmp_path, entry(5))
    expected = [entry(3), entry(5)]
    if left == -1:  # but for its end, which is no loss
        expected.insert(1, entry(3))
    assert read_history(tmp_path) == expected
    assert ("line 2 is left out" in caplog.text) == (left != -1)


@pytest.mark.parametrize("line", ["[]", '{"frames": 3}', "null", "\x00\x00", '"text"', "\xff"])
def test_lines_of_others_are_left_out(tmp_path, line, caplog):
    append_history(tmp_path, entry(3))
    with (tmp_path / HISTORY_FILE).open("a", encoding="latin-1") as file:
        file.write(line + "\n")
    append_history(tmp_path, entry(4))
    assert read_history(tmp_path) == [entry(3), entry(4)]
    assert "line 2" in caplog.text


def test_a_folder_that_is_gone_is_said(tmp_path):
    with pytest.raises(StoreError, match=r"cannot write .*history\.jsonl"):
        append_history(tmp_path / "gone", entry(1))
    (tmp_path / HISTORY_FILE).mkdir()
    with pytest.raises(StoreError, match="cannot read"):
        read_history(tmp_path)


def test_figures_that_are_no_numbers_are_a_fault_of_ours(tmp_path):
    bad = HistoryEntry(1, 1, 1, "predicted", 0.0, "m", {"excess": float("nan")})
    with pytest.raises(ValueError, match="JSON"):
        append_history(tmp_path, bad)
    assert read_history(tmp_path) == []
