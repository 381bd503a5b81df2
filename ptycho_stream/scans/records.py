"""The fixed-size records of the three logs of a scan, and the check word that ends each of them.

Written by :class:`~ptycho_stream.scans.writer.ScanWriter`, read and checked by readers and by
recovery; ``docs/store.md`` describes the fields.  All little endian, all multiples of 8 bytes.
``i0`` is a reading of the beam monitor; 0 where there is none.
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

PAIR_FLAG_OUT_OF_EXTENT: Final = 1
"""The position lies further out than ``reconstruct.max_extent_m``."""
PAIR_FLAG_JUMP: Final = 2
"""The position is further from its predecessor than ``reconstruct.max_step_m``."""
PAIR_FLAG_GATED: Final = 4
"""The frame is to be left out of the image: its gate was ``skip`` (shutter closed, top-up)."""

POSITION_GATE_OPEN: Final = 1
"""The positioner says that the frame is to be in the image."""
POSITION_GATE_SKIP: Final = 2
"""The positioner says that it is not."""

FRAME_FLAG_DARK: Final = 1
"""Taken without beam, for the background; such a frame has no pair."""
FRAME_FLAG_SKIP: Final = 2
"""To be left out of the image; its pair, if it has a position, is flagged as gated."""
FRAME_FLAG_LOST: Final = 1 << 31
"""Damaged, which recovery has found out: the slot is taken, nothing else in the record is true."""

FRAME_RECORD: Final = np.dtype(
    [
        ("number", "<u8"),
        ("start_ns", "<i8"),
        ("stop_ns", "<i8"),
        ("received_ns", "<i8"),
        ("received_monotonic_ns", "<i8"),
        ("checksum", "<u8"),
        ("flags", "<u4"),
        ("slot", "<u4"),
        ("i0", "<f8"),
        ("record_check", "<u8"),
    ]
)
POSITION_RECORD: Final = np.dtype(
    [
        ("number", "<i8"),
        ("y_m", "<f8"),
        ("x_m", "<f8"),
        ("received_ns", "<i8"),
        ("i0", "<f8"),
        ("gate", "<u8"),
        ("record_check", "<u8"),
    ]
)
PAIR_RECORD: Final = np.dtype(
    [
        ("number", "<u8"),
        ("slot", "<u4"),
        ("revision", "<u4"),
        ("y_m", "<f8"),
        ("x_m", "<f8"),
        ("paired_monotonic_ns", "<i8"),
        ("flags", "<u4"),
        ("reserved", "<u4"),
        ("i0", "<f8"),
        ("record_check", "<u8"),
    ]
)

FRAME_RECORD_FORMAT: Final = "<QqqqqQIId"
"""``struct`` format of a frame record without its check word: packing one costs 0.1 µs."""
POSITION_RECORD_FORMAT: Final = "<qddqdQQ"
PAIR_RECORD_FORMAT: Final = "<QIIddqIIdQ"
"""``struct`` formats of whole records; their check words are stamped when they are written."""

# Odd 64-bit numbers without structure (fractional parts of square roots of primes, low bit set).
_MULTIPLIERS: Final = (
    0x6A09E667F3BCC909,
    0xBB67AE8584CAA73B,
    0x3C6EF372FE94F82B,
    0xA54FF53A5F1D36F1,
    0x510E527FADE682D1,
    0x9B05688C2B3E6C1F,
    0x1F83D9ABFB41BD6B,
    0x5BE0CD19137E2179,
)
_FINAL_MULTIPLIER: Final = 0x9E3779B97F4A7C15


def record_checks(records: NDArray[np.void]) -> NDArray[np.uint64]:
    """Check words (n,) of contiguous ``records`` (n,).

    A multilinear hash of the 64-bit words before the check word, modulo 2^64 (Lemire and Kaser,
    "Strongly universal string hashing is fast", Computer Journal 57, 2014): with odd multipliers
    every change of a single word changes the sum.  xxh3 costs 0.4 µs a record from Python; this
    checks 64 at a time.  A record of zeros never fits, nor does one of another log.
    """
    count = records.dtype.itemsize // 8
    words = records.view(np.uint64).reshape(len(records), count)
    multipliers = np.array(_MULTIPLIERS[: count - 1], np.uint64)
    total = words[:, :-1] @ multipliers + np.uint64(_FINAL_MULTIPLIER // count)
    total ^= total >> np.uint64(32)
    total *= np.uint64(_FINAL_MULTIPLIER)
    return total


def stamp(records: NDArray[np.void]) -> None:
    """Fill in the check words of contiguous ``records``."""
    records["record_check"] = record_checks(records)


def intact(records: NDArray[np.void]) -> NDArray[np.bool_]:
    """Which of contiguous ``records`` (n,) carry the check word that their content asks for."""
    return records["record_check"] == record_checks(records)


def positions_of(records: NDArray[Any]) -> NDArray[np.float64]:
    """Positions (n, 2), metres, of ``records`` (n,) of the logs of positions or pairs."""
    return np.stack([records["y_m"], records["x_m"]], axis=1)
