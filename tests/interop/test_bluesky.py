"""The recipe of docs/suspender.md as it is written, with a real RunEngine and a real publisher."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from daemon_harness import wait_for
from results_source import SCANS, Source, free_settings, grown

pytest.importorskip("bluesky", reason="bluesky is not installed: pip install '.[interop]'")
pytestmark = [
    pytest.mark.interop,
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
]
DOCUMENT = Path(__file__).parents[2] / "docs" / "suspender.md"
STEPS = 400
BAD = {"verdict": "probe suspect", "reasons": ("64 frames misfit by 0.080",)}


@pytest.fixture(scope="module")
def recipe() -> dict[str, Any]:
    (code,) = re.findall(r"^```python\n(.*?)^```$", DOCUMENT.read_text(), re.MULTILINE | re.DOTALL)
    names: dict[str, Any] = {"__name__": "recipe"}
    exec(compile(code, str(DOCUMENT), "exec"), names)
    return names


class Session:
    """A beamline's session: a RunEngine with the suspender, and a plan that counts its steps."""

    def __init__(self, recipe: dict[str, Any], source: Source, **options: Any) -> None:
        from bluesky import RunEngine

        self.source = source
        self.engine = RunEngine({}, context_managers=[])
        self.signal = recipe["VerdictSignal"](*source.endpoints, after_frames=5)
        self.engine.install_suspender(recipe["StopBadScans"](self.signal, **options))
        self.documents: list[tuple[str, dict[str, Any]]] = []
        self.engine.subscribe(lambda name, document: self.documents.append((name, document)))
        self.steps = 0
        self.closed = False

    def plan(self, steps: int = STEPS) -> Iterator[Any]:
        import bluesky.plan_stubs as bps
        from bluesky.preprocessors import finalize_wrapper

        def scan() -> Iterator[Any]:
            yield from bps.open_run()
            for _ in range(steps):
                yield from bps.checkpoint()
                yield from bps.sleep(0.02)
                self.steps += 1
            yield from bps.close_run()

        def close_shutter() -> Iterator[Any]:
            self.closed = True
            yield from bps.null()

        self.steps, self.closed = 0, False
        yield from finalize_wrapper(scan(), close_shutter())

    def stop_document(self) -> dict[str, Any]:
        return [document for name, document in self.documents if name == "stop"][-1]


@pytest.fixture
def source() -> Iterator[Source]:
    with Source() as source:
        yield source


def after(delay_s: float, *actions: Any) -> threading.Thread:
    """Do things one after the other, beside the plan."""

    def act() -> None:
        for action in actions:
            time.sleep(delay_s)
            action()

    thread = threading.Thread(target=act)
    thread.start()
    return thread


def test_a_bad_scan_fails_its_plan_and_the_next_one_runs(recipe, source):
    session = Session(recipe, source)
    source.publish(grown(4, **BAD))  # too few frames to be believed
    worker = after(1.5, lambda: source.publish(grown(6, **BAD)))
    began_s = time.monotonic()
    with pytest.raises(recipe["BadScan"], match=r"after 6 frames: probe suspect; 64 frames"):
        session.engine(session.plan())
    worker.join()
    assert time.monotonic() - began_s < 5
    assert 0 < session.steps < STEPS / 2 and session.closed
    assert session.stop_document()["exit_status"] == "fail"
    assert "64 frames misfit by 0.080" in session.stop_document()["reason"]

    source.publish(grown(6, state="aborted", final=True, **BAD))
    wait_for(lambda: session.signal.value == "", what="the end of the bad scan")
    source.publish(grown(6, SCANS[1], verdict="good"))
    session.engine(session.plan(20))
    assert session.steps == 20 and session.stop_document()["exit_status"] == "success"
    session.signal.close()


def test_a_scan_can_be_suspended_until_it_is_good(recipe, source):
    session = Session(recipe, source, stop=False)
    source.publish(grown(6, verdict="undecided"))
    seen: list[int] = []
    worker = after(
        1.5,
        lambda: source.publish(grown(7, **BAD)),
        lambda: seen.append(session.steps),
        lambda: seen.append(session.steps),
        lambda: source.publish(grown(8, verdict="good")),
    )
    session.engine(session.plan(200))
    worker.join()
    assert seen[0] == seen[1] < 200 and session.steps >= 200
    assert session.stop_document()["exit_status"] == "success"
    session.signal.close()


def test_without_a_daemon_nothing_is_stopped(recipe):
    settings = free_settings()
    signal = recipe["VerdictSignal"](settings.endpoint, settings.resync_endpoint)
    assert signal.value == ""
    signal.close()
