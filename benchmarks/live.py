"""How much of the bare network's speed is left from detector to image, and how late images are.

Three measurements with the real daemon, sockets and a subscriber, on simulated 128 x 128 frames.
The network, bare or in the daemon, has core 0; everything else, the sender too, has the others:

Refinement and trust, which take what time there is, are off.

1. frames/s from socket to published image while more frames come than it can take, alternating
   with the bare network (same model, probe, batch and threads) on the same frames;
2. receipt-to-publication latency at half of that rate, over a minute (of the newest 2,000
   frames);
3. memory of the stages over a long scan, over the same area again and again.

    python benchmarks/live.py --pairs 3 --long 20000
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Generator
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from prometheus_client.parser import text_string_to_metric_families
from sampling import Sampler

from ptycho_stream.client import ResultStream
from ptycho_stream.errors import EndpointError
from ptycho_stream.files.npz import ScanFile
from ptycho_stream.models.registry import ModelRegistry
from ptycho_stream.physics.probe import load_probe
from ptycho_stream.reconstruct.predict import Predictor
from ptycho_stream.remote import Daemon
from ptycho_stream.simulate.detector import DetectorSimulator, PositionSimulator, play
from ptycho_stream.simulate.experiment import simulate_experiment
from ptycho_stream.simulate.scan_file import scan_file_of
from ptycho_stream.simulate.series import DetectorOptions

SIZE_PX = 128
BATCH = 16
DIFFERENT = 400
CONFIG = """
[data]
directory = "data"
min_free_bytes = 100_000_000
[detector]
endpoint = "tcp://127.0.0.1:{0}"
[positions]
endpoint = "tcp://127.0.0.1:{1}"
socket = "pull"
[probe]
path = "probe.npz"
[reconstruct]
size_px = {size}
threads = {threads}
helpers = {helpers}
device = "{device}"
batch_frames = {batch}
[results]
endpoint = "tcp://127.0.0.1:{2}"
resync_endpoint = "tcp://127.0.0.1:{3}"
[control]
endpoint = "tcp://127.0.0.1:{4}"
[http]
port = {5}
[viewer]
enabled = false
"""

NETWORK_ALONE = "[refine]\nenabled = false\n[trust]\nenabled = false\n"
"""More settings: nothing is refined or judged."""


class Beamline:
    """The daemon, the simulated detector and positioner, and a subscriber."""

    def __init__(
        self,
        folder: Path,
        threads: int,
        *,
        helpers: int = 0,
        size_px: int = SIZE_PX,
        device: str = "cpu",
        batch: int = BATCH,
        more: str = "",
    ) -> None:
        ports = free_ports(6)
        self.config = folder / "daemon.toml"
        self.config.write_text(
            CONFIG.format(
                *ports, size=size_px, threads=threads, helpers=helpers, device=device, batch=batch
            )
            + more
        )
        self.endpoints = [f"tcp://127.0.0.1:{port}" for port in ports]
        self.page = f"http://127.0.0.1:{ports[5]}"
        self.control = Daemon(self.endpoints[4])
        self.log = folder / "daemon.log"

    @contextmanager
    def running(self) -> Generator[None]:
        """The daemon, from ready to stopped."""
        with self.log.open("wb") as log:
            daemon = subprocess.Popen(
                [sys.executable, "-m", "ptycho_streamd.supervisor", "--config", str(self.config)],
                stderr=log,
            )
        try:
            until_s = time.monotonic() + 60
            while not self._ready():
                if daemon.poll() is not None or time.monotonic() > until_s:
                    raise SystemExit(f"the daemon did not start:\n{self.log.read_text()}")
                time.sleep(0.1)
            yield
        finally:
            daemon.send_signal(signal.SIGTERM)
            daemon.wait(20)
            self.control.close()

    def _ready(self) -> bool:
        try:
            return self.control.status()["state"] == "ready"
        except EndpointError:
            return False

    def stage(self, name: str) -> dict[str, Any]:
        """What the daemon says of a stage."""
        return self.control.status()["stages"][name]

    def metrics(self) -> dict[str, float]:
        """Metrics without labels, of all stages, by name."""
        with urllib.request.urlopen(f"{self.page}/metrics", timeout=10) as page:
            families = text_string_to_metric_families(page.read().decode())
        return {one.name: one.value for held in families for one in held.samples if not one.labels}

    def scan(self, scan: ScanFile, rate_hz: float | None) -> list[tuple[float, int]]:
        """Play a scan; (monotonic seconds, frames in the image) of each update received."""
        with ResultStream(self.endpoints[2], self.endpoints[3]) as results:
            newest = results.latest()
            after = newest.scan_id if newest else ""
            player = threading.Thread(target=self.play, args=(scan, rate_hz))
            player.start()
            seen: list[tuple[float, int]] = []
            for image in results:
                if image.scan_id > after:
                    seen.append((time.monotonic(), len(image.frame_numbers)))
                    if image.final:
                        break
            player.join()
        if seen[-1][1] != len(scan):
            raise SystemExit(f"{seen[-1][1]} of {len(scan)} frames are in the image")
        return seen

    def play(self, scan: ScanFile, rate_hz: float | None) -> None:
        """Send a scan, at a rate or as fast as it is taken."""
        with (
            DetectorSimulator(self.endpoints[0], DetectorOptions(rate_hz=rate_hz)) as detector,
            PositionSimulator(self.endpoints[1]) as positions,
        ):
            detector.wait_for_receiver()
            positions.wait_for_receiver()
            play(scan, detector, positions, batch=1)


def free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


def repeated(scan: ScanFile, frames: int) -> ScanFile:
    """``frames`` frames, by taking those of ``scan`` again and again."""
    index = np.arange(frames) % len(scan)
    return replace(
        scan,
        counts=scan.counts[index],
        positions_yx_m=scan.positions_yx_m[index],
        frame_numbers=np.arange(frames),
    )


def pin(beamline: Beamline) -> None:
    """Core 0 for the thread that runs the network, the other cores for everything else."""
    others = set(range(1, os.cpu_count() or 1)) or {0}
    daemon = beamline.control.status()
    for pid in (os.getpid(), daemon["pid"], daemon["stages"]["ingest"]["pid"]):
        for thread in Path(f"/proc/{pid}/task").iterdir():
            os.sched_setaffinity(int(thread.name), others)
    os.sched_setaffinity(daemon["stages"]["reconstruct"]["pid"], {0})


def bare_network(
    scan: ScanFile, probe: Path, seconds: float, device: str = "cpu", batch: int = BATCH
) -> float:
    """Frames/s of the predictor alone, on a CPU on core 0, in batches as the daemon's."""
    cores = os.sched_getaffinity(0)
    if device == "cpu":
        os.sched_setaffinity(0, {0})
    try:
        return frames_per_s(scan, probe, seconds, device, batch)
    finally:
        os.sched_setaffinity(0, cores)


def frames_per_s(
    scan: ScanFile, probe: Path, seconds: float, device: str = "cpu", batch: int = BATCH
) -> float:
    """Of the predictor alone."""
    network, _ = ModelRegistry().load()
    predictor = Predictor(network, load_probe(probe), device, batch)
    shift = np.zeros((batch, 2), np.float32)
    predictor.predict_judged(scan.counts[:batch], shift)
    frames, started_s = 0, time.monotonic()
    while time.monotonic() - started_s < seconds:
        first = frames % (len(scan) - batch)
        predictor.predict_judged(scan.counts[first : first + batch], shift)
        frames += batch
    return frames / (time.monotonic() - started_s)


def sustained(seen: list[tuple[float, int]]) -> float:
    """Frames/s between the first tenth and the end."""
    frames = seen[-1][1]
    start = next(update for update in seen if update[1] >= frames / 10)
    return (frames - start[1]) / (seen[-1][0] - start[0])


def memory_kb(pid: int) -> dict[str, int]:
    """Resident memory, and the part of it that is not file pages."""
    rows = Path(f"/proc/{pid}/status").read_text().splitlines()
    held = dict(row.split(":", 1) for row in rows)
    return {name: int(held[name].split()[0]) for name in ("VmRSS", "RssAnon")}


def memory_over(beamline: Beamline, scan: ScanFile) -> list[dict[str, Any]]:
    """Memory of both stages at each tenth of a long scan."""
    pids = {name: beamline.stage(name)["pid"] for name in ("ingest", "reconstruct")}

    def sample() -> dict[str, Any]:
        received = beamline.stage("ingest")["status"]["frames_received"]
        return {"received": received} | {name: memory_kb(pid) for name, pid in pids.items()}

    with closing(Sampler(sample, 0.5)) as sampler:
        beamline.scan(scan, None)
    return sampler.samples[:: max(len(sampler.samples) // 10, 1)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--threads", type=int, default=1, help="of the network; above 1: not pinned"
    )
    parser.add_argument("--pairs", type=int, default=3, help="bare and live, alternating")
    parser.add_argument("--frames", type=int, default=1500, help="of each live measurement")
    parser.add_argument(
        "--long", type=int, default=20000, help="frames of the memory scan; 0: none"
    )
    parser.add_argument("--device", default="cpu", help="cpu or cuda; the latter: not pinned")
    parser.add_argument("--batch", type=int, default=BATCH, help="frames; on a GPU 256")
    parser.add_argument("--json", action="store_true", help="print the figures only")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory(prefix="live-") as name:
        folder = Path(name)
        experiment = simulate_experiment(seed=1, frames=DIFFERENT, size_px=SIZE_PX)
        np.savez(folder / "probe.npz", probe=experiment.probe.modes)
        scan = repeated(scan_file_of(experiment), max(DIFFERENT, 2 * options.batch))
        told = {"device": options.device, "batch": options.batch}
        beamline = Beamline(folder, options.threads, more=NETWORK_ALONE, **told)
        with beamline.running():
            figures = measure(beamline, scan, folder / "probe.npz", options)
    print(json.dumps(figures, indent=None if options.json else 2))


def measure(
    beamline: Beamline, scan: ScanFile, probe: Path, options: argparse.Namespace
) -> dict[str, Any]:
    if options.threads == 1 and options.device == "cpu":
        pin(beamline)
    pairs = []
    for _ in range(options.pairs):
        bare = bare_network(scan, probe, 5.0, options.device, options.batch)
        live = sustained(beamline.scan(repeated(scan, options.frames), 2 * bare))
        pairs.append({"bare_frames_per_s": round(bare, 1), "live_frames_per_s": round(live, 1)})
    ratio = statistics.median(p["live_frames_per_s"] / p["bare_frames_per_s"] for p in pairs)
    half = statistics.median(p["live_frames_per_s"] for p in pairs) / 2
    seen = beamline.scan(repeated(scan, int(60 * half)), half)
    status = beamline.stage("reconstruct")["status"]
    figures = {
        "cores": os.cpu_count(),
        "threads": options.threads,
        "device": options.device,
        "batch": options.batch,
        "pairs": pairs,
        "live_over_bare_median": round(ratio, 3),
        "half_capacity_frames_per_s": round(half, 1),
        "updates": len(seen),
        "latency_p50_ms": round(status["latency_p50_ms"], 1),
        "latency_p99_ms": round(status["latency_p99_ms"], 1),
    }
    if options.long:
        figures["memory"] = memory_over(beamline, repeated(scan, options.long))
    return figures


if __name__ == "__main__":
    main()
