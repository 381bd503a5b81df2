"""The one set-up of Lightning's Trainer: precision, clipping, validation, devices, checkpoints.

Used by pre-training and by jobs.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

import lightning
import torch
from lightning.fabric.plugins.environments.cluster_environment import ClusterEnvironment
from lightning.pytorch.callbacks import Callback, Checkpoint, LearningRateMonitor
from lightning.pytorch.loggers import Logger
from lightning.pytorch.strategies import DDPStrategy, Strategy

from ptycho_stream.training.budget import Budget
from ptycho_stream.training.checkpoints import AtomicCheckpoints

_CLIP_NORM = 1.0

_PATIENCE = timedelta(minutes=3)
"""Processes wait no longer for one that does not come, or that has died."""


@dataclass(frozen=True)
class Machine:
    """What to train on.

    Attributes:
        device: the first, or only, device.
        ranks: processes, each with a device; those of GPUs follow the first.
        precision: Lightning's name.
        environment: how several processes find each other; None: Lightning starts this program
            again for each.
        strategy: ``ddp`` where one process is to work as one of several would; ``auto``: only
            several do.
    """

    device: torch.device
    ranks: int = 1
    precision: str = "32-true"
    environment: ClusterEnvironment | None = None
    strategy: Literal["auto", "ddp"] = "auto"

    def arguments(self) -> dict[str, Any]:
        """What the Trainer is told of the machine."""
        on_gpu = self.device.type == "cuda"
        first = self.device.index or 0
        plugins: list[Any] = [AtomicCheckpoints()]
        if self.environment is not None:
            plugins.append(self.environment)
        return {
            "accelerator": "gpu" if on_gpu else "cpu",
            "devices": list(range(first, first + self.ranks)) if on_gpu else self.ranks,
            "strategy": self._strategy(),
            "precision": self.precision,
            "plugins": plugins,
        }

    def _strategy(self) -> str | Strategy:
        if self.ranks == 1 and self.strategy == "auto":
            return "auto"
        # Unused parameters: a confidence learns nothing where the truth is not known.
        return DDPStrategy(find_unused_parameters=True, timeout=_PATIENCE)


def make_trainer(
    folder: Path,
    budget: Budget,
    machine: Machine,
    *,
    loggers: Sequence[Logger],
    callbacks: Sequence[Callback],
    validate_every: int,
    progress: bool = False,
) -> lightning.Trainer:
    """A Trainer that trains until the module says that the budget is spent.

    Args:
        folder: for what callbacks write by default.
        budget: its steps, if it has any, are never exceeded.
        machine: where to train.
        loggers: where figures go; none is fine.
        callbacks: besides the learning rate's monitor.
        validate_every: steps between validations.
        progress: show Lightning's progress bar.
    """
    monitors = [LearningRateMonitor("step")] if loggers else []
    return lightning.Trainer(
        **machine.arguments(),
        default_root_dir=folder,
        max_steps=budget.steps or -1,
        max_epochs=-1,
        gradient_clip_val=_CLIP_NORM,
        logger=list(loggers),
        callbacks=[*monitors, *callbacks],
        val_check_interval=validate_every,
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
        log_every_n_steps=20,
        use_distributed_sampler=False,
        enable_checkpointing=any(isinstance(callback, Checkpoint) for callback in callbacks),
        enable_progress_bar=progress,
        enable_model_summary=False,
    )
