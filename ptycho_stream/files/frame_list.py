"""A list of frames to leave out, from a text file: numbers and ranges.

Read by ingest for the views of scans.
"""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ptycho_stream.errors import FileFormatError

MAX_BYTES = 16 * 2**20
_MAX_NUMBER = 2**62
_ITEM = re.compile(r"(\d+)(?:\s*(?:-|\.\.)\s*(\d+))?")


def load_frame_list(path: Path) -> NDArray[np.int64]:
    """Ranges (n, 2) of frame numbers, first and last of each, ascending and apart from each other.

    The file has numbers (``17``) and ranges (``20-25`` or ``20..25``, both ends included),
    separated by commas, semicolons, blanks or lines. What follows ``#`` is a comment; a first line
    without a digit is taken for a heading.

    Raises:
        FileFormatError: it is missing or too long, or holds something else.
    """
    try:
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise FileFormatError(f"cannot read {path}, the bad frames: {error.strerror}") from error
    if len(data) > MAX_BYTES:
        raise FileFormatError(f"{path}, the bad frames, is above {MAX_BYTES} bytes: use ranges")
    try:
        lines = data.decode("utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise FileFormatError(f"{path}, the bad frames, is not text: {error}") from error
    found: list[tuple[int, int]] = []
    for at, line in enumerate(lines):
        content = line.split("#", 1)[0]
        if at == 0 and not re.search(r"\d", content):
            continue
        found += (_range(item, path, at + 1) for item in _items(content))
    return _merged(found)


def _items(content: str) -> list[str]:
    closed = re.sub(r"\s*(-|\.\.)\s*", r"\1", content)
    return [item for item in re.split(r"[,;\s]+", closed) if item]


def _range(item: str, path: Path, line: int) -> tuple[int, int]:
    match = _ITEM.fullmatch(item)
    if match is None or len(item) > 60:
        raise FileFormatError(
            f"{path} line {line}: {item[:60]!r} is no frame number, nor a range such as 20-25"
        )
    first = int(match[1])
    last = first if match[2] is None else int(match[2])
    if not first <= last < _MAX_NUMBER:
        raise FileFormatError(
            f"{path} line {line}: {item!r} is no range: its first number is the smaller one"
        )
    return first, last


def _merged(ranges: list[tuple[int, int]]) -> NDArray[np.int64]:
    apart: list[list[int]] = []
    for first, last in sorted(ranges):
        if apart and first <= apart[-1][1] + 1:
            apart[-1][1] = max(apart[-1][1], last)
        else:
            apart.append([first, last])
    return np.array(apart, np.int64).reshape(-1, 2)
