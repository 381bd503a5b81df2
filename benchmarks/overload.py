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
import tempfile
import threading
import time
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from live import NETWORK_ALONE, SIZE_PX, Beamline, memory_kb, repeated, sustained
from sampling import Sampler, growth

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


def seen_share(image: Image, final: Image) -> float:
    """How much of what the final image covers can be seen in an earlier one."""
    wanted = final.weight_yx >= COVERED
    top, left = np.subtract(image.corner_yx_px, final.corner_yx_px)
    height, width = image.object_yx.shape
    there = np.zeros_like(wanted)
    there[top : top + height, left : left + width] = np.isfinite(image.object_yx)
    return float((there & wanted).sum() / wanted.sum())


def overload(beamline: Beamline, part: ScanFile, factor: float, seconds: float) -> dict[str, Any]:
    """The figures of one run."""
    capacity = sustained(beamline.scan(repeated(part, WARM_UP), None))
    scan = field(part, int(factor * capacity * seconds))
    player = threading.Thread(target=beamline.play, args=(scan, factor * capacity))
    pids = {name: beamline.stage(name)["pid"] for name in ("ingest", "reconstruct")}

    def memory_mb() -> dict[str, float]:
        return {f"{name}_mb": memory_kb(pid)["RssAnon"] / 1e3 for name, pid in pids.items()}

    images: dict[str, Image] = {}
    backlog, sent_s = 0, float("inf")
    with (
        ResultStream(beamline.endpoints[2], beamline.endpoints[3]) as results,
        closing(Sampler(memory_mb, 1.0)) as sampler,
    ):
        newest = results.latest()
        after = newest.scan_id if newest else ""
        started_s = time.monotonic()
        player.start()
        for image in results:
            now_s = time.monotonic()
            if image.scan_id <= after:
                continue
            if sent_s == float("inf") and not player.is_alive():
                sent_s = now_s
                sampler.close()
                backlog = beamline.stage("reconstruct")["status"]["backlog_frames"]
            if now_s <= sent_s:
                images["at the last frame"] = image
            if now_s <= sent_s + SETTLED_S:
                images["two seconds later"] = image
            if image.final:
                images["final"] = image
                break
        done_s = time.monotonic()
    final = images.pop("final")
    return {
        "capacity_frames_per_s": round(capacity, 1),
        "offered_frames_per_s": round(len(scan) / (sent_s - started_s), 1),
        "frames": len(scan),
        "counts": beamline.control.scan(final.scan_id)["counts"],
        "in_the_final_image": len(final.frame_numbers),
        "memory": growth(sampler.samples),
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
