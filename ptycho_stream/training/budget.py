"""How long training may take, in steps or in minutes, and how much of that is spent.

Used by pre-training and by jobs; the learning rate follows it.
"""

import math
from dataclasses import dataclass

from ptycho_stream.errors import ModelError

WARM_UP_STEPS = 100
"""The learning rate rises over so many steps, or over a tenth of a short budget of steps."""


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

    def rate(self, step: int, seconds: float, warm_up_steps: int = WARM_UP_STEPS) -> float:
        """Learning rate of a step as a share of its peak: up a ramp, then down a cosine."""
        ramp = warm_up_steps if self.steps is None else min(warm_up_steps, self.steps // 10 + 1)
        warm = min((step + 1) / ramp, 1.0)
        spent = min(self.spent(step, seconds), 1.0)
        return warm * max(0.5 + 0.5 * math.cos(math.pi * spent), 1e-3)
