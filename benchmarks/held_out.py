"""Score a model on synthetic frames that no training uses, beside plain error reduction.

Every cell of the grid (kind of probe, kind of sample, photons) holds frames of samples of its own;
printed are medians of the probe-weighted relative error of single frames, for the network and for
50 sweeps of error reduction from a flat start, and in how many cells the network's is the lower.
Run by hand after a model changes; docs/models.md keeps the figures.

    python benchmarks/held_out.py [--model NAME] [--registry DIR] [--size 128]
"""

import argparse
import json
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ptycho_stream.models.registry import ModelRegistry
from ptycho_stream.networks.network import Network
from ptycho_stream.physics.forward import intensity, mode_sum, modulus_correction
from ptycho_stream.simulate.optics import OPTICS
from ptycho_stream.simulate.probes import probe_of_kind
from ptycho_stream.simulate.samples import SAMPLE_KINDS, sample_of_kind
from ptycho_stream.training.losses import frame_errors

SEED = 2**40
PHOTONS = (1e3, 1e4, 1e5, 1e6, 1e7)
SWEEPS = 50
FRAMES = 8


class Cell(NamedTuple):
    """What the frames of a cell have in common."""

    probe: str
    sample: str
    photons: float


class Frames(NamedTuple):
    """Frames of a cell, as the network takes them; ``weight`` is the root of the probe's power."""

    amplitude: Tensor
    probe: Tensor
    valid: Tensor
    obj: Tensor
    weight: Tensor


def cells() -> Iterator[Cell]:
    """The grid."""
    for probe in OPTICS:
        for sample in SAMPLE_KINDS:
            for photons in PHOTONS:
                yield Cell(probe, sample, photons)


def frames_of(cell: Cell, size: int, number: int) -> Frames:
    """Frames of as many samples, of 0.2 to 1.8 rad, each under a probe of its own."""
    rng = np.random.default_rng((SEED, size, number))
    probes, objects = [], []
    for _ in range(FRAMES):
        modes = int(rng.integers(1, 3))
        drawn = probe_of_kind(rng, size, cell.probe, modes=modes, photons=cell.photons).modes
        probes.append(np.concatenate([drawn, np.zeros((2 - modes, size, size), drawn.dtype)]))
        objects.append(
            sample_of_kind(
                rng,
                (size, size),
                cell.sample,
                phase_rad=rng.choice([-1, 1]) * rng.uniform(0.2, 1.8),
                absorption=rng.uniform(0, 0.3),
            )
        )
    probe, obj = torch.as_tensor(np.stack(probes)), torch.as_tensor(np.stack(objects))
    counts = rng.poisson(intensity(probe, obj).double().numpy()).astype(np.float32)
    power = mode_sum(probe)
    return Frames(
        amplitude=torch.as_tensor(counts).sqrt(),
        probe=probe,
        valid=torch.ones((1, size, size), dtype=torch.bool),
        obj=obj,
        weight=(power / power.amax((-2, -1), keepdim=True)).sqrt(),
    )


def error_reduction(frames: Frames) -> Tensor:
    """Sweeps of the modulus projection, divided back by the probe's peak power; from a flat start.

    The object update of Maiden & Rodenburg 2009 (doi:10.1016/j.ultramic.2009.05.012) at one
    position.
    """
    obj = torch.ones_like(frames.obj)
    conj = frames.probe.conj().resolve_conj()
    peak = mode_sum(frames.probe).amax((-2, -1), keepdim=True)
    for _ in range(SWEEPS):
        change = modulus_correction(frames.probe, conj, obj, frames.amplitude, frames.valid, 1e-6)
        obj = obj + change / peak
    return obj


def compare(network: Network, cell: Cell, size: int, number: int) -> tuple[float, float]:
    """Median error of the network's and of error reduction's objects."""
    frames = frames_of(cell, size, number)
    with torch.inference_mode():
        found = network(frames.amplitude, frames.probe, frames.valid).obj
        plain = error_reduction(frames)
        ours, theirs = (frame_errors(o, frames.obj, frames.weight)[1] for o in (found, plain))
    return float(ours.median()), float(theirs.median())


def main() -> int:
    """Print medians by each of the three kinds, and the share of cells won."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="default")
    parser.add_argument("--registry", type=Path)
    parser.add_argument("--size", type=int, default=128)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, help="every cell, as JSON")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    network, manifest = ModelRegistry(args.registry).load(args.model)
    network.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    won, rows = 0, []
    groups: dict[tuple[str, object], list[tuple[float, float]]] = defaultdict(list)
    for number, cell in enumerate(cells()):
        ours, theirs = compare(network, cell, args.size, number)
        won += ours < theirs
        rows.append({**cell._asdict(), "network": ours, "error_reduction": theirs})
        for name, value in cell._asdict().items():
            groups[name, value].append((ours, theirs))
    print(f"{manifest.name}, {args.size} px: lower in {won} of {len(rows)} cells")
    for (name, value), pairs in groups.items():
        ours, theirs = (median(column) for column in zip(*pairs, strict=True))
        shown = f"{value:.0e}" if isinstance(value, float) else value
        print(f"{name:8} {shown:12} {ours:.3f} {theirs:.3f}")
    if args.out is not None:
        args.out.write_text(json.dumps(rows, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
