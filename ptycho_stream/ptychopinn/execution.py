"""How something is computed, apart from what: devices, threads, precision, where figures go.

Never stored with a model: a bundle that was trained on four GPUs loads on a laptop. Used by
training, inference and reassembly.
"""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Annotated, Any, Literal, get_args

import torch

from ptycho_stream.ptychopinn.checked import Checked, one_of, optional_whole, whole
from ptycho_stream.settings import device_name

Precision = Literal["32-true", "bf16-mixed", "16-mixed"]
Strategy = Literal["auto", "ddp"]
LoggerName = Literal["csv", "tensorboard", "mlflow"]


def _loggers(value: Any) -> tuple[LoggerName, ...]:
    names: tuple[Any, ...] = (value,) if isinstance(value, str) else tuple(value)
    if unknown := set(names) - set(get_args(LoggerName)):
        raise ValueError(
            f"{sorted(unknown)} are no loggers: give {', '.join(get_args(LoggerName))}"
        )
    return names


def _optional_text(value: Any) -> str | None:
    if value is not None and not isinstance(value, str):
        raise ValueError("give text")
    return value


@dataclass
class ExecutionConfig(Checked):
    """Where and how to compute.

    Attributes:
        device: auto, cpu, cuda or cuda:N; the first of ``devices``.
        devices: processes of a training, each with a device of its own.
        threads: of torch, while something of this package runs; None: as they are.
        workers: threads that put patches together.
        precision: of a network's arithmetic; ``16-mixed`` trains on GPUs only.
        strategy: how processes of a training work together: ``auto`` is plain training with one and
            ``ddp`` with several.
        loggers: where the figures of a training go.
        mlflow_uri: MLflow's tracking store; None: the folder ``mlruns`` of the output.
    """

    device: Annotated[str, device_name] = "auto"
    devices: Annotated[int, whole(1)] = 1
    threads: Annotated[int | None, optional_whole(1)] = None
    workers: Annotated[int, whole(1)] = 1
    precision: Annotated[Precision, one_of(get_args(Precision))] = "32-true"
    strategy: Annotated[Strategy, one_of(get_args(Strategy))] = "auto"
    loggers: Annotated[tuple[LoggerName, ...], _loggers] = ("csv",)
    mlflow_uri: Annotated[str | None, _optional_text] = None

    @contextmanager
    def applied(self) -> Generator[None]:
        """Have torch use ``threads`` while the block runs."""
        before = torch.get_num_threads()
        if self.threads is not None:
            torch.set_num_threads(self.threads)
        try:
            yield
        finally:
            torch.set_num_threads(before)
