"""Score a model on synthetic frames of a seed that no training uses, by photons and frame size.

Printed is the probe-weighted relative error of single frames, of the network and of the best
constant object. Run by hand after a model changes; docs/models.md keeps the figures.

    python benchmarks/held_out.py [--model NAME] [--registry DIR]
"""

import argparse
import sys
from pathlib import Path

import torch
from torch import nn

from ptycho_stream.models.registry import ModelRegistry
from ptycho_stream.training.pretrain import frame_errors
from ptycho_stream.training.synthetic import SyntheticSettings, synthetic_batch

SEED = 2**40


def errors(network: nn.Module, settings: SyntheticSettings, batches: int) -> tuple[float, float]:
    """Mean error of the network's objects and of the best constant ones."""
    ours: list[torch.Tensor] = []
    flat: list[torch.Tensor] = []
    with torch.inference_mode():
        for number in range(batches):
            batch = synthetic_batch(SEED, number, settings)
            estimate, _ = network(batch.amplitude, batch.probe, batch.valid)
            ours.append(frame_errors(estimate, batch.obj, batch.weight)[1])
            squared = batch.weight.square()
            mean = (squared * batch.obj).sum((1, 2)) / squared.sum((1, 2))
            constant = mean[:, None, None].expand_as(batch.obj)
            flat.append(frame_errors(constant, batch.obj, batch.weight)[1])
    return float(torch.cat(ours).mean()), float(torch.cat(flat).mean())


def main() -> int:
    """Print one line for each size and number of photons."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="default")
    parser.add_argument("--registry", type=Path)
    parser.add_argument("--batches", type=int, default=24)
    args = parser.parse_args()
    torch.set_num_threads(1)
    network, manifest = ModelRegistry(args.registry).load(args.model)
    print(f"{manifest.name}: size, photons, error of the network, of the best constant")
    for size in (64, 128, 256):
        for photons in (1e3, 1e4, 1e5, 1e6, 1e7):
            spread = (0.99 * photons, photons, 1.01 * photons)
            settings = SyntheticSettings(sizes_px=(size,), frames=4, photons=spread)
            ours, flat = errors(network, settings, args.batches)
            print(f"{size:4d} {photons:8.0e} {ours:.3f} {flat:.3f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
