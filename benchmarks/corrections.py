"""What corrections of frames cost an image and the figures of its trust, on simulated scans.

Frames are thinned as a flat field and a beam that varies would, and get a background; then they are
corrected as a view does it. Error to the truth of the image after 8 sweeps of refinement, and the
excess R that trust would report of the truth itself. docs/corrections.md keeps the figures.

    python benchmarks/corrections.py [--scans 2]
"""

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from ptycho_stream.models.registry import ModelRegistry
from ptycho_stream.physics.probe import Probe
from ptycho_stream.reconstruct.trust import total

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from trust_scans import Scan, scan_of


@dataclass(frozen=True)
class Fault:
    """Spreads of flat field and beam about 1, and a background in counts a pixel."""

    flat: float = 0.0
    beam: float = 0.0
    background: float = 0.0


FAULTS = (
    Fault(),
    Fault(flat=0.05),
    Fault(flat=0.2),
    Fault(beam=0.05),
    Fault(beam=0.3),
    Fault(background=0.05),
    Fault(background=0.5),
    Fault(background=5.0),
)


def spoiled(scan: Scan, fault: Fault, rng: np.random.Generator) -> tuple[Scan, Scan]:
    """The scan with a fault, and with the fault corrected."""
    spread = rng.standard_normal((scan.size_px, scan.size_px))
    flat = np.clip(1 + fault.flat * spread, 0.2, 2)
    beam = np.clip(1 + fault.beam * rng.standard_normal((len(scan.counts), 1, 1)), 0.2, 2)
    response = flat * beam
    most = float(response.max())
    counts = rng.binomial(scan.counts.astype(np.int64), response / most)
    counts += rng.poisson(fault.background, counts.shape)
    corrected = np.maximum((counts - fault.background) / response, 0)
    probe = Probe((scan.truth.probe.modes / np.sqrt(most)).astype(np.complex64))
    return (
        scan.told(counts=counts.astype(np.float32), probe=probe),
        scan.told(counts=corrected.astype(np.float32), probe=probe),
    )


def error(image: NDArray[np.complex64], truth: NDArray[np.complex64]) -> float:
    known = np.isfinite(image) & np.isfinite(truth)
    a, b = image[known], truth[known]
    factor = np.vdot(a, b) / np.vdot(a, a)
    return float(np.linalg.norm(factor * a - b) / np.linalg.norm(b))


def main() -> int:
    """The program; returns its exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--scans", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(1)
    network, _ = ModelRegistry().load()
    rng = np.random.default_rng(0)
    for seed in range(1, options.scans + 1):
        clean = scan_of(network, seed=seed, photons=1e5)
        for fault in FAULTS:
            raw, corrected = spoiled(clean, fault, rng)
            errors = [error(scan.refined(), scan.true_image) for scan in (raw, corrected)]
            excess = total(corrected.judged(corrected.true_image)).excess
            print(
                f"scan {seed}: {fault}: uncorrected {errors[0]:.3f}, corrected {errors[1]:.3f}, "
                f"the truth's excess {excess:+.4f}"
            )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
