"""How much faster the reconstruct stage predicts with a helper: one core each, against one alone.

Both in one run, alternating, with the real daemon, sockets and a subscriber, on simulated
128 x 128 frames that come faster than they can be predicted. Ingest, the sender and the subscriber
share the second core with the helper.

    python benchmarks/wide.py --pairs 3
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
from pathlib import Path

import numpy as np
from live import DIFFERENT, NETWORK_ALONE, SIZE_PX, Beamline, repeated, sustained

from ptycho_stream.files.npz import ScanFile
from ptycho_stream.simulate.experiment import simulate_experiment
from ptycho_stream.simulate.scan_file import scan_file_of


def pin(beamline: Beamline) -> None:
    """A core for the stage, the others for all else."""
    others = set(range(1, os.cpu_count() or 1)) or {0}
    status = beamline.control.status()
    for name, stage in status["stages"].items():
        for thread in Path(f"/proc/{stage['pid']}/task").iterdir():
            os.sched_setaffinity(int(thread.name), {0} if name == "reconstruct" else others)


def frames_per_s(folder: Path, scan: ScanFile, helpers: int) -> float:
    """Of the image's growth, in a daemon of its own."""
    folder.mkdir()
    np.savez(folder / "probe.npz", probe=scan.probe)
    beamline = Beamline(folder, threads=1, helpers=helpers, more=NETWORK_ALONE)
    with beamline.running():
        pin(beamline)
        return sustained(beamline.scan(scan, None))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=3, help="alone and with help, alternating")
    parser.add_argument("--frames", type=int, default=1500, help="of each measurement")
    parser.add_argument("--helpers", type=int, default=1)
    options = parser.parse_args()
    scan = scan_file_of(simulate_experiment(seed=1, frames=DIFFERENT, size_px=SIZE_PX))
    scan = repeated(scan, options.frames)
    pairs = []
    with tempfile.TemporaryDirectory(prefix="wide-") as name:
        for number in range(options.pairs):
            alone = frames_per_s(Path(name) / f"{number}-alone", scan, 0)
            helped = frames_per_s(Path(name) / f"{number}-helped", scan, options.helpers)
            pairs.append({"alone_frames_per_s": round(alone, 1), "helped": round(helped, 1)})
    ratio = statistics.median(p["helped"] / p["alone_frames_per_s"] for p in pairs)
    figures = {"cores": os.cpu_count(), "helpers": options.helpers, "pairs": pairs}
    print(json.dumps({**figures, "ratio_median": round(ratio, 2)}, indent=2))


if __name__ == "__main__":
    main()
