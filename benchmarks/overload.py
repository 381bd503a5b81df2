"""What becomes of frames that come faster than they can be reconstructed.

With the real daemon, sockets and a subscriber. First the capacity is measured with a short scan as
fast as it goes, then one long scan comes at ``--factor`` times that rate for ``--seconds``, on
simulated 128 x 128 frames over a field of equal parts, part by part. Told are the frames that were
lost (none may be), the memory of the stages while the scan runs, how much of the final image's area
could be seen when the last frame was sent and two seconds later, and when the backlog was done.

    python benchmarks/overload.py --seconds 60
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from live import NETWORK_ALONE, SIZE_PX, Beamline, memory_kb, repeated, sustained

from ptycho_stream.client import ResultStream
from ptycho_stream.files.npz import ScanFile
from ptycho_stream.results import Image
from ptycho_stream.simulate.experiment import simulate_experiment
from ptycho_stream.simulate.scan_file import scan_file_of

PART = 200
"""Frames of a part of the field, all different."""
WARM_UP = 300
COVERED = 0.5
"""From this weight on (1 = one frame at the probe's peak) the final image counts as seen."""
SETTLED_S = 2.0


def field(scan: ScanFile, frames: int) -> ScanFile:
    """A long scan over a square of parts that are shifted copies of ``scan``."""
    parts = -(-frames // len(scan))
    side = int(np.ceil(np.sqrt(parts)))
    number = np.arange(frames)
    part, index = np.divmod(number, len(scan))
    spanned_m = np.ptp(scan.positions_yx_m, axis=0)
    step_m = spanned_m * (1 + 1 / np.sqrt(len(scan)))
    shift_m = np.stack(np.divmod(part, side), 1) * step_m
    return replace(
        scan,
        counts=scan.counts[index],
        positions_yx_m=scan.positions_yx_m[index] + shift_m,
        frame_numbers=number,
    )


class Memory:
    """Private memory of both stages, each second, until it is closed."""

    def __init__(self, beamline: Beamline) -> None:
        self.samples: dict[str, list[float]] = {"ingest": [], "reconstruct": []}
        self._pids = {name: beamline.stage(name)["pid"] for name in self.samples}
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        while not self._over.wait(1.0):
            for name, pid in self._pids.items():
                self.samples[name].append(memory_kb(pid)["RssAnon"] / 1e3)

    def close(self) -> dict[str, dict[str, float]]:
        """End the thread; MB in the second and in the last third of the time."""
        self._over.set()
        self._thread.join()
        figures: dict[str, dict[str, float]] = {}
        for name, held in self.samples.items():
            third = len(held) // 3
            middle, last = held[third : 2 * third], held[2 * third :]
            figures[name] = {
                "second_third_mb": round(statistics.median(middle), 1),
                "last_third_mb": round(statistics.median(last), 1),
            }
        return figures


def seen_share(image: Image | None, final: Image) -> float:
    """How much of what the final image covers can be seen in an earlier one."""
    wanted = final.weight_yx >= COVERED
    if image is None:
        return 0.0
    there = np.zeros_like(wanted)
    (top, left), (height, width) = (
        tuple(np.subtract(image.corner_yx_px, final.corner_yx_px)),
        image.object_yx.shape,
    )
    there[top : top + height, left : left + width] = np.isfinite(image.object_yx)
    return float((there & wanted).sum() / wanted.sum())


def overload(beamline: Beamline, part: ScanFile, factor: float, seconds: float) -> dict[str, Any]:
    """The figures of one run."""
    capacity = sustained(beamline.scan(repeated(part, WARM_UP), None))
    scan = field(part, int(factor * capacity * seconds))
    player = threading.Thread(target=beamline.play, args=(scan, factor * capacity))
    images: dict[str, Image] = {}
    with ResultStream(beamline.endpoints[2], beamline.endpoints[3]) as results:
        newest = results.latest()
        after = newest.scan_id if newest else ""
        memory = Memory(beamline)
        started_s = time.monotonic()
        player.start()
        sent_s = float("inf")
        for image in results:
            now_s = time.monotonic()
            if image.scan_id <= after:
                continue
            if sent_s == float("inf") and not player.is_alive():
                sent_s, held = now_s, memory.close()
                backlog = beamline.stage("reconstruct")["status"]["backlog_frames"]
            if now_s <= sent_s:
                images["at the last frame"] = image
            if now_s <= sent_s + SETTLED_S:
                images["two seconds later"] = image
            if image.final:
                final, done_s = image, now_s
                break
    header = beamline.control.scan(final.scan_id)
    return {
        "capacity_frames_per_s": round(capacity, 1),
        "offered_frames_per_s": round(len(scan) / (sent_s - started_s), 1),
        "frames": len(scan),
        "counts": header["counts"],
        "in_the_final_image": len(final.frame_numbers),
        "memory": held,
        "backlog_at_the_last_frame": backlog,
        "frames_in_the_image": {when: len(image.frame_numbers) for when, image in images.items()},
        "area_seen": {when: round(seen_share(one, final), 4) for when, one in images.items()},
        "backlog_done_after_s": round(done_s - sent_s, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=60.0, help="the scan lasts [60]")
    parser.add_argument("--factor", type=float, default=3.0, help="times the capacity [3]")
    parser.add_argument("--refine", action="store_true", help="refine and judge as well")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="overload-") as name:
        folder = Path(name)
        part = scan_file_of(simulate_experiment(seed=1, frames=PART, size_px=SIZE_PX))
        np.savez(folder / "probe.npz", probe=part.probe)
        beamline = Beamline(folder, threads=1, more="" if options.refine else NETWORK_ALONE)
        with beamline.running():
            figures = overload(beamline, part, options.factor, options.seconds)
    print(json.dumps({"refined": options.refine, **figures}, indent=2))


if __name__ == "__main__":
    main()
