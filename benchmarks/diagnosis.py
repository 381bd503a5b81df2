"""How often the self-diagnosis names the right orientation within 64 frames.

Every case draws a probe, a sample, a step, a photon count, an orientation of the detector and one
of the positions, all at random; right is the true way round or one that the probe cannot tell from
it. Run by hand after diagnosis or a model changes; docs/trust.md keeps the figures.

    python benchmarks/diagnosis.py [--cases 100] [--first 0] [--model NAME] [--limit 95]
"""

import argparse
import sys
import time
from pathlib import Path

import numpy as np
import torch

from ptycho_stream.geometry import ORIENTATIONS, Orientation, View
from ptycho_stream.models.registry import ModelRegistry
from ptycho_stream.networks.network import Network
from ptycho_stream.reconstruct.diagnosis import Finding, diagnose
from ptycho_stream.reconstruct.layouts import Layout, composed, matrix_of
from ptycho_stream.reconstruct.predict import Predictor
from ptycho_stream.simulate.experiment import SimulatedExperiment, simulate_experiment
from ptycho_stream.simulate.probes import random_probe
from ptycho_stream.simulate.samples import random_sample

FRAMES = 64


def inverse(orientation: Orientation) -> Orientation:
    """What undoes an orientation."""
    return next(name for name in ORIENTATIONS if composed(orientation, name) == "identity")


def draw_case(number: int, size_px: int | None = None) -> tuple[SimulatedExperiment, Layout]:
    """A scan of 64 frames as it should be, and what has to be done to how it was recorded."""
    rng = np.random.default_rng((17, number))
    size = size_px or (64 if number % 4 else 128)
    experiment = simulate_experiment(
        seed=number,
        frames=FRAMES,
        size_px=size,
        photons=float(10 ** rng.uniform(4.5, 6)),
        step_px=float(rng.uniform(0.06, 0.11) * size),
        probe=random_probe(rng, size, modes=1 + int(rng.random() < 0.25)),
        sample=random_sample,
    )
    detector, positions = rng.integers(0, len(ORIENTATIONS), 2)
    return experiment, Layout(ORIENTATIONS[detector], ORIENTATIONS[positions])


def find(experiment: SimulatedExperiment, fault: Layout, network: Network) -> Finding:
    """Diagnose the scan as a beamline with that fault records it."""
    size = experiment.counts.shape[-1]
    counts = View(size, orientation=inverse(fault.detector)).apply(experiment.counts)
    positions = experiment.positions_yx_m @ matrix_of(inverse(fault.positions)).T
    predictor = Predictor(network, experiment.probe)
    return diagnose(counts, positions, experiment.pixel_yx_m, predictor)


def is_right(finding: Finding, fault: Layout) -> bool:
    """Whether the best is the truth, or equivalent to it."""
    best = finding.best
    return best is not None and fault in (best.layout, *best.equivalent)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=100)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--size", type=int, choices=(64, 128), help="of the frames; default: both")
    parser.add_argument("--model", default="default")
    parser.add_argument("--registry", type=Path)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--limit", type=int, help="exit 1 if fewer cases are right")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    network, _ = ModelRegistry(args.registry).load(args.model)
    right, wrong, undecided, spent_s = 0, 0, 0, 0.0
    for number in range(args.first, args.first + args.cases):
        experiment, fault = draw_case(number, args.size)
        started = time.process_time()
        finding = find(experiment, fault, network)
        spent_s += time.process_time() - started
        good = is_right(finding, fault)
        right, undecided = right + good, undecided + (not finding.decided)
        wrong += finding.decided and not good
        if not (good and finding.decided):
            said = "right" if good else "wrong"
            print(f"case {number}: {said}, should be {fault}; {finding.reason}", flush=True)
    print(
        f"{right} of {args.cases} right; {undecided} called undecided, {wrong} decided and wrong; "
        f"{spent_s / args.cases:.1f} s of CPU each"
    )
    return int(args.limit is not None and right < args.limit)


if __name__ == "__main__":
    sys.exit(main())
