"""Frames a second of our networks, side by side in one run, so that their ratio can be believed.

The networks take turns; each turn is the predictor's whole work on the same simulated frames.
Beside the median rate stand the best one and the processor's time a frame, which other programs
disturb less. Run by hand; docs/benchmarks.md keeps the figures.

    python benchmarks/networks.py [--size 128] [--threads 2] [--frames 64] [--turns 5] [--model M]
"""

import argparse
import json
import statistics
import time
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

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


class Turn(NamedTuple):
    """One network's time for all frames."""

    frames_per_s: float
    cpu_ms: float


def a_turn(predictor: Predictor, counts: NDArray[Any], shift: NDArray[np.float64]) -> Turn:
    """Predict all frames; processor time is that of all threads, for one frame."""
    started_s, cpu_s = time.perf_counter(), time.process_time()
    predictor.predict(counts, shift)
    took_s, cpu_s = time.perf_counter() - started_s, time.process_time() - cpu_s
    return Turn(len(counts) / took_s, 1e3 * cpu_s / len(counts))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", type=int, default=128, help="frame size N [128]")
    parser.add_argument("--threads", type=int, default=2, help="workers [2]")
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
    turns: dict[str, list[Turn]] = {name: [] for name in made}
    for predictor in made.values():
        predictor.warm_up()
    for _ in range(arguments.turns):
        for name, predictor in made.items():
            turns[name].append(a_turn(predictor, scan.counts, shift))
    rates = {name: [turn.frames_per_s for turn in held] for name, held in turns.items()}
    medians = {name: statistics.median(held) for name, held in rates.items()}
    best = {name: max(held) for name, held in rates.items()}
    work = {name: min(turn.cpu_ms for turn in held) for name, held in turns.items()}
    slowest = min(medians.values())
    print(f"| network at {arguments.size}², {arguments.threads} workers ", end="")
    print("| frames/s, median (range) | ratio | CPU ms a frame, least |")
    print("|---|---|---|---|")
    for name, median in medians.items():
        spread = f"{median:.1f} ({min(rates[name]):.1f} to {best[name]:.1f})"
        print(f"| {name} | {spread} | {median / slowest:.2f} | {work[name]:.2f} |")
    figures = {"frames_per_s": medians, "best_frames_per_s": best, "cpu_ms": work}
    print(json.dumps({**figures, **vars(arguments)}))


if __name__ == "__main__":
    main()
