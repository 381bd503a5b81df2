"""Files that appear whole or not at all: images, scan files and pictures are written through this.

A reader, or a program that looks after a crash, sees the old file or the new one and never half.
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from ptycho_stream.errors import FileFormatError


@contextmanager
def atomic_file(path: Path) -> Generator[IO[bytes]]:
    """Open a file that takes the name ``path`` when the block ends, and is gone if it fails.

    The content has reached the disk before the name does.

    Raises:
        FileFormatError: the path cannot be written.
    """
    with atomic_path(path) as partial, partial.open("wb") as file:
        yield file


@contextmanager
def atomic_path(path: Path) -> Generator[Path]:
    """Another name for ``path`` until the block ends, for what must open its files by name.

    As :func:`atomic_file`; the block writes and closes the file.

    Raises:
        FileFormatError: the path cannot be written.
    """
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex}.partial")
    try:
        yield partial
        sync_path(partial)
        partial.replace(path)
        sync_path(path.parent)
    except OSError as error:
        raise FileFormatError(
            f"cannot write {path}: {error.strerror or error}; choose an existing folder with room"
        ) from error
    finally:
        partial.unlink(missing_ok=True)


def make_folder(path: Path) -> None:
    """Make a folder that files go into, if it is not there yet.

    Raises:
        FileFormatError: it cannot be made.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise FileFormatError(
            f"cannot make the folder {path}: {error.strerror or error}; choose another"
        ) from error


def sync_path(path: Path) -> None:
    """Wait until a file, or a folder's list of names, has reached the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
