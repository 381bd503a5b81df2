"""Fine-tune on the first half of the measured siemens-star scan, score on the second.

Writes the frames into a scan store, runs a real training job on the first half of the pairs, and
stitches the second half, whose frames no training saw, from its own patches alone: with the weights
before and after. Printed are excess R of these frames and, with the scoring tool, the closeness to
the reference run. Run by hand after the training's defaults change; docs/training.md has figures.

    python benchmarks/finetune.py --data DIR --score-tool score_object.py [--minutes 2]
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from zero_shot import REFERENCE_FILE, load_scan

from ptycho_stream.files.npz import ScanFile, save_arrays
from ptycho_stream.files.stored_scan import store_scan
from ptycho_stream.models.registry import ModelRegistry
from ptycho_stream.networks.network import Network
from ptycho_stream.reconstruct.misfit import stitched_misfit
from ptycho_stream.reconstruct.recipe import told_probe
from ptycho_stream.scans import Catalogue
from ptycho_stream.settings import Settings
from ptycho_stream.training.job import JobProgress, JobSpec
from ptycho_stream.training.job_plan import read_plan
from ptycho_stream.training.jobs import run_job
from ptycho_stream.training.scan_frames import open_frames
from ptycho_stream.training.validation import stitched

PIXEL_M = 10e-9
"""The scan comes without a geometry; the figures do not depend on this."""

NAME = "finetuned"


def stored(folder: Path, data: Path, threads: int) -> tuple[Settings, str, int]:
    """The measured scan in a store, settings for it, its id and its number of frames."""
    counts, corner, probe = load_scan(data)
    centre = corner + (counts.shape[-1] - 1) / 2
    scan = ScanFile(
        counts=np.rint(counts).astype(np.uint16),
        positions_yx_m=centre * PIXEL_M,
        frame_numbers=np.arange(len(counts), dtype=np.int64),
        pixel_yx_m=(PIXEL_M, PIXEL_M),
    )
    save_arrays(folder / "probe.npz", {"probe": probe.modes})
    settings = Settings.model_validate(
        {
            "data": {"directory": folder / "data"},
            "probe": {"path": folder / "probe.npz"},
            "model": {"registry": folder / "models"},
            "training": {"threads": threads},
        }
    )
    return settings, store_scan(folder / "data", scan), len(counts)


def score(
    networks: list[Network], settings: Settings, job: Path, first: int, command: list[str]
) -> list[tuple[float, float | None]]:
    """Excess R and nrmse of each network, of the frames from ``first`` on and their patches alone.

    Only what all of them have seen is scored: the frames that one alone leaves out are often the
    hard ones, and would make it look better.
    """
    planned = read_plan(job).scans[0]
    with Catalogue(settings.data.directory).open(planned.scan_id) as reader:
        probe = told_probe(settings.probe, reader.header)
        frames = open_frames(reader, probe, planned.photons, (first, reader.pair_count))
        every, cpu = np.arange(len(frames)), torch.device("cpu")
        made = [stitched(network, frames, every, cpu) for network in networks]
        seen = np.all([np.isfinite(object_yx) for _, object_yx, _ in made], axis=0)
        bright = np.all([weight > 1e-2 * weight.max() for _, _, weight in made], axis=0)
        results: list[tuple[float, float | None]] = []
        for corner, object_yx, weight in made:
            misfit = stitched_misfit(
                np.where(seen, object_yx, np.nan).astype(np.complex64),
                frames.corner_yx_px - corner,
                frames.shift_yx_px,
                frames.counts,
                frames.probe,
                frames.valid,
            )
            print(
                f"  R {misfit.r_factor:.4f}, of noise {misfit.r_poisson:.4f}, excess "
                f"{misfit.excess:.4f}, deviance {misfit.deviance:.2f}, {misfit.frames} frames; "
                f"seen {np.isfinite(object_yx).mean():.3f} of the box"
            )
            # As zero_shot.py does: where patches hardly weigh anything there is nothing to score.
            np.savez(job / "score.npz", object=object_yx, weight=np.where(bright, weight, 0))
            results.append((misfit.excess, _nrmse(job / "score.npz", command)))
    return results


def _nrmse(path: Path, command: list[str]) -> float | None:
    if not command:
        return None
    done = subprocess.run(
        [sys.executable, command[0], str(path), *command[1:]],
        capture_output=True,
        text=True,
        check=True,
    )
    print("  " + ", ".join(done.stdout.splitlines()))
    return float(done.stdout.split()[1])


def main() -> int:
    """Print both figures before and after; exit 1 if fine-tuning does not pay as it should."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=os.environ.get("PTYCHO_STREAM_DATA"))
    parser.add_argument("--score-tool", type=Path)
    parser.add_argument("--model", default="default")
    parser.add_argument("--minutes", type=float, default=1.75, help="validation comes on top")
    parser.add_argument("--steps", type=int, help="budget instead of minutes")
    parser.add_argument("--loss", default="unsupervised")
    parser.add_argument("--learning-rate", type=float)
    parser.add_argument("--batch-frames", type=int)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    if args.data is None:
        parser.error("give --data or set PTYCHO_STREAM_DATA")
    torch.set_num_threads(args.threads)
    command = [str(args.score_tool), str(args.data / REFERENCE_FILE)] if args.score_tool else []
    with tempfile.TemporaryDirectory() as held:
        folder = Path(held)
        settings, scan_id, frames = stored(folder, args.data, args.threads)
        half, job = frames // 2, folder / "job"
        spec = JobSpec(
            job_id="benchmark",
            name=NAME,
            scan_ids=(scan_id,),
            frames=(0, half),
            model=args.model,
            minutes=None if args.steps else args.minutes,
            steps=args.steps,
            loss=args.loss,
            learning_rate=args.learning_rate,
            batch_frames=args.batch_frames,
        )
        started, started_cpu = time.monotonic(), time.process_time()
        done = run_job(spec, settings, job, _tell, lambda: "")
        wall, cpu = time.monotonic() - started, time.process_time() - started_cpu
        print(f"\n{done.message}; {done.step} steps, {wall:.0f} s, {cpu:.0f} s of processors")
        if done.state != "done":
            return 1
        registry, parent = ModelRegistry(folder / "models"), read_plan(job).parent or args.model
        print(f"frames {half} to {frames}, stitched from their own patches; before and after")
        networks = [registry.load(name)[0] for name in (parent, NAME)]
        results = score(networks, settings, job, half, command)
    (before, nrmse_before), (after, nrmse_after) = results
    print(f"excess R on the unseen half: {before:.4f} -> {after:.4f} ({after / before - 1:+.0%})")
    worse = nrmse_before is not None and nrmse_after is not None and nrmse_after > nrmse_before
    return int(after > 0.9 * before or worse)


def _tell(progress: JobProgress) -> None:
    loss = "" if progress.loss is None else f"loss {progress.loss:.4f}"
    print(f"\r{progress.state} {progress.fraction:4.0%} step {progress.step} {loss}", end="")


if __name__ == "__main__":
    sys.exit(main())
