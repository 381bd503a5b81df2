"""Train from a folder with ``train_data.npz`` and ``test_data.npz``, in a process of its own.

The host's memory, a GPU's above all, is as it was afterwards, and Lightning is never loaded in it.
Used by programs that speak PtychoPINN.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from ptycho_stream.atomic_file import make_folder
from ptycho_stream.errors import FileFormatError, PtychoPinnError, TrainingError
from ptycho_stream.files.measured_choice import Domain
from ptycho_stream.ptychopinn.bundle import ARCHIVE_FILE
from ptycho_stream.ptychopinn.config import TrainingConfig
from ptycho_stream.ptychopinn.execution import ExecutionConfig
from ptycho_stream.ptychopinn.request import (
    OUTCOME_FILE,
    REQUEST_FILE,
    Request,
    read_outcome,
    write,
)
from ptycho_stream.ptychopinn.runnable import check_runnable
from ptycho_stream.training.apart import run_apart
from ptycho_stream.training.epoch_figures import EpochFigures

TRAIN_FILE = "train_data.npz"
TEST_FILE = "test_data.npz"

_PROGRAM = "ptycho_stream.ptychopinn.fit_process"


@dataclass(frozen=True)
class TrainingResult:
    """What a training came to.

    Attributes:
        archive: the bundle; :func:`~ptycho_stream.ptychopinn.model.load_inference_bundle` reads it.
        epochs: the figures of each epoch; the model is the one of the lowest ``validation``.
    """

    archive: Path
    epochs: list[EpochFigures]


def train(
    folder: Path | str,
    config: TrainingConfig,
    *,
    execution: ExecutionConfig | None = None,
    measurement_domain: Domain | None = None,
) -> TrainingResult:
    """Train on ``train_data.npz`` and judge by ``test_data.npz`` of a folder.

    ``config.output_dir`` gets ``wts.h5.zip``, ``metrics.csv`` and what was asked for and answered.

    Args:
        folder: with the two files.
        config: what to train.
        execution: where.
        measurement_domain: of the frames, if the files do not tell.

    Raises:
        PtychoPinnError: a setting does not run here, or names other files than the folder's.
        FileFormatError: a file is missing, or the output cannot be written.
        TrainingError: the training failed; the text says why.
    """
    config = _of_folder(config, Path(folder))
    check_runnable(config)
    out = config.output_dir
    make_folder(out)
    (out / OUTCOME_FILE).unlink(missing_ok=True)
    request = out.absolute() / REQUEST_FILE
    write(request, Request.of(config, execution or ExecutionConfig(), measurement_domain))
    status = run_apart(_PROGRAM, request)
    if status != 0 and not (out / OUTCOME_FILE).exists():
        raise TrainingError(
            f"training broke off with status {status}: what it printed says why; a smaller "
            "batch_size needs less memory"
        )
    outcome = read_outcome(out / OUTCOME_FILE)
    if outcome.error:
        raise TrainingError(outcome.error)
    return TrainingResult(out / ARCHIVE_FILE, outcome.epochs)


def _of_folder(config: TrainingConfig, folder: Path) -> TrainingConfig:
    """The configuration with the folder's files."""
    files = {"train_data_file": folder / TRAIN_FILE, "test_data_file": folder / TEST_FILE}
    for name, file in files.items():
        told: Path | None = getattr(config, name)
        if told is not None and told.absolute() != file.absolute():
            raise PtychoPinnError(f"{name} is {told}, the folder's is {file}: give one of them")
        if not file.is_file():
            raise FileFormatError(
                f"there is no {file}: training needs {TRAIN_FILE} and {TEST_FILE}"
            )
    return replace(config, **files)
