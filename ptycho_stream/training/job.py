"""What a training job is asked to do, and what it says of itself while it does it.

Plain values that travel as JSON: requests, job files, progress messages. Needs neither torch nor
Lightning, so the supervisor and clients use them too; ``training.jobs`` runs what they describe.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

import msgspec

from ptycho_stream.errors import ModelError, TrainingError
from ptycho_stream.models.manifest import check_name
from ptycho_stream.settings import TrainingSettings, device_name

JobKind = Literal["finetune", "train"]
JobLoss = Literal["unsupervised", "supervised", "mixed"]
JobState = Literal["queued", "running", "validating", "done", "failed", "cancelled"]
Promotion = Literal["if_better", "always", "never"]

ENDED_STATES: frozenset[JobState] = frozenset({"done", "failed", "cancelled"})
"""A job in one of these will not go on by itself."""

TRAINABLE: frozenset[str] = frozenset({"unrolled", "cnn"})
"""Architectures of the registry, named here because that needs torch."""
DEFAULT_ARCHITECTURE = "unrolled"
MAX_STEPS = 10_000_000
MAX_DEVICES = 64

Positive = Annotated[float, msgspec.Meta(gt=0)]
Count = Annotated[int, msgspec.Meta(ge=1)]


class JobSpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A request for a new model.

    What is None is taken from the settings' section ``training``.

    Attributes:
        job_id: names the job and its folder.
        name: of the new model; must be free in the registry.
        scan_ids: scans of the store whose frames are trained on.
        kind: ``finetune`` starts from a model's weights, ``train`` from nothing.
        frames: half-open range of indices into each scan's log of pairs, for training and
            validation; None: all pairs that are there when the job starts.
        model: parent of a fine-tuning; None: the model in use.
        architecture: of a network that is trained from nothing; None: ``unrolled``.
        network: its settings as JSON; what is left out has its default.
        loss: ``unsupervised`` fits the frames through the forward model, ``supervised`` synthetic
            samples under the scan's own probe, ``mixed`` both.
        minutes: budget in wall-clock time of training, with its validations but without
            the comparison at the end.
        steps: budget in optimiser steps, which makes the result repeatable; excludes ``minutes``.
        learning_rate: peak rate.
        batch_frames: frames of a step.
        seed: of batches, synthetic samples and, in a training from nothing, weights.
        held_out: share of the frames that is never trained on.
        promote: whether the new model becomes the one in use.
        device: auto, cpu, cuda or cuda:N.
        devices: processes, each with a device and batches of its own.
        precision: Lightning's.
        loggers: where figures go while the job runs.
    """

    job_id: str
    name: str
    scan_ids: tuple[str, ...]
    kind: JobKind = "finetune"
    frames: tuple[Annotated[int, msgspec.Meta(ge=0)], Count] | None = None
    model: str | None = None
    architecture: str | None = None
    network: dict[str, Any] = msgspec.field(default_factory=dict[str, Any])
    loss: JobLoss = "unsupervised"
    minutes: Positive | None = None
    steps: Annotated[int, msgspec.Meta(ge=1, le=MAX_STEPS)] | None = None
    learning_rate: Positive | None = None
    batch_frames: Annotated[int, msgspec.Meta(ge=2, le=1024)] | None = None
    seed: Annotated[int, msgspec.Meta(ge=0, lt=2**31)] = 1
    held_out: Annotated[float, msgspec.Meta(gt=0, le=0.5)] | None = None
    promote: Promotion = "if_better"
    device: str | None = None
    devices: Annotated[int, msgspec.Meta(ge=1, le=MAX_DEVICES)] | None = None
    precision: Literal["32-true", "bf16-mixed", "16-mixed"] | None = None
    loggers: tuple[Literal["csv", "tensorboard", "mlflow"], ...] | None = None

    def __post_init__(self) -> None:
        """Refuse what contradicts itself.

        Raises:
            ValueError: names, scans, range or budget make no sense; msgspec and
                :meth:`from_json` turn it into their own errors.
        """
        for field, text in (("job_id", self.job_id), ("name", self.name)):
            try:
                check_name(text)
            except ModelError as error:
                raise ValueError(f"{field}: {error}") from error
        if self.architecture is not None and self.architecture not in TRAINABLE:
            raise ValueError(
                f"architecture {self.architecture!r} is unknown: use one of {sorted(TRAINABLE)}"
            )
        if self.device is not None:
            try:
                device_name(self.device)
            except ValueError as error:
                raise ValueError(f"device {self.device!r} {error}") from error
        if not self.scan_ids:
            raise ValueError("scan_ids is empty: name at least one scan to train on")
        if self.minutes is not None and self.steps is not None:
            raise ValueError("minutes and steps are both given: the budget is one of them")
        if self.frames is not None and self.frames[0] >= self.frames[1]:
            raise ValueError(
                f"frames {self.frames} holds nothing: give [first, end) with first < end"
            )
        if self.kind == "finetune" and (self.architecture is not None or self.network):
            raise ValueError(
                "kind 'finetune' keeps its model's network: leave both out, or 'train'"
            )
        if self.kind == "train" and self.model is not None:
            raise ValueError("kind 'train' starts from nothing: leave model out, or use 'finetune'")

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any]) -> Self:
        """Make a spec of plain values, as a request carries them.

        Raises:
            TrainingError: a name is unknown or missing, or a value is wrong.
        """
        try:
            return msgspec.convert(dict(values), cls)
        except msgspec.ValidationError as error:
            raise TrainingError(f"this is no training job: {error}") from error

    @classmethod
    def from_json(cls, text: str | bytes) -> Self:
        """Read what :meth:`to_json` wrote.

        Raises:
            TrainingError: it is not JSON, or not a job.
        """
        try:
            return msgspec.json.decode(text, type=cls)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise TrainingError(f"this is no training job: {error}") from error

    def to_json(self) -> str:
        """As JSON text."""
        return msgspec.json.encode(self).decode()

    def resolved(self, settings: TrainingSettings) -> Self:
        """This job with every choice made that it left to the settings."""
        minutes = settings.minutes if self.minutes is None and self.steps is None else self.minutes
        return msgspec.structs.replace(
            self,
            minutes=minutes,
            learning_rate=self.learning_rate or settings.learning_rate,
            batch_frames=self.batch_frames or settings.batch_frames,
            held_out=self.held_out or settings.held_out,
            device=self.device or settings.device,
            devices=self.devices or settings.devices,
            precision=self.precision or settings.precision,
            loggers=settings.loggers if self.loggers is None else self.loggers,
        )


class JobProgress(msgspec.Struct, frozen=True, kw_only=True):
    """Where a job stands.

    Attributes:
        state: ``queued`` also after a pause, when a checkpoint waits to be gone on from.
        step: optimiser steps done.
        fraction: of the budget, 0 to 1.
        loss: of the newest steps, None before the first.
        elapsed_s: time spent training, interrupted runs included.
        remaining_s: until the budget is spent; None where it cannot be told yet.
        message: a line for people; of a failure: what is wrong and what to do.
        metrics: validation figures of the candidate (``excess``, ``deviance``, ...) and, with
            ``_in_use`` appended, of the model in use.
        promoted: whether the new model is the one in use now; None before the end.
        model: name of the new model, once it is in the registry.
    """

    state: JobState = "queued"
    step: int = 0
    fraction: float = 0.0
    loss: float | None = None
    elapsed_s: float = 0.0
    remaining_s: float | None = None
    message: str = ""
    metrics: dict[str, float] = msgspec.field(default_factory=dict[str, float])
    promoted: bool | None = None
    model: str | None = None

    @property
    def ended(self) -> bool:
        """Whether the job will not go on by itself."""
        return self.state in ENDED_STATES

    @classmethod
    def from_json(cls, text: str | bytes) -> Self:
        """Read what :meth:`to_json` wrote.

        Raises:
            TrainingError: it is not JSON, or no progress.
        """
        try:
            return msgspec.json.decode(text, type=cls)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise TrainingError(f"this is no job's progress: {error}") from error

    def to_json(self) -> str:
        """As JSON text."""
        return msgspec.json.encode(self).decode()
