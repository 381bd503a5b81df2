"""Train the plain encoder-decoder without any truth on one simulated scan, and compare with it.

Simulates a scan, writes it into a scan store, runs a real unsupervised training job from nothing on
it, stitches all frames and prints Pearson's correlation of phase and amplitude with the sample's,
after removing what ptychography cannot know (factor, ramp). Exit status 1 if the phase's is below
the limit or the output has collapsed to a constant. ``tests/test_cnn_training.py`` runs a short
form; docs/training.md has figures.

    python benchmarks/cnn_unsupervised.py [--size 64] [--minutes 8 | --steps 2000]
"""

import argparse
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from ptycho_stream.files.npz import save_arrays
from ptycho_stream.files.stored_scan import store_scan
from ptycho_stream.models.registry import ModelRegistry
from ptycho_stream.scans import Catalogue
from ptycho_stream.settings import Settings
from ptycho_stream.simulate.experiment import SimulatedExperiment, simulate_experiment
from ptycho_stream.simulate.scan_file import scan_file_of
from ptycho_stream.training.job import JobProgress, JobSpec
from ptycho_stream.training.job_plan import read_plan
from ptycho_stream.training.jobs import run_job
from ptycho_stream.training.scan_frames import open_frames
from ptycho_stream.training.validation import stitched


@dataclass(frozen=True)
class Outcome:
    """What a run made.

    Attributes:
        phase: Pearson's correlation of the stitched and the true phase.
        amplitude: the same of the moduli.
        spread: standard deviation of the stitched object over the true one's; 0 is collapsed.
        progress: how the job ended.
    """

    phase: float
    amplitude: float
    spread: float
    progress: JobProgress


def pearson(a: NDArray[np.floating], b: NDArray[np.floating]) -> float:
    """Correlation of two sets of values."""
    a, b = a - a.mean(), b - b.mean()
    return float((a * b).sum() / max(np.sqrt((a * a).sum() * (b * b).sum()), 1e-30))


def without_ramp(found: NDArray[np.complex128], truth: NDArray[np.complex128], seen) -> NDArray:
    """``found`` with the factor and phase ramp that bring it nearest to ``truth`` where seen."""
    y, x = np.indices(found.shape, float)
    y, x = y - y[seen].mean(), x - x[seen].mean()
    design = np.stack([y[seen], x[seen], np.ones(int(seen.sum()))], 1)
    for _ in range(10):
        product = (truth * found.conj())[seen]
        product *= np.exp(-1j * np.angle(product.sum()))
        weight, angle = np.abs(product), np.angle(product)
        slopes = np.linalg.lstsq(design * weight[:, None], weight * angle, rcond=None)[0]
        found = found * np.exp(1j * (slopes[0] * y + slopes[1] * x))
    factor = np.vdot(found[seen], truth[seen]) / np.vdot(found[seen], found[seen])
    return found * factor


def compare(
    object_yx: NDArray[np.complex64],
    corner: NDArray[np.int64],
    experiment: SimulatedExperiment,
    margin: int,
) -> tuple[float, float, float]:
    """Correlations of phase and amplitude, and the relative spread, inside the scanned area."""
    top, left = (
        corner - np.rint(np.asarray(experiment.origin_yx_m) / experiment.pixel_yx_m)
    ).astype(int)
    height, width = object_yx.shape
    truth = experiment.object[top : top + height, left : left + width].astype(np.complex128)
    seen = np.isfinite(object_yx)
    border = np.zeros_like(seen)
    border[margin:-margin, margin:-margin] = True
    seen &= border
    found = without_ramp(np.where(seen, object_yx, 0).astype(np.complex128), truth, seen)
    turn = np.exp(-1j * np.angle(truth[seen].sum()))
    phase = pearson(np.angle(found * turn)[seen], np.angle(truth * turn)[seen])
    amplitude = pearson(np.abs(found)[seen], np.abs(truth)[seen])
    return phase, amplitude, float(found[seen].std() / truth[seen].std())


def train(
    folder: Path,
    experiment: SimulatedExperiment,
    *,
    network: dict[str, object],
    threads: int = 2,
    tell=lambda _: None,
    **budget,
) -> Outcome:
    """Run the job in ``folder`` and judge its model by the truth."""
    save_arrays(folder / "probe.npz", {"probe": experiment.probe.modes})
    size = experiment.probe.size_px
    settings = Settings.model_validate(
        {
            "data": {"directory": folder / "data"},
            "probe": {"path": folder / "probe.npz", "photons": experiment.probe.photons},
            "model": {"registry": folder / "models"},
            "reconstruct": {"size_px": size},
            "training": {"threads": threads},
        }
    )
    spec = JobSpec(
        job_id="benchmark",
        name="cnn",
        kind="train",
        architecture="cnn",
        network={"size_px": size} | network,
        scan_ids=(store_scan(folder / "data", scan_file_of(experiment)),),
        promote="never",
        **budget,
    )
    done = run_job(spec, settings, folder / "job", tell, lambda: "")
    if done.state != "done":
        raise SystemExit(done.message)
    trained = ModelRegistry(folder / "models").load("cnn")[0]
    planned = read_plan(folder / "job").scans[0]
    with Catalogue(settings.data.directory).open(planned.scan_id) as reader:
        frames = open_frames(reader, experiment.probe, planned.photons, planned.pairs)
        every = np.arange(len(frames))
        corner, object_yx, _ = stitched(trained, frames, every, torch.device("cpu"))
    return Outcome(*compare(object_yx, corner, experiment, size // 2), done)


def main() -> int:
    """Print the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--frames", type=int, default=600)
    parser.add_argument("--gridsize", type=int, default=1)
    parser.add_argument("--filters", type=int, default=1, help="n_filters_scale")
    parser.add_argument("--minutes", type=float, default=8.0)
    parser.add_argument("--steps", type=int, help="budget instead of minutes")
    parser.add_argument("--learning-rate", type=float)
    parser.add_argument("--batch-frames", type=int, default=16)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--limit", type=float, default=0.9)
    args = parser.parse_args()
    experiment = simulate_experiment(seed=1, frames=args.frames, size_px=args.size)
    with tempfile.TemporaryDirectory() as held:
        outcome = train(
            Path(held),
            experiment,
            network={"gridsize": args.gridsize, "n_filters_scale": args.filters},
            threads=args.threads,
            tell=_tell,
            minutes=None if args.steps else args.minutes,
            steps=args.steps,
            learning_rate=args.learning_rate,
            batch_frames=args.batch_frames,
        )
    print(
        f"\ncnn at {args.size}, {args.frames} frames, {outcome.progress.step} steps: Pearson phase "
        f"{outcome.phase:.3f}, amplitude {outcome.amplitude:.3f}, spread {outcome.spread:.2f}; "
        f"excess R {outcome.progress.metrics['excess']:.4f} "
        f"({outcome.progress.metrics['excess_in_use']:.4f} of the model in use)"
    )
    return int(outcome.phase < args.limit or outcome.spread < 0.1)


def _tell(progress: JobProgress) -> None:
    loss = "" if progress.loss is None else f"loss {progress.loss:.4f}"
    print(f"\r{progress.state} {progress.fraction:4.0%} step {progress.step} {loss}", end="")


if __name__ == "__main__":
    sys.exit(main())
