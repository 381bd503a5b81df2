"""Batches of neighbouring frames of stored scans, as indices into the mapped store.

Which frames make batch k is a pure function of (seed, k), so a killed job resumes where it was and
ends with the weights of an undisturbed one. Used by training jobs.
"""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import lightning
import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Dataset, IterableDataset

from ptycho_stream.errors import TrainingError
from ptycho_stream.physics.forward import mode_sum
from ptycho_stream.physics.probe import Probe, shifted_modes, spectrum_of
from ptycho_stream.reconstruct.predict import corner_amplitude
from ptycho_stream.training.overlap import ScanBatch
from ptycho_stream.training.scan_frames import ScanFrames, held_out, judging
from ptycho_stream.training.synthetic import FRAMES_OF_A_SAMPLE, TrainingBatch
from ptycho_stream.training.told_probe import told_probe_batch

_VALIDATION_BATCHES = 8


class JobBatch(NamedTuple):
    """A step's frames: measured ones, synthetic ones or both."""

    measured: ScanBatch | None
    synthetic: TrainingBatch | None


@dataclass(frozen=True)
class BatchPlan:
    """How batches are drawn.

    Attributes:
        seed: of all draws.
        frames: of a batch.
        group_frames: so many successive frames of a batch are neighbours that the network
            reconstructs together.
        held_out: share of the frames that is never trained on.
        measured: batches hold measured frames.
        synthetic: batches hold synthetic frames under the scan's probe.
        rank: which of several processes this is; each has batches of its own.
        ranks: how many there are.
    """

    seed: int
    frames: int
    group_frames: int = 1
    held_out: float = 0.1
    measured: bool = True
    synthetic: bool = False
    rank: int = 0
    ranks: int = 1

    @property
    def frames_of_a_sample(self) -> int:
        """So many successive synthetic frames show one sample."""
        return max(self.group_frames, FRAMES_OF_A_SAMPLE)


class SplitScan:
    """A scan's frames, by their use.

    Attributes:
        frames: all.
        train: indices of those that are trained on.
        held_out: of the others.
        choosing: of those held out that choose the best weights.
        judging: of the rest, which nothing sees before the job's end.

    Raises:
        TrainingError: there are too few of either.
    """

    def __init__(self, frames: ScanFrames, plan: BatchPlan) -> None:
        self.frames = frames
        out = held_out(frames.number, plan.held_out, plan.seed)
        self.train, self.held_out = np.flatnonzero(~out), np.flatnonzero(out)
        judge = judging(frames.number[self.held_out], plan.seed)
        if judge.all() or not judge.any():
            judge = np.arange(len(judge)) % 2 == 1  # so few frames that chance gave all to one
        self.choosing, self.judging = self.held_out[~judge], self.held_out[judge]
        least = max(plan.group_frames, 2)
        if len(self.train) < least or not len(self.judging):
            raise TrainingError(
                f"scan {frames.reader.header.scan_id} gives {len(self.train)} frames to train on "
                f"and {len(self.held_out)} to validate with, {least} and 2 are the least: take "
                "more frames, or hold out another share of them"
            )


def frame_groups(
    rng: np.random.Generator,
    frames: ScanFrames,
    seed_frame: int,
    count: int,
    group_frames: int,
    among: NDArray[np.integer[Any]],
) -> NDArray[np.int64]:
    """Frames near ``seed_frame``, in groups where the network takes several at once.

    Args:
        rng: chooses the partners within groups.
        frames: of the scan.
        seed_frame: the batch lies around it.
        count: frames wanted; whole groups of it are given, fewer where there are fewer.
        group_frames: C; a group is a frame and C - 1 of its max(4, 2 C) nearest ones.
        among: indices to choose from, at least C.

    Returns:
        Indices (B,), group after group.
    """
    if group_frames == 1:
        return frames.nearest(seed_frame, count, among).astype(np.int64)
    firsts = frames.nearest(seed_frame, max(count // group_frames, 1), among)
    groups: list[NDArray[np.integer[Any]]] = []
    for first in firsts.tolist():
        near = frames.nearest(first, max(4, 2 * group_frames) + 1, among)
        near = near[near != first]
        partners = rng.choice(near, group_frames - 1, replace=False)
        groups.append(np.concatenate([[first], partners]))
    return np.concatenate(groups).astype(np.int64)


class PlacedFrames(Protocol):
    """What a batch needs of frames, whoever holds them; the meaning is ScanFrames'."""

    @property
    def probe(self) -> Probe:
        """Scaled to the frames' photons."""
        ...

    @property
    def valid(self) -> NDArray[np.bool_]:
        """Pixels (N, N) that measure."""
        ...

    @property
    def corner_yx_px(self) -> NDArray[np.int64]:
        """Canvas pixels (M, 2) of the patches' [0, 0]."""
        ...

    @property
    def shift_yx_px(self) -> NDArray[np.float32]:
        """By what (M, 2) the probe lies off them."""
        ...

    def counts(self, indices: NDArray[np.integer[Any]]) -> NDArray[Any]:
        """Counts (n, N, N) of frames."""
        ...


def scan_batch(
    frames: PlacedFrames, indices: NDArray[np.int64], scored: NDArray[np.bool_]
) -> ScanBatch:
    """Read frames and put them beside each other; ``scored`` (B,) says whose misfit counts."""
    mask = torch.as_tensor(np.fft.ifftshift(frames.valid)[None].copy())
    amplitude = corner_amplitude(frames.counts(indices))
    shift = torch.as_tensor(frames.shift_yx_px[indices])
    probe = shifted_modes(spectrum_of(frames.probe), shift)
    corner = frames.corner_yx_px[indices]
    return ScanBatch(
        amplitude=torch.where(mask, amplitude, amplitude.new_zeros(())),
        probe=probe,
        valid=mask,
        weight=mode_sum(probe) / float(frames.probe.power_yx.max()),
        corner_yx_px=torch.as_tensor(corner - corner.min(0)),
        scored=torch.as_tensor(scored),
    )


class _Series(IterableDataset[JobBatch]):
    """The endless series of a plan from batch ``first`` on.

    Without a length, so that Lightning does not end a resumed epoch too early.
    """

    def __init__(self, scans: Sequence[SplitScan], plan: BatchPlan, first: int) -> None:
        self._scans, self._plan, self._first = scans, plan, first

    def __iter__(self) -> Iterator[JobBatch]:
        plan = self._plan
        for step in itertools.count(self._first):
            yield training_batch(self._scans, plan, step * plan.ranks + plan.rank)


def training_batch(scans: Sequence[SplitScan], plan: BatchPlan, number: int) -> JobBatch:
    """Batch ``number`` of a plan: frames about one that is drawn from all training frames."""
    rng = np.random.default_rng((plan.seed, number))
    shares = np.array([len(scan.train) for scan in scans], np.float64)
    scan = scans[int(rng.choice(len(scans), p=shares / shares.sum()))]
    measured = synthetic = None
    if plan.measured:
        seed_frame = int(rng.choice(scan.train))
        near = frame_groups(
            rng, scan.frames, seed_frame, plan.frames, plan.group_frames, scan.train
        )
        measured = scan_batch(scan.frames, near, np.ones(len(near), bool))
    if plan.synthetic:
        synthetic = told_probe_batch(
            scan.frames, plan.seed, number, plan.frames, plan.frames_of_a_sample
        )
    return JobBatch(measured, synthetic)


class _Validation(Dataset[JobBatch]):
    """The same few batches each time, around held-out frames; only these are scored.

    Frames that judge the job's end are in none of them.
    """

    def __init__(self, scans: Sequence[SplitScan], plan: BatchPlan) -> None:
        rng = np.random.default_rng(plan.seed)
        everywhere = [(s, int(i)) for s, scan in enumerate(scans) for i in scan.choosing]
        chosen = rng.permutation(len(everywhere))[:_VALIDATION_BATCHES]
        self._centres = [everywhere[i] for i in chosen.tolist()]
        self._scans, self._plan = scans, plan

    def __len__(self) -> int:
        return len(self._centres)

    def __getitem__(self, number: int) -> JobBatch:
        which, centre = self._centres[number]
        scan, plan = self._scans[which], self._plan
        rng = np.random.default_rng((plan.seed, number))
        others = np.setdiff1d(np.arange(len(scan.frames)), scan.judging)
        near = frame_groups(rng, scan.frames, centre, plan.frames, plan.group_frames, others)
        return JobBatch(scan_batch(scan.frames, near, np.isin(near, scan.choosing)), None)


class ScanData(lightning.LightningDataModule):
    """Batches for a job's training and validation, made as they are needed.

    Args:
        scans: to draw from, each as often as it has frames.
        plan: how to draw.
        first: steps already done, when a job is resumed.
    """

    def __init__(self, scans: Sequence[SplitScan], plan: BatchPlan, first: int = 0) -> None:
        super().__init__()
        self._scans, self._plan, self._first = scans, plan, first

    def train_dataloader(self) -> DataLoader[JobBatch]:
        """The training series, without end."""
        return DataLoader(_Series(self._scans, self._plan, self._first), batch_size=None)

    def val_dataloader(self) -> DataLoader[JobBatch]:
        """A few batches of which the held-out frames count."""
        return DataLoader(_Validation(self._scans, self._plan), batch_size=None)
