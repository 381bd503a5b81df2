"""Score a shipped model on the measured siemens-star scan, which no training ever saw.

Every frame is reconstructed alone; the patches are added with their weights on the integer grid
and scored against the reference run, with one and with all probe modes. At 64 the measured frames
are cropped, so the pixels are twice as large; at 256 they are simulated from the reference on
pixels half as large. Run by hand after a model changes; docs/models.md keeps the figures.

    python benchmarks/zero_shot.py --data DIR --score-tool score_object.py [--size 64] [--model M]
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
from ptycho_stream.physics.forward import intensity
from ptycho_stream.physics.probe import Probe, shifted_modes, spectrum_of
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


def resampled(waves: NDArray[np.complex64], size: tuple[int, int]) -> NDArray[np.complex64]:
    """Band-limited waves (..., H, W) on another grid of the same width; index i goes to i s / H.

    Values are kept where |waves| means transmission; scale by the ratio of the areas' roots for a
    probe, whose photons are to stay.
    """
    spectrum = np.fft.fftshift(np.fft.fft2(waves), axes=(-2, -1))
    for axis, wanted in ((-2, size[0]), (-1, size[1])):
        have = spectrum.shape[axis]
        cut, pad = max(have // 2 - wanted // 2, 0), max(wanted // 2 - have // 2, 0)
        spectrum = np.take(spectrum, range(cut, cut + min(wanted, have)), axis)
        widths = [(0, 0)] * spectrum.ndim
        widths[axis] = (pad, wanted - pad - spectrum.shape[axis])
        spectrum = np.pad(spectrum, widths)
    share = size[0] * size[1] / (waves.shape[-2] * waves.shape[-1])
    made = np.fft.ifft2(np.fft.ifftshift(spectrum, axes=(-2, -1))) * share
    return made.astype(np.complex64)


def at_size(
    scan: tuple[NDArray[np.float32], NDArray[np.float64], Probe],
    reference: NDArray[np.complex64],
    size: int,
) -> tuple[NDArray[np.float32], NDArray[np.float64], Probe, NDArray[np.complex64]]:
    """The scan with frames of ``size``, and the reference object on its pixels."""
    counts, corner, probe = scan
    have = counts.shape[-1]
    if size == have:
        return counts, corner, probe, reference
    scale = size / have
    rows, columns = (2 * round(n * scale / 2) for n in reference.shape)
    obj = resampled(reference, (rows, columns))
    moved = Probe(resampled(probe.modes, (size, size)) / np.float32(scale))
    # The object's grid is rounded to an even size, so that its pixels differ a little from these.
    corner = corner * (np.array([rows, columns]) / reference.shape)
    if size < have:
        edge = (have - size) // 2
        return counts[:, edge:-edge, edge:-edge], corner, moved, obj
    whole = np.floor(corner + 0.5).astype(np.int64)
    shift = torch.as_tensor((corner - whole).astype(np.float32))
    modes = shifted_modes(spectrum_of(moved), shift)
    rng = np.random.default_rng(1)
    frames = np.empty((len(corner), size, size), np.float32)
    for number, (y, x) in enumerate(whole):
        patch = torch.as_tensor(obj[y : y + size, x : x + size])[None]
        expected = intensity(modes[number : number + 1], patch)[0].double().numpy()
        frames[number] = np.fft.fftshift(rng.poisson(expected))
    return frames, corner, moved, obj


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
    parser.add_argument("--size", type=int, choices=(64, 128, 256), default=128)
    parser.add_argument("--limit", type=float, help="exit 1 if the leading mode's nrmse is above")
    args = parser.parse_args()
    if args.data is None:
        parser.error("give --data or set PTYCHO_STREAM_DATA")
    torch.set_num_threads(args.threads)
    network, manifest = ModelRegistry(args.registry).load(args.model)
    with np.load(args.data / REFERENCE_FILE) as held:
        reference = held["object"].astype(np.complex64)
    counts, position, probe, reference = at_size(load_scan(args.data), reference, args.size)
    roi = 300 * args.size // 128
    corner = np.floor(position + 0.5).astype(np.int64)
    photons = float(np.percentile(counts.sum((1, 2)), 90))
    args.out.mkdir(parents=True, exist_ok=True)
    np.savez(args.out / f"reference-{args.size}.npz", object=reference)
    scores: dict[int, float] = {}
    for modes in (1, len(probe.modes)):
        predictor = Predictor(network, probe.leading(modes).normalised(photons))
        predictor.warm_up()
        started = time.perf_counter()
        patches, weights = predictor.predict(counts, position - corner)
        rate = len(counts) / (time.perf_counter() - started)
        image, weight = stitch(patches, weights, corner)
        path = args.out / f"{manifest.name}-{args.size}-{modes}.npz"
        np.savez(path, object=image, weight=weight)
        print(f"{manifest.name}, {modes} of {len(probe.modes)} modes, {rate:.0f} frames/s")
        command = [sys.executable, args.score_tool, path, args.out / f"reference-{args.size}.npz"]
        done = subprocess.run(
            [*command, "--roi", str(roi)], capture_output=True, text=True, check=True
        )
        print(done.stdout)
        scores[modes] = float(done.stdout.split()[1])
    return int(args.limit is not None and scores[1] > args.limit)


if __name__ == "__main__":
    sys.exit(main())
