"""Synthetic frames under a scan's own probe, for supervised training that suits this scan.

The samples are the simulator's, everything else is the scan's: probe modes, photons, masked
pixels. Every batch is a pure function of (seed, number).
"""

import numpy as np
import torch
from numpy.typing import NDArray

from ptycho_stream.physics.forward import intensity, mode_sum
from ptycho_stream.physics.probe import shifted_modes, spectrum_of
from ptycho_stream.simulate.samples import WIDE_SAMPLES, random_sample
from ptycho_stream.training.scan_frames import ScanFrames
from ptycho_stream.training.synthetic import TrainingBatch, overlapping_corners

_STREAM = 0x5EED
"""Keeps the synthetic series of a seed apart from its series of measured batches."""


def told_probe_batch(
    frames: ScanFrames, seed: int, number: int, count: int, per_sample: int
) -> TrainingBatch:
    """Make batch ``number`` of the endless series that ``seed`` names.

    Args:
        frames: whose probe and mask are used.
        seed: of the series.
        number: of the batch.
        count: frames of it, rounded down to whole samples (at least one).
        per_sample: so many successive frames show parts of one sample.
    """
    rng = np.random.default_rng((seed, number, _STREAM))
    size = frames.probe.size_px
    samples = max(count // per_sample, 1)
    corners: list[NDArray[np.int64]] = []
    windows: list[NDArray[np.complex64]] = []
    for _ in range(samples):
        sample = random_sample(rng, (2 * size, 2 * size), WIDE_SAMPLES)
        corners.append(overlapping_corners(rng, size, per_sample))
        windows += [sample[y : y + size, x : x + size] for y, x in corners[-1]]
    obj = torch.as_tensor(np.stack(windows))
    shift = rng.uniform(-0.5, 0.5, (len(windows), 2)).astype(np.float32)
    probe = shifted_modes(spectrum_of(frames.probe), torch.as_tensor(shift))
    counts = rng.poisson(intensity(probe, obj).double().numpy()).astype(np.float32)
    valid = torch.as_tensor(np.fft.ifftshift(frames.valid).copy()).expand(obj.shape)
    amplitude = torch.where(valid, torch.as_tensor(counts).sqrt(), torch.zeros(()))
    power = mode_sum(probe)
    weight = (power / power.amax((1, 2), keepdim=True)).sqrt()
    corner = torch.as_tensor(np.concatenate(corners))
    return TrainingBatch(amplitude, probe, valid, obj, weight, corner)
