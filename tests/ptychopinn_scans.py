"""A simulated scan of an asymmetric sample, as the tests of the PtychoPINN face share it."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from ptycho_stream.files.npz import ScanFile
from ptycho_stream.files.ptychopinn_npz import save_ptychopinn
from ptycho_stream.simulate.experiment import simulate_experiment
from ptycho_stream.simulate.scan_file import scan_file_of

SIZE = 32


def asymmetric_sample(_rng: np.random.Generator, shape: tuple[int, int]) -> np.ndarray:
    """No turn, mirror or swap of axes leaves it as it is: two unequal bars and a phase wedge."""
    height, width = shape
    y, x = np.mgrid[0:height, 0:width] / min(shape)
    amplitude = np.ones(shape)
    amplitude[height // 6 : height // 4, width // 5 : 4 * width // 5] = 0.6
    amplitude[height // 4 : 4 * height // 5, width // 5 : width // 4] = 0.75
    phase = 0.8 * np.sin(9 * x) * y + 0.5 * (np.hypot(y - 0.7, x - 0.65) < 0.12)
    return (amplitude * np.exp(1j * phase)).astype(np.complex64)


def make_scan(frames: int = 60, size_px: int = SIZE, **changes) -> ScanFile:
    values = {"seed": 3, "photons": 1e6, "sample": asymmetric_sample, "step_px": 4.0} | changes
    return scan_file_of(simulate_experiment(frames=frames, size_px=size_px, **values))


def write_files(folder: Path, scan: ScanFile) -> float:
    """Write ``train_data.npz`` and ``test_data.npz``, which are the same; photons of a frame."""
    for name in ("train_data.npz", "test_data.npz"):
        save_ptychopinn(folder / name, scan)
    good = True if scan.bad_pixels is None else ~scan.bad_pixels
    return float((scan.counts * good).sum(dtype=np.float64)) / len(scan)
