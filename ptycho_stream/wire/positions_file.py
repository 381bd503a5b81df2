"""Scan positions from a file, NPZ or CSV, for beamlines that know their path before they scan.

Read by ingest at a scan's start where the settings say ``positions.source = "file"``; no pickled
array is ever opened.
"""

from __future__ import annotations

import csv
import zipfile
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from ptycho_stream.errors import FileFormatError
from ptycho_stream.messages import Positions

CSV_COLUMNS = ("frame", "y_m", "x_m")


def load_positions(path: Path, epoch: str = "file", series: str | None = None) -> Positions:
    """Positions of a file as one batch.

    An NPZ holds ``positions_yx_m`` (M, 2), metres, and ``frame_numbers`` (M,) unless they are
    0 to M - 1.  A CSV has a header line with the columns ``frame,y_m,x_m``, in any order; other
    columns are left alone.  Single NaNs are passed on, to be counted as missing positions.

    Args:
        path: of the file; what does not end in ``.csv`` is read as NPZ.
        epoch: name given to the batch.
        series: the detector's series it belongs to, where that is known.

    Raises:
        FileFormatError: the file is missing or unreadable, lacks a key or column, holds no numbers,
            negative or repeated frame numbers, or no position without a NaN.
    """
    if not path.is_file():
        raise FileFormatError(f"there is no positions file {path}: correct positions.path")
    try:
        numbers, position = (_read_csv if path.suffix.lower() == ".csv" else _read_npz)(path)
    except (OSError, zipfile.BadZipFile, UnicodeDecodeError, csv.Error, EOFError) as error:
        raise FileFormatError(f"{path} cannot be read: {error}") from error
    except (ValueError, TypeError, OverflowError) as error:
        raise FileFormatError(f"{path} holds something else than numbers: {error}") from error
    _check(path, numbers, position)
    return Positions(epoch, series, numbers, position)


def _read_npz(path: Path) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    # numpy leaves a file open that it opened itself and could not read
    with path.open("rb") as file, np.load(file, allow_pickle=False) as held:
        if not isinstance(held, np.lib.npyio.NpzFile):
            raise FileFormatError(f"{path} is not an NPZ: write it with numpy.savez")
        if "positions_yx_m" not in held.files:
            raise FileFormatError(
                f"{path} has no positions_yx_m, only {', '.join(held.files)}: "
                "store the probe's centres (M, 2) in metres, y first, under that name"
            )
        position = held["positions_yx_m"].astype(np.float64, casting="same_kind")
        if position.ndim != 2 or position.shape[1] != 2:
            raise FileFormatError(f"{path}: positions_yx_m has shape {position.shape}, not (M, 2)")
        if "frame_numbers" not in held.files:
            return np.arange(len(position), dtype=np.int64), position
        numbers = cast("NDArray[Any]", held["frame_numbers"])
    if numbers.dtype.kind not in "iu" or numbers.shape != (len(position),):
        raise FileFormatError(
            f"{path}: frame_numbers is {numbers.dtype} {numbers.shape}, "
            f"not integers of shape ({len(position)},)"
        )
    return numbers.astype(np.int64), position


def _read_csv(path: Path) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    with path.open(newline="", encoding="utf-8-sig") as file:
        rows = csv.reader(file, skipinitialspace=True)
        header = [name.strip() for name in next(rows, list[str]())]
        missing = [name for name in CSV_COLUMNS if name not in header]
        if missing:
            raise FileFormatError(
                f"{path} has no column {', '.join(missing)}: "
                f"its first line must name {','.join(CSV_COLUMNS)}"
            )
        at = [header.index(name) for name in CSV_COLUMNS]
        numbers: list[int] = []
        position: list[tuple[float, float]] = []
        for row in rows:
            if not row:
                continue
            try:
                frame, y, x = (row[column] for column in at)
                numbers.append(int(frame))
                position.append((float(y), float(x)))
            except (ValueError, IndexError) as error:
                raise FileFormatError(f"{path} line {rows.line_num}: {error}") from error
    return np.array(numbers, np.int64), np.array(position, np.float64).reshape(-1, 2)


def _check(path: Path, numbers: NDArray[np.int64], position: NDArray[np.float64]) -> None:
    if not len(numbers):
        raise FileFormatError(f"{path} holds no position")
    if numbers.min() < 0:
        raise FileFormatError(f"{path}: frame number {numbers.min()} is negative; they begin at 0")
    if len(np.unique(numbers)) != len(numbers):
        raise FileFormatError(f"{path}: a frame number appears twice; a frame has one position")
    for axis, name in enumerate("yx"):
        if not np.isfinite(position[:, axis]).any():
            raise FileFormatError(f"{path}: the {name} positions are all NaN or infinite")
    if not np.isfinite(position).all(axis=1).any():
        raise FileFormatError(f"{path}: no frame has both y and x, one is always NaN or infinite")
