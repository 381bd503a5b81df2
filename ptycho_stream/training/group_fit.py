"""Train a network on groups of frames that somebody else has drawn, epoch by epoch.

The Lightning side of the PtychoPINN face: its files, groups and bundles know nothing of Lightning.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning
import numpy as np
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import Logger
from numpy.typing import NDArray
from torch import distributed
from torch.utils.data import DataLoader, Dataset, IterableDataset

from ptycho_stream.errors import TrainingError
from ptycho_stream.networks.network import Network
from ptycho_stream.training.budget import Budget
from ptycho_stream.training.conductor import BestWeights
from ptycho_stream.training.epoch_figures import EpochFigures
from ptycho_stream.training.fitting import LEARNING_RATE, MONITOR
from ptycho_stream.training.group_objectives import GroupBatch, KnownPatches, Misfit
from ptycho_stream.training.module import NetworkTraining
from ptycho_stream.training.scan_data import PlacedFrames, scan_batch
from ptycho_stream.training.trainer import Machine, make_trainer


@dataclass(frozen=True)
class Groups:
    """Groups of frames.

    Attributes:
        frames: to choose from, in photons.
        indices: integers (B, C), the groups.
        truth: known patches (n, N, N) of frames (n,), on the pixel grid of their batches; None:
            nothing is known.
    """

    frames: PlacedFrames
    indices: NDArray[np.integer[Any]]
    truth: Callable[[NDArray[np.integer[Any]]], NDArray[np.complex64]] | None = None

    def batch(self, chosen: NDArray[np.integer[Any]]) -> GroupBatch:
        """The groups ``chosen`` (n,), read and put beside each other."""
        rows = self.indices[chosen].reshape(-1).astype(np.int64)
        measured = scan_batch(self.frames, rows, np.ones(len(rows), bool))
        truth = None if self.truth is None else torch.as_tensor(self.truth(rows))
        return GroupBatch(measured, truth)


@dataclass(frozen=True)
class GroupFit:
    """How to train.

    Attributes:
        epochs: so often every group is seen.
        batch_groups: groups of a step.
        seed: of the order of groups.
        learning_rate: peak rate.
    """

    epochs: int
    batch_groups: int
    seed: int = 0
    learning_rate: float = LEARNING_RATE


def fit_groups(
    network: Network,
    objective: Misfit | KnownPatches,
    train: Groups,
    test: Groups,
    how: GroupFit,
    *,
    folder: Path,
    machine: Machine,
    loggers: Sequence[Logger] = (),
    told: Mapping[str, Any] | None = None,
) -> list[EpochFigures]:
    """Train ``network`` in place; it ends with the weights of the epoch that ``test`` liked best.

    Args:
        network: on the CPU before and afterwards.
        objective: what to learn.
        train: to learn from.
        test: to judge each epoch by.
        how: long, and in which steps.
        folder: for what Lightning writes.
        machine: where.
        loggers: of figures.
        told: what they are told of the training besides.

    Returns:
        The figures of each epoch.

    Raises:
        TrainingError: the loss is not finite, or Lightning refuses the settings.
    """
    steps = math.ceil(len(train.indices) / (how.batch_groups * machine.ranks))
    module = NetworkTraining(
        network.train(), objective, Budget(steps=how.epochs * steps), how.learning_rate
    )
    best, history = BestWeights(MONITOR), _History(objective)
    try:
        trainer = make_trainer(
            folder,
            module.budget,
            machine,
            loggers=loggers,
            callbacks=[best, history],
            validate_every=steps,
        )
    except MisconfigurationException as error:
        raise TrainingError(f"training cannot be set up so: {error}") from error
    for logger in loggers:
        logger.log_hyperparams(dict(told or {}))
    trainer.fit(
        module,
        DataLoader(_Series(train, how), batch_size=None),
        DataLoader(_Judging(test, how.batch_groups), batch_size=None),
    )
    assert best.weights is not None
    network.cpu().load_state_dict(best.weights)
    network.eval()
    return history.epochs


def is_first_process() -> bool:
    """Whether this is the process, of those that Lightning started, that writes files."""
    return getattr(rank_zero_only, "rank", 0) == 0


class _Series(IterableDataset[GroupBatch]):
    """The groups in another order each epoch, without end; each process has batches of its own."""

    def __init__(self, groups: Groups, how: GroupFit) -> None:
        self._groups, self._how = groups, how

    def __iter__(self) -> Iterator[GroupBatch]:
        rank, ranks = 0, 1
        if distributed.is_initialized():
            rank, ranks = distributed.get_rank(), distributed.get_world_size()
        count = len(self._groups.indices)
        share = math.ceil(count / (self._how.batch_groups * ranks))
        for epoch in itertools.count():
            order = np.random.default_rng((self._how.seed, epoch)).permutation(count)
            # Every process takes as many steps: they wait for each other at each.
            batches = np.array_split(order, min(share * ranks, count))
            for step in range(share):
                yield self._groups.batch(batches[(step * ranks + rank) % len(batches)])


class _Judging(Dataset[GroupBatch]):
    """The groups in order, a few at a time."""

    def __init__(self, groups: Groups, batch_groups: int) -> None:
        self._groups = groups
        count = len(groups.indices)
        self._batches = np.array_split(np.arange(count), math.ceil(count / batch_groups))

    def __len__(self) -> int:
        return len(self._batches)

    def __getitem__(self, number: int) -> GroupBatch:
        return self._groups.batch(self._batches[number])


class _History(Callback):
    """Keeps the figures of every epoch."""

    def __init__(self, objective: Misfit | KnownPatches) -> None:
        self.epochs: list[EpochFigures] = []
        self._objective = objective

    def on_validation_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule
    ) -> None:
        told = {name: float(value) for name, value in trainer.callback_metrics.items()}
        self.epochs.append(
            EpochFigures(
                epoch=len(self.epochs) + 1,
                training=told["train_loss"],
                validation=told[MONITOR],
                spread=told["val_spread"],
                collapsed=told["val_collapsed"],
                flux=self._objective.flux,
            )
        )
