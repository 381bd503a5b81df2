"""Whether a candidate is better than the model in use: both stitch, the same held-out frames judge.

The frames around the judging ones are predicted and stitched as the reconstruct stage does it; the
judging ones, which neither trained nor chose weights, are then simulated back from the object. Used
by training jobs.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import reduce

import numpy as np
import torch
from numpy.typing import NDArray

from ptycho_stream.networks.network import Network
from ptycho_stream.reconstruct.canvas import divide
from ptycho_stream.reconstruct.misfit import Misfit, seen_windows, stitched_misfit
from ptycho_stream.reconstruct.predict import Predictor
from ptycho_stream.training.scan_data import SplitScan, frame_groups
from ptycho_stream.training.scan_frames import ScanFrames

_REGION_FRAMES = 256
_REGIONS = 2
"""Of a scan with more frames than one region, so many regions are stitched, spread at random."""

_REGION_WINDOWS = 32
"""A region is no wider than so many windows, that a sparse scan does not need all memory."""


@dataclass(frozen=True)
class Judgement:
    """What the frames that judge say of some networks.

    Attributes:
        misfits: of each network; of the same frames, those that every object shows. ``skipped``
            are those that the network's own object does not show.
        apart: the judging frames did not help to stitch. False where the scan overlaps so little
            that there was no object at most of their places without them.
    """

    misfits: tuple[Misfit, ...]
    apart: bool


def judge(
    networks: Sequence[Network],
    scans: Sequence[SplitScan],
    device: torch.device,
    seed: int,
    heed: Callable[[], None] = lambda: None,
) -> Judgement:
    """Misfits of held-out frames to the objects that networks make of the frames around them.

    The same seed judges by the same frames and the same noise.  ``heed`` is called before each
    object is stitched, and may raise to end it.
    """
    totals, apart = [Misfit() for _ in networks], True
    for scan in scans:
        for region in _regions(scan, seed):
            found = _judged(networks, scan, region, device, seed, heed)
            totals = [total + more for total, more in zip(totals, found.misfits, strict=True)]
            apart = apart and found.apart
    return Judgement(tuple(totals), apart)


def _regions(scan: SplitScan, seed: int) -> list[NDArray[np.int64]]:
    """Sets of neighbouring frames about judging ones; all frames where they are few and near."""
    frames = scan.frames
    every = np.arange(len(frames))
    widest_px = _REGION_WINDOWS * frames.probe.size_px
    near_enough = np.ptp(frames.corner_yx_px, axis=0).max() <= widest_px
    if len(every) <= _REGIONS * _REGION_FRAMES and near_enough:
        return [every]
    rng = np.random.default_rng(seed)
    regions: list[NDArray[np.int64]] = []
    for centre in rng.choice(scan.judging, min(_REGIONS, len(scan.judging)), replace=False):
        near = frames.nearest(int(centre), _REGION_FRAMES, every).astype(np.int64)
        off = np.abs(frames.corner_yx_px[near] - frames.corner_yx_px[centre]).max(1)
        regions.append(near[off <= widest_px // 2])
    return regions


def _judged(
    networks: Sequence[Network],
    scan: SplitScan,
    region: NDArray[np.int64],
    device: torch.device,
    seed: int,
    heed: Callable[[], None],
) -> Judgement:
    judges = region[np.isin(region, scan.judging)]
    others = np.setdiff1d(region, judges)
    least = max(network.group_frames for network in networks)
    if len(others) >= least:
        found, common = _objects(networks, scan.frames, others, judges, device, seed, heed)
        # Of the object that shows most: holes are a fault of their network, not of the scan.
        if 2 * max(len(made.shown) for made in found) >= len(judges):
            return Judgement(_misfits(found, scan.frames, judges, common, device, seed), True)
    found, common = _objects(networks, scan.frames, region, judges, device, seed, heed)
    return Judgement(_misfits(found, scan.frames, judges, common, device, seed), False)


@dataclass(frozen=True)
class _Object:
    """What a network made of a region, and the judges (indices) that it shows."""

    corner_yx_px: NDArray[np.int64]
    object_yx: NDArray[np.complex64]
    shown: NDArray[np.int64]


def _objects(
    networks: Sequence[Network],
    frames: ScanFrames,
    indices: NDArray[np.int64],
    judges: NDArray[np.int64],
    device: torch.device,
    seed: int,
    heed: Callable[[], None],
) -> tuple[list[_Object], NDArray[np.int64]]:
    """The networks' objects, and the judges that all of them show."""
    found: list[_Object] = []
    for network in networks:
        heed()
        corner, object_yx, _ = stitched(network, frames, indices, device, seed)
        shown = seen_windows(object_yx, frames.corner_yx_px[judges] - corner, frames.probe)
        found.append(_Object(corner, object_yx, judges[shown]))
    return found, reduce(np.intersect1d, [made.shown for made in found])


def _misfits(
    found: Sequence[_Object],
    frames: ScanFrames,
    judges: NDArray[np.int64],
    common: NDArray[np.int64],
    device: torch.device,
    seed: int,
) -> tuple[Misfit, ...]:
    return tuple(
        replace(
            stitched_misfit(
                made.object_yx,
                frames.corner_yx_px[common] - made.corner_yx_px,
                frames.shift_yx_px[common],
                lambda which: frames.counts(common[which]),
                frames.probe,
                frames.valid,
                device=device,
                seed=seed,
            ),
            skipped=len(judges) - len(made.shown),
        )
        for made in found
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
