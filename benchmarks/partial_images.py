"""How good images of a part of the scan are: the measured siemens star, streamed at 100 frames/s.

The real daemon, network and refinement, two scans one after the other: the first begins with the
file's guess of the probe (or with ``--probe reference``), the second with the probe that came out
of the first. Scored by the tool that comes with the data, inside the coverage of the frames in the
image (the discs that hold half of the probe's photons, docs/trust.md), when a quarter, a half and
three quarters of the frames have been sent, when the last one has, and in the end.

    python benchmarks/partial_images.py --data DIR --score-tool score_object.py
"""

from __future__ import annotations

import argparse
import bz2
import io
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np

from ptycho_stream.client import ResultStream
from ptycho_stream.physics.probe import Probe
from ptycho_stream.reconstruct.coverage import probe_diameter_px
from ptycho_stream.results import Image
from ptycho_stream.simulate.detector import DetectorSimulator, PositionSimulator, play
from ptycho_stream.simulate.series import DetectorOptions

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from daemon_harness import DaemonHarness
from make_siemens_star import REFERENCE, SOURCE, siemens_star

PARTS = (0.25, 0.5, 0.75, 1.0)


def first_probe(data: Path, which: str) -> np.ndarray:
    """The probe that the first scan begins with, (modes, N, N)."""
    if which == "reference":
        return siemens_star(data, modes=3).probe
    with np.load(io.BytesIO(bz2.decompress((data / SOURCE).read_bytes()))) as held:
        return np.squeeze(held["probe"]).astype(np.complex64)[None]


def covered(image: Image) -> np.ndarray:
    """Which pixels (H, W) lie in the probe's disc about the position of a frame in the image."""
    radius_px = probe_diameter_px(Probe(image.probe)) / 2
    centre_yx_px = (image.positions_yx_m - image.origin_yx_m) / image.pixel_yx_m
    y, x = np.indices(image.object_yx.shape)
    inside = np.zeros(image.object_yx.shape, bool)
    for at_y, at_x in centre_yx_px:
        inside |= (y - at_y) ** 2 + (x - at_x) ** 2 <= radius_px**2
    return inside


def score(image: Image, args: argparse.Namespace) -> dict[str, float]:
    """What the tool says of the covered part of an image; it may be NaN where that is small."""
    well = covered(image)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "object.npz"
        np.savez(path, object=np.where(well, image.object_yx, np.nan))
        command = [sys.executable, args.score_tool, path, args.data / REFERENCE]
        done = subprocess.run(command, capture_output=True, text=True)
    said = done.stdout
    if not said and "share too little" not in done.stderr:
        raise SystemExit(f"{args.score_tool}: {done.stderr}")
    if not said:  # the covered part is too small to be laid over the reference
        return dict.fromkeys(("nrmse", "phase_ssim", "frc_half"), float("nan"))
    return {name: float(value) for name, value in (line.split() for line in said.splitlines())}


def stream(
    daemon: DaemonHarness, known: set[str], args: argparse.Namespace
) -> list[dict[str, object]]:
    """Play the scan once; figures of the images at the parts of it, and of the final one.

    Images of scans that are ``known`` are of former ones.
    """
    scan = siemens_star(args.data)
    total = len(scan.counts)
    told = daemon.settings.results
    taken: list[tuple[str, float, Image]] = []
    with (
        DetectorSimulator(daemon.detector_endpoint, DetectorOptions(rate_hz=args.rate)) as detector,
        PositionSimulator(daemon.positions_endpoint) as positioner,
        ResultStream(told.endpoint, told.resync_endpoint) as results,
    ):
        player = threading.Thread(target=play, args=(scan, detector, positioner))
        detector.wait_for_receiver()
        started_s = time.monotonic()
        player.start()
        waiting = list(PARTS)
        for image in results:
            if image.scan_id in known:
                continue
            at_s = time.monotonic() - started_s
            while waiting and at_s >= waiting[0] * total / args.rate:
                taken.append((f"{waiting.pop(0):.0%}", at_s, image))
            if image.final:
                taken.append(("final", at_s, image))
                known.add(image.scan_id)
                break
        player.join()
    return [
        {"part": part, "at_s": at_s, "frames": len(image.frame_numbers), "layer": image.layer}
        | {"sweeps": image.sweeps, "verdict": image.verdict, **score(image, args)}
        for part, at_s, image in taken
    ]


def main() -> None:
    """Print a table a scan, and all figures as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=os.environ.get("PTYCHO_STREAM_DATA"))
    parser.add_argument("--score-tool", type=Path, required=True)
    parser.add_argument("--probe", choices=("guess", "reference"), default="guess")
    parser.add_argument("--rate", type=float, default=100.0, help="frames/s [100]")
    parser.add_argument("--threads", type=int, default=1, help="of the network [1]")
    parser.add_argument("--helpers", type=int, default=0, help="reconstruct.helpers [0]")
    parser.add_argument("--share", type=float, default=0.75, help="refine.share [0.75]")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        np.savez(Path(folder) / "probe.npz", probe=first_probe(args.data, args.probe))
        settings = {
            "detector": {"dialect": "dectris-v1"},
            "geometry": None,
            "reconstruct": {"size_px": 128, "threads": args.threads, "helpers": args.helpers},
            "refine": {"enabled": True, "share": args.share},
            "trust": {"enabled": True},
        }
        with DaemonHarness(Path(folder), settings) as daemon:
            known: set[str] = set()
            scans = [stream(daemon, known, args) for _ in range(2)]
    for number, figures in enumerate(scans, 1):
        limit = 1.3 * float(figures[-1]["nrmse"])  # type: ignore[arg-type]
        print(f"scan {number}; 1.3 of the final nrmse: {limit:.4f}")
        print("| part | s | frames | layer | sweeps | nrmse | phase_ssim | frc_half |")
        print("|---|---|---|---|---|---|---|---|")
        for row in figures:
            print(
                f"| {row['part']} | {row['at_s']:.1f} | {row['frames']} | {row['layer']} "
                f"| {row['sweeps']:.1f} | {row['nrmse']:.4f} | {row['phase_ssim']:.3f} "
                f"| {row['frc_half']:.3f} |"
            )
    print(json.dumps({"scans": scans, "rate": args.rate, "share": args.share}))


if __name__ == "__main__":
    main()
