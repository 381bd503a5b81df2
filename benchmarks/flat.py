"""Whether a frame costs the same at a scan's start and after 100,000, and with 50 subscribers.

With the real daemon and sockets: one long scan over a field that grows part by part, on simulated
32 x 32 frames, so that all that is not the network counts for much; the network alone. While it
runs, the processor time of each stage and the bytes that were published are sampled, and given for
a frame from 1,000 to 2,000 frames, from 10,000 to 20,000 ..., and in the scan's second half. Then
short scans with one and with fifty subscribers in turns, who are processes of their own.

    python benchmarks/flat.py [--frames 100000] [--subscribers 50] [--pairs 5]
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Generator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from live import NETWORK_ALONE, Beamline, sustained
from overload import PART, field
from sampling import Sampler

from ptycho_stream.client import ResultStream
from ptycho_stream.files.npz import ScanFile
from ptycho_stream.simulate.experiment import simulate_experiment
from ptycho_stream.simulate.scan_file import scan_file_of

SIZE_PX = 32
FIRST = 1000
SHORT = 3000
"""Frames of a scan with few or many subscribers."""
LOAD = 0.7
"""Of the capacity, so that the image keeps up with the frames."""
STAGES = ("ingest", "reconstruct")


class Used:
    """Processor time of the stages, sampled until it is closed."""

    def __init__(self, beamline: Beamline) -> None:
        stages = beamline.control.status()["stages"]
        self._processes = {name: psutil.Process(stages[name]["pid"]) for name in STAGES}
        self._sampler = Sampler(self.now, 0.05)
        self.close = self._sampler.close

    def now(self) -> dict[str, float]:
        """Seconds used so far by each stage, and when that was."""
        used_s = {name: sum(p.cpu_times()[:2]) for name, p in self._processes.items()}
        return {"at_s": time.monotonic(), **used_s}

    def microseconds(self, from_s: float, to_s: float, frames: float) -> dict[str, float]:
        """Of each stage for each of ``frames`` that were done between two times."""
        held = self._sampler.samples
        at_s = [each["at_s"] for each in held]
        used_s = {
            name: np.diff(np.interp([from_s, to_s], at_s, [each[name] for each in held]))[0]
            for name in STAGES
        }
        return {f"{name}_us": float(used * 1e6 / frames) for name, used in used_s.items()}


def windows(frames: int) -> list[tuple[float, float]]:
    """From 1,000 frames to twice as many, from 10,000 ..., and the second half of the scan."""
    spans: list[tuple[float, float]] = []
    at = FIRST
    while 2 * at <= frames:
        spans.append((at, 2 * at))
        at *= 10
    return [*spans, (frames / 2, frames)]


def over_length(
    beamline: Beamline, part: ScanFile, frames: int, rate_hz: float
) -> list[dict[str, float]]:
    """The cost of a frame in each window of a long scan, and what was published for it."""

    def published() -> tuple[float, float]:
        metrics = beamline.metrics()
        return (
            metrics["ptycho_stream_frames_reconstructed_total"],
            metrics["ptycho_stream_results_published_bytes_total"],
        )

    time.sleep(1.5)  # the last figures of the scan before
    first = published()[0]
    with closing(Used(beamline)) as used, closing(Sampler(published, 0.5)) as sampler:
        seen = beamline.scan(field(part, frames), rate_hz)
        time.sleep(1.5)  # the last figures of the stages
    shown, sent_bytes = zip(*sampler.samples, strict=True)
    costs: list[dict[str, float]] = []
    for low, high in windows(frames):
        from_s, to_s = np.interp([low, high], [n for _, n in seen], [at for at, _ in seen])
        size = np.diff(np.interp([low + first, high + first], shown, sent_bytes))[0]
        costs.append(
            {"from": low, "to": high, "published_bytes": float(size / (high - low))}
            | {"frames_per_s": float((high - low) / (to_s - from_s))}
            | used.microseconds(from_s, to_s, high - low)
        )
    return costs


def follow(endpoints: list[str], count: int) -> None:
    """A process of ``count`` subscribers, until it is killed."""

    def one() -> None:
        with ResultStream(*endpoints) as results:
            for _ in results:
                pass

    for _ in range(count):
        threading.Thread(target=one, daemon=True).start()
    print("ready", flush=True)
    threading.Event().wait()


@contextmanager
def followers(endpoints: list[str], count: int) -> Generator[None]:
    """``count`` subscribers in another process, which takes every update."""
    words = [sys.executable, __file__, "--follow", *endpoints, "--subscribers", str(count)]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        if process.stdout.readline() != "ready\n":
            raise SystemExit("the subscribers did not start")
        yield
    finally:
        process.kill()
        process.wait()


def short_scan(beamline: Beamline, scan: ScanFile, rate_hz: float) -> dict[str, float]:
    """The cost of a frame over the last nine tenths of a short scan."""
    with closing(Used(beamline)) as used:
        seen = beamline.scan(scan, rate_hz)
    at_s, frames = next(update for update in seen if update[1] >= len(scan) / 10)
    return used.microseconds(at_s, seen[-1][0], len(scan) - frames)


def with_subscribers(
    beamline: Beamline, scan: ScanFile, rate_hz: float, pairs: int, count: int
) -> dict[str, object]:
    """One and ``count`` subscribers in turns, and the median ratios."""
    taken: list[dict[str, dict[str, float]]] = []
    for _ in range(pairs):
        one = short_scan(beamline, scan, rate_hz)
        with followers(beamline.endpoints[2:4], count - 1):
            taken.append({"one": one, "many": short_scan(beamline, scan, rate_hz)})
    ratios = {
        f"{name}_ratio_median": statistics.median(
            pair["many"][f"{name}_us"] / pair["one"][f"{name}_us"] for pair in taken
        )
        for name in STAGES
    }
    return {"subscribers": count, "pairs": taken, **ratios}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--frames", type=int, default=100_000, help="of the long scan [100000]")
    parser.add_argument("--subscribers", type=int, default=50, help="[50]")
    parser.add_argument("--pairs", type=int, default=5, help="with one and with many, in turns [5]")
    parser.add_argument("--follow", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.follow:
        follow(options.follow, options.subscribers)
        return
    torch.set_num_threads(1)
    figures: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="flat-") as name:
        folder = Path(name)
        part = scan_file_of(simulate_experiment(seed=1, frames=PART, size_px=SIZE_PX))
        np.savez(folder / "probe.npz", probe=part.probe)
        beamline = Beamline(folder, threads=1, size_px=SIZE_PX, more=NETWORK_ALONE)
        with beamline.running():
            short = field(part, SHORT)
            beamline.scan(short, None)  # what is allocated once
            rate_hz = LOAD * sustained(beamline.scan(short, None))
            figures["offered_frames_per_s"] = rate_hz
            figures["length"] = over_length(beamline, part, options.frames, rate_hz)
            figures["subscribers"] = with_subscribers(
                beamline, short, rate_hz, options.pairs, options.subscribers
            )
    print(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()
