"""The one Lightning module of this package: any network, any objective, a budget.

Pre-training and jobs use it. It owns the optimiser, the learning rate's schedule and the clock.
"""

import math
import time
from typing import Any

import lightning
import torch
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR

from ptycho_stream.errors import TrainingError
from ptycho_stream.networks.network import Network
from ptycho_stream.training.budget import WARM_UP_STEPS, Budget
from ptycho_stream.training.objectives import Objective


class NetworkTraining(lightning.LightningModule):
    """Loss, optimiser and schedule of a network.

    AdamW whose rate rises for a few steps and falls along a cosine to zero at the budget's end.

    Args:
        network: trained in place.
        objective: what to learn; its own parameters, if it is a torch module, are learnt too.
        budget: when to stop.
        learning_rate: peak of AdamW's rate.
        warm_up_steps: over which the rate rises.
    """

    def __init__(
        self,
        network: Network,
        objective: Objective,
        budget: Budget,
        learning_rate: float,
        warm_up_steps: int = WARM_UP_STEPS,
    ) -> None:
        super().__init__()
        self.network = network
        # In place: three times faster convolutions on a CPU, tensor cores on a GPU.
        self.network.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
        self.budget = budget
        self.newest_loss: float | None = None
        self._objective = objective
        self._learning_rate, self._warm_up_steps = learning_rate, warm_up_steps
        self._seconds_before = 0.0
        self._started = time.monotonic()
        self._seconds = 0.0

    @property
    def seconds(self) -> float:
        """Wall-clock training time when the newest step began, interrupted runs included.

        The same on all of several processes, whose learning rates would else differ.
        """
        return self._seconds

    @property
    def spent(self) -> float:
        """The part of the budget that is used up."""
        return self.budget.spent(self.trainer.global_step, self._seconds)

    def on_fit_start(self) -> None:
        """Start the clock."""
        self._started = time.monotonic()
        self._seconds = self._seconds_before

    def on_save_checkpoint(self, checkpoint: dict[str, object]) -> None:
        """Keep the clock."""
        checkpoint["training_seconds"] = self._seconds

    def on_load_checkpoint(self, checkpoint: dict[str, object]) -> None:
        """Set the clock to where the earlier run stopped."""
        seconds = checkpoint["training_seconds"]
        self._seconds_before = float(seconds) if isinstance(seconds, int | float) else 0.0

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Read the clock, once for the schedule and for the budget."""
        seconds = self._seconds_before + time.monotonic() - self._started
        if self.trainer.world_size > 1:
            seconds = self.trainer.strategy.broadcast(seconds)
        self._seconds = seconds

    def training_step(self, batch: Any, _number: int) -> Tensor:
        """Loss of a batch.

        Raises:
            TrainingError: it is not finite.
        """
        total = self._objective.loss(self.network, batch)
        self.newest_loss = float(total.detach())
        if not math.isfinite(self.newest_loss):
            raise TrainingError(
                f"the loss became {self.newest_loss} at step {self.trainer.global_step}: lower the "
                "learning rate, or check the probe and the photon count"
            )
        self.log("train_loss", total)
        return total

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Stop when the budget is used up."""
        if self.spent >= 1:
            self.trainer.should_stop = True

    def validation_step(self, batch: Any, _number: int) -> None:
        """Log the objective's figures."""
        for name, values in self._objective.figures(self.network, batch).items():
            self.log(name, values.mean(), batch_size=len(values), on_epoch=True, sync_dist=True)

    def configure_optimizers(self) -> dict[str, object]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """AdamW, its rate set anew at every step."""
        optimiser = torch.optim.AdamW(self.parameters(), lr=self._learning_rate, weight_decay=1e-4)
        schedule = LambdaLR(optimiser, self._rate)
        return {
            "optimizer": optimiser,
            "lr_scheduler": {"scheduler": schedule, "interval": "step"},
        }

    def _rate(self, step: int) -> float:
        return self.budget.rate(step, self._seconds, self._warm_up_steps)
