"""Requests for training and what jobs say of themselves: plain values, checked, JSON and back."""

import subprocess
import sys

import pytest
from pydantic import ValidationError

from ptycho_stream.errors import TrainingError
from ptycho_stream.models.registry import ARCHITECTURES
from ptycho_stream.settings import TrainingSettings
from ptycho_stream.training.job import TRAINABLE, JobProgress, JobSpec

GIVEN = {"job_id": "job-1", "name": "tuned", "scan_ids": ["01ABC"]}


def test_a_job_survives_json():
    shape = {"kind": "train", "network": {"stages": 2}}
    spec = JobSpec.from_mapping(GIVEN | shape | {"steps": 5, "frames": [0, 40]})
    assert JobSpec.from_json(spec.to_json()) == spec
    assert spec.frames == (0, 40)
    progress = JobProgress(state="running", step=3, loss=0.5, metrics={"excess": 0.02})
    assert JobProgress.from_json(progress.to_json()) == progress


@pytest.mark.parametrize(
    ("wrong", "text"),
    [
        ({"nmae": "x"}, "nmae"),
        ({"name": "../evil"}, "no model name"),
        ({"name": None}, "name"),
        ({"scan_ids": []}, "at least one scan"),
        ({"steps": 5, "minutes": 1.0}, "one of them"),
        ({"steps": 0}, "steps"),
        ({"minutes": -1.0}, "minutes"),
        ({"frames": [10, 10]}, "holds nothing"),
        ({"kind": "train", "model": "parent"}, "leave model out"),
        ({"network": {"stages": 2}}, "keeps its model's network"),
        ({"architecture": "cnn"}, "keeps its model's network"),
        ({"loss": "clever"}, "loss"),
        ({"held_out": 0.9}, "held_out"),
        ({"loggers": ["paper"]}, "loggers"),
        ({"name": "default"}, "stands for the model in use"),
        ({"steps": 10**12}, "steps"),
        ({"devices": 100_000}, "devices"),
        ({"device": "meta"}, "cuda:N"),
        ({"kind": "train", "architecture": "telepathy"}, "telepathy"),
    ],
)
def test_a_job_that_makes_no_sense_is_refused(wrong, text):
    with pytest.raises(TrainingError, match=text):
        JobSpec.from_mapping(GIVEN | wrong)


def test_every_architecture_of_the_registry_can_be_trained():
    assert set(ARCHITECTURES) == TRAINABLE


@pytest.mark.parametrize("text", ["", "[]", '{"job_id": 1}', "\x00"])
def test_what_is_no_job_is_refused(text):
    with pytest.raises(TrainingError, match="no training job"):
        JobSpec.from_json(text)


def test_what_a_job_leaves_open_is_taken_from_the_settings():
    settings = TrainingSettings(minutes=3, batch_frames=8, loggers=("tensorboard",))
    resolved = JobSpec.from_mapping(GIVEN).resolved(settings)
    assert resolved.minutes == 3 and resolved.steps is None
    assert resolved.batch_frames == 8 and resolved.loggers == ("tensorboard",)
    chosen = JobSpec.from_mapping(GIVEN | {"steps": 7, "batch_frames": 4, "loggers": []})
    resolved = chosen.resolved(settings)
    assert resolved.minutes is None and resolved.steps == 7
    assert resolved.batch_frames == 4 and resolved.loggers == ()


@pytest.mark.parametrize(
    "wrong", [{"device": "gpu"}, {"minutes": 0}, {"precision": "8"}, {"loggers": ["paper"]}]
)
def test_settings_of_training_are_checked(wrong):
    with pytest.raises(ValidationError):
        TrainingSettings.model_validate(wrong)


def test_ended_jobs_are_told_from_those_that_go_on():
    assert JobProgress(state="failed").ended
    assert not JobProgress(state="queued").ended


def test_neither_torch_nor_lightning_is_needed_to_speak_of_jobs():
    code = (
        "import sys, ptycho_stream.training.job; print([m for m in sys.modules if m in "
        "('torch', 'lightning')])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
