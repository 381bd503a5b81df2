"""The time that the network leaves: how much refinement and trust get of it, and of which scan."""

from __future__ import annotations

import time
from types import SimpleNamespace
from typing import Any

import pytest

from ptycho_stream.errors import ProbeError, PtychoStreamError, StoreError
from ptycho_stream.reconstruct.spare_time import (
    ENOUGH_SWEEPS,
    LACKING_S,
    OWED_SLICE_S,
    SLICE_S,
    SpareTime,
)
from ptycho_streamd.reconstruct_metrics import ReconstructMetrics


class Scan:
    """In the place of an open scan: what it was given."""

    def __init__(
        self, *, refining: bool = True, judging: bool = False, takes_s: float = 0.04
    ) -> None:
        self.refining, self.judging, self._takes_s = refining, judging, takes_s
        self.parked = self.changed = self.unsaved = False
        self.may_renew = True
        self.renewed: list[bool] = []
        self.budgets_s: list[float] = []
        self.looks = 0
        self.fault: PtychoStreamError | None = None
        self.reader = SimpleNamespace(scan_id="a")
        self.layer = SimpleNamespace(
            show_due=False, unshown=False, shown_sweeps=1.5, show=lambda: None
        )
        self.image = SimpleNamespace(refine=self._refine, refined=self.layer, sweeps=1.5)
        self.trust: Any = SimpleNamespace(look=self._look, report=None, close=lambda: None)

    def state(self, *, final: bool) -> object:
        assert not final
        return object()

    def _refine(self, budget_s: float, *, may_renew: bool) -> int:
        if self.fault is not None:
            self.refining = False
            raise self.fault
        self.budgets_s.append(budget_s)
        self.renewed.append(may_renew)
        time.sleep(self._takes_s)
        return 12

    def _look(self, _state: object) -> bool:
        self.looks += 1
        if self.fault is not None:
            raise self.fault
        return False


@pytest.fixture
def metrics() -> ReconstructMetrics:
    return ReconstructMetrics()


@pytest.fixture
def spare_time(metrics: ReconstructMetrics) -> SpareTime:
    return SpareTime(metrics)


def use(spare_time: SpareTime, *, between_batches: bool = False, **scans: Scan) -> bool:
    return spare_time.use(scans, between_batches=between_batches)  # type: ignore[arg-type]


def sample(metrics: ReconstructMetrics, name: str) -> float | None:
    return metrics.registry.get_sample_value(f"ptycho_stream_{name}")


def test_where_there_is_time_it_is_used_in_slices(spare_time, metrics):
    scan = Scan(judging=True)
    scan.may_renew = False
    assert use(spare_time, a=scan)
    scan.may_renew = True
    assert use(spare_time, a=scan)
    assert scan.renewed == [False, True]
    assert scan.budgets_s == [SLICE_S, SLICE_S] and scan.looks == 2
    assert sample(metrics, "frame_refinements_total") == 24
    scan.refining = scan.judging = False
    assert not use(spare_time, a=scan) and not use(spare_time)


def test_between_batches_there_is_time_only_where_it_is_owed(spare_time):
    scan = Scan(judging=True)
    assert not use(spare_time, between_batches=True, a=scan)
    spare_time.owe(0.3, share=0.1, late=True)
    assert spare_time.owes
    assert use(spare_time, between_batches=True, a=scan)
    assert not spare_time.owes and not use(spare_time, between_batches=True, a=scan)
    assert scan.budgets_s == pytest.approx([0.1 / 3]) and scan.looks == 1


def test_what_is_owed_is_paid_in_slices_before_the_next_batch(spare_time):
    scan = Scan(takes_s=0.05)
    spare_time.owe(0.1, share=0.6, late=True)
    while spare_time.owes:
        assert use(spare_time, a=scan)
    assert scan.budgets_s[0] == OWED_SLICE_S and len(scan.budgets_s) == 3


def test_a_late_network_goes_on_when_its_frames_were_refined_often_enough(spare_time):
    scan = Scan()
    scan.image.sweeps = ENOUGH_SWEEPS
    spare_time.owe(0.3, share=0.5, late=True)
    assert not use(spare_time, a=scan) and not spare_time.owes
    assert use(spare_time, a=scan), "where nothing waits refinement goes on"
    assert scan.budgets_s == [SLICE_S]


def test_where_the_network_keeps_up_a_batch_waits_only_if_there_are_no_pauses(spare_time):
    scan = Scan(takes_s=0.06)
    for _ in range(10):
        spare_time.owe(0.05, share=0.5, late=False)
        assert not spare_time.owes, "the pause after each batch is enough"
        assert use(spare_time, a=scan)
    batches = 0
    while not spare_time.owes:
        batches += 1
        spare_time.owe(0.05, share=0.5, late=False)
        assert batches < 20 and not (spare_time.owes and batches * 0.05 <= LACKING_S)
    scan.budgets_s.clear()
    assert use(spare_time, between_batches=True, a=scan)
    assert scan.budgets_s == pytest.approx([0.05]) and not spare_time.owes


def test_what_one_scan_lacks_is_not_taken_from_the_next(spare_time):
    idle = Scan(refining=False)
    for _ in range(10):
        spare_time.owe(1.0, share=0.75, late=True)
        use(spare_time, between_batches=True, a=idle)
    spare_time.owe(0.05, share=0.5, late=False)
    assert not spare_time.owes
    for _ in range(10):
        spare_time.owe(0.05, share=0.5, late=False)
    use(spare_time, a=idle)
    spare_time.owe(0.05, share=0.5, late=False)
    assert not spare_time.owes, "nobody wanted it"


def test_nothing_is_owed_for_ever(spare_time):
    spare_time.owe(100.0, share=0.9, late=True)
    scan = Scan(refining=False)
    use(spare_time, a=scan)
    assert not spare_time.owes


def test_without_a_share_a_late_network_is_still_judged(spare_time):
    scan = Scan(judging=True)
    spare_time.owe(0.3, share=0.0, late=True)
    assert use(spare_time, between_batches=True, a=scan)
    assert scan.budgets_s == [] and scan.looks == 1
    assert use(spare_time, a=scan)
    assert scan.budgets_s == [SLICE_S]


def test_the_newest_scan_that_wants_it_comes_first(spare_time):
    old, middle, new = Scan(judging=True), Scan(), Scan()
    new.parked = True
    use(spare_time, a=old, c=new, b=middle)
    assert (len(old.budgets_s), len(middle.budgets_s), len(new.budgets_s)) == (0, 1, 0)
    assert old.looks == 1


def test_what_is_due_is_shown(spare_time, metrics):
    scan = Scan()
    use(spare_time, a=scan)
    assert not scan.changed
    scan.layer.show_due = True
    use(spare_time, a=scan)
    assert scan.changed and scan.unsaved
    assert sample(metrics, "refinement_sweeps") == 1.5


def test_the_last_sweeps_are_shown_before_they_are_judged(spare_time):
    scan = Scan(judging=True)
    scan.layer.unshown = True
    use(spare_time, a=scan)
    assert not scan.changed
    scan.refining = False
    use(spare_time, a=scan)
    assert scan.changed


def test_refinement_that_fails_is_said_and_counted_and_touches_nothing_else(
    spare_time, metrics, caplog
):
    scan, other = Scan(), Scan()
    scan.fault = ProbeError("it has lost the probe")
    for _ in range(3):
        use(spare_time, b=scan, a=other)
    assert sample(metrics, "refinements_failed_total") == 1
    assert caplog.text.count("scan a is not refined any more: it has lost the probe") == 1
    assert len(other.budgets_s) == 2


def test_a_scan_that_cannot_be_judged_is_not_judged_again(spare_time, metrics, caplog):
    scan = Scan(refining=False, judging=True)
    scan.fault = StoreError("the disk is gone")
    use(spare_time, a=scan)
    assert scan.trust is None
    assert sample(metrics, "judgements_failed_total") == 1
    assert "not judged any more: the disk is gone" in caplog.text
