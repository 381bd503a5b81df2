"""What a stopped subscriber and fifty slow ones cost: rates with and without them, and memory.

Scans alternate in one run, without them and with them: one subscriber that is stopped (SIGSTOP)
amid the scan, and fifty that look at an image every one to two seconds. At each scan's end all go
on, and the time is taken until each has the final image. The network has core 0, all the rest the
others; the sender sends twice what the network can take. Nothing is refined or judged.

    python benchmarks/subscribers.py --pairs 3 --frames 900 --slow 50
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from live import NETWORK_ALONE, Beamline, bare_network, memory_kb, pin, repeated, sustained

from ptycho_stream.client import ResultStream
from ptycho_stream.files.npz import ScanFile
from ptycho_stream.scans.catalogue import Catalogue
from ptycho_stream.simulate.experiment import simulate_experiment
from ptycho_stream.simulate.scan_file import scan_file_of

DIFFERENT = 200
SIZE_PX = 128
SLOW_S = (1.0, 2.0)
PATIENCE_S = 30.0


def watch_slowly(endpoints: list[str], count: int) -> None:
    """A process of ``count`` subscribers; told ``SCAN_ID`` on stdin it prints when each has it."""
    told = threading.Event()
    wanted: list[str] = []
    late_s: list[float] = []

    def one(seed: int) -> None:
        rng = random.Random(seed)
        with ResultStream(*endpoints, timeout_s=PATIENCE_S) as stream:
            while not told.is_set():
                stream.latest(PATIENCE_S)
                told.wait(rng.uniform(*SLOW_S))
            started_s = time.monotonic()
            image = stream.wait_complete(wanted[0], PATIENCE_S)
            late_s.append(time.monotonic() - started_s)
            assert image.complete

    threads = [threading.Thread(target=one, args=(seed,)) for seed in range(count)]
    for thread in threads:
        thread.start()
    print("ready", flush=True)
    wanted.append(sys.stdin.readline().strip())
    told.set()
    for thread in threads:
        thread.join()
    print(json.dumps(late_s), flush=True)


class Watchers:
    """A process of subscribers."""

    def __init__(self, endpoints: list[str], count: int) -> None:
        words = [sys.executable, __file__, "--watch", *endpoints, "--slow", str(count)]
        self.process = subprocess.Popen(
            words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert self.process.stdout is not None
        self.process.stdout.readline()

    def go_on(self, scan_id: str) -> list[float]:
        """Seconds until each of them has the final image of a scan."""
        self.process.send_signal(signal.SIGCONT)
        answer, _ = self.process.communicate(scan_id + "\n", timeout=2 * PATIENCE_S)
        return json.loads(answer)


@contextmanager
def slow_subscribers(endpoints: list[str], count: int) -> Generator[list[Watchers]]:
    """One that will be stopped, and ``count`` that are slow."""
    watchers = [Watchers(endpoints, 1), Watchers(endpoints, count)]
    others = set(range(1, os.cpu_count() or 1)) or {0}
    for each in watchers:
        os.sched_setaffinity(each.process.pid, others)
    try:
        yield watchers
    finally:
        for each in watchers:
            each.process.kill()
            each.process.wait()


def ingest_rate(folder: Path) -> tuple[str, float]:
    """The newest scan, and frames/s that ingest took, by the records of their receipt."""
    catalogue = Catalogue(folder / "data")
    header = catalogue.latest()
    assert header is not None
    with catalogue.open(header.scan_id) as reader:
        received_ns = reader.records()["received_monotonic_ns"]
    return header.scan_id, (len(received_ns) - 1) * 1e9 / float(received_ns[-1] - received_ns[0])


def main_thread_s(pid: int) -> float:
    """Processor time that the thread which predicts, stitches and publishes has used so far.

    Unlike the rate it does not hang on who else wants the processor.
    """
    first = next(thread for thread in psutil.Process(pid).threads() if thread.id == pid)
    return first.user_time + first.system_time


def measure(beamline: Beamline, folder: Path, scan: ScanFile, rate_hz: float) -> dict[str, Any]:
    pid = beamline.stage("reconstruct")["pid"]
    before_s = main_thread_s(pid)
    seen = beamline.scan(scan, rate_hz)
    used_s = main_thread_s(pid) - before_s
    scan_id, ingested = ingest_rate(folder)
    return {
        "scan_id": scan_id,
        "ingest_frames_per_s": ingested,
        "reconstruct_frames_per_s": sustained(seen),
        "reconstruct_frames_per_cpu_s": len(scan) / used_s,
        "memory_mb": memory_kb(pid)["RssAnon"] / 1e3,
    }


def measure_disturbed(
    beamline: Beamline, folder: Path, scan: ScanFile, rate_hz: float, count: int
) -> dict[str, Any]:
    with slow_subscribers(beamline.endpoints[2:4], count) as watchers:
        stopped = watchers[0].process
        timer = threading.Timer(2.0, lambda: stopped.send_signal(signal.SIGSTOP))
        timer.start()
        figures = measure(beamline, folder, scan, rate_hz)
        timer.join()
        late_s = [late for each in watchers[::-1] for late in each.go_on(figures["scan_id"])]
    return figures | {"newest_image_after_s": late_s}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=3, help="without and with, alternating")
    parser.add_argument("--frames", type=int, default=900, help="of each scan")
    parser.add_argument("--slow", type=int, default=50, help="subscribers")
    parser.add_argument("--watch", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.watch:
        watch_slowly(options.watch, options.slow)
        return
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="subscribers-") as name:
        folder = Path(name)
        experiment = simulate_experiment(seed=1, frames=DIFFERENT, size_px=SIZE_PX)
        np.savez(folder / "probe.npz", probe=experiment.probe.modes)
        beamline = Beamline(folder, 1, more=NETWORK_ALONE)
        scan = repeated(scan_file_of(experiment), options.frames)
        with beamline.running():
            figures = compare(beamline, folder, scan, options)
    print(json.dumps(figures, indent=2))


def compare(
    beamline: Beamline, folder: Path, scan: ScanFile, options: argparse.Namespace
) -> dict[str, Any]:
    pin(beamline)
    rate_hz = 2 * bare_network(scan, folder / "probe.npz", 3.0)
    beamline.scan(scan, rate_hz)  # what is allocated once
    pairs: list[dict[str, Any]] = []
    for _ in range(options.pairs):
        alone = measure(beamline, folder, scan, rate_hz)
        beside = measure_disturbed(beamline, folder, scan, rate_hz, options.slow)
        pairs.append({"without": alone, "with": beside})
    late_s = [late for pair in pairs for late in pair["with"]["newest_image_after_s"]]
    for pair in pairs:
        del pair["with"]["newest_image_after_s"]
    return {
        "cores": os.cpu_count(),
        "slow_subscribers": options.slow,
        "pairs": pairs,
        "ingest_ratio_median": ratio(pairs, "ingest_frames_per_s"),
        "reconstruct_ratio_median": ratio(pairs, "reconstruct_frames_per_s"),
        "reconstruct_cpu_ratio_median": ratio(pairs, "reconstruct_frames_per_cpu_s"),
        "memory_growth_mb": max(p["with"]["memory_mb"] - p["without"]["memory_mb"] for p in pairs),
        "subscribers_that_went_on": len(late_s),
        "newest_image_after_s": {"median": statistics.median(late_s), "most": max(late_s)},
    }


def ratio(pairs: list[dict[str, Any]], key: str) -> float:
    return round(statistics.median(pair["with"][key] / pair["without"][key] for pair in pairs), 3)


if __name__ == "__main__":
    main()
