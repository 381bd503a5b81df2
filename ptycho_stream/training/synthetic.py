"""Synthetic training batches: frames of random samples under random, imperfectly known probes.

Every batch is a pure function of (seed, number), so a run resumes where it stopped and repeats
bit for bit. Used by pre-training and by its tests.
"""

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import lightning
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, get_worker_info

from ptycho_stream.physics.forward import intensity
from ptycho_stream.physics.probe import Probe
from ptycho_stream.simulate.probes import WIDE_PROBES, random_probe
from ptycho_stream.simulate.samples import WIDE_SAMPLES, random_sample

Complex = NDArray[np.complex64]
Mask = NDArray[np.bool_]

FRAMES_OF_A_SAMPLE = 4
"""So many neighbouring frames of a batch show parts of one sample under one probe."""

VALIDATION_SEED = 2**31
"""Added to the training seed, so that no validation batch is ever trained on."""


@dataclass(frozen=True)
class SyntheticSettings:
    """What the training frames are like.

    Attributes:
        sizes_px: frame sizes; one is drawn for each batch, so repeating one favours it.
        frames: frames of the largest size in a batch; smaller sizes get more, for equal work.
        max_modes: most modes that the network is given.
        photons: lowest, most likely and highest of the beam's photons (triangular in the log).
    """

    sizes_px: tuple[int, ...] = (64, 64, 128)
    frames: int = 8
    max_modes: int = 3
    photons: tuple[float, float, float] = (2e3, 1e6, 1e7)


class TrainingBatch(NamedTuple):
    """One batch, all of one size and number of modes; a tuple, as Lightning moves it to a device.

    Attributes:
        amplitude: float32 (B, N, N), square root of the counts, zero frequency at [0, 0].
        probe: complex64 (B, modes, N, N), as the network is told.
        valid: bool (B, N, N).
        obj: complex64 (B, N, N), the truth.
        weight: float32 (B, N, N), root of the true probe intensity, 1 at its peak.
        corner_yx_px: int64 (B, 2), where in its sample a frame's patch begins.
    """

    amplitude: Tensor
    probe: Tensor
    valid: Tensor
    obj: Tensor
    weight: Tensor
    corner_yx_px: Tensor


@dataclass(frozen=True)
class _Group:
    """Frames of one sample under one probe, before detection."""

    true_probe: Complex
    told_probe: Complex
    objects: Complex
    corners: NDArray[np.int64]
    valid: Mask
    background: float


def synthetic_batch(seed: int, number: int, settings: SyntheticSettings) -> TrainingBatch:
    """Make batch ``number`` of the endless series that ``seed`` names."""
    rng = np.random.default_rng((seed, number))
    size = int(rng.choice(settings.sizes_px))
    modes = 1 if rng.random() < 0.4 else int(rng.integers(1, settings.max_modes + 1))
    ratio = max(settings.sizes_px) / size
    frames = round(settings.frames * ratio * ratio)
    per_group = FRAMES_OF_A_SAMPLE
    groups = [_group(rng, size, modes, settings) for _ in range(max(frames // per_group, 1))]
    obj = torch.as_tensor(np.concatenate([g.objects for g in groups]))
    valid = torch.as_tensor(np.repeat([g.valid for g in groups], per_group, 0))
    expected = [
        intensity(torch.as_tensor(g.true_probe)[None], torch.as_tensor(g.objects)) + g.background
        for g in groups
    ]
    counts = rng.poisson(torch.cat(expected).double().numpy()).astype(np.float32)
    amplitude = torch.where(valid, torch.as_tensor(counts).sqrt(), torch.zeros(()))
    power = np.stack([(np.abs(g.true_probe) ** 2).sum(0) for g in groups]).astype(np.float32)
    weight = np.sqrt(power / power.max((1, 2), keepdims=True))
    told = np.stack([g.told_probe for g in groups])
    return TrainingBatch(
        amplitude=amplitude,
        probe=torch.as_tensor(np.repeat(told, per_group, 0)),
        valid=valid,
        obj=obj,
        weight=torch.as_tensor(np.repeat(weight, per_group, 0)),
        corner_yx_px=torch.as_tensor(np.concatenate([g.corners for g in groups])),
    )


def _group(rng: np.random.Generator, size: int, modes: int, settings: SyntheticSettings) -> _Group:
    low, mode, high = (math.log10(n) for n in settings.photons)
    photons = float(10 ** rng.triangular(low, mode, high))
    hidden = int(rng.integers(1, 3)) if rng.random() < 0.12 else 0
    probe = random_probe(rng, size, modes=modes + hidden, photons=photons, mix=WIDE_PROBES)
    told = probe.leading(modes)
    if hidden and rng.random() < 0.5:
        told = told.normalised(photons)
    sample = random_sample(rng, (2 * size, 2 * size), WIDE_SAMPLES)
    corners = overlapping_corners(rng, size, FRAMES_OF_A_SAMPLE)
    objects = np.stack([sample[y : y + size, x : x + size] for y, x in corners])
    return _Group(
        true_probe=probe.modes,
        told_probe=_misjudged(rng, told).modes,
        objects=objects,
        corners=corners,
        valid=_valid_pixels(rng, size),
        background=float(10 ** rng.uniform(-3, -0.5)) if rng.random() < 0.1 else 0.0,
    )


def overlapping_corners(rng: np.random.Generator, size: int, count: int) -> NDArray[np.int64]:
    """Corners (count, 2) of windows of ``size`` in a sample of twice that, not far apart."""
    reach = round(size * rng.uniform(0.03, 0.25))
    corners = rng.integers(0, size + 1, 2) + rng.integers(-reach, reach + 1, (count, 2))
    return np.clip(corners, 0, size)


def _misjudged(rng: np.random.Generator, probe: Probe) -> Probe:
    """The probe as an earlier reconstruction would have it: noisy, and not quite of this power."""
    modes = probe.modes
    if rng.random() < 0.1:
        noise = rng.standard_normal((2, *modes.shape), np.float32)
        level = rng.uniform(0.002, 0.03) * np.sqrt(float(np.max(probe.power_yx)))
        modes = modes + (noise[0] + 1j * noise[1]).astype(np.complex64) * np.float32(level)
    if rng.random() < 0.2:
        modes = modes * np.float32(1 + 0.01 * rng.standard_normal())
    return Probe(modes)


def _valid_pixels(rng: np.random.Generator, size: int) -> Mask:
    """Module gaps, dead pixels and a beam stop, each in some of the groups; corner order."""
    valid = np.ones((size, size), bool)
    if rng.random() < 0.7:
        return valid
    for axis in range(2):
        if rng.random() < 0.4:
            width, start = int(rng.integers(1, 8)), int(rng.integers(0, size))
            np.moveaxis(valid, axis, 0)[start : start + width] = False
    if rng.random() < 0.5:
        valid &= rng.random((size, size)) > rng.uniform(0, 0.02)
    if rng.random() < 0.25:
        f = np.fft.fftfreq(size) * size
        valid &= np.hypot(f[:, None], f[None, :]) > rng.uniform(0.5, 0.05 * size)
    return valid


class _Series(IterableDataset[TrainingBatch]):
    """The endless series of a seed from batch ``first`` on, dealt over a DataLoader's workers.

    Without a length on purpose: Lightning counts the batches of an interrupted epoch against a
    loader's length, and would end a resumed epoch too early.
    """

    def __init__(self, seed: int, first: int, settings: SyntheticSettings) -> None:
        self._seed, self._first, self._settings = seed, first, settings

    def __iter__(self) -> Iterator[TrainingBatch]:
        worker = get_worker_info()
        offset, stride = (0, 1) if worker is None else (worker.id, worker.num_workers)
        for number in itertools.count(self._first + offset, stride):
            yield synthetic_batch(self._seed, number, self._settings)


def _one_thread(_worker: int) -> None:
    torch.set_num_threads(1)


class SyntheticData(lightning.LightningDataModule):
    """Training and validation batches made while training runs, by worker processes.

    Args:
        seed: names the series.
        first: batches already trained on, when a run is resumed.
        validation: number of validation batches.
        workers: processes that make batches; 0 makes them in the training process.
        settings: what the frames are like.
    """

    def __init__(
        self,
        seed: int,
        *,
        first: int = 0,
        validation: int = 12,
        workers: int = 1,
        settings: SyntheticSettings | None = None,
    ) -> None:
        super().__init__()
        self._seed, self._first = seed, first
        self._validation, self._workers = validation, workers
        self._settings = settings or SyntheticSettings()

    def train_dataloader(self) -> DataLoader[TrainingBatch]:
        """The training series, without end."""
        # spawn, not fork: torch's threads do not survive a fork.
        return DataLoader(
            _Series(self._seed, self._first, self._settings),
            batch_size=None,
            num_workers=self._workers,
            worker_init_fn=_one_thread,
            prefetch_factor=4 if self._workers else None,
            multiprocessing_context="spawn" if self._workers else None,
        )

    def val_dataloader(self) -> DataLoader[TrainingBatch]:
        """The same few batches each time, of a seed that is never trained on."""
        made = [
            synthetic_batch(self._seed + VALIDATION_SEED, number, self._settings)
            for number in range(self._validation)
        ]
        return DataLoader(_Held(made), batch_size=None)


class _Held(Dataset[TrainingBatch]):
    """Batches kept in memory."""

    def __init__(self, batches: list[TrainingBatch]) -> None:
        self._batches = batches

    def __len__(self) -> int:
        return len(self._batches)

    def __getitem__(self, number: int) -> TrainingBatch:
        return self._batches[number]
