"""Pre-training of the unrolled network on synthetic frames, from nothing or from a checkpoint.

This made the weights that the package ships (see docs/models.md). Used by the command
``ptycho-stream models pretrain`` and by tests.
"""

import math
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.pytorch.callbacks import Callback, LearningRateMonitor, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR

from ptycho_stream.errors import ModelError
from ptycho_stream.models.manifest import Manifest
from ptycho_stream.models.registry import ModelRegistry
from ptycho_stream.networks.unrolled import UnrolledNetwork, UnrolledSettings
from ptycho_stream.training.synthetic import (
    FRAMES_OF_A_SAMPLE,
    SyntheticData,
    SyntheticSettings,
    TrainingBatch,
    synthetic_batch,
)

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


def frame_errors(
    estimate: Tensor, obj: Tensor, weight: Tensor, share_phase: int = 1
) -> tuple[Tensor, Tensor]:
    """Probe-weighted errors of each frame after removing an arbitrary phase.

    Args:
        estimate: complex (B, N, N).
        obj: complex (B, N, N), the truth.
        weight: real (B, N, N).
        share_phase: so many successive frames are of one sample and have one phase between them;
            1 gives each frame its own.

    Returns:
        (weighted mean absolute error (B,), weighted relative root mean square error (B,)).
    """
    squared = weight.square()
    inner = (squared * obj * estimate.conj()).sum((-2, -1)).reshape(-1, share_phase)
    inner = inner.sum(1, keepdim=True).expand(-1, share_phase).reshape(-1, 1, 1)
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
        self.network = UnrolledNetwork(settings)
        # In place: three times faster convolutions on a CPU, tensor cores on a GPU.
        self.network.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
        self._budget, self._learning_rate = budget, learning_rate
        self._seconds_before = 0.0
        self._started = time.monotonic()

    @property
    def seconds(self) -> float:
        """Wall-clock training time, earlier runs that this one resumes included."""
        return self._seconds_before + time.monotonic() - self._started

    def on_fit_start(self) -> None:
        """Start the clock."""
        self._started = time.monotonic()

    def on_save_checkpoint(self, checkpoint: dict[str, object]) -> None:
        """Keep the clock."""
        checkpoint["training_seconds"] = self.seconds

    def on_load_checkpoint(self, checkpoint: dict[str, object]) -> None:
        """Set the clock to where the earlier run stopped."""
        seconds = checkpoint["training_seconds"]
        self._seconds_before = float(seconds) if isinstance(seconds, int | float) else 0.0

    def training_step(self, batch: TrainingBatch, _number: int) -> Tensor:
        """Loss of a batch: the mean absolute error after every stage, the last ones most."""
        estimates = self.network.stages(batch.amplitude, batch.probe, batch.valid)
        total = batch.weight.new_zeros(())
        share = 1.0
        for estimate, _ in reversed(estimates):
            # Half of the loss lets every patch have a phase of its own, as a single frame does;
            # the other half asks patches of one sample to agree, as stitching wants them to.
            for together in (1, FRAMES_OF_A_SAMPLE):
                absolute, _ = frame_errors(estimate, batch.obj, batch.weight, together)
                total = total + 0.5 * share * absolute.mean()
            share *= _STAGE_DISCOUNT
        self.log("train_loss", total)
        return total

    def validation_step(self, batch: TrainingBatch, _number: int) -> None:
        """Log both errors of the last stage."""
        estimate, _ = self.network(batch.amplitude, batch.probe, batch.valid)
        absolute, relative = frame_errors(estimate, batch.obj, batch.weight)
        frames = len(absolute)
        self.log("val_error", absolute.mean(), batch_size=frames, on_epoch=True)
        self.log("val_nrmse", relative.mean(), batch_size=frames, on_epoch=True)
        _, relative = frame_errors(estimate, batch.obj, batch.weight, FRAMES_OF_A_SAMPLE)
        self.log("val_nrmse_one_phase", relative.mean(), batch_size=frames, on_epoch=True)

    def configure_optimizers(self) -> dict[str, object]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """AdamW, its rate set anew at every step."""
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
        outputs: object,
        batch: TrainingBatch,
        batch_idx: int,
    ) -> None:
        """Ask the trainer to stop."""
        if not isinstance(pl_module, UnrolledTraining):
            raise ModelError("the training budget needs an UnrolledTraining module")
        if self._budget.spent(trainer.global_step, pl_module.seconds) >= 1:
            trainer.should_stop = True


@dataclass(frozen=True)
class PretrainResult:
    """What a run made.

    Attributes:
        network: the trained network, on the CPU, in evaluation mode.
        metrics: validation figures at the end: mean absolute and relative root mean square error
            of frames, and the latter with one phase for the frames of a sample.
        training: what made the weights (data, steps, time, machine), for the manifest.
        seed: of the run.
        checkpoint: the file to resume from.
    """

    network: UnrolledNetwork
    metrics: dict[str, float]
    training: dict[str, Any]
    seed: int
    checkpoint: Path

    def save(self, registry: ModelRegistry, name: str) -> Manifest:
        """Add the model to a registry's folder.

        Raises:
            ModelError: the registry has no folder, or a model of this name.
        """
        manifest = Manifest(
            name=name,
            architecture="unrolled",
            settings=self.network.settings.to_json(),
            training=self.training,
            seed=self.seed,
            metrics=self.metrics,
        )
        return registry.save(self.network, manifest)


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
    data = data or SyntheticSettings()
    feed = SyntheticData(seed, first=first, workers=workers, settings=data)
    saver = ModelCheckpoint(
        out_dir, save_last=True, every_n_train_steps=validate_every, enable_version_counter=False
    )
    trainer = lightning.Trainer(
        accelerator="auto",
        devices=1,
        precision="bf16-mixed",
        max_steps=budget.steps or -1,
        max_epochs=-1,
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
    last, seconds = out_dir / "last.ckpt", module.seconds
    trainer.save_checkpoint(last)
    (figures,) = trainer.validate(module, datamodule=feed, verbose=False, weights_only=True)
    return PretrainResult(
        network=module.network.cpu().eval(),
        metrics={name: float(value) for name, value in figures.items()},
        training={
            "data": synthetic_batch.__module__,
            "data_settings": asdict(data),
            "learning_rate": learning_rate,
            "steps": trainer.global_step,
            "seconds": round(seconds, 1),
            "threads": torch.get_num_threads(),
            "device": str(trainer.strategy.root_device),
            "torch": torch.__version__,
        },
        seed=seed,
        checkpoint=last,
    )


def _steps_of(checkpoint: Path) -> int:
    if not checkpoint.is_file():
        raise ModelError(f"no checkpoint at {checkpoint}; give the last.ckpt of the earlier run")
    held = torch.load(checkpoint, map_location="cpu", weights_only=True)
    return int(held["global_step"])
