"""What happens around a job's steps: progress, checkpoints, pausing, stopping, the best weights.

Callbacks of Lightning's Trainer, used by jobs. With several processes all of them decide alike.
"""

import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, cast

import lightning
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from ptycho_stream.errors import TrainingError
from ptycho_stream.training.job import JobProgress
from ptycho_stream.training.module import NetworkTraining

Stop = Literal["", "pause", "cancel"]

_REPORT_INTERVAL_S = 0.5


class Conductor(Callback):
    """Reports, saves and stops; the last of the callbacks, so that it saves what others found.

    After a step that is validated it saves when the validation is over: a resumed run never
    repeats one, and would else end without what it found.

    Args:
        checkpoint: where to save.
        report: told where the job stands, at most twice a second.
        stop: asked after each step whether to go on.
        save_interval_s: between checkpoints.
        validate_every: steps between validations.
    """

    def __init__(
        self,
        checkpoint: Path,
        report: Callable[[JobProgress], None],
        stop: Callable[[], Stop],
        save_interval_s: float,
        validate_every: int,
    ) -> None:
        self.outcome: Stop = ""
        self._validate_every = validate_every
        self._save_after_validation = False
        self._checkpoint, self._save_interval_s = checkpoint, save_interval_s
        self._report, self._stop = report, stop
        self._saved_at_s: float | None = None
        self._reported_at_s = -math.inf

    def on_train_batch_end(
        self,
        trainer: lightning.Trainer,
        pl_module: lightning.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Ask, report, save."""
        assert isinstance(pl_module, NetworkTraining)
        outcome: Stop = self._stop()
        if trainer.world_size > 1:
            outcome = cast("Stop", trainer.strategy.broadcast(outcome))
        self.outcome = outcome
        if time.monotonic() - self._reported_at_s >= _REPORT_INTERVAL_S:
            self._reported_at_s = time.monotonic()
            self._report(progress_of(pl_module))
        # By the module's clock, which is the same on all processes: saving needs all of them.
        due = self._saved_at_s is None or (
            pl_module.seconds - self._saved_at_s >= self._save_interval_s
        )
        save = outcome == "pause" or (due and outcome != "cancel")
        validated = trainer.global_step % self._validate_every == 0
        if save and validated:
            self._save_after_validation = True
        elif save:
            self._save(trainer, pl_module)
        if outcome:
            trainer.should_stop = True
            if outcome == "cancel" or not validated:
                trainer.limit_val_batches = 0  # else Lightning validates whatever it stops at

    def on_validation_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule
    ) -> None:
        """Save what had to wait for this."""
        if self._save_after_validation:
            assert isinstance(pl_module, NetworkTraining)
            self._save_after_validation = False
            self._save(trainer, pl_module)

    def _save(self, trainer: lightning.Trainer, module: NetworkTraining) -> None:
        self._saved_at_s = module.seconds
        trainer.save_checkpoint(self._checkpoint, weights_only=False)


def progress_of(module: NetworkTraining) -> JobProgress:
    """Where a training in progress stands."""
    step, seconds, spent = module.trainer.global_step, module.seconds, min(module.spent, 1.0)
    return JobProgress(
        state="running",
        step=step,
        fraction=spent,
        loss=module.newest_loss,
        elapsed_s=seconds,
        remaining_s=seconds * (1 - spent) / spent if spent else None,
    )


class BestWeights(Callback):
    """Keeps the weights of the validation with the lowest loss.

    Args:
        monitor: name of the figure.
    """

    def __init__(self, monitor: str) -> None:
        self.value = math.inf
        self.weights: dict[str, Tensor] | None = None
        self._monitor = monitor

    def on_validation_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule
    ) -> None:
        """Compare, and copy the weights if they are better than all before."""
        assert isinstance(pl_module, NetworkTraining)
        value = float(trainer.callback_metrics[self._monitor])
        if not math.isfinite(value):
            raise TrainingError(
                f"the validation loss became {value} at step {trainer.global_step}: lower the "
                "learning rate, or check the probe and the photon count"
            )
        if value < self.value:
            self.value = value
            held = pl_module.network.state_dict()
            self.weights = {name: tensor.detach().cpu().clone() for name, tensor in held.items()}

    def state_dict(self) -> dict[str, Any]:
        """For the checkpoint."""
        return {"value": self.value, "weights": self.weights}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """From a checkpoint."""
        self.value, self.weights = state_dict["value"], state_dict["weights"]
