"""Fine-tune on the first half of the measured siemens star while the daemon records a live scan.

The first half is streamed and completes, then a fine-tuning of it is asked for and the whole scan
is streamed again beside it, slowly enough to last as long. Scored on the second half as
``finetune.py`` does it; exit 1 if the live scan misses a frame or fine-tuning does not pay.

    python benchmarks/finetune_live.py --data DIR --score-tool score_object.py [--minutes 1.75]
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path

import msgspec
import numpy as np
from finetune import NAME, REFERENCE_FILE, score, stored

from ptycho_stream.models.registry import ModelRegistry
from ptycho_stream.simulate.detector import DetectorSimulator, PositionSimulator, play
from ptycho_stream.simulate.series import DetectorOptions
from ptycho_stream.training.job_plan import PLAN_FILE, PlannedScan, read_plan

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from daemon_harness import DaemonHarness, wait_for
from make_siemens_star import siemens_star


def main() -> int:
    """Print what the live scan lost and what fine-tuning gained."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=os.environ.get("PTYCHO_STREAM_DATA"))
    parser.add_argument("--score-tool", type=Path)
    parser.add_argument("--minutes", type=float, default=1.75, help="validation comes on top")
    parser.add_argument("--threads", type=int, default=2, help="of the training")
    args = parser.parse_args()
    if args.data is None:
        parser.error("give --data or set PTYCHO_STREAM_DATA")
    command = [str(args.score_tool), str(args.data / REFERENCE_FILE)] if args.score_tool else []
    scan = siemens_star(args.data, modes=3)
    half = len(scan) // 2
    with tempfile.TemporaryDirectory() as held:
        folder = Path(held)
        np.savez(folder / "probe.npz", probe=scan.probe)
        daemon = DaemonHarness(
            folder,
            {
                "detector": {"dialect": "dectris-v1"},
                "geometry": None,
                "positions": {"wait_s": 10.0},
                "reconstruct": {"size_px": 128, "threads": 1},
                "model": {"registry": "models"},
                "training": {"threads": args.threads},
            },
        )
        rate_hz = len(scan) / (args.minutes * 60 + 15)
        with (
            daemon,
            DetectorSimulator(daemon.detector_endpoint) as detector,
            PositionSimulator(daemon.positions_endpoint) as positions,
            daemon.control() as control,
        ):
            detector.options = DetectorOptions(rate_hz=50)
            play(scan, detector, positions, series=1, stop_after=half)
            control.stop()
            wait_for(lambda: control.scans()[0]["state"] == "complete", 30, "the first half")
            first_id = control.scans()[0]["scan_id"]
            job = control.finetune(
                first_id, name=NAME, minutes=args.minutes, batch_frames=12, promote="never"
            )
            detector.options = DetectorOptions(rate_hz=rate_hz)
            started = time.monotonic()
            play(scan, detector, positions, series=2)
            streamed_s = time.monotonic() - started
            wait_for(lambda: control.scans()[0]["state"] == "complete", 60, "the live scan")
            live = control.scan(control.scans()[0]["scan_id"])
            wait_for(
                lambda: control.job(job["job_id"])["state"] in ("done", "failed", "cancelled"),
                120,
                "the training",
            )
            done = control.job(job["job_id"])
            print(f"fine-tuning: {done['state']}, {done['step']} steps, {done.get('message', '')}")
            print(f"live scan: {live['counts']}, {rate_hz:.1f} frames/s for {streamed_s:.0f} s")
        worse = _gain(daemon.data, job["job_id"], folder, args, command)
    lost = len(scan) - live["counts"]["frames"] + live["counts"].get("missing", 0)
    return int(lost > 0 or worse)


def _gain(
    data: Path, job_id: str, folder: Path, args: argparse.Namespace, command: list[str]
) -> bool:
    """Print how both models do on the second half; whether tuning does not pay."""
    made = folder / "whole"
    made.mkdir()
    settings, scan_id, frames = stored(made, args.data, args.threads)
    plan = read_plan(data / "jobs" / job_id)
    whole = PlannedScan(scan_id, (0, frames), plan.scans[0].photons)
    (made / PLAN_FILE).write_bytes(
        msgspec.json.encode(msgspec.structs.replace(plan, scans=(whole,)))
    )
    registry = ModelRegistry(folder / "models")
    networks = [registry.load(name)[0] for name in (plan.parent or "default", NAME)]
    before, after = score(networks, settings, made, frames // 2, command)
    print(f"excess R on the unseen half: {before[0]:.4f} -> {after[0]:.4f}")
    nrmse_worse = before[1] is not None and after[1] is not None and after[1] > before[1]
    return after[0] > 0.9 * before[0] or nrmse_worse


if __name__ == "__main__":
    sys.exit(main())
