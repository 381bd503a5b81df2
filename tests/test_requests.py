"""Control commands that go through stages: one after the other, or not at all."""

from __future__ import annotations

import select
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from scan_samples import make_scan

from ptycho_stream.reconstruct.history import HistoryEntry, append_history
from ptycho_stream.scans.catalogue import Catalogue
from ptycho_stream.settings import Settings
from ptycho_streamd import requests
from ptycho_streamd.bus import Answer, Refusal, StageRequest
from ptycho_streamd.control import Request
from ptycho_streamd.readable_files import ReadableFiles
from ptycho_streamd.requests import Requests, desk_commands, store_commands
from ptycho_streamd.store_desk import StoreDesk

ARGUMENTS: dict[str, Any] = {
    "scan_id": None,
    "orientation": None,
    "center_yx_px": None,
    "dc": None,
    "bad_pixels": None,
    "flat_field": None,
    "background": None,
    "bad_frames": None,
    "probe": None,
    "model": None,
}


class Desk:
    """``Requests`` between a client and two stages, both played by the test."""

    def __init__(self, root: Path) -> None:
        self.incoming: list[Request] = []
        self.answers: list[tuple[str, Any]] = []
        self.asked: list[tuple[str, StageRequest]] = []
        self.children = {
            name: SimpleNamespace(beating=True, pid=number)
            for number, name in enumerate(("ingest", "reconstruct"), 1)
        }
        catalogue = Catalogue(root)
        self.desk = StoreDesk(desk_commands(Catalogue(root)))
        self.requests = Requests(
            self,  # type: ignore[arg-type]
            self,  # type: ignore[arg-type]
            self.children,  # type: ignore[arg-type]
            store_commands(catalogue),
            catalogue,
            self.desk,
            lambda: ReadableFiles((root, root.parent / "masks"), (root / "daemon.key_secret",)),
        )

    def poll(self) -> list[Request]:
        taken, self.incoming = self.incoming, []
        return taken

    def reply(self, _request: Request, result: Any) -> None:
        self.answers.append(("ok", result))

    def fail(self, _request: Request, code: str, _message: str) -> None:
        self.answers.append((code, None))

    def send(self, stage: str, _pid: int, request: StageRequest) -> None:
        self.asked.append((stage, request))

    def ask(self, command: str, **arguments: Any) -> None:
        self.incoming.append(Request((), 1, command, arguments))
        self.requests.serve()

    def wait(self) -> tuple[str, Any]:
        """What is answered next, by the desk's thread."""
        before = len(self.answers)
        while len(self.answers) == before:
            assert select.select([self.desk.wakes], [], [], 10)[0], "nothing is answered"
            self.requests.serve()
        return self.answers[-1]

    def answer(self, result: dict[str, Any]) -> None:
        stage, request = self.asked[-1]
        self.requests.answered(Answer(stage, request.request_id, result))


@pytest.fixture
def scan_id(tmp_path: Path) -> str:
    return make_scan(tmp_path, frames=2)


@pytest.fixture
def desk(tmp_path: Path, scan_id: str) -> Iterator[Desk]:
    desk = Desk(tmp_path)
    yield desk
    desk.desk.close()


def test_reprocessing_changes_the_view_first_and_then_makes_the_image(desk, scan_id, tmp_path):
    probe = str(tmp_path / "p.npz")
    desk.ask("reprocess", **ARGUMENTS | {"orientation": "flip_x", "probe": probe})
    stage, request = desk.asked[0]
    assert (stage, request.command) == ("ingest", "set_view")
    assert request.arguments == {
        "scan_id": scan_id,
        "orientation": "flip_x",
        "center_yx_px": None,
        "dc": None,
        "bad_pixels": None,
        "flat_field": None,
        "background": None,
        "bad_frames": None,
    }
    desk.answer({"scan_id": scan_id, "view": {"version": 2}})
    stage, request = desk.asked[1]
    assert (stage, request.command) == ("reconstruct", "reprocess")
    assert request.arguments == {"scan_id": scan_id, "probe": probe, "model": None}
    assert desk.answers == []
    desk.answer({"scan_id": scan_id, "generation": 5})
    assert desk.answers == [("ok", {"scan_id": scan_id, "view": {"version": 2}, "generation": 5})]


def test_reprocessing_with_the_same_view_leaves_the_header_alone(desk, scan_id):
    desk.ask("reprocess", **ARGUMENTS | {"scan_id": scan_id, "model": "mine"})
    ((stage, request),) = desk.asked
    assert (stage, request.arguments["model"]) == ("reconstruct", "mine")
    desk.answer({"generation": 2})
    assert desk.answers == [("ok", {"generation": 2})]


def test_a_view_that_is_refused_ends_it(desk):
    desk.ask("reprocess", **ARGUMENTS | {"center_yx_px": (1.0, 900.0)})
    stage, request = desk.asked[0]
    desk.requests.answered(Refusal(stage, request.request_id, "bad_arguments", "outside"))
    assert desk.answers == [("bad_arguments", None)] and len(desk.asked) == 1


def test_without_reconstruction_not_even_the_view_changes(desk):
    desk.children["reconstruct"].beating = False
    desk.ask("reprocess", **ARGUMENTS | {"orientation": "flip_x"})
    assert desk.answers == [("unavailable", None)] and desk.asked == []


def test_a_stage_that_goes_between_the_steps_is_told(desk):
    desk.ask("reprocess", **ARGUMENTS | {"orientation": "flip_x"})
    desk.children["reconstruct"].beating = False
    desk.answer({"view": {"version": 2}})
    assert desk.answers == [("unavailable", None)]
    desk.answer({"view": {"version": 2}})  # late, and of nobody
    assert len(desk.answers) == 1


def test_a_stage_that_says_nothing_is_given_up(desk, monkeypatch):
    monkeypatch.setattr(requests, "REPROCESS", requests.Step("reconstruct", "reprocess", -1.0))
    desk.ask("reprocess", **ARGUMENTS)
    assert desk.answers == [("timeout", None)]


@pytest.mark.parametrize("name", ["01JBQ3N8Z5T0V6W7X8Y9ZABCDE", "../../etc"])
@pytest.mark.parametrize("command", ["reprocess", "snapshots", "history", "scan"])
def test_a_scan_that_is_not_there_is_not_found(desk, command, name):
    desk.ask(command, **ARGUMENTS | {"limit": 5, "scan_id": name})
    assert desk.answers == [("not_found", None)] and desk.asked == []


@pytest.mark.parametrize("argument", ["probe", "bad_pixels", "flat_field", "background"])
def test_files_are_read_from_folders_that_are_allowed_only(desk, tmp_path, argument):
    (tmp_path / "passwd").symlink_to("/etc/passwd")
    outside = ("/etc/passwd", f"{tmp_path}/../secret.npz", f"{tmp_path}/passwd", f"{tmp_path}x/a")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "key").symlink_to(tmp_path / "daemon.key_secret")
    secret = (f"{tmp_path}/daemon.key_secret", f"{tmp_path}/key")
    for path in (*outside, f"{tmp_path}/loop", *secret):
        desk.ask("reprocess", **ARGUMENTS | {argument: path})
    assert desk.answers == [("bad_arguments", None)] * 7 and desk.asked == []
    (tmp_path / "link.npz").symlink_to(tmp_path.parent / "masks" / "real.npz")
    desk.ask("reprocess", **ARGUMENTS | {argument: f"{tmp_path}/link.npz"})
    ((_, request),) = desk.asked
    assert request.arguments[argument] == str(tmp_path.parent / "masks" / "real.npz")


def test_keys_and_tokens_of_the_settings_are_no_files_for_requests(tmp_path):
    settings = Settings.model_validate(
        {
            "probe": {"path": tmp_path / "probe.npz"},
            "security": {"key_path": tmp_path / "k", "allowed_keys_path": tmp_path / "list"},
            "http": {"token_path": tmp_path / "h"},
            "viewer": {"token_path": tmp_path / "v"},
        }
    )
    readable = ReadableFiles.of(settings, tmp_path / "my.toml")
    assert readable.secrets == (tmp_path / "k", tmp_path / "h", tmp_path / "v")
    assert readable.checked("probe", f"{tmp_path}/probe.npz") == f"{tmp_path}/probe.npz"


def test_words_in_place_of_files_are_taken_as_they_are(desk):
    desk.ask("reprocess", **ARGUMENTS | {"background": "dark-frames", "bad_pixels": "none"})
    assert desk.asked[0][1].arguments["background"] == "dark-frames"
    assert desk.asked[0][1].arguments["bad_pixels"] == "none"


def test_more_requests_than_stages_get_through_are_refused(desk):
    for _ in range(requests.MAX_PENDING + 3):
        desk.ask("models")
    assert len(desk.asked) == requests.MAX_PENDING
    assert desk.answers == [("unavailable", None)] * 3


def test_an_empty_store_has_nothing_to_reprocess(tmp_path):
    desk = Desk(tmp_path / "empty")
    desk.ask("reprocess", **ARGUMENTS)
    assert desk.answers == [("not_found", None)]
    desk.desk.close()


def test_the_history_of_a_scan_is_thinned_out_evenly(desk, tmp_path, scan_id):
    directory = tmp_path / "scans" / scan_id
    for n in range(11):
        figures = {"r_factor": 0.5 - n / 100}
        append_history(directory, HistoryEntry(n, 1, n, "refined", 1.0, "m", figures, "good"))
    desk.ask("history", scan_id=None, limit=100)
    desk.ask("history", scan_id=scan_id, limit=3)
    (_, whole), (_, thin) = desk.answers
    assert [entry["frames"] for entry in whole["entries"]] == list(range(11))
    assert whole["scan_id"] == scan_id and whole["entries"][10]["verdict"] == "good"
    assert [entry["frames"] for entry in thin["entries"]] == [0, 5, 10]


def test_snapshots_are_listed_from_the_store(desk):
    desk.ask("snapshots", scan_id=None)
    assert desk.answers == [("ok", [])]
