"""The viewer as a stage of a real daemon: pages over real sockets, hostile ones too.

Images come from a publisher in the test, so that no torch is loaded; the page in a browser is
tested in ``interop/test_browser.py``.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from email.message import Message
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from beamline import Beamline
from daemon_harness import DaemonHarness, wait_for
from page_mirror import PageMirror, taken_apart
from results_source import SCANS, Source, free_settings, grown, tile
from scan_samples import make_scan
from websockets.exceptions import ConnectionClosed, InvalidStatus, WebSocketException
from websockets.sync.client import ClientConnection, connect

from ptycho_stream.keys import new_key, write_private
from ptycho_stream.results import Image, MisfitTile
from ptycho_stream.scans.folders import scan_directory
from ptycho_streamd.stored_images import IMAGE_FILE

STAGES = ("ingest", "viewer")
TOKEN = "a-word-that-nobody-guesses"
LIMITS = {"updates_per_s": 20.0, "max_pages": 5}


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DaemonHarness]:
    folder = tmp_path_factory.mktemp("viewer")
    with running(folder) as held:
        yield held


@contextmanager
def running(folder: Path, **more: dict[str, Any]) -> Iterator[DaemonHarness]:
    results = free_settings()
    tables = {
        "results": {"endpoint": results.endpoint, "resync_endpoint": results.resync_endpoint},
        "viewer": LIMITS,
        **more,
    }
    with DaemonHarness(folder, tables, stages=STAGES) as held:
        yield held


@pytest.fixture
def source(daemon: DaemonHarness) -> Iterator[Source]:
    """A publisher in the place of the reconstruct stage."""
    with Source(daemon.settings.results, epoch=str(time.time_ns())) as held:
        yield held


def address(daemon: DaemonHarness) -> str:
    return f"127.0.0.1:{daemon.settings.viewer.port}"


class Page:
    """What a browser's page does, without a browser."""

    def __init__(self, link: ClientConnection) -> None:
        self.link = link
        self.told: dict[str, Any] = {}
        self.words: dict[str, dict[str, Any]] = {"a": {}, "b": {}}
        self.mirrors = {"a": PageMirror(), "b": PageMirror()}
        self.heard: list[dict[str, Any]] = []
        self.replies: dict[int, dict[str, Any]] = {}
        self.scans: list[dict[str, Any]] = []
        self.acknowledges = True

    def say(self, kind: str, **content: Any) -> None:
        self.link.send(json.dumps({"type": kind, **content}))

    def look(self, pane: str = "a", stream: int = 1, **look: Any) -> None:
        self.say("look", pane=pane, stream=stream, **look)

    def hear(self, timeout_s: float = 0.05) -> bool:
        """Take a message; whether there was one."""
        try:
            message = self.link.recv(timeout_s)
        except TimeoutError:
            return False
        if isinstance(message, bytes):
            head, payload = taken_apart(message)
            self.heard.append(head | {"payload": payload, "bytes": len(message)})
            if head["type"] == "tiles":
                mirror = self.mirrors[head["pane"]]
                mirror.take(head["side"], head["count"], payload, head["dropped"])
            if self.acknowledges:
                self.say("ack", seq=head["seq"])
            return True
        head = json.loads(message)
        self.heard.append(head)
        match head["type"]:
            case "picture":
                if head["fresh"]:
                    self.words[head["pane"]] = {}
                    self.mirrors[head["pane"]] = PageMirror()
                self.words[head["pane"]] |= head["words"]
            case "reply":
                self.replies[head["id"]] = head
            case "scans":
                held = {scan["scan_id"]: scan for scan in [*self.scans, *head["changed"]]}
                order = head["order"] or [scan["scan_id"] for scan in self.scans]
                self.scans = [held[scan_id] for scan_id in order]
            case name:
                self.told[name] = head.get("value")
        return True

    def until(self, condition: Callable[[], Any], what: str = "it", timeout_s: float = 10) -> Any:
        end = time.monotonic() + timeout_s
        while not (found := condition()):
            assert time.monotonic() < end, f"{what} did not come: {self.words}, {self.told}"
            self.hear()
        return found

    def of_kind(self, kind: str) -> list[dict[str, Any]]:
        return [head for head in self.heard if head["type"] == kind]

    def command(self, name: str, /, **arguments: Any) -> dict[str, Any]:
        number = 1 + max(self.replies, default=0)
        self.say("command", id=number, command=name, arguments=arguments)
        return self.until(lambda: self.replies.get(number), f"answer to {name}")


@contextmanager
def opened(daemon: DaemonHarness, token: str = "", **options: Any) -> Iterator[Page]:
    where = address(daemon)
    options = {"origin": f"http://{where}", "compression": None, "max_size": None, **options}
    with connect(f"ws://{where}/ws?token={token}", close_timeout=0.5, **options) as link:
        yield Page(link)


def fetched(daemon: DaemonHarness, path: str, **headers: str) -> tuple[int, dict[str, str], bytes]:
    request = urllib.request.Request(f"http://{address(daemon)}{path}", headers=headers)
    try:
        with urllib.request.urlopen(request, timeout=5) as answer:
            return answer.status, lowered(answer.headers), answer.read()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, lowered(error.headers), error.read()


def lowered(headers: Message) -> dict[str, str]:
    return {name.lower(): value for name, value in headers.items()}


# -- HTTP ----------------------------------------------------------------------------------------


def test_the_page_and_its_files_are_served(daemon):
    status, headers, body = fetched(daemon, "/")
    assert status == 200 and b"<title>ptycho-stream</title>" in body
    assert headers["content-type"].startswith("text/html")
    assert "default-src 'none'" in headers["content-security-policy"]
    assert headers["x-content-type-options"] == "nosniff"
    assert "server" not in headers and "set-cookie" not in headers
    status, headers, body = fetched(daemon, "/static/main.js")
    assert status == 200 and headers["content-type"].startswith("text/javascript")
    again = fetched(daemon, "/static/main.js", **{"If-None-Match": headers["etag"]})
    assert again[0] == 304 and not again[2]
    for path in (
        "/static/../viewer.py",
        "/static/%2e%2e/application.py",
        "/static//etc/passwd",
        "/etc/passwd",
        "/thumbnail/..%2f..%2fprobe.png",
        f"/thumbnail/{SCANS[3]}.png",
        "/ws",
    ):
        assert fetched(daemon, path)[0] == 404, path


def test_strangers_are_refused_and_counted(daemon):
    before = daemon.metrics().get('ptycho_stream_viewer_requests_refused_total{reason="host"}', 0)
    assert fetched(daemon, "/", Host="evil.example")[0] == 421
    for origin in ("http://evil.example", "null", None, "http://127.0.0.1:1"):
        with pytest.raises(InvalidStatus) as refused, opened(daemon, origin=origin):
            pass
        assert refused.value.response.status_code == 403
    rebound = socket.create_connection(("127.0.0.1", daemon.settings.viewer.port))
    with pytest.raises(InvalidStatus):
        connect("ws://evil.example/ws", sock=rebound, origin="http://evil.example")
    embedded = {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "no-cors"}
    assert fetched(daemon, "/static/main.js", **embedded)[0] == 403
    daemon.metric('ptycho_stream_viewer_requests_refused_total{reason="host"}', before + 2)
    assert "evil.example" in daemon.log


@pytest.fixture(scope="module")
def keyed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DaemonHarness]:
    """A daemon that asks for keys, and its pages for :data:`TOKEN`."""
    folder = tmp_path_factory.mktemp("keyed")
    new_key(folder, "daemon")
    (folder / "allowed-keys").touch()
    write_private(folder / "viewer-token", f"{TOKEN}\n")
    security = {"key_path": "daemon.key_secret", "allowed_keys_path": "allowed-keys"}
    viewer = {**LIMITS, "token_path": "viewer-token"}
    with running(folder, security=security, viewer=viewer) as held:
        yield held


@pytest.mark.parametrize("token", ["", "another-word-than-that", f"{TOKEN}x"])
def test_pages_without_the_token_of_a_daemon_with_keys_get_its_files_alone(keyed, token):
    counter = 'ptycho_stream_viewer_requests_refused_total{reason="token"}'
    before = keyed.metrics().get(counter, 0)
    assert fetched(keyed, "/")[0] == fetched(keyed, "/static/main.js")[0] == 200
    assert fetched(keyed, f"/thumbnail/{SCANS[3]}.png?token={token}")[0] == 401
    with opened(keyed, token) as page, pytest.raises(ConnectionClosed) as refused:
        page.until(lambda: False, "a close")
    assert refused.value.rcvd is not None and refused.value.rcvd.code == 4401
    assert not page.heard
    keyed.metric(counter, before + 2)


def test_pages_with_the_token_see_and_command_a_daemon_with_keys(keyed):
    settings = keyed.settings
    with (
        Source(settings.results, epoch="keyed", security=settings.security) as source,
        opened(keyed, TOKEN) as page,
    ):
        source.publish(replace(grown(6), layer="refined", predicted=dict(grown(6).tiles)))
        page.look()
        page.until(lambda: page.mirrors["a"].levels, "tiles")
        page.look("b", part="predicted")
        page.until(lambda: page.mirrors["b"].levels, "tiles of another layer")
        page.until(lambda: page.told.get("status"), "the status")
        assert page.command("abort")["ok"] is False, "there is no scan to abort"
    assert fetched(keyed, f"/thumbnail/{SCANS[3]}.png?token={TOKEN}")[0] == 404
    assert TOKEN not in keyed.log


def test_the_daemons_http_address_leads_to_the_page(daemon):
    opener = urllib.request.build_opener()
    with opener.open(daemon.url("/"), timeout=5) as answer:
        assert answer.url == f"http://{address(daemon)}/"
    status = daemon.status()
    assert status["viewer"] == f"http://{address(daemon)}/"
    assert status["stages"]["viewer"]["status"]["pages"] == 0


def test_it_loads_no_torch(daemon):
    pid = daemon.stage_pid("viewer")
    assert "libtorch" not in Path(f"/proc/{pid}/maps").read_text()
    assert os.getpriority(os.PRIO_PROCESS, pid) > 0, "frames come before pictures of them"


# -- pages ---------------------------------------------------------------------------------------


def test_a_page_sees_the_image_grow(daemon, source):
    with opened(daemon) as page:
        page.look()
        page.until(lambda: "problem" in page.words["a"], "that there is nothing")
        for step in range(1, 6):
            image = grown(step)
            source.publish(image)
            page.until(lambda n=step: page.words["a"].get("frames") == n, f"frame {step}")
        page.until(lambda: len(page.mirrors["a"].levels) == 4, "the tiles")
        words = page.words["a"]
        assert words["scan_id"] == SCANS[0] and words["metadata"]["sample"] == "siemens star"
        assert words["bounds_yx_px"] == [-32, -64, 0, 64] and words["live"]
        for (ty, tx), held in image.tiles.items():
            found = page.mirrors["a"].values((0, ty, tx))
            np.testing.assert_allclose(found, np.angle(held.object_yx), atol=1e-3)
        hello = page.of_kind("hello")[0]
        assert hello["version"] and page.told["status"]["state"] in ("ready", "degraded")


def test_only_what_changed_travels(daemon, source):
    image = grown(8, tile_px=128)
    source.publish(image)
    with opened(daemon) as page:
        page.look(quantity="amplitude")
        page.until(lambda: page.words["a"].get("frames") == 8, "the image")
        page.until(lambda: len(page.mirrors["a"].levels) == 4, "the tiles")
        page.heard.clear()
        source.publish(grown(9, tile_px=128))
        page.until(lambda: page.of_kind("tiles"), "the change")
        (update,) = page.of_kind("tiles")
        assert update["count"] == 1 and update["bytes"] < 1500
        (words,) = page.of_kind("picture")
        assert {"frames", "counts"} <= words["words"].keys() and "metadata" not in words["words"]


def test_two_panes_show_two_layers_and_scans(daemon, source):
    polished = {key: tile(50, 3.0) for key in grown(4).tiles}
    misfit = {(-1, 0): MisfitTile(1, np.full((8, 8), 0.25, np.float32))}
    told = {"tiles": polished, "predicted": grown(4).tiles, "layer": "refined", "misfit": misfit}
    source.publish(replace(grown(4, SCANS[1]), **told))
    with opened(daemon) as page:
        page.look("a", quantity="amplitude")
        page.look("b", quantity="amplitude", part="predicted")
        page.until(lambda: page.words["a"].get("scan_id") == SCANS[1], "the scan")
        page.until(lambda: page.words["b"].get("scan_id") == SCANS[1], "the scan")
        page.until(lambda: len(page.mirrors["b"].levels) == 4, "what the network made")
        page.until(lambda: len(page.mirrors["a"].levels) == 4, "the refined image")
        assert page.words["a"]["layer"] == "refined" and page.words["a"]["predicted"]
        assert page.words["b"]["layer"] == "predicted"
        np.testing.assert_allclose(page.mirrors["a"].values((0, -1, 0)), 3.0, atol=1e-3)
        np.testing.assert_allclose(page.mirrors["b"].values((0, -1, 0)), 3.0, atol=1e-3)
        np.testing.assert_allclose(page.mirrors["b"].values((0, -1, 1)), 4.0, atol=1e-3)
        page.look("a", stream=2, quantity="misfit")
        page.until(lambda: (2, -1, 0) in page.mirrors["a"].levels, "the misfit")
        assert np.nanmax(page.mirrors["a"].values((2, -1, 0))) == pytest.approx(0.25, abs=1e-3)
        # A new model: the former generation is there to be compared with.
        source.publish(grown(6, SCANS[1], generation=2, model="better"))
        page.look("a", stream=3, quantity="amplitude")
        page.until(lambda: page.words["a"].get("generation") == 2, "the new generation")
        assert page.words["a"]["former"] == [{"generation": 1, "model": "test"}]
        page.look("b", stream=2, quantity="amplitude", generation=1)
        page.until(lambda: page.words["b"].get("generation") == 1, "the former one")
        page.until(lambda: len(page.mirrors["b"].levels) == 4, "its tiles")
        # And so are older scans that the daemon still holds.
        source.publish(grown(3, SCANS[2]))
        page.until(lambda: page.words["a"].get("scan_id") == SCANS[2], "the newest scan")
        page.look("b", stream=3, quantity="amplitude", scan_id=SCANS[1])
        page.until(lambda: page.words["b"].get("scan_id") == SCANS[1], "the older scan")
        page.look("b", stream=4, nothing=True)
        page.command("snapshots")
        page.heard.clear()
        source.publish(grown(4, SCANS[1], generation=2, model="better", state="complete"))
        page.command("snapshots")
        assert not [head for head in page.of_kind("picture") if head["pane"] == "b"]


def test_a_page_that_shows_nothing_more_holds_up_no_other(daemon, source):
    """Stopped at any point: it never says what it has shown, or does not even read."""
    source.publish(grown(4, tile_px=128, tiles=12))
    with opened(daemon) as stopped, opened(daemon) as silent, opened(daemon) as page:
        silent.acknowledges = False
        for one in (stopped, silent, page):
            one.look(quantity="amplitude")
        for step in range(5, 16):
            source.publish(grown(step, tile_px=128, tiles=12))
            page.until(lambda n=step: page.words["a"].get("frames") == n, f"frame {step}")
            while silent.hear(0):
                pass
        assert len(silent.of_kind("tiles")) <= 2
        silent.acknowledges = True
        silent.say("ack", seq=2)
        over = grown(30, tile_px=128, tiles=12, state="complete", final=True)
        source.publish(over)
        silent.until(lambda: silent.words["a"].get("final"), "the end")
        silent.until(lambda: len(silent.mirrors["a"].levels) == 12, "the newest picture at once")
        silent.until(
            lambda: np.allclose(
                silent.mirrors["a"].values((0, -1, 0)),
                np.abs(over.tiles[-1, 0].object_yx),
                atol=1e-2,
            ),
            "the newest tile",
        )


def test_what_a_page_may_have_done_and_what_not(daemon, source, tmp_path):
    source.publish(grown(3))
    with opened(daemon) as page:
        reply = page.command("scan", scan_id=SCANS[5])
        assert not reply["ok"] and reply["error"]["code"] == "not_found"
        reply = page.command("snapshot", name="a")
        assert reply["error"]["code"] == "unavailable", "reconstruct does not run here"
        reply = page.command("export", formats=["npz"], path="/etc")
        assert reply["error"]["code"] == "bad_arguments"
        for name in ("reload", "start", "image", "nonsense", "train"):
            assert page.command(name)["error"]["code"] == "unknown_command"
        numbers = range(100, 130)
        for number in numbers:
            page.say("command", id=number, command="snapshots", arguments={"scan_id": SCANS[7]})
        page.until(lambda: set(numbers) <= page.replies.keys(), "all answers")
        codes = {page.replies[number]["error"]["code"] for number in numbers}
        assert codes == {"not_found", "unavailable"}, "too many at once are refused"
    name = 'ptycho_stream_viewer_commands_total{command="snapshot"}'
    wait_for(lambda: daemon.metrics().get(name, 0) >= 1, what="the count")


@pytest.mark.parametrize(
    "message",
    ["nonsense", '{"type": "look"}', b"\0\1\2", "[" * 60_000, "x" * 200_000],
    ids=["text", "field", "binary", "deep", "long"],
)
def test_a_page_that_talks_nonsense_is_closed_and_no_other(daemon, source, message):
    source.publish(grown(2))
    with opened(daemon) as page, opened(daemon) as other:
        other.look()
        page.link.send(message)
        with pytest.raises(ConnectionClosed) as closed:
            page.until(lambda: False, "a close")
        assert closed.value.rcvd is not None and closed.value.rcvd.code in (1008, 1009)
        other.until(lambda: other.mirrors["a"].levels, "the image")
    assert daemon.status()["stages"]["viewer"]["restarts"] == 0


def test_a_page_that_never_stops_talking_is_closed(daemon):
    def talk(page: Page) -> None:
        end = time.monotonic() + 20
        while time.monotonic() < end:
            page.say("ack", seq=1)

    with opened(daemon) as page, pytest.raises(ConnectionClosed):
        talk(page)


def test_there_are_only_so_many_pages(daemon):
    pages = [opened(daemon) for _ in range(LIMITS["max_pages"])]
    held = [page.__enter__() for page in pages]
    for page in held:
        page.until(lambda one=page: one.of_kind("hello"), "the greeting")
    with opened(daemon) as late, pytest.raises(ConnectionClosed) as refused:
        late.until(lambda: False, "a close")
    assert refused.value.rcvd is not None and refused.value.rcvd.code == 1013
    for page in pages:
        page.__exit__(None, None, None)
    wait_for(lambda: daemon.status()["stages"]["viewer"]["status"]["pages"] == 0)


def test_kept_scans_are_shown_with_thumbnails_frames_and_probe(daemon, source):
    """A scan of the store, whose image was kept: nothing of it comes over the results socket."""
    with Beamline(daemon.detector_endpoint, daemon.positions_endpoint) as line:
        line.send_positions(range(20))
        line.native("1", 1, range(20))
        with daemon.control() as control:
            header = wait_for(lambda: (control.scans(1) or [None])[0], what="the scan")
            scan_id = header["scan_id"]
            wait_for(lambda: control.scan(scan_id)["state"] == "complete", what="its end")
    image = grown(30, scan_id, tile_px=64, tiles=3, state="complete", verdict="good", final=True)
    Image(image).save(scan_directory(daemon.data, scan_id) / IMAGE_FILE)
    source.publish(grown(1, SCANS[0]))  # an older one
    stored = make_scan(daemon.data, 2, detector="camera", beside=scan_id)
    with opened(daemon) as page:
        page.look(scan_id=scan_id)
        page.say("watch", frame=True, probe=True, path=True)
        page.until(lambda: page.words["a"].get("frames") == 30, "the words")
        assert page.words["a"]["verdict"] == "good" and not page.words["a"]["live"]
        page.until(lambda: (0, -1, 0) in page.mirrors["a"].levels, "the tile")
        found = page.mirrors["a"].values((0, -1, 0))
        assert np.nanmin(found) == pytest.approx(0.5, abs=1e-3)
        for kind in ("path", "probe", "frame"):
            page.until(lambda one=kind: page.of_kind(one), kind)
        path = page.of_kind("path")[0]
        assert path["count"] == 30 and len(path["payload"]) == 30 * 12
        places = np.frombuffer(path["payload"], "<f4", 60).reshape(30, 2)
        np.testing.assert_allclose(places * 5e-9, image.position_yx_m, atol=1e-12)
        numbers = np.frombuffer(path["payload"], "<u4", offset=240)
        np.testing.assert_array_equal(numbers, image.frame_numbers)
        frame = page.of_kind("frame")[-1]
        assert (frame["scan_id"], frame["frame"], frame["frames"]) == (scan_id, 19, 20)
        assert frame["shape"] == [64, 64] and frame["position_yx_m"] is not None
        page.say("watch", frame=True, frame_number=3, frame_look="stored")
        page.until(lambda: page.of_kind("frame")[-1]["frame"] == 3, "another frame")
        page.say("watch", frame=True, frame_number=999)
        page.until(lambda: page.of_kind("no_frame"), "that there is none")

        def listed() -> dict[str, Any]:
            return next((scan for scan in page.scans if scan["scan_id"] == scan_id), {})

        page.until(lambda: listed().get("thumbnail"), "the thumbnail")
        assert listed()["verdict"] == "good" and listed()["frames"] == 20
        assert stored not in {scan["scan_id"] for scan in page.scans}, "it has no image"
        status, headers, png = fetched(daemon, f"/thumbnail/{scan_id}.png?v=1")
        assert (
            status == 200 and png.startswith(b"\x89PNG") and headers["content-type"] == "image/png"
        )
        page.look(stream=2, scan_id=scan_id, snapshot="never")
        page.until(lambda: "never" in page.words["a"].get("problem", ""), "that it is not there")


# -- when something breaks ----------------------------------------------------------------------


def test_a_publisher_that_comes_back_is_followed(daemon, source):
    source.publish(grown(9))
    with opened(daemon) as page:
        page.look()
        page.until(lambda: page.words["a"].get("frames") == 9, "the image")
        source.close()
        with Source(daemon.settings.results, epoch="later") as again:
            again.publish(grown(4))  # made anew, with lower versions
            page.until(lambda: page.words["a"].get("frames") == 4, "the image after the restart")
            wanted = np.angle(grown(4).tiles[-1, 0].object_yx)
            page.until(
                lambda: np.allclose(page.mirrors["a"].values((0, -1, 0)), wanted, atol=1e-3),
                "its tiles",
            )
        source.__init__(daemon.settings.results)  # for the fixture to close


def test_a_viewer_that_dies_is_started_again_and_pages_come_back(tmp_path):
    with running(tmp_path) as daemon:
        with opened(daemon) as page:
            page.until(lambda: page.of_kind("hello"), "the greeting")
            daemon.kill("viewer")
            with pytest.raises(ConnectionClosed):
                page.until(lambda: False, "a close")

        def back() -> bool:
            try:
                with opened(daemon) as page:
                    page.until(lambda: page.of_kind("hello"), "the greeting")
                return True
            except (OSError, WebSocketException):
                return False

        wait_for(back, 20, "a page again")
        assert daemon.status()["stages"]["viewer"]["restarts"] == 1
        # One that hangs costs nobody anything: what is asked of the daemon is answered.
        hung = daemon.stage_pid("viewer")
        os.kill(hung, signal.SIGSTOP)
        try:
            for _ in range(5):
                began_s = time.monotonic()
                daemon.status()
                assert time.monotonic() - began_s < 3
        finally:
            os.kill(hung, signal.SIGCONT)


def test_a_page_that_is_open_does_not_hold_up_a_stop(tmp_path):
    with running(tmp_path) as daemon, opened(daemon) as page:
        page.until(lambda: page.of_kind("hello"), "the greeting")
        began_s = time.monotonic()
        assert daemon.stop() == 0
        assert time.monotonic() - began_s < 5
        assert "viewer did not stop in time" not in daemon.log


def test_a_port_in_use_is_named_with_its_setting(tmp_path):
    daemon = DaemonHarness(tmp_path, stages=STAGES)
    with socket.socket() as other:
        other.bind(("127.0.0.1", daemon.settings.viewer.port))
        other.listen()
        daemon.start(ready=False)
        assert daemon.wait(30) == 1
    assert "viewer.port" in daemon.log and "viewer.enabled" in daemon.log
