"""Files appear whole or not at all."""

from __future__ import annotations

from pathlib import Path

import pytest

from ptycho_stream.atomic_file import atomic_file
from ptycho_stream.errors import FileFormatError


def test_the_old_file_stays_until_the_new_one_is_whole(tmp_path: Path) -> None:
    target = tmp_path / "a.bin"
    target.write_bytes(b"old")
    with atomic_file(target) as file:
        file.write(b"new")
        file.flush()
        assert target.read_bytes() == b"old"
    assert target.read_bytes() == b"new"
    assert list(tmp_path.iterdir()) == [target]


def test_what_fails_half_way_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    target = tmp_path / "a.bin"
    target.write_bytes(b"old")

    def fail() -> None:
        with atomic_file(target) as file:
            file.write(b"half of the")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert target.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [target]


def test_a_folder_that_is_not_there_is_an_error_that_names_the_file(tmp_path: Path) -> None:
    target = tmp_path / "none" / "a.bin"
    with pytest.raises(FileFormatError, match="cannot write") as caught, atomic_file(target):
        pass
    assert str(target) in str(caught.value)


def test_two_writers_do_not_disturb_each_other(tmp_path: Path) -> None:
    target = tmp_path / "a.bin"
    with atomic_file(target) as one, atomic_file(target) as two:
        one.write(b"one")
        two.write(b"two")
    assert target.read_bytes() == b"one"  # which was closed last
    assert list(tmp_path.iterdir()) == [target]
