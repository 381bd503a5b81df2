"""Scans for the tests of the store: headers, and frames that anybody can make again from a number.

Also a program, so that the tests have writers and readers in other processes, which can be killed:
``python scan_samples.py write|follow|hold|fill ROOT SCAN_ID ...``.
"""

from __future__ import annotations

import json
import random
import resource
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np

from ptycho_stream.errors import DiskFull
from ptycho_stream.geometry import View
from ptycho_stream.scans import Catalogue, ScanHeader, ScanReader, ScanWriter, new_scan_id

SHAPE_YX = (24, 40)
FRAMES_PER_FILE = 100


def make_header(**changes: Any) -> ScanHeader:
    """A plausible header of a scan that is armed."""
    fields: dict[str, Any] = {
        "scan_id": new_scan_id(),
        "source": "detector",
        "series": "1",
        "state": "armed",
        "created_ns": time.time_ns(),
        "frame_shape_yx": SHAPE_YX,
        "dtype": "<u2",
        "size_px": 32,
    }
    return ScanHeader(**fields | changes)


def running_header(shape_yx: tuple[int, int], dtype: str, size_px: int, **more: Any) -> ScanHeader:
    """The header of a scan that runs, of frames that are looked at about their middle."""
    fields = {"views": (View(size_px),), **more}
    return make_header(
        source="native",
        state="running",
        created_ns=0,
        frame_shape_yx=shape_yx,
        dtype=dtype,
        size_px=size_px,
        **fields,
    )


def make_frame(number: int) -> np.ndarray:
    """The pixels of frame ``number``, different in each."""
    ramp = np.arange(SHAPE_YX[0] * SHAPE_YX[1], dtype=np.uint64).reshape(SHAPE_YX)
    return ((ramp * 2654435761 + number * 40503) >> 7 & 0xFFFF).astype("<u2")


def write_frames(writer: ScanWriter, numbers: range, *, pairs: bool = True) -> None:
    """Append frames ``numbers`` with their pairs and positions; nothing is committed."""
    for number in numbers:
        slot = writer.append(number, make_frame(number), time.time_ns(), time.monotonic_ns())
        if pairs:
            writer.append_pair(number, slot, number * 1e-6, -number * 1e-6, time.monotonic_ns())
    if pairs:
        yx_m = np.array([[number * 1e-6, -number * 1e-6] for number in numbers]).reshape(-1, 2)
        writer.append_positions(np.array(numbers, np.int64), yx_m, time.time_ns())


def make_scan(root: Path, frames: int, **changes: Any) -> str:
    """A sealed scan with ``frames`` frames; returns its id."""
    with ScanWriter.create(root, make_header(**changes), FRAMES_PER_FILE) as writer:
        write_frames(writer, range(frames))
        writer.seal("complete", {})
    return writer.scan_id


def crashed_copy(root: Path, to: Path) -> Path:
    """The store as a crash at this moment would leave it: files as they are, and no lock held.

    A file that takes its name while the others are copied would be in the copy under neither: such
    a copy is no moment's, and is made again.
    """
    for last in (False, False, False, True):
        shutil.rmtree(to, ignore_errors=True)
        try:
            shutil.copytree(root, to)
        except shutil.Error:
            if last:
                raise
        else:
            break
    return to


def assert_bit_exact(reader: ScanReader) -> None:
    """Every committed frame is the one that its record names; every pair points to its frame."""
    records = reader.records()
    assert reader.verify() == []
    for slot, number in enumerate(records["number"].tolist()):
        np.testing.assert_array_equal(reader.frame(slot), make_frame(number))
    pairs = reader.pairs()
    np.testing.assert_array_equal(records["number"][pairs["slot"]], pairs["number"])


def start_process(*arguments: object) -> subprocess.Popen[str]:
    """Run this file as a program."""
    return subprocess.Popen(
        [sys.executable, __file__, *map(str, arguments)], stdout=subprocess.PIPE, text=True
    )


def _write(root: Path, scan_id: str, seed: int) -> None:
    """Write frames until killed, in batches of any size, synced by another thread."""
    if (root / "scans" / scan_id).exists():
        writer, _ = ScanWriter.recover(root, scan_id)
    else:
        writer = ScanWriter.create(root, make_header(scan_id=scan_id), FRAMES_PER_FILE)
    chance = random.Random(seed)
    number = int(writer.records()["number"].max(initial=0)) + 1

    def sync_forever() -> None:
        while True:
            time.sleep(0.02)
            writer.sync()

    threading.Thread(target=sync_forever, daemon=True).start()
    print("writing", flush=True)
    while True:
        count = chance.randint(1, 90)
        write_frames(writer, range(number, number + count))
        number += count
        writer.commit()


def _follow(root: Path, scan_id: str) -> None:
    """Check every frame as it appears, until the scan is sealed."""
    done = 0
    with ScanReader.open(root, scan_id) as reader:
        print("following", flush=True)
        while True:
            reader.refresh()
            sealed, committed, pairs = reader.header.sealed, reader.committed, reader.pair_count
            assert pairs <= reader.committed
            numbers = reader.records(done, committed)["number"]
            for number, pixels in zip(numbers, reader.frames(slice(done, committed)), strict=True):
                np.testing.assert_array_equal(pixels, make_frame(int(number)))
            done = committed
            if sealed:
                break
        assert_bit_exact(reader)
    print(json.dumps({"frames": done}), flush=True)


def _hold(root: Path, scan_id: str) -> None:
    """Hold a lease until killed."""
    with Catalogue(root).lease(scan_id, "training"):
        print("holding", flush=True)
        time.sleep(60)


def _fill(root: Path, scan_id: str, limit_bytes: int) -> None:
    """Write until no file may grow any more, then seal."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit_bytes, limit_bytes))
    header = make_header(scan_id=scan_id)
    writer = ScanWriter.create(root, header, FRAMES_PER_FILE)
    number = 0
    try:
        while True:
            writer.append(number, make_frame(number), 0, 0)
            number += 1
    except DiskFull as error:
        header = writer.seal("interrupted", {}, reason=str(error))
    print(json.dumps({"taken": number, "reason": header.reason, **header.counts}), flush=True)


if __name__ == "__main__":
    command, root_text, name, *numbers = sys.argv[1:]
    program = {"write": _write, "follow": _follow, "hold": _hold, "fill": _fill}[command]
    program(Path(root_text), name, *map(int, numbers))
