"""Where a job's figures go while it runs: CSV always works, TensorBoard and MLflow if installed.

Used by jobs. Only this file knows of MLflow, and imports it only when it is asked for.
"""

import os
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from pathlib import Path

from lightning.pytorch.loggers import CSVLogger, Logger, MLFlowLogger, TensorBoardLogger

from ptycho_stream.errors import TrainingError

METRICS_FILE = "metrics.csv"
_RUN_FILE = "mlflow_run.txt"
_EXPERIMENT = "ptycho-stream"


def make_loggers(
    names: Sequence[str], folder: Path, *, run: str, mlflow_uri: str | None
) -> list[Logger]:
    """Loggers that write into a job's folder, or to an MLflow store.

    A resumed job goes on in the same MLflow run; its earlier CSV file is kept beside the new one.

    Args:
        names: of csv, tensorboard and mlflow.
        folder: the job's.
        run: what MLflow and TensorBoard call this run.
        mlflow_uri: MLflow's tracking store; None: the folder ``mlruns`` of the job.

    Raises:
        TrainingError: a logger is not installed, or cannot reach its store.
    """
    return [_make(name, folder, run, mlflow_uri) for name in names]


def log_result(loggers: Sequence[Logger], metrics: dict[str, float], model_folder: Path) -> None:
    """Give MLflow the final figures and the registry's model directory, if it is among them.

    Raises:
        TrainingError: its store does not take them.
    """
    for logger in loggers:
        if isinstance(logger, MLFlowLogger):
            with _mlflow_errors("did not take the model, which is in the registry all the same"):
                logger.log_metrics(metrics)
                logger.experiment.log_artifacts(logger.run_id, str(model_folder), "model")


def _make(name: str, folder: Path, run: str, mlflow_uri: str | None) -> Logger:
    try:
        match name:
            case "csv":
                _keep_earlier(folder / METRICS_FILE)
                return CSVLogger(folder, name="", version="", flush_logs_every_n_steps=20)
            case "tensorboard":
                return TensorBoardLogger(folder, name="tensorboard", version=run)
            case "mlflow":
                return _mlflow(folder, run, mlflow_uri)
            case _:
                raise TrainingError(f"there is no logger {name!r}: use csv, tensorboard or mlflow")
    except ModuleNotFoundError as error:
        raise TrainingError(
            f"the logger {name} needs a package that is not installed ({error}): "
            f"pip install 'ptycho-stream[{name}]', or leave it out of training.loggers"
        ) from error


def _keep_earlier(path: Path) -> None:
    """Lightning starts a CSV file anew: put what an interrupted run wrote out of its way."""
    if path.exists():
        number = 1 + len(list(path.parent.glob("metrics-*.csv")))
        path.rename(path.with_name(f"metrics-{number}.csv"))


def _mlflow(folder: Path, run: str, mlflow_uri: str | None) -> MLFlowLogger:
    # MLflow reads both when it is imported: a beamline's figures are nobody else's, and the store
    # of plain files, which needs no database, has to be asked for since version 3.
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
    held = folder / _RUN_FILE
    logger = MLFlowLogger(
        experiment_name=_EXPERIMENT,
        run_name=run,
        tracking_uri=mlflow_uri or (folder / "mlruns").absolute().as_uri(),
        run_id=held.read_text() if held.exists() else None,
    )
    with _mlflow_errors("cannot be used: correct training.mlflow_uri"):
        held.write_text(str(logger.run_id))
    return logger


@contextmanager
def _mlflow_errors(trouble: str) -> Generator[None]:
    from mlflow.exceptions import MlflowException  # pyright: ignore[reportMissingImports]

    try:
        yield
    except MlflowException as error:
        raise TrainingError(f"MLflow's store {trouble} ({error})") from error
