"""Score a shipped model on the measured siemens-star scan, which no training ever saw.

Every frame is reconstructed alone; the patches are added with their weights on the integer grid
and scored against the reference run, with one and with all probe modes. Run by hand after a model
changes; docs/models.md keeps the figures.

    python benchmarks/zero_shot.py --data DIR --score-tool score_object.py [--model NAME]
"""

import argparse
import bz2
import io
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from ptycho_stream.models.registry import ModelRegistry
from ptycho_stream.physics.probe import Probe
from ptycho_stream.reconstruct.predict import Predictor

FRAMES_FILE = "siemens-star-small.npz.bz2"
REFERENCE_FILE = "siemens-star-reference.npz"


def load_scan(data: Path) -> tuple[NDArray[np.float32], NDArray[np.float64], Probe]:
    """Counts (M, N, N) with zero frequency at N // 2, window corners (M, 2) in px, the probe."""
    with np.load(io.BytesIO(bz2.decompress((data / FRAMES_FILE).read_bytes()))) as held:
        counts = np.fft.fftshift(held["data"][0], axes=(-2, -1))
    with np.load(data / REFERENCE_FILE) as held:
        modes = held["probe"][0]
        size = modes.shape[-1]
        corner = held["positions_yx_px"] + held["origin_yx_px"] - (size - 1) / 2
    # The reference was made with an unnormalised FFT.
    return counts, corner, Probe((modes * size).astype(np.complex64))


def stitch(
    patches: NDArray[np.complex64], weights: NDArray[np.float32], corner: NDArray[np.int64]
) -> tuple[NDArray[np.complex64], NDArray[np.float32]]:
    """Weighted mean of the patches on their integer corners; NaN where nothing was seen."""
    size = patches.shape[-1]
    corner = corner - corner.min(0)
    shape = tuple(corner.max(0) + size)
    total, weight = np.zeros(shape, np.complex128), np.zeros(shape, np.float64)
    for patch, seen, (y, x) in zip(patches, weights, corner, strict=True):
        window = slice(y, y + size), slice(x, x + size)
        total[window] += patch * seen
        weight[window] += seen
    known = weight > 1e-2 * weight.max()
    image = np.where(known, total / np.where(known, weight, 1), np.nan)
    return image.astype(np.complex64), np.where(known, weight, 0).astype(np.float32)


def main() -> int:
    """Print the scoring tool's figures for the leading mode and for all modes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=os.environ.get("PTYCHO_STREAM_DATA"))
    parser.add_argument("--score-tool", type=Path, required=True)
    parser.add_argument("--model", default="default")
    parser.add_argument("--registry", type=Path)
    parser.add_argument("--out", type=Path, default=Path("out/zero_shot"))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--limit", type=float, help="exit 1 if the leading mode's nrmse is above")
    args = parser.parse_args()
    if args.data is None:
        parser.error("give --data or set PTYCHO_STREAM_DATA")
    torch.set_num_threads(args.threads)
    network, manifest = ModelRegistry(args.registry).load(args.model)
    counts, position, probe = load_scan(args.data)
    corner = np.floor(position + 0.5).astype(np.int64)
    photons = float(np.percentile(counts.sum((1, 2)), 90))
    args.out.mkdir(parents=True, exist_ok=True)
    scores: dict[int, float] = {}
    for modes in (1, len(probe.modes)):
        predictor = Predictor(network, probe.leading(modes).normalised(photons))
        predictor.warm_up()
        started = time.perf_counter()
        patches, weights = predictor.predict(counts, position - corner)
        rate = len(counts) / (time.perf_counter() - started)
        image, weight = stitch(patches, weights, corner)
        path = args.out / f"{manifest.name}-{modes}.npz"
        np.savez(path, object=image, weight=weight)
        print(f"{manifest.name}, {modes} of {len(probe.modes)} modes, {rate:.0f} frames/s")
        command = [sys.executable, str(args.score_tool), str(path)]
        done = subprocess.run(
            [*command, str(args.data / REFERENCE_FILE)], capture_output=True, text=True, check=True
        )
        print(done.stdout)
        scores[modes] = float(done.stdout.split()[1])
    return int(args.limit is not None and scores[1] > args.limit)


if __name__ == "__main__":
    sys.exit(main())
