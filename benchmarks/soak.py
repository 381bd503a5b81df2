"""Scan after scan at half of what the daemon can take: does anything of it grow?

First the capacity is measured with one scan as fast as it goes, then scans follow each other at
half of that rate for ``--minutes``. Memory, threads and descriptors of every process and the files
of the data directory, which retention keeps small, are sampled; compared are the medians of the
second and of the last third of the run, and memory is told for each minute.

    python benchmarks/soak.py --minutes 30
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from live import Beamline, repeated, sustained
from sampling import Sampler, growth

from ptycho_stream.files.npz import ScanFile
from ptycho_stream.simulate.experiment import simulate_experiment
from ptycho_stream.simulate.scan_file import scan_file_of

DIFFERENT = 200
SIZE_PX = 128
SAMPLE_S = 2.0
KEPT_BYTES = 400_000_000


def sample(beamline: Beamline, folder: Path) -> dict[str, float]:
    """What each process and the data directory hold just now."""
    status = beamline.control.status()
    pids = {name: stage["pid"] for name, stage in status["stages"].items()}
    found: dict[str, float] = {}
    for name, pid in {"supervisor": status["pid"], **pids}.items():
        process = psutil.Process(pid)
        memory = process.memory_full_info()
        found[f"{name}_memory_mb"] = memory.uss / 1e6
        found[f"{name}_threads"] = process.num_threads()
        found[f"{name}_descriptors"] = process.num_fds()
        found[f"{name}_restarts"] = status["stages"].get(name, {}).get("restarts", 0)
    files = [path for path in (folder / "data").rglob("*") if path.is_file()]
    found["files"] = len(files)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--frames", type=int, default=300, help="of a scan")
    parser.add_argument("--json", action="store_true", help="print the figures only")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="soak-") as name:
        folder = Path(name)
        experiment = simulate_experiment(seed=1, frames=DIFFERENT, size_px=SIZE_PX)
        np.savez(folder / "probe.npz", probe=experiment.probe.modes)
        beamline = Beamline(folder, 1)
        config = beamline.config.read_text()
        config = config.replace("[detector]", f"retention_bytes = {KEPT_BYTES}\n[detector]", 1)
        beamline.config.write_text(config + "[refine]\nseconds = 2.0\n")
        scan = repeated(scan_file_of(experiment), options.frames)
        with beamline.running():
            figures = soak(beamline, folder, scan, options.minutes)
    print(json.dumps(figures, indent=None if options.json else 2))


def soak(beamline: Beamline, folder: Path, scan: ScanFile, minutes: float) -> dict[str, Any]:
    capacity = sustained(beamline.scan(scan, None))
    until_s, scans = time.monotonic() + 60 * minutes, 0
    with closing(Sampler(partial(sample, beamline, folder), SAMPLE_S)) as sampler:
        while time.monotonic() < until_s:
            beamline.scan(scan, capacity / 2)
            scans += 1
    return {
        "minutes": minutes,
        "frames_per_s": round(capacity / 2, 1),
        "scans": scans,
        "frames": scans * len(scan),
        "samples": len(sampler.samples),
        "growth": growth(sampler.samples),
        "each_minute": each_minute(sampler.samples),
    }


def each_minute(samples: list[dict[str, float]]) -> dict[str, list[float]]:
    """Medians of the memory of each process, minute by minute: whether it has come to rest."""
    span = max(1, round(60 / SAMPLE_S))
    minutes = [samples[at : at + span] for at in range(0, len(samples), span)]
    return {
        key: [round(statistics.median(one[key] for one in minute), 1) for minute in minutes]
        for key in samples[-1]
        if key.endswith("_memory_mb")
    }


if __name__ == "__main__":
    main()
