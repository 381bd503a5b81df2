"""What the figures of trust are worth: the misfit map, the live resolution and the verdict.

On simulated scans with known truth. The map: area under the ROC curve for 5 % of the frames
spoiled, next to each other. The resolution: where the live correlation ends beside where that with
the truth does, over doses and probes. The verdict: what it says of sound and of faulty scans. Run
by hand after any of these or a model changes; docs/trust.md keeps the figures.

    python benchmarks/trust.py [--scans 8] [--part map|resolution|verdict] [--model NAME]
"""

import argparse
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from ptycho_stream.models.registry import ModelRegistry
from ptycho_stream.networks.network import Network
from ptycho_stream.physics.probe import defocused
from ptycho_stream.reconstruct.trust import object_windows
from ptycho_stream.reconstruct.trust_watch import Shown, TrustWatch
from ptycho_stream.results import Tile
from ptycho_stream.simulate.probes import random_probe
from ptycho_stream.simulate.samples import random_sample

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from trust_scans import Scan, block_of, cutoffs, map_auc, scan_of, spoiled

TILE_PX = 64
LEAST_CONTRAST = 0.01
"""Where the sample is flat a wrong position changes nothing, and cannot be found."""

DOSES = (1e4, 6e4, 1e6)
FAULTS = ("other frames", "shutter", "positions", "probe")


def draw(network: Network, seed: int, photons: float, frames: int = 196) -> Scan:
    """A random probe and sample; every fourth probe has three modes."""
    probe = random_probe(np.random.default_rng((5, seed)), 64, modes=1 if seed % 4 else 3)
    return scan_of(network, seed, frames=frames, photons=photons, probe=probe, sample=random_sample)


def map_part(network: Network, scans: int) -> None:
    """Areas under the ROC curve, the worst and the median, by fault and layer."""
    for fault in FAULTS:
        found: dict[str, list[float]] = {"predicted": [], "refined": []}
        empty = 0
        for seed in range(1, scans + 1):
            scan = scan_of(network, seed, frames=256, sample=random_sample)
            which = block_of(scan)
            if contrast_of(scan, which) < LEAST_CONTRAST:
                empty += 1
                continue
            bad = spoiled(scan, fault, which)
            for layer in found:
                image = bad.stitched if layer == "predicted" else bad.refined()
                found[layer].append(map_auc(bad, bad.judged(image), which))
        said = ", ".join(
            f"{layer}: median {np.median(auc):.3f}, worst {min(auc):.3f}"
            for layer, auc in found.items()
        )
        print(f"map, {fault}: {said}; {empty} scans with nothing to see there left out", flush=True)


def contrast_of(scan: Scan, which: NDArray[np.int64]) -> float:
    """Median spread of the true sample in the middle of the frames' windows."""
    middle = slice(scan.size_px // 3, -(scan.size_px // 3))
    windows = scan.windows(scan.true_image)[which][:, middle, middle]
    return float(np.nanmedian(np.nanstd(windows, axis=(1, 2))))


def resolution_part(network: Network, scans: int) -> None:
    """How often a live cutoff is within a fifth of the true one."""
    ratios: dict[str, list[float]] = {"network's halves": [], "predicted": [], "refined": []}
    for photons in DOSES:
        for seed in range(1, scans + 1):
            found = cutoffs(draw(network, seed, photons))
            for name, kept in ratios.items():
                true = "refined, true" if name == "refined" else "predicted, true"
                kept.append(found[name] / found[true])
    for name, kept in ratios.items():
        ratio = np.array(kept)
        within = np.mean(np.abs(ratio - 1) <= 0.2)
        low, middle, high = np.percentile(ratio, (5, 50, 95))
        print(
            f"resolution, {name}: {within:.0%} of {len(ratio)} within a fifth of the truth; "
            f"live over true {low:.2f} {middle:.2f} {high:.2f} (5, 50, 95 %)",
            flush=True,
        )


def verdict_part(network: Network, scans: int) -> None:
    """Verdicts by fault."""
    for photons in (1e4, 2e5):
        said: dict[str, Counter[str]] = {}
        for seed in range(1, scans + 1):
            for name, scan in faulty(draw(network, seed, photons, 144), seed):
                said.setdefault(name, Counter())[judged(scan)] += 1
        for name, counted in said.items():
            print(f"verdict, {photons:.0e} photons, {name}: {dict(counted)}", flush=True)


def faulty(scan: Scan, seed: int) -> list[tuple[str, Scan]]:
    """The scan as it is, and told wrongly in some ways."""
    rng = np.random.default_rng(seed)
    other = random_probe(np.random.default_rng((99, seed)), 64).normalised(scan.beam.photons)
    off = rng.normal(0, 2, scan.position_yx_m.shape) * np.asarray(scan.truth.pixel_yx_m)
    which = rng.choice(len(scan.counts), len(scan.counts) // 20 + 1, replace=False)
    return [
        ("sound", scan),
        ("another probe", scan.told(probe=other)),
        ("defocus of 4 rad", scan.told(probe=defocused(scan.beam, 4.0))),
        ("half the photons", scan.told(probe=scan.beam.normalised(scan.beam.photons / 2))),
        ("positions off by 2 px rms", scan.told(position_yx_m=scan.position_yx_m + off)),
        ("5 % other frames", spoiled(scan, "other frames", which)),
    ]


def judged(scan: Scan) -> str:
    """The verdict on the refined image when everything was looked at."""
    watch = TrustWatch(lambda slots: scan.counts[slots], scan.truth.pixel_yx_m, TILE_PX)
    number = np.arange(len(scan.counts))
    watch.add(number, number, scan.position_yx_m)
    image, tiles = scan.refined(), {}
    for (y, x), version in scan.canvas.versions.items():
        corner = np.array([[y, x]]) * TILE_PX - scan.low_yx_px
        weight = scan.canvas.object_tile((y, x))[1]
        tiles[y, x] = Tile(version, object_windows(image, corner, TILE_PX)[0], weight)
    shown = Shown(tiles, scan.beam, scan.canvas, "refined")
    report = watch.look(shown, 1.0)
    while watch.has_work:
        report = watch.look(shown, 1.0)
    return report.verdict


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--scans", type=int, default=8)
    parser.add_argument("--part", choices=("map", "resolution", "verdict"), help="default: all")
    parser.add_argument("--model", default="default")
    args = parser.parse_args()
    torch.set_num_threads(1)
    network, _ = ModelRegistry().load(args.model)
    parts = {"map": map_part, "resolution": resolution_part, "verdict": verdict_part}
    for name, part in parts.items():
        if args.part in (None, name):
            part(network, args.scans)


if __name__ == "__main__":
    main()
