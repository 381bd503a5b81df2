"""A training job on disk: what was asked for, and how far it is.

Whoever holds the job writes: the supervisor while it waits, the training process while it runs.
Both files appear whole or not at all, so that a job outlives the death of either.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Self, TypeVar

import msgspec

from ptycho_stream.atomic_file import atomic_file
from ptycho_stream.errors import FileFormatError, TrainingError
from ptycho_stream.training.job import JobProgress, JobSpec

JOBS_FOLDER = "jobs"
RECORD_FILE = "job.json"
PROGRESS_FILE = "progress.json"
_WEIGHTS = frozenset({".ckpt", ".safetensors"})

_Held = TypeVar("_Held")


class JobRecord(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What the supervisor knows of a job.

    Attributes:
        spec: what was asked for.
        created_ns: when, UTC.
        automatic: nobody asked: the misfit of a live scan stayed high.
        starts: processes begun for it in a row that came no further than those before them.
        furthest_step: that processes before the newest one had come to.
        cancelled: it is not wanted any more.
    """

    spec: JobSpec
    created_ns: int
    automatic: bool = False
    starts: int = 0
    furthest_step: int = 0
    cancelled: bool = False


class JobFolder:
    """The folder of one job, which need not exist before the first write."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @classmethod
    def of(cls, data_directory: Path, job_id: str) -> Self:
        """That of the job ``job_id`` under the daemon's data directory."""
        return cls(data_directory / JOBS_FOLDER / job_id)

    def record(self) -> JobRecord:
        """What was asked for.

        Raises:
            TrainingError: the file is missing or damaged.
        """
        return self._read(RECORD_FILE, JobRecord)

    def progress(self) -> JobProgress:
        """How far it is; as queued if nobody has said so yet.

        Raises:
            TrainingError: the file is damaged.
        """
        if not (self.path / PROGRESS_FILE).exists():
            return JobProgress()
        return self._read(PROGRESS_FILE, JobProgress)

    def write_record(self, record: JobRecord) -> None:
        """Keep ``record``.

        Raises:
            TrainingError: the disk refused.
        """
        self._write(RECORD_FILE, record)

    def write_progress(self, progress: JobProgress) -> None:
        """Keep ``progress``.

        Raises:
            TrainingError: the disk refused.
        """
        self._write(PROGRESS_FILE, progress)

    def remove_weights(self) -> None:
        """Delete checkpoint and weights, which only a job that goes on needs."""
        for path in self.path.glob("*"):
            if path.suffix in _WEIGHTS:
                path.unlink(missing_ok=True)

    def remove(self) -> None:
        """Delete it with all that the job left there; its model stays in the registry."""
        shutil.rmtree(self.path, ignore_errors=True)

    def _read(self, name: str, kind: type[_Held]) -> _Held:
        path = self.path / name
        try:
            return msgspec.json.decode(path.read_bytes(), type=kind)
        except (OSError, msgspec.DecodeError, UnicodeDecodeError) as error:
            raise TrainingError(
                f"{path} cannot be read ({error}): remove its folder, and ask for the job again"
            ) from error

    def _write(self, name: str, value: JobRecord | JobProgress) -> None:
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            with atomic_file(self.path / name) as file:
                file.write(msgspec.json.encode(value))
        except (OSError, FileFormatError) as error:
            raise TrainingError(f"the job cannot be kept on disk: {error}") from error
