"""Another view of a scan: of one that ingest is recording, and of one that is over."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import zmq
from beamline import SHAPE, Beamline, pixels
from daemon_harness import DaemonHarness, wait_for
from scan_samples import make_header, make_scan

from ptycho_stream.errors import GeometryError, ScanLocked, ScanNotFound
from ptycho_stream.files.view_change import asks_for_a_view, change_sealed, changed_view
from ptycho_stream.scans.catalogue import Catalogue
from ptycho_stream.scans.header import ScanHeader
from ptycho_stream.scans.ulid import new_scan_id
from ptycho_stream.scans.writer import ScanWriter
from ptycho_stream.wire import NativeEncoder
from ptycho_streamd.bus import Answer, Beat, Bus, Refusal, Reload, StageRequest
from ptycho_streamd.process import StageProcess


def test_a_view_is_the_present_one_with_what_is_asked_for(tmp_path):
    header = make_header()
    told = {"orientation": "flip_y", "center_yx_px": [3, 5.5], "dc": None}
    view = changed_view(header, tmp_path, told)
    assert (view.orientation, view.center_yx_px, view.dc) == ("flip_y", (3.0, 5.5), "center")
    assert (view.version, view.size_px) == (2, header.size_px)
    assert changed_view(header, tmp_path, {"orientation": "identity"}) == header.view
    assert asks_for_a_view({"dc": "corner"}) and not asks_for_a_view({"probe": "/a", "dc": None})


@pytest.mark.parametrize("center", [(24, 0), (0, 40.5), (-1, 3)])
def test_a_centre_outside_the_frame_is_refused(center, tmp_path):
    with pytest.raises(GeometryError, match="24 x 40 pixels"):
        changed_view(make_header(), tmp_path, {"center_yx_px": center})


def test_a_scan_that_is_over_gets_it_once(tmp_path):
    scan_id = make_scan(tmp_path, frames=3)
    for _ in range(2):
        assert change_sealed(tmp_path, scan_id, {"orientation": "rotate90"}).version == 2
    header = Catalogue(tmp_path).scans()[0]
    assert [view.orientation for view in header.views[-1:]] == ["rotate90"]
    with pytest.raises(ScanNotFound):
        change_sealed(tmp_path, new_scan_id(), {"orientation": "rotate90"})


def test_only_its_writer_changes_a_scan_that_is_being_written(tmp_path):
    with ScanWriter.create(tmp_path, make_header(), 16) as writer, pytest.raises(ScanLocked):
        change_sealed(tmp_path, writer.scan_id, {"orientation": "rotate90"})


class IngestAlone:
    """The ingest process; the test is its supervisor."""

    def __init__(self, folder: Path) -> None:
        self.daemon = DaemonHarness(folder)  # for its settings only
        self.catalogue = Catalogue(self.daemon.data)
        self._context = zmq.Context()
        self._bus = Bus(self._context)
        self._fd = os.open(os.devnull, os.O_RDONLY)
        self._process = StageProcess("ingest", self.daemon.config, self._bus, self._fd)
        self._asked = 0
        root = Path(__file__).parents[1]
        self._process.start({"PYTHONPATH": f"{root}:{root / 'daemon'}", "OMP_NUM_THREADS": "1"})
        wait_for(lambda: self.heard(Beat), 30, "first heartbeat")

    def heard(self, *kinds: type[Any]) -> Any:
        """A message of these kinds, if one has come."""
        for message in self._bus.receive():
            if isinstance(message, Beat):
                self._process.heard(message)
            if isinstance(message, kinds):
                return message
        return None

    def set_view(self, **arguments: Any) -> Answer | Refusal:
        self._asked += 1
        self._process.send(StageRequest(self._asked, "set_view", arguments))
        return wait_for(lambda: self.heard(Answer, Refusal), 10, "answer")

    def reload(self) -> None:
        self._process.send(Reload())

    def header(self) -> ScanHeader:
        return self.catalogue.scans()[0]

    def close(self) -> None:
        self._process.ask_to_stop()
        self._process.wait_until(time.monotonic() + 10)
        os.close(self._fd)
        self._bus.close()
        self._context.term()


@pytest.fixture
def ingest(tmp_path: Path) -> Iterator[IngestAlone]:
    alone = IngestAlone(tmp_path)
    try:
        yield alone
    finally:
        alone.close()


def test_a_running_scan_is_looked_at_otherwise_while_frames_go_on(ingest):
    daemon = ingest.daemon
    with Beamline(daemon.detector_endpoint, daemon.positions_endpoint) as beamline:
        encoder = NativeEncoder("7")
        beamline.send(encoder.scan_start(40, SHAPE, "<u2"))
        for number in range(20):
            beamline.send(encoder.frame(number, pixels(7, number)))
        wait_for(lambda: ingest.catalogue.scans(), what="scan")
        scan_id = ingest.header().scan_id
        answer = ingest.set_view(scan_id=scan_id, orientation="transpose", center_yx_px=None)
        assert isinstance(answer, Answer)
        assert answer.result["scan_id"] == scan_id and answer.result["view"]["version"] == 2
        assert ingest.header().view.orientation == "transpose"

        refused = ingest.set_view(scan_id=scan_id, center_yx_px=[200.0, 3.0])
        assert isinstance(refused, Refusal) and refused.code == "bad_arguments"

        daemon.write_config({"positions": {"wait_s": 2.0}})
        ingest.reload()  # of something else: what was corrected stays
        again = ingest.set_view(scan_id=scan_id, orientation="transpose")
        assert isinstance(again, Answer) and again.result["view"]["version"] == 2

        for number in range(20, 40):
            beamline.send(encoder.frame(number, pixels(7, number)))
        beamline.send(encoder.scan_end())
        wait_for(lambda: ingest.header().sealed, 15, "end of the scan")
    assert ingest.header().view.orientation == "transpose"
    with ingest.catalogue.open(scan_id) as reader:
        assert reader.committed == 40 and reader.verify() == []

    after = ingest.set_view(scan_id=scan_id, center_yx_px=[30.0, 33.0])
    assert isinstance(after, Answer) and after.result["view"]["version"] == 3
    assert ingest.header().view.center_yx_px == (30.0, 33.0)
    assert ingest.header().view.orientation == "transpose"


def test_a_scan_that_is_not_there_is_not_found(ingest):
    refused = ingest.set_view(scan_id=new_scan_id(), orientation="flip_x")
    assert isinstance(refused, Refusal) and refused.code == "not_found"
