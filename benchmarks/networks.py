"""Frames a second of our networks, side by side in one run, so that their ratio can be believed.

The networks take turns; each turn is the predictor's whole work on the same simulated frames. Run
by hand; docs/benchmarks.md keeps the figures.

    python benchmarks/networks.py [--size 128] [--threads 2] [--frames 64] [--turns 5] [--model M]
"""

import argparse
import json
import statistics
import time

import numpy as np
import torch

from ptycho_stream.models.registry import ModelRegistry
from ptycho_stream.networks.cnn import CnnNetwork, CnnSettings
from ptycho_stream.physics.probe import Probe
from ptycho_stream.reconstruct.predict import Predictor
from ptycho_stream.simulate.experiment import simulate_experiment


def predictors(
    size_px: int, model: str, probe: Probe, device: str, batch: int, names: list[str]
) -> dict[str, Predictor]:
    """The networks by name; the cnn at the size of the published one, untrained."""

    def cnn(gridsize: int) -> Predictor:
        settings = CnnSettings(size_px=size_px, n_filters_scale=2, gridsize=gridsize)
        return Predictor(CnnNetwork(settings), probe, device, batch)

    def unrolled(modes: int) -> Predictor:
        network, _ = ModelRegistry().load(model)
        return Predictor(network, probe.leading(modes), device, batch)

    makers = {
        "unrolled, 1 mode": lambda: unrolled(1),
        "unrolled, 3 modes": lambda: unrolled(3),
        "cnn, gridsize 1": lambda: cnn(1),
        "cnn, gridsize 2": lambda: cnn(2),
    }
    return {name: make() for name, make in makers.items() if not names or name in names}


def three_modes(probe: Probe) -> Probe:
    """The probe and two weaker modes made of it, orthogonal enough for a measurement of time."""
    first = probe.modes[0]
    side = np.linspace(-1, 1, probe.size_px, dtype=np.float32)
    return Probe(np.stack([first, 0.3 * first * side[:, None], 0.2 * first * side[None]]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", type=int, default=128, help="frame size N [128]")
    parser.add_argument("--threads", type=int, default=2, help="torch threads [2]")
    parser.add_argument("--frames", type=int, default=64, help="frames of a turn [64]")
    parser.add_argument("--turns", type=int, default=5, help="turns of each network [5]")
    parser.add_argument("--batch", type=int, default=16, help="frames of a batch [16]")
    parser.add_argument("--model", default="default", help="the unrolled model [default]")
    parser.add_argument("--device", default="cpu", help="cpu or cuda [cpu]")
    parser.add_argument("--only", action="append", default=[], help="this network; may be repeated")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    scan = simulate_experiment(seed=1, frames=arguments.frames, size_px=arguments.size)
    shift = np.random.default_rng(1).uniform(-0.5, 0.5, (arguments.frames, 2))
    made = predictors(
        arguments.size,
        arguments.model,
        three_modes(scan.probe),
        arguments.device,
        arguments.batch,
        arguments.only,
    )
    rates: dict[str, list[float]] = {name: [] for name in made}
    for predictor in made.values():
        predictor.warm_up()
    for _ in range(arguments.turns):
        for name, predictor in made.items():
            started_s = time.perf_counter()
            predictor.predict(scan.counts, shift)
            rates[name].append(arguments.frames / (time.perf_counter() - started_s))
    medians = {name: statistics.median(values) for name, values in rates.items()}
    slowest = min(medians.values())
    print(f"| network at {arguments.size}², {arguments.threads} threads | frames/s | ratio |")
    print("|---|---|---|")
    for name, median in medians.items():
        low, high = min(rates[name]), max(rates[name])
        print(f"| {name} | {median:.1f} ({low:.1f} to {high:.1f}) | {median / slowest:.2f} |")
    print(json.dumps({"frames_per_s": medians, **vars(arguments)}))


if __name__ == "__main__":
    main()
