"""Pre-training of the unrolled network on synthetic frames, from nothing or from a checkpoint.

This made the weights that the package ships (see docs/models.md). Used by the command
``ptycho-stream models pretrain`` and by tests.
"""

import math
import time
from dataclasses import dataclass
from pathlib import Path

import lightning
import torch
from lightning.pytorch.callbacks import Callback, LearningRateMonitor, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR

from ptycho_stream.errors import ModelError
from ptycho_stream.networks.unrolled import UnrolledNetwork, UnrolledSettings
from ptycho_stream.training.synthetic import SyntheticData, SyntheticSettings, TrainingBatch

_WARM_UP_STEPS = 100
_STAGE_DISCOUNT = 0.5
"""Each stage before the last counts this much of the next one: early stages learn at once."""


@dataclass(frozen=True)
class Budget:
    """How long to train: exactly one of the two.

    Attributes:
        steps: optimiser steps, repeatable bit for bit on one machine.
        minutes: wall-clock time, for machines of unknown speed.
    """

    steps: int | None = None
    minutes: float | None = None

    def __post_init__(self) -> None:
        given = [v for v in (self.steps, self.minutes) if v is not None]
        if len(given) != 1 or given[0] <= 0:
            raise ModelError("give a training budget as either steps or minutes, above zero")

    def spent(self, steps: int, seconds: float) -> float:
        """The part of the budget that is used up, 0 to 1 and beyond."""
        if self.steps is not None:
            return steps / self.steps
        return seconds / (60 * (self.minutes or 1))


def frame_errors(estimate: Tensor, obj: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Probe-weighted errors of each frame after removing its arbitrary phase.

    Args:
        estimate: complex (B, N, N).
        obj: complex (B, N, N), the truth.
        weight: real (B, N, N).

    Returns:
        (weighted mean absolute error (B,), weighted relative root mean square error (B,)).
    """
    squared = weight.square()
    inner = (squared * obj * estimate.conj()).sum((-2, -1), keepdim=True)
    phase = inner / inner.abs().clamp_min(1e-12)
    difference = estimate * phase.detach() - obj
    power = torch.view_as_real(difference).square().sum(-1)
    # The root's gradient is infinite at zero error; 1e-8 is 1e-4 of the object's amplitude.
    absolute = (weight * (power + 1e-8).sqrt()).sum((-2, -1)) / weight.sum((-2, -1))
    truth = (squared * torch.view_as_real(obj).square().sum(-1)).sum((-2, -1))
    return absolute, ((squared * power).sum((-2, -1)) / truth).sqrt()


class UnrolledTraining(lightning.LightningModule):
    """Loss, optimiser and schedule of the unrolled network.

    AdamW whose rate rises for 100 steps and falls along a cosine to zero at the budget's end.
    """

    def __init__(self, settings: UnrolledSettings, budget: Budget, learning_rate: float) -> None:
        super().__init__()
        self.network = UnrolledNetwork(settings).to(memory_format=torch.channels_last)
        self._budget, self._learning_rate = budget, learning_rate
        self._seconds_before = 0.0
        self._started = time.monotonic()

    @property
    def seconds(self) -> float:
        """Wall-clock training time, earlier runs that this one resumes included."""
        return self._seconds_before + time.monotonic() - self._started

    def on_fit_start(self) -> None:
        self._started = time.monotonic()

    def on_save_checkpoint(self, checkpoint: dict[str, object]) -> None:
        checkpoint["training_seconds"] = self.seconds

    def on_load_checkpoint(self, checkpoint: dict[str, object]) -> None:
        seconds = checkpoint["training_seconds"]
        self._seconds_before = float(seconds) if isinstance(seconds, int | float) else 0.0

    def training_step(self, batch: TrainingBatch, _number: int) -> Tensor:
        estimates = self.network.stages(batch.amplitude, batch.probe, batch.valid)
        total = batch.weight.new_zeros(())
        share = 1.0
        for estimate in reversed(estimates):
            absolute, _ = frame_errors(estimate, batch.obj, batch.weight)
            total = total + share * absolute.mean()
            share *= _STAGE_DISCOUNT
        self.log("train_loss", total)
        return total

    def validation_step(self, batch: TrainingBatch, _number: int) -> None:
        estimate = self.network(batch.amplitude, batch.probe, batch.valid)
        absolute, relative = frame_errors(estimate, batch.obj, batch.weight)
        frames = len(absolute)
        self.log("val_error", absolute.mean(), batch_size=frames, on_epoch=True)
        self.log("val_nrmse", relative.mean(), batch_size=frames, on_epoch=True)

    def configure_optimizers(self) -> dict[str, object]:  # pyright: ignore[reportIncompatibleMethodOverride]
        optimiser = torch.optim.AdamW(
            self.network.parameters(), lr=self._learning_rate, weight_decay=1e-4
        )
        schedule = LambdaLR(optimiser, self._rate)
        return {
            "optimizer": optimiser,
            "lr_scheduler": {"scheduler": schedule, "interval": "step"},
        }

    def _rate(self, step: int) -> float:
        spent = min(self._budget.spent(step, self.seconds), 1.0)
        warm = min((step + 1) / _WARM_UP_STEPS, 1.0)
        return warm * max(0.5 + 0.5 * math.cos(math.pi * spent), 1e-3)


class _StopWhenSpent(Callback):
    """Ends the run when the budget is used up."""

    def __init__(self, budget: Budget) -> None:
        self._budget = budget

    def on_train_batch_end(
        self,
        trainer: lightning.Trainer,
        pl_module: lightning.LightningModule,
        *_: object,
    ) -> None:
        if not isinstance(pl_module, UnrolledTraining):
            raise ModelError("the training budget needs an UnrolledTraining module")
        if self._budget.spent(trainer.global_step, pl_module.seconds) >= 1:
            trainer.should_stop = True


@dataclass(frozen=True)
class PretrainResult:
    """What a run made.

    Attributes:
        network: the trained network, on the CPU, in evaluation mode.
        metrics: last validation figures, steps and seconds.
        checkpoint: the file to resume from.
    """

    network: UnrolledNetwork
    metrics: dict[str, float]
    checkpoint: Path


def pretrain(
    out_dir: Path,
    budget: Budget,
    *,
    seed: int = 1,
    threads: int | None = None,
    learning_rate: float = 2e-3,
    settings: UnrolledSettings | None = None,
    data: SyntheticSettings | None = None,
    resume: Path | None = None,
    workers: int = 1,
    validate_every: int = 200,
    progress: bool = True,
) -> PretrainResult:
    """Train an unrolled network on synthetic frames.

    Args:
        out_dir: gets ``last.ckpt`` and ``metrics.csv``.
        budget: when to stop; the learning rate reaches zero there.
        seed: of the weights and of every frame.
        threads: torch threads; None leaves torch's default.
        learning_rate: peak of AdamW's rate.
        settings: shape of the network.
        data: what the training frames are like.
        resume: a ``last.ckpt`` of a run with the same arguments.
        workers: processes that make frames.
        validate_every: steps between validations and checkpoints.
        progress: show a progress bar.

    Raises:
        ModelError: ``resume`` is missing.
    """
    if threads is not None:
        torch.set_num_threads(threads)
    first = _steps_of(resume) if resume is not None else 0
    lightning.seed_everything(seed, workers=True)
    module = UnrolledTraining(settings or UnrolledSettings(), budget, learning_rate)
    steps = budget.steps if budget.steps is not None else first + 1_000_000
    feed = SyntheticData(seed, steps, first=first, workers=workers, settings=data)
    saver = ModelCheckpoint(out_dir, save_last=True, every_n_train_steps=validate_every)
    trainer = lightning.Trainer(
        accelerator="auto",
        devices=1,
        precision="bf16-mixed",
        max_steps=steps,
        gradient_clip_val=1.0,
        logger=CSVLogger(out_dir, name="", version="", flush_logs_every_n_steps=50),
        callbacks=[saver, LearningRateMonitor("step"), _StopWhenSpent(budget)],
        val_check_interval=validate_every,
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
        log_every_n_steps=20,
        enable_progress_bar=progress,
        enable_model_summary=False,
    )
    trainer.fit(module, datamodule=feed, ckpt_path=resume, weights_only=True)
    trainer.validate(module, datamodule=feed, verbose=False)
    last = out_dir / "last.ckpt"
    trainer.save_checkpoint(last)
    metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
    metrics |= {"steps": float(trainer.global_step), "seconds": round(module.seconds, 1)}
    return PretrainResult(module.network.cpu().eval(), metrics, last)


def _steps_of(checkpoint: Path) -> int:
    if not checkpoint.is_file():
        raise ModelError(f"no checkpoint at {checkpoint}; give the last.ckpt of the earlier run")
    held = torch.load(checkpoint, map_location="cpu", weights_only=True)
    return int(held["global_step"])
