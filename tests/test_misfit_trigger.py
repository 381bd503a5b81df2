"""When the live misfit starts a fine-tuning by itself."""

from __future__ import annotations

from typing import Any

import pytest

from ptycho_stream.errors import TrainingError
from ptycho_stream.settings import TrainingSettings
from ptycho_streamd.misfit_trigger import LOOKS, MisfitTrigger

SETTINGS = TrainingSettings(automatic_above=0.05, automatic_minutes=3.0)


class Queue:
    """Takes the jobs that the trigger submits."""

    def __init__(self) -> None:
        self.submitted: list[dict[str, Any]] = []
        self.busy = False
        self.fault: Exception | None = None

    def submit(self, kind: str, arguments: dict[str, Any], *, automatic: bool) -> None:
        assert kind == "finetune" and automatic
        if self.fault is not None:
            raise self.fault
        self.submitted.append(arguments)

    def triggered(self, scan_id: str) -> bool:
        return any(scan_id in arguments["scan_ids"] for arguments in self.submitted)


@pytest.fixture
def queue() -> Queue:
    return Queue()


def look(trigger: MisfitTrigger, *figures: float, scan: str = "S", first: int = 1) -> None:
    for number, excess in enumerate(figures, first):
        misfit = {"scan_id": scan, "look": number, "frames": 32, "excess": excess}
        for _ in range(3):  # the status is told more often than it is measured
            trigger.look({"misfit": misfit}, SETTINGS)


def test_a_misfit_that_stays_high_starts_one_job_for_a_scan(queue):
    trigger = MisfitTrigger(queue)
    look(trigger, *[0.06] * (LOOKS - 1))
    assert queue.submitted == []
    look(trigger, *[0.06] * 10, first=LOOKS)
    assert queue.submitted == [{"scan_ids": ("S",), "minutes": 3.0}]
    look(trigger, *[0.06] * 10, scan="T", first=50)
    assert [arguments["scan_ids"] for arguments in queue.submitted] == [("S",), ("T",)]


def test_a_misfit_that_goes_down_between_starts_none(queue):
    look(MisfitTrigger(queue), *[0.06, 0.06, 0.04] * 5, float("nan"))
    assert queue.submitted == []


def test_looks_at_several_scans_do_not_add_up(queue):
    trigger = MisfitTrigger(queue)
    for number, scan in enumerate("STSTST"):
        look(trigger, 0.06, scan=scan, first=number)
    assert queue.submitted == []


def test_nothing_starts_while_a_job_runs_and_it_does_afterwards(queue):
    trigger = MisfitTrigger(queue)
    queue.busy = True
    look(trigger, *[0.06] * 5)
    assert queue.submitted == []
    queue.busy = False
    look(trigger, 0.06, first=6)
    assert len(queue.submitted) == 1


def test_a_job_that_cannot_be_had_is_tried_again_after_as_many_looks(queue, caplog):
    trigger = MisfitTrigger(queue)
    queue.fault = TrainingError("no room")
    look(trigger, *[0.06] * (LOOKS + 1))
    assert caplog.text.count("no room") == 1
    queue.fault = None
    look(trigger, *[0.06] * LOOKS, first=10)
    assert len(queue.submitted) == 1


def test_without_a_threshold_or_a_measurement_nothing_is_looked_at(queue):
    trigger = MisfitTrigger(queue)
    trigger.look({}, SETTINGS)
    for number in range(10):
        misfit = {"scan_id": "S", "look": number, "frames": 32, "excess": 9.0}
        trigger.look({"misfit": misfit}, TrainingSettings())
    assert queue.submitted == []
