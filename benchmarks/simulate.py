"""How fast the simulators feed training: samples, probes, frames and whole batches a second.

Printed are milliseconds of one core's time each (process time, so that other programs on the
machine do not count) and what that makes a second. Training asks for one sample of twice the frame
size and one probe for every few frames; frames can also be counted on an accelerator.

    python benchmarks/simulate.py [--size 128] [--device cuda]
"""

import argparse
import sys
import time
from collections.abc import Callable

import numpy as np
import torch

from ptycho_stream.physics.forward import intensity
from ptycho_stream.physics.fourier import centred
from ptycho_stream.physics.probe import shifted_modes, spectrum_of
from ptycho_stream.simulate.grid import grid_of
from ptycho_stream.simulate.optics import OPTICS
from ptycho_stream.simulate.probes import probe_of_kind, random_probe
from ptycho_stream.simulate.samples import (
    SAMPLE_KINDS,
    random_sample,
)
from ptycho_stream.simulate.sensor import SensorSettings, draw_sensor
from ptycho_stream.training.synthetic import SyntheticSettings, synthetic_batch

FAULTS = SensorSettings(gap_px=4, hot=1e-3, dead=1e-3, beam_stop_px=3, background=0.1)


def timed(work: Callable[[int], object], repeats: int) -> float:
    """Milliseconds of processor time of one call, mean over seeds 0 to ``repeats`` - 1."""
    work(0)
    started_s = time.process_time()
    for seed in range(repeats):
        work(seed)
    return (time.process_time() - started_s) / repeats * 1e3


def told(name: str, unit_ms: float, many: int = 1) -> None:
    print(f"{name:34s} {unit_ms / many:9.3f} ms {1e3 * many / unit_ms:12.0f} /s")


def samples(size: int, repeats: int) -> None:
    """Samples of twice the frame size, of the mixture and of every kind."""
    shape = (2 * size, 2 * size)
    print(f"samples of {2 * size} x {2 * size} pixels")
    told("mixture", timed(lambda s: random_sample(np.random.default_rng(s), shape), repeats))
    grid = grid_of(shape)
    for kind, draw in SAMPLE_KINDS.items():
        told(f"  {kind}", timed(lambda s, d=draw: d(np.random.default_rng(s), grid), repeats // 4))


def probes(size: int, repeats: int) -> None:
    """Probes of the frame size."""
    print(f"probes of {size} x {size} pixels")
    for modes in (1, 3):

        def draw(seed: int, modes=modes) -> object:
            return random_probe(np.random.default_rng(seed), size, modes=modes)

        told(f"mixture, {modes} modes", timed(draw, repeats))
    for kind in OPTICS:
        told(
            f"  {kind}",
            timed(lambda s, k=kind: probe_of_kind(np.random.default_rng(s), size, k), repeats // 4),
        )


def frames(size: int, device: torch.device, repeats: int) -> None:
    """Sub-pixel probes, forward model and counting, 64 frames at a time."""
    print(f"frames of {size} x {size} pixels, 3 modes, 5e5 photons, on {device}")
    rng = np.random.default_rng(0)
    spectrum = spectrum_of(random_probe(rng, size, modes=3, photons=5e5), device)
    patches = torch.ones((64, size, size), dtype=torch.complex64, device=device)
    shift = torch.rand(64, 2, device=device)
    sensor = draw_sensor(rng, size, FAULTS)
    generator = torch.Generator(device).manual_seed(0)
    expected = centred(intensity(shifted_modes(spectrum, shift), patches))

    def model(_seed: int) -> None:
        centred(intensity(shifted_modes(spectrum, shift), patches))
        _wait(device)

    def count(_seed: int) -> None:
        sensor.count(expected, generator)
        _wait(device)

    told("forward model", timed(model, repeats), 64)
    told("counting", timed(count, repeats), 64)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", type=int, default=128)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--repeats", type=int, default=80)
    args = parser.parse_args()
    torch.set_num_threads(1)
    samples(args.size, args.repeats)
    probes(args.size, args.repeats)
    frames(args.size, torch.device(args.device), max(args.repeats // 10, 1))
    settings = SyntheticSettings(sizes_px=(args.size,))
    print(f"training batches of {settings.frames} frames of {args.size} x {args.size} pixels")
    batch = timed(lambda s: synthetic_batch(0, s, settings), max(args.repeats // 8, 1))
    told("frames of a batch", batch, settings.frames)
    return 0


if __name__ == "__main__":
    sys.exit(main())
