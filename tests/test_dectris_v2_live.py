"""DECTRIS version 2 over real sockets into a daemon that stores a window of each frame.

One daemon for all tests, so every test is also about what came before it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np
import pytest
from beamline import SHAPE, Beamline, pixels, position, sealed_headers
from daemon_harness import DaemonHarness, wait_for

from ptycho_stream.scans.catalogue import Catalogue
from ptycho_stream.scans.header import ScanHeader
from ptycho_stream.wire import DectrisV2Encoder

CROP = (32, 48)
WINDOW = (slice(16, 48), slice(8, 56))
BEGUN_NS = 1_700_000_000_000_000_000
UNDECODABLE = 'ptycho_stream_messages_undecodable_total{{reason="{}"}}'


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DaemonHarness]:
    tables = {
        "detector": {"dialect": "dectris-v2", "crop_yx_px": CROP},
        "positions": {"wait_s": 3.0},
    }
    folder = tmp_path_factory.mktemp("daemon")
    with DaemonHarness(folder, tables, stages=("ingest",)) as harness:
        yield harness


@pytest.fixture(scope="module")
def line(daemon: DaemonHarness) -> Iterator[Beamline]:
    with Beamline(daemon.detector_endpoint, daemon.positions_endpoint) as beamline:
        yield beamline


@pytest.fixture
def counted(daemon: DaemonHarness):
    """How much a counter has gone up since the test began."""
    before = daemon.metrics()

    def assert_more(name: str, count: int) -> None:
        daemon.metric(name, before.get(name, 0.0) + count)

    return assert_more


def send(
    line: Beamline,
    series: int,
    key: int,
    numbers: Iterable[int],
    expected: int,
    *,
    end: bool = True,
    channels: tuple[str, ...] = ("threshold_1",),
) -> None:
    """A series; channel c of frame n is frame n of scan key + c."""
    encoder = DectrisV2Encoder(series, unique_id=f"id-{key}", begun_ns=BEGUN_NS)
    told = {
        "channels": list(channels),
        "image_dtype": "uint16",
        "image_size_y": SHAPE[0],
        "image_size_x": SHAPE[1],
        "number_of_images": expected,
        "beam_center_y": 32.0,
        "beam_center_x": 32.0,
        "user_data": {"sample": "noise"},
    }
    line.send(encoder.start(told))
    for n in numbers:
        images = {name: pixels(key + c, n) for c, name in enumerate(channels)}
        line.send(encoder.frame(n, images, n * 1000, n * 1000 + 900))
    if end:
        line.send(encoder.end())


def sealed(daemon: DaemonHarness, key: int) -> ScanHeader:
    """The scan of the series with this key, when it is sealed."""

    def found() -> ScanHeader | None:
        scans = Catalogue(daemon.data).scans()
        wanted = (h for h in scans if h.metadata.get("series_unique_id") == f"id-{key}")
        return next((h for h in wanted if h.sealed), None)

    try:
        return wait_for(found, 20, f"the end of scan {key}")
    except AssertionError as error:
        raise AssertionError(f"{error}\n{daemon.log}") from None


def check(daemon: DaemonHarness, header: ScanHeader, key: int, numbers: Iterable[int]) -> None:
    """Assert that a scan holds these frames bit by bit, with their own positions and times."""
    with Catalogue(daemon.data).open(header.scan_id) as reader:
        records = reader.records()
        assert records["number"].tolist() == list(numbers)
        for slot, number in enumerate(records["number"].tolist()):
            np.testing.assert_array_equal(reader.frame(slot), pixels(key, number)[WINDOW])
        assert records["start_ns"].tolist() == [BEGUN_NS + 1000 * n for n in numbers]
        assert records["stop_ns"].tolist() == [BEGUN_NS + 1000 * n + 900 for n in numbers]
        pairs = reader.pairs()
        assert sorted(pairs["number"].tolist()) == sorted(numbers)
        for pair in pairs:
            assert (pair["y_m"], pair["x_m"]) == position(int(pair["number"]))


def test_a_series_is_stored_bit_by_bit_and_joined_with_its_positions(daemon, line, counted):
    send(line, 1, 1, range(40), 40)
    line.send_positions(range(40), "1", "e1")
    header = sealed(daemon, 1)
    assert (header.state, header.expected_frames) == ("complete", 40)
    assert header.frame_shape_yx == CROP and header.detector_shape_yx == SHAPE
    assert header.counts["frames"] == header.counts["positioned"] == 40
    assert header.counts["missing"] == header.counts["duplicate"] == 0
    assert header.metadata["sample"] == "noise"
    check(daemon, header, 1, range(40))
    counted("ptycho_stream_frames_received_total", 40)
    counted("ptycho_stream_frames_committed_total", 40)
    counted("ptycho_stream_positions_received_total", 40)


def test_frames_that_are_lost_or_damaged_are_holes_and_counted(daemon, line, counted):
    good = [0, 1, 2, 5, 6, 9]
    send(line, 2, 2, [0, 1, 2], 10, end=False)
    encoder = DectrisV2Encoder(2, unique_id="id-2", begun_ns=BEGUN_NS)
    (whole,) = encoder.frame(3, {"threshold_1": pixels(2, 3)})
    line.send([whole[: len(whole) // 2]])
    line.send([whole[:-40] + bytes(40)])
    line.send([b"\xbb" + (2**60).to_bytes(8, "big")])
    for n in (5, 6, 6, 9):
        image = {"threshold_1": pixels(2, n)}
        line.send(encoder.frame(n, image, n * 1000, n * 1000 + 900))
    line.send(encoder.end())
    line.send_positions(good, "2", "e2")
    header = sealed(daemon, 2)
    assert header.state == "complete"
    assert header.counts["frames"] == header.counts["positioned"] == 6
    assert (header.counts["missing"], header.counts["duplicate"]) == (4, 1)
    assert header.counts["malformed"] == header.counts["limit"] == 1
    assert header.counts["undecodable"] == 1
    check(daemon, header, 2, good)
    counted("ptycho_stream_frames_missing_total", 4)
    counted("ptycho_stream_frames_duplicate_total", 1)
    for reason in ("malformed", "limit", "undecodable"):
        counted(UNDECODABLE.format(reason), 1)


def test_a_new_start_closes_a_series_that_was_aborted(daemon, line):
    """The detector was switched off and on: its numbers begin again, and no end has come."""
    send(line, 1, 3, range(15), 60, end=False)
    send(line, 1, 4, range(20), 20)
    catalogue = Catalogue(daemon.data)
    wait_for(lambda: catalogue.scans()[0].metadata["series_unique_id"] == "id-4")
    line.send_positions(range(20), "1", "e4")  # before it they would be those of the first
    second = sealed(daemon, 4)
    first = sealed(daemon, 3)
    assert (first.state, first.reason) == ("interrupted", "superseded by a new start")
    assert first.counts["frames"] == 15
    assert second.state == "complete" and second.counts["missing"] == 0
    check(daemon, second, 4, range(20))
    with Catalogue(daemon.data).open(first.scan_id) as reader:
        for slot, number in enumerate(reader.records()["number"].tolist()):
            np.testing.assert_array_equal(reader.frame(slot), pixels(3, number)[WINDOW])


def test_of_two_thresholds_one_is_stored_and_the_other_told(daemon, line, counted):
    send(line, 5, 5, range(10), 10, channels=("threshold_1", "threshold_2"))
    line.send_positions(range(10), "5", "e5")
    header = sealed(daemon, 5)
    check(daemon, header, 5, range(10))
    assert header.metadata["channel"] == "threshold_1"
    assert header.metadata["channels"] == ["threshold_1", "threshold_2"]
    assert header.counts["channels"] == 1
    counted(UNDECODABLE.format("channels"), 1)
    assert "only 'threshold_1' is recorded" in daemon.log


def test_nothing_was_restarted_and_no_scan_is_open(daemon):
    catalogue = Catalogue(daemon.data)
    assert sealed_headers(catalogue, 5) is not None
    assert daemon.status()["stages"]["ingest"]["restarts"] == 0
