"""Write a series as a dump that libertem-dectris' DectrisSim plays: its own sender, our frames.

A dump is, for every part, its length as a little-endian int64 and its bytes.
"""

from __future__ import annotations

from pathlib import Path

from ptycho_stream.files.npz import ScanFile
from ptycho_stream.simulate.series import DectrisSeries, DetectorOptions


def write_dump(path: Path, scan: ScanFile, series: int = 1) -> None:
    messages = DectrisSeries(scan, series, DetectorOptions(rate_hz=1000))
    with path.open("wb") as file:
        for parts in (messages.start(), *map(messages.frame, range(len(scan))), messages.end()):
            for part in parts:
                file.write(len(part).to_bytes(8, "little") + part)
