"""What a training in a process of its own is asked for, and what it answers: two JSON files.

Written and read by ``training`` and ``fit_process``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec

from ptycho_stream.atomic_file import atomic_file
from ptycho_stream.errors import TrainingError
from ptycho_stream.files.measured_choice import Domain
from ptycho_stream.ptychopinn.config import TrainingConfig, plain, training_config
from ptycho_stream.ptychopinn.execution import ExecutionConfig
from ptycho_stream.training.epoch_figures import EpochFigures

REQUEST_FILE = "request.json"
OUTCOME_FILE = "outcome.json"


class Request(msgspec.Struct, frozen=True):
    """A training.

    Attributes:
        train_file: to learn from.
        test_file: to judge by.
        config: the flat settings of its TrainingConfig; paths are text.
        execution: the fields of its ExecutionConfig.
        measurement_domain: of files that do not tell.
    """

    train_file: str
    test_file: str
    config: dict[str, Any]
    execution: dict[str, Any]
    measurement_domain: Domain | None

    @classmethod
    def of(
        cls, config: TrainingConfig, execution: ExecutionConfig, domain: Domain | None
    ) -> Request:
        """A request for the training that the configurations describe, its files named."""
        told = plain(config)
        return cls(
            train_file=told["train_data_file"],
            test_file=told["test_data_file"],
            config=told,
            execution=vars(execution),
            measurement_domain=domain,
        )

    @property
    def training_config(self) -> TrainingConfig:
        """The configuration."""
        return training_config(self.config)

    @property
    def execution_config(self) -> ExecutionConfig:
        """Where to compute."""
        return ExecutionConfig(**self.execution)


class Outcome(msgspec.Struct, frozen=True):
    """How a training ended.

    Attributes:
        epochs: the figures of each.
        error: what went wrong; empty: nothing.
    """

    epochs: list[EpochFigures] = []
    error: str = ""


def write(path: Path, held: Request | Outcome) -> None:
    """Write one of the two files.

    Raises:
        FileFormatError: it cannot be written.
    """
    with atomic_file(path) as file:
        file.write(msgspec.json.encode(held))


def read_request(path: Path) -> Request:
    """Read a request.

    Raises:
        TrainingError: it is missing or damaged.
    """
    return _read(path, Request)


def read_outcome(path: Path) -> Outcome:
    """Read an outcome.

    Raises:
        TrainingError: it is missing or damaged.
    """
    return _read(path, Outcome)


def _read(path: Path, kind: type[Any]) -> Any:
    try:
        return msgspec.json.decode(path.read_bytes(), type=kind)
    except (OSError, msgspec.DecodeError) as error:
        raise TrainingError(f"{path} cannot be read: {error}; train again") from error
