"""Whether a candidate is better than the model in use: both stitch, held-out frames judge.

The frames around the held-out ones are predicted and stitched as the reconstruct stage does it;
the held-out ones are then simulated back from the object. Used by training jobs.
"""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from ptycho_stream.networks.network import Network
from ptycho_stream.reconstruct.canvas import divide
from ptycho_stream.reconstruct.misfit import Misfit, stitched_misfit
from ptycho_stream.reconstruct.predict import Predictor
from ptycho_stream.training.scan_data import SplitScan, frame_groups
from ptycho_stream.training.scan_frames import ScanFrames

_REGION_FRAMES = 256
_REGIONS = 2
"""Of a scan with more frames than one region, so many regions are stitched, spread at random."""


def judge(network: Network, scans: Sequence[SplitScan], device: torch.device, seed: int) -> Misfit:
    """Misfit of held-out frames to the object that ``network`` makes of them and their neighbours.

    The same seed judges every network by the same frames and the same noise.
    """
    total = Misfit()
    for scan in scans:
        for region in _regions(scan, seed):
            total = total + _region_misfit(network, scan, region, device, seed)
    return total


def _regions(scan: SplitScan, seed: int) -> list[NDArray[np.int64]]:
    """Sets of neighbouring frames about held-out ones; all frames where they are few."""
    every = np.arange(len(scan.frames))
    if len(every) <= _REGIONS * _REGION_FRAMES:
        return [every]
    rng = np.random.default_rng(seed)
    centres = rng.choice(scan.held_out, min(_REGIONS, len(scan.held_out)), replace=False)
    return [
        scan.frames.nearest(centre, _REGION_FRAMES, every).astype(np.int64)
        for centre in centres.tolist()
    ]


def _region_misfit(
    network: Network,
    scan: SplitScan,
    region: NDArray[np.int64],
    device: torch.device,
    seed: int,
) -> Misfit:
    frames = scan.frames
    corner, object_yx, _ = stitched(network, frames, region, device, seed)
    judges = region[np.isin(region, scan.held_out)]
    return stitched_misfit(
        object_yx,
        frames.corner_yx_px[judges] - corner,
        frames.shift_yx_px[judges],
        lambda which: frames.counts(judges[which]),
        frames.probe,
        frames.valid,
        device=device,
        seed=seed,
    )


def stitched(
    network: Network,
    frames: ScanFrames,
    indices: NDArray[np.int64],
    device: torch.device,
    seed: int = 0,
) -> tuple[NDArray[np.int64], NDArray[np.complex64], NDArray[np.float32]]:
    """The object that a network makes of some frames, in one pass.

    Args:
        network: moved to ``device``.
        frames: of a scan.
        indices: (n,), which of them.
        device: where to compute.
        seed: of the partners that frames get where the network takes several at once.

    Returns:
        Canvas pixel (2,) of the object's [0, 0]; the object complex64 (H, W), NaN where never
        seen; and its weight float32 (H, W).
    """
    size = frames.probe.size_px
    grouped = _in_groups(network, frames, indices, seed)
    predictor = Predictor(network, frames.probe, device, _batch_frames(network))
    corner = frames.corner_yx_px[grouped].min(0)
    shape = tuple(frames.corner_yx_px[grouped].max(0) + size - corner)
    numerator, denominator = np.zeros(shape, np.complex64), np.zeros(shape, np.float32)
    for start in range(0, len(grouped), predictor.batch_size):
        part = grouped[start : start + predictor.batch_size]
        patches, weights = predictor.predict(
            frames.counts(part), frames.shift_yx_px[part], frames.valid
        )
        places = (frames.corner_yx_px[part] - corner).tolist()
        for patch, weight, (top, left) in zip(patches, weights, places, strict=True):
            window = slice(top, top + size), slice(left, left + size)
            numerator[window] += patch * weight
            denominator[window] += weight
    return corner, *divide(numerator, denominator)


def _batch_frames(network: Network) -> int:
    return network.group_frames * max(16 // network.group_frames, 1)


def _in_groups(
    network: Network, frames: ScanFrames, indices: NDArray[np.int64], seed: int
) -> NDArray[np.int64]:
    """Frames as the network takes them: each once as the first of a group."""
    group = network.group_frames
    if group == 1:
        return indices
    rng = np.random.default_rng(seed)
    groups = [frame_groups(rng, frames, i, group, group, indices) for i in indices.tolist()]
    return np.concatenate(groups)
