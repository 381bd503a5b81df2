"""The viewer's smaller parts: who may talk to it, what it understands, what it warns of."""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from page_mirror import taken_apart
from PIL import Image as Picture
from results_source import SCANS, grown, tile

from ptycho_stream.errors import ControlError, EndpointError, MalformedMessage
from ptycho_stream.results import Image
from ptycho_stream.settings import ViewerSettings
from ptycho_stream.wire.stored import StoredFrame, StoredImage, image_of
from ptycho_streamd.stored_images import IMAGE_FILE, stored_image
from ptycho_streamd.viewer_metrics import ViewerMetrics
from ptycho_streamd.web.alarms import RestartWatch, alarms
from ptycho_streamd.web.application import static_files
from ptycho_streamd.web.beside import Beside
from ptycho_streamd.web.budget import NEW_PICTURE_S, SAVED_S, Budget
from ptycho_streamd.web.frame_and_probe import frame_bytes, probe_bytes
from ptycho_streamd.web.messages import (
    MAX_MESSAGE_BYTES,
    Ack,
    Command,
    Look,
    Watch,
    decode_page_message,
    encode_binary,
)
from ptycho_streamd.web.security_headers import security_headers
from ptycho_streamd.web.session import MAX_UNANSWERED, Session
from ptycho_streamd.web.sources import Shown
from ptycho_streamd.web.thumbnails import SIDE_PX, Thumbnails

# -- who may talk to it --------------------------------------------------------------------------

OURS = "127.0.0.1:9604"


def test_the_page_may_load_nothing_from_elsewhere():
    policy = security_headers(OURS)["content-security-policy"]
    assert "default-src 'none'" in policy and "frame-ancestors 'none'" in policy
    assert f"connect-src 'self' ws://{OURS} wss://{OURS}" in policy
    assert "unsafe" not in policy and "http:" not in policy
    for name, (content, kind, _) in static_files().items():
        if kind.startswith("text/"):
            text = content.decode()
            # Of other hosts there is only the namespace of SVG.
            text = text.replace("http://www.w3.org/2000/svg", "")
            assert not re.search(r"\w://|[\"'(]//", text), name
    assert {"index.html", "main.js", "page.css", "icon.svg"} <= static_files().keys()


# -- what it understands -------------------------------------------------------------------------


def test_messages_of_a_page_are_read():
    look = decode_page_message(
        '{"type": "look", "pane": "a", "stream": 3, "quantity": "misfit", "level": 2,'
        f'"scan_id": "{SCANS[0]}", "window": [-5, 0, 10, 20]}}'
    )
    assert isinstance(look, Look) and look.window == (-5, 0, 10, 20)
    assert decode_page_message('{"type": "ack", "seq": 4}') == Ack(4)
    assert decode_page_message('{"type": "watch", "frame": true}') == Watch(frame=True)
    command = decode_page_message('{"type": "command", "id": 1, "command": "abort"}')
    assert command == Command(1, "abort", {})


@pytest.mark.parametrize(
    "text",
    [
        "",
        "nonsense",
        "[]",
        "null",
        '{"type": "shutdown"}',
        '{"type": "ack"}',
        '{"type": "ack", "seq": -1}',
        '{"type": "ack", "seq": 1, "more": 2}',
        '{"type": "ack", "seq": 1e300}',
        '{"type": "look", "pane": "c", "stream": 1}',
        '{"type": "look", "pane": "a", "stream": 1, "level": 99}',
        '{"type": "look", "pane": "a", "stream": 1, "scan_id": "../../etc"}',
        '{"type": "look", "pane": "a", "stream": 1, "snapshot": "../a"}',
        '{"type": "look", "pane": "a", "stream": 1, "window": [0, 0, 1]}',
        '{"type": "look", "pane": "a", "stream": 1, "window": [0, 0, 1, 1e40]}',
        '{"type": "command", "id": 1, "command": "' + "x" * 65 + '"}',
        '{"type": "ack", "seq": ' + "[" * 5000 + "]" * 5000 + "}",
        '{"type": "ack", "seq": 1}' + " " * MAX_MESSAGE_BYTES,
    ],
)
def test_what_no_page_says_is_refused(text):
    with pytest.raises(MalformedMessage):
        decode_page_message(text)


@settings(max_examples=200, deadline=None)
@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9),
        lambda inner: (
            st.lists(inner, max_size=4)
            | st.dictionaries(
                st.sampled_from(["type", "pane", "stream", "seq", "id", "command"]), inner
            )
        ),
        max_leaves=12,
    )
)
def test_whatever_comes_is_a_message_or_refused(value):
    with contextlib.suppress(MalformedMessage):
        decode_page_message(json.dumps(value))


def test_a_page_that_commands_and_never_takes_the_answers_is_closed():
    async def never(_message: str | bytes) -> None:
        await asyncio.get_running_loop().create_future()

    async def flood() -> None:
        hub: Any = None  # no page may give this command: nobody is asked
        session = Session(hub, ViewerSettings(), ViewerMetrics(), never)
        telling = asyncio.create_task(session.run())
        try:
            for number in range(MAX_UNANSWERED):
                await session.hear(json.dumps({"type": "command", "id": number, "command": "no"}))
                await asyncio.sleep(0)
            with pytest.raises(MalformedMessage, match="answers"):
                await session.hear('{"type": "command", "id": 1, "command": "no"}')
        finally:
            telling.cancel()
            await asyncio.gather(telling, return_exceptions=True)

    asyncio.run(flood())


def test_binary_messages_come_apart_again():
    head, payload = taken_apart(encode_binary("tiles", b"abc" * 50, count=2, pane="a"))
    assert head == {"type": "tiles", "count": 2, "pane": "a"} and payload == b"abc" * 50


# -- how much it sends ---------------------------------------------------------------------------


def test_a_budget_saves_a_second_and_gives_more_for_a_new_picture():
    budget = Budget(100.0, 0.0)
    assert budget.left(0.0) == budget.left(9.0) == 100 * NEW_PICTURE_S
    budget.spend(700)
    assert budget.left(9.0) == -200
    assert budget.left(10.5) == -50
    assert budget.left(99.0) == 100 * SAVED_S
    budget.new_picture(99.0)
    assert budget.left(99.0) == 100 * NEW_PICTURE_S
    budget.spend(600)
    budget.new_picture(100.0)
    assert budget.left(100.0) == 0, "not for every wish of a page that wishes all the time"


def test_no_page_gets_more_than_its_rate_over_some_seconds():
    budget = Budget(120_000.0, 0.0)
    budget.spend(600_000)
    sent: list[float] = []
    for turn in range(5 * 60):
        left = budget.left(turn / 5)
        sent.append(min(max(left, 0), 90_000.0))
        budget.spend(int(sent[-1]))
    windows = [sum(sent[first : first + 25]) / 5 for first in range(len(sent) - 25)]
    assert max(windows) <= 150_000


# -- frame and probe -----------------------------------------------------------------------------


def test_a_frame_is_sent_as_the_logarithm_of_its_counts():
    counts = np.zeros((300, 300), np.float32)
    counts[0, 0], counts[5, 5] = 999, 9
    valid = np.ones((300, 300), bool)
    valid[100:102, 100:102] = False
    frame = StoredFrame("X", 7, 7, 8, 0, False, (1e-6, 2e-6), "view", 1, counts, valid)
    words, payload = frame_bytes(frame)
    levels = np.frombuffer(payload, np.uint8).reshape(words["shape"])
    assert words["shape"] == [150, 150] and words["bin_px"] == 2 and words["high"] == 3
    assert levels[0, 0] == 255 and levels[2, 2] == 1 + round(254 / 3)
    assert levels[50, 50] == 0 and (levels == 0).sum() == 1
    assert (words["total"], words["most"]) == (1008, 999)
    dark = frame_bytes(replace(frame, counts_yx=0 * counts))
    assert set(dark[1]) == {0, 1}


def test_a_frame_that_was_asked_for_another_scan_is_not_shown():
    asked: list[tuple[str, int | None]] = []
    told: list[str] = []

    class Frames:
        async def frame(self, scan_id: str, number: int | None, look: str) -> StoredFrame:
            asked.append((scan_id, number))
            raise ControlError("not_found", f"{scan_id} has no frame {number} to {look}")

    async def tell(message: str) -> None:
        told.append(json.loads(message)["reason"])

    async def nothing(*_: Any, **__: Any) -> int:
        raise AssertionError("there is no frame")

    async def turns() -> None:
        hub: Any = Frames()
        beside = Beside(hub, 1e6, tell, nothing)

        async def turn(scan_id: str) -> None:
            image = Shown(None, {"scan_id": scan_id}, *3 * (np.zeros(0),))  # type: ignore[arg-type]
            await beside.turn(image, 1)
            await asyncio.sleep(0)

        beside.wish(Watch(frame=True))
        await turn(SCANS[0])
        beside.begin()
        await turn(SCANS[1])
        beside.wish(Watch(frame=True, frame_number=7))
        await turn(SCANS[1])
        await turn(SCANS[1])

    asyncio.run(turns())
    assert asked == [(SCANS[0], None), (SCANS[1], None), (SCANS[1], 7)]
    assert told == [f"{SCANS[1]} has no frame 7 to view"]


def test_a_probe_is_sent_as_amplitude_and_phase_of_its_modes():
    y, x = np.mgrid[-1:1:256j, -1:1:256j]
    mode = np.exp(-8 * (y**2 + x**2) + 1j * np.pi / 2)
    probe = np.stack([3 * mode, mode]).astype(np.complex64)
    words, payload = probe_bytes(probe)
    assert words["shape"] == [2, 128, 128] and words["step_px"] == 2
    assert words["shares"] == [0.9, 0.1]
    light, turn = np.frombuffer(payload, np.uint8).reshape(2, 2, 128, 128)[1]
    assert light.max() == 255 and light[0, 0] == 0 and turn[0, 0] == 0
    assert turn[64, 64] == 192, "a quarter turn, counted from -pi"


# -- what it warns of ----------------------------------------------------------------------------


def status(**changes: Any) -> dict[str, Any]:
    stage = {"alive": True, "restarts": 0, "error": "", "status": {}}
    told = {"ingest": dict(stage), "reconstruct": dict(stage)}
    for name, values in changes.items():
        told[name] = {**told[name], **values}
    return {"stages": told}


def titles(*arguments: Any) -> list[tuple[str, str]]:
    return [(alarm.level, alarm.title) for alarm in alarms(*arguments)]


NOTHING = frozenset[str]()


def test_a_daemon_that_is_well_gives_no_alarm():
    image = Image(grown(3, verdict="good", reasons=("it fits",)))
    assert titles(status(), image, [], NOTHING) == []
    assert titles(status(), None, [{"state": "done", "name": "a", "message": ""}], NOTHING) == []


@pytest.mark.parametrize(
    ("told", "level", "words"),
    [
        ({"reconstruct": {"alive": False}}, "bad", "reconstruct does not run"),
        ({"ingest": {"status": {"refusing": "no room"}}}, "bad", "New scans are refused"),
        ({"reconstruct": {"status": {"problem": "no probe"}}}, "bad", "cannot be reconstructed"),
        (
            {"reconstruct": {"status": {"backlog_frames": 900, "frames_per_s": 50.0}}},
            "warn",
            "900 frames behind",
        ),
        (
            {"reconstruct": {"status": {"latency_p99_ms": 9000.0, "open_scans": 1}}},
            "warn",
            "9 s after they came",
        ),
        (
            {"ingest": {"status": {"scans": [{"state": "running", "missing": 3}]}}},
            "bad",
            "3 frames are missing",
        ),
        (
            {"ingest": {"status": {"scans": [{"state": "draining", "unpositioned": 5}]}}},
            "bad",
            "5 frames have no position",
        ),
        (
            {
                "ingest": {
                    "status": {"endpoints": [{"name": "detector", "endpoint": "e", "peers": 0}]}
                }
            },
            "note",
            "Nobody is connected at detector",
        ),
    ],
)
def test_each_trouble_is_told_with_its_reason(told, level, words):
    (alarm,) = alarms(status(**told), None, [], NOTHING)
    assert alarm.level == level and words in alarm.title and alarm.reason


def test_what_a_stored_detector_loses_is_told_with_its_name():
    lost = {"status": {"scans": [{"state": "complete", "missing": 3, "unpositioned": 9}]}}
    told = status()
    told["stages"]["ingest-camera"] = {**told["stages"]["ingest"], **lost}
    found = titles(told, None, [], NOTHING)
    assert found == [("bad", "camera: 3 frames are missing")], "its frames need no positions"


def test_how_late_the_scan_before_was_is_no_alarm():
    told = {"status": {"latency_p99_ms": 9000.0, "open_scans": 0}}
    assert titles(status(reconstruct=told), None, [], NOTHING) == []


def test_frames_that_wait_for_positions_are_no_alarm_before_the_end():
    scan = {"state": "running", "unpositioned": 5}
    assert titles(status(ingest={"status": {"scans": [scan]}}), None, [], NOTHING) == []


def test_a_bad_verdict_and_a_collapse_come_first_with_their_reasons():
    image = Image(grown(3, verdict="probe suspect", reasons=("why", "and so"), collapsed=True))
    job = {"state": "failed", "name": "mine", "message": "no memory"}
    found = alarms(status(), image, [job], frozenset({"ingest"}))
    assert [alarm.level for alarm in found] == ["bad", "bad", "warn", "warn"]
    assert any(alarm.title == "Probe suspect" and alarm.reason == "why; and so" for alarm in found)
    assert any("collapsed" in alarm.title for alarm in found)
    assert any("ingest was started again" in alarm.title for alarm in found)
    assert any(alarm.reason == "no memory" for alarm in found)


def test_a_restart_is_told_for_a_minute():
    watch = RestartWatch()
    stages = status()["stages"]
    stages["ingest"]["restarts"] = 4
    assert watch.lately(stages, 0.0) == NOTHING, "before the page was opened"
    stages["ingest"] = {**stages["ingest"], "restarts": 5}
    assert watch.lately(stages, 10.0) == {"ingest"}
    assert watch.lately(stages, 69.0) == {"ingest"} and watch.lately(stages, 71.0) == NOTHING


# -- thumbnails ----------------------------------------------------------------------------------


class Store:
    """The control client, which asks the real command without a socket."""

    def __init__(self, folders: dict[str, Path]) -> None:
        self.folders = folders
        self.asked: list[str] = []

    async def image(self, scan_id: str, **more: Any) -> StoredImage:
        self.asked.append(scan_id)
        if scan_id not in self.folders:
            raise ControlError("not_found", "no image")
        defaults = {"snapshot": None, "parts": (), "corner_yx_px": None, "shape_yx": None}
        arguments = {"scan_id": scan_id, **defaults, "bin_px": None, **more}
        return image_of(stored_image(self.folders[scan_id], arguments))


def header(scan_id: str, **changes: Any) -> dict[str, Any]:
    return {"scan_id": scan_id, "state": "complete", "ended_ns": 5, "views": [1], **changes}


def drawn(thumbnails: Thumbnails, newest: Image | None = None) -> list[bool]:
    """Until nothing is left to draw."""

    async def main() -> list[bool]:
        return [await thumbnails.draw(newest) for _ in range(6)]

    return asyncio.run(main())


def test_scans_that_are_over_get_a_picture_once(tmp_path):
    image = Image(grown(40, SCANS[0], tile_px=128, tiles=3, verdict="good"))
    image.save(tmp_path / IMAGE_FILE)
    store = Store({SCANS[0]: tmp_path})
    thumbnails = Thumbnails(store)  # type: ignore[arg-type]
    thumbnails.of([header(SCANS[1], state="running"), header(SCANS[0])])
    assert any(drawn(thumbnails))
    version, verdict = thumbnails.known(SCANS[0])
    assert version and verdict == "good"
    with Picture.open(io.BytesIO(thumbnails.png(SCANS[0]) or b"")) as png:
        assert png.size == (SIDE_PX, 32)
    assert thumbnails.png(SCANS[1]) is None and thumbnails.known(SCANS[1]) == ("", "")
    asked = len(store.asked)
    assert not any(drawn(thumbnails)) and len(store.asked) == asked
    # Looked at anew, it is made anew.
    thumbnails.of([header(SCANS[0], views=[1, 2])])
    drawn(thumbnails)
    assert len(store.asked) == asked + 2


def test_the_scan_that_runs_is_drawn_from_the_newest_image():
    thumbnails = Thumbnails(Store({}))  # type: ignore[arg-type]
    thumbnails.of([header(SCANS[0], state="running")])
    drawn(thumbnails, Image(grown(3)))
    first = thumbnails.known(SCANS[0])[0]
    drawn(thumbnails, Image(grown(4)))
    assert thumbnails.known(SCANS[0])[0] == first, "not with every frame"
    over = Image(grown(4, final=True, state="complete", verdict="good"))
    drawn(thumbnails, over)
    assert thumbnails.known(SCANS[0]) != (first, "") and thumbnails.known(SCANS[0])[1] == "good"


def test_a_daemon_that_is_away_costs_no_thumbnail(tmp_path):
    store = Store({})

    async def away(scan_id: str, **more: Any) -> StoredImage:
        raise EndpointError("no answer")

    store.image = away  # type: ignore[method-assign]
    thumbnails = Thumbnails(store)  # type: ignore[arg-type]
    thumbnails.of([header(SCANS[0])])
    drawn(thumbnails)
    assert thumbnails.known(SCANS[0]) == ("", "")


def test_stray_tiles_do_not_make_a_thumbnail_large():
    far = replace(grown(0), tiles={(0, 0): tile(1, 1.0), (60_000, 50_000): tile(1, 1.0)})
    thumbnails = Thumbnails(Store({}))  # type: ignore[arg-type]
    thumbnails.of([header(far.scan_id, state="running")])
    drawn(thumbnails, Image(far))
    with Picture.open(io.BytesIO(thumbnails.png(far.scan_id) or b"")) as png:
        assert max(png.size) <= SIDE_PX
