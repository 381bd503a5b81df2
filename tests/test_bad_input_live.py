"""Bad input against a daemon that runs: it costs itself only, and is counted and logged.

Every case stands in the middle of a good scan, in place of frame 5, and a good scan follows.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import pytest
from beamline import SHAPE, Beamline, check_scan, pixels, positions, sealed_headers
from daemon_harness import DaemonHarness, wait_for

from ptycho_stream.scans.catalogue import Catalogue
from ptycho_stream.scans.header import ScanHeader
from ptycho_stream.wire import DectrisV1Encoder, NativeEncoder

Parts = Sequence[bytes]
FRAMES = 10
BAD = 5
GOOD = [*range(BAD), *range(BAD + 1, FRAMES)]
UNDECODABLE = 'ptycho_stream_messages_undecodable_total{{reason="{}"}}'
DROPPED = 'ptycho_stream_frames_dropped_total{{reason="{}"}}'
NOT_FINITE = r"\bNaN\b|\bnan\b|finite|invalid"
CONFIG = {
    "nimages": FRAMES,
    "ntrigger": 1,
    "trigger_mode": "ints",
    "x_pixels_in_detector": SHAPE[1],
    "y_pixels_in_detector": SHAPE[0],
    "bit_depth_image": 16,
}


@dataclass(frozen=True)
class Case:
    """Messages in place of a frame, the counter that goes up, and words of the log line."""

    name: str
    messages: Callable[[], Sequence[Parts]]
    counter: str
    says: str
    count: int = 1


@contextmanager
def running(folder: Path, **tables: Any) -> Iterator[tuple[DaemonHarness, Beamline]]:
    with (
        DaemonHarness(folder, tables, stages=("ingest",)) as daemon,
        Beamline(daemon.detector_endpoint, daemon.positions_endpoint) as line,
    ):
        yield daemon, line


def sealed(daemon: DaemonHarness, count: int) -> list[ScanHeader]:
    catalogue = Catalogue(daemon.data)
    try:
        return wait_for(lambda: sealed_headers(catalogue, count), 20, f"the end of {count} scans")
    except AssertionError as error:
        raise AssertionError(f"{error}\n{daemon.log}") from None


def start(dialect: str, series: int) -> Parts:
    if dialect == "dectris-v1":
        return DectrisV1Encoder(series).start("basic", CONFIG)
    return NativeEncoder(str(series)).scan_start(FRAMES, SHAPE, "<u2")


def end(dialect: str, series: int) -> Parts:
    if dialect == "dectris-v1":
        return DectrisV1Encoder(series).end()
    return NativeEncoder(str(series)).scan_end()


def frame(dialect: str, series: int, number: int, encoding: str = "") -> list[bytes]:
    image = pixels(series, number)
    if dialect == "dectris-v1":
        return DectrisV1Encoder(series, encoding or "bs16-lz4<").frame(number, image)
    return NativeEncoder(str(series), encoding=encoding or "bslz4").frame(number, image)


def send_scan(
    line: Beamline,
    dialect: str,
    series: int,
    *,
    first: Parts | None = None,
    instead: Sequence[Parts] | None = None,
    with_positions: bool = True,
) -> None:
    """A scan of ten frames with key = series; ``instead`` comes in place of frame 5."""
    line.send(first or start(dialect, series))
    for number in range(FRAMES):
        bad = instead is not None and number == BAD
        for message in instead if bad and instead else [frame(dialect, series, number)]:
            line.send(message)
    line.send(end(dialect, series))
    if with_positions:
        line.send_positions(range(FRAMES), str(series), f"e{series}")


def assert_counted_and_said(daemon: DaemonHarness, counter: str, count: int, says: str) -> None:
    daemon.metric(counter, count)
    assert re.search(says, daemon.log), f"no line says {says!r}:\n{daemon.log}"
    assert daemon.status()["stages"]["ingest"]["restarts"] == 0


def assert_good(daemon: DaemonHarness, header: ScanHeader, key: int) -> None:
    assert header.state == "complete", header.reason
    assert header.counts["frames"] == header.counts["positioned"] == FRAMES
    assert header.counts["missing"] == 0
    check_scan(Catalogue(daemon.data), header.scan_id, key, range(FRAMES))


def cut_blob(dialect: str, encoding: str) -> Callable[[], list[Parts]]:
    """Frame 5 with half of its blob."""

    def made() -> list[Parts]:
        parts = frame(dialect, 1, BAD, encoding)
        at = 2 if dialect == "dectris-v1" else 1
        parts[at] = parts[at][: len(parts[at]) // 2]
        return [parts]

    return made


def altered_blob(dialect: str, encoding: str) -> Callable[[], list[Parts]]:
    """Frame 5 with all bits of its blob's second half turned over."""

    def made() -> list[Parts]:
        parts = frame(dialect, 1, BAD, encoding)
        at = 2 if dialect == "dectris-v1" else 1
        half = len(parts[at]) // 2
        parts[at] = parts[at][:half] + bytes(byte ^ 0xFF for byte in parts[at][half:])
        return [parts]

    return made


def dectris_frame(number: int, image: np.ndarray) -> Callable[[], list[Parts]]:
    return lambda: [DectrisV1Encoder(1).frame(number, image)]


def dectris_parts(*which: int) -> Callable[[], list[Parts]]:
    """Some parts of frame 5, each as a message of its own."""
    return lambda: [[frame("dectris-v1", 1, BAD)[part]] for part in which]


DECTRIS = [
    Case("json", lambda: [[b'{"htype":']], UNDECODABLE.format("malformed"), "htype"),
    Case(
        "deeply nested json",
        lambda: [[b'{"htype":"dimage-1.0","frame":' + b"[" * 100_000 + b"]" * 100_000 + b"}"]],
        UNDECODABLE.format("malformed"),
        "malformed",
    ),
    *(
        Case(
            f"{name} {encoding}",
            broken("dectris-v1", encoding),
            UNDECODABLE.format("undecodable"),
            "frame 5 of series 1: ",
        )
        for name, broken, encodings in (
            ("cut", cut_blob, ("<", "lz4<", "bs16-lz4<", "bs8-lz4<")),
            ("altered", altered_blob, ("lz4<", "bs16-lz4<")),
        )
        for encoding in encodings
    ),
    Case(
        "wrong shape",
        dectris_frame(BAD, pixels(1, BAD, (64, 32))),
        DROPPED.format("wrong_shape"),
        r"\b64, 32\b",
    ),
    Case(
        "wrong dtype",
        dectris_frame(BAD, pixels(1, BAD).astype(np.uint32)),
        DROPPED.format("wrong_shape"),
        "u4|uint32",
    ),
    Case(
        "frame that came before",
        dectris_frame(2, pixels(1, 2)),
        "ptycho_stream_frames_duplicate_total",
        r"frame 2 of series 1",
    ),
    Case(
        "absurd number",
        dectris_frame(2**62, pixels(1, BAD)),
        UNDECODABLE.format("limit"),
        f"frame number {2**62}",
    ),
    Case(  # the part that follows the hole belongs to nothing
        "broken up without pixels",
        dectris_parts(0, 1, 3),
        UNDECODABLE.format("torn"),
        "frame 5 came without its pixels",
        2,
    ),
    Case("broken up without head", dectris_parts(1), UNDECODABLE.format("torn"), "dimage_d"),
]

NATIVE = [
    Case("msgpack", lambda: [[b"\xc1"]], UNDECODABLE.format("malformed"), "native dialect"),
    Case(
        "cut msgpack",
        lambda: [[frame("native", 1, BAD)[0][:-3], frame("native", 1, BAD)[1]]],
        UNDECODABLE.format("malformed"),
        "native dialect",
    ),
    Case(
        "deeply nested msgpack",
        lambda: [[b"\x81\xa4type" + b"\x91" * 100_000 + b"\xc0"]],
        UNDECODABLE.format("malformed"),
        "native dialect",
    ),
    Case(
        "unknown type",
        lambda: [[msgpack.packb({"type": "surprise", "series": "1"})]],
        UNDECODABLE.format("malformed"),
        "surprise",
    ),
    Case(
        "frame without blob",
        lambda: [frame("native", 1, BAD)[:1]],
        UNDECODABLE.format("torn"),
        "1 parts instead of 2",
    ),
    Case(
        "absurd shape",
        lambda: [
            [
                msgpack.packb(
                    {
                        "type": "frame",
                        "series": "1",
                        "frame": BAD,
                        "shape_yx": [2**31, 2**31],
                        "dtype": "<u2",
                        "encoding": "lz4",
                    }
                ),
                b"\0" * 100,
            ]
        ],
        UNDECODABLE.format("limit"),
        "detector.max_shape_yx_px",
    ),
    *(
        Case(
            f"{name} {encoding}",
            broken("native", encoding),
            UNDECODABLE.format("undecodable"),
            "frame 5 of series 1: ",
        )
        for name, broken, encodings in (
            ("cut", cut_blob, ("raw", "lz4", "bslz4", "lz4-hdf5")),
            ("altered", altered_blob, ("lz4", "bslz4", "lz4-hdf5")),
        )
        for encoding in encodings
    ),
]


def named(cases: list[Case]) -> Any:
    return pytest.mark.parametrize("case", cases, ids=lambda case: case.name)


def check_case(folder: Path, dialect: str, case: Case) -> None:
    with running(folder, detector={"dialect": dialect}) as (daemon, line):
        send_scan(line, dialect, 1, instead=case.messages())
        send_scan(line, dialect, 2)
        hurt, following = sealed(daemon, 2)
        assert (hurt.state, hurt.counts["missing"]) == ("complete", 1)
        check_scan(Catalogue(daemon.data), hurt.scan_id, 1, GOOD)
        assert_good(daemon, following, 2)
        assert_counted_and_said(daemon, case.counter, case.count, case.says)


@named(DECTRIS)
def test_a_bad_message_of_a_dectris_detector(case: Case, tmp_path: Path) -> None:
    check_case(tmp_path, "dectris-v1", case)


@named(NATIVE)
def test_a_bad_message_of_a_native_sender(case: Case, tmp_path: Path) -> None:
    check_case(tmp_path, "native", case)


# ---- headers and broken-up messages ------------------------------------------------------------


def test_messages_broken_up_into_parts_are_put_together(tmp_path: Path) -> None:
    with running(tmp_path, detector={"dialect": "dectris-v1"}) as (daemon, line):
        for parts in (
            start("dectris-v1", 1),
            *(frame("dectris-v1", 1, number) for number in range(FRAMES)),
            end("dectris-v1", 1),
        ):
            for part in parts:
                line.send([part])
        line.send_positions(range(FRAMES))
        (header,) = sealed(daemon, 1)
        assert_good(daemon, header, 1)
        assert not [name for name in daemon.metrics() if "undecodable_total{" in name]


def whole_header(series: int) -> list[bytes]:
    mask = np.zeros(SHAPE, np.uint32)
    mask[7, 9] = 1
    return DectrisV1Encoder(series).start("all", CONFIG, pixel_mask=mask)


def test_a_header_with_all_tables_brings_its_mask(tmp_path: Path) -> None:
    with running(tmp_path, detector={"dialect": "dectris-v1"}) as (daemon, line):
        send_scan(line, "dectris-v1", 1, first=whole_header(1))
        (header,) = sealed(daemon, 1)
        assert_good(daemon, header, 1)
        with Catalogue(daemon.data).open(header.scan_id) as reader:
            assert reader.bad_pixels is not None
            assert np.argwhere(reader.bad_pixels).tolist() == [[7, 9]]


def test_a_cut_table_costs_the_table_only(tmp_path: Path) -> None:
    with running(tmp_path, detector={"dialect": "dectris-v1"}) as (daemon, line):
        parts = whole_header(1)
        parts[5] = parts[5][:100]
        send_scan(line, "dectris-v1", 1, first=parts)
        send_scan(line, "dectris-v1", 2, first=whole_header(2))
        first, second = sealed(daemon, 2)
        assert_good(daemon, first, 1)
        assert_good(daemon, second, 2)
        assert_counted_and_said(
            daemon, UNDECODABLE.format("undecodable"), 1, "dpixelmask|100 bytes"
        )


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("x_pixels_in_detector", 2**40, "detector.max_shape_yx_px"),
        ("y_pixels_in_detector", 10**5, "detector.max_shape_yx_px"),
        ("nimages", 2**63, "series 1.*announces more than"),
        ("ntrigger", 2**62, "series 1.*announces more than"),
        ("bit_depth_image", [16], None),
        ("photon_energy", {"eV": 8800}, None),
    ],
)
def test_an_absurd_header_costs_no_frame(
    key: str, value: object, says: str | None, tmp_path: Path
) -> None:
    """What it says is not believed, and the frames tell the rest; odd types count as not told."""
    absurd = DectrisV1Encoder(1).start("basic", CONFIG | {key: value})
    with running(tmp_path, detector={"dialect": "dectris-v1"}) as (daemon, line):
        send_scan(line, "dectris-v1", 1, first=absurd)
        send_scan(line, "dectris-v1", 2)
        first, second = sealed(daemon, 2)
        assert_good(daemon, first, 1)
        assert_good(daemon, second, 2)
        if says is not None:
            assert_counted_and_said(daemon, UNDECODABLE.format("limit"), 1, says)
        assert daemon.status()["stages"]["ingest"]["restarts"] == 0


# ---- positions ---------------------------------------------------------------------------------


def from_file(folder: Path) -> dict[str, dict[str, Any]]:
    return {"positions": {"source": "file", "path": str(folder / "path.npz"), "endpoint": None}}


def test_a_positions_file_that_is_missing_costs_no_frame(tmp_path: Path) -> None:
    with running(tmp_path, **from_file(tmp_path)) as (daemon, line):
        send_scan(line, "native", 1, with_positions=False)
        (first,) = sealed(daemon, 1)
        assert first.state == "unmatched"
        check_scan(Catalogue(daemon.data), first.scan_id, 1, range(FRAMES))
        assert_counted_and_said(
            daemon, "ptycho_stream_frames_unpositioned_total", FRAMES, r"path\.npz"
        )
        np.savez(tmp_path / "path.npz", positions_yx_m=positions(range(FRAMES)))
        send_scan(line, "native", 2, with_positions=False)
        assert_good(daemon, sealed(daemon, 2)[1], 2)


def test_nan_in_a_positions_file_costs_that_frame_its_position(tmp_path: Path) -> None:
    where = positions(range(FRAMES))
    where[3, 1] = np.nan
    np.savez(tmp_path / "path.npz", positions_yx_m=where)
    with running(tmp_path, **from_file(tmp_path)) as (daemon, line):
        send_scan(line, "native", 1, with_positions=False)
        (first,) = sealed(daemon, 1)
        assert (first.counts["frames"], first.counts["positioned"]) == (FRAMES, FRAMES - 1)
        check_scan(Catalogue(daemon.data), first.scan_id, 1, range(FRAMES))
        assert_counted_and_said(daemon, "ptycho_stream_positions_invalid_total", 1, NOT_FINITE)
        np.savez(tmp_path / "path.npz", positions_yx_m=positions(range(FRAMES)))
        send_scan(line, "native", 2, with_positions=False)
        assert_good(daemon, sealed(daemon, 2)[1], 2)


@pytest.mark.parametrize(
    ("value", "counter", "says", "positioned"),
    [
        (np.nan, "ptycho_stream_positions_invalid_total", NOT_FINITE, FRAMES - 1),
        (np.inf, "ptycho_stream_positions_invalid_total", NOT_FINITE, FRAMES - 1),
        (
            0.5,
            'ptycho_stream_positions_flagged_total{reason="extent"}',
            "(?i)max_extent_m|extent",
            FRAMES,
        ),
    ],
)
def test_a_position_that_cannot_be_is_counted_and_said(
    value: float, counter: str, says: str, positioned: int, tmp_path: Path
) -> None:
    where = positions(range(FRAMES))
    where[3, 0] = value
    encoder = NativeEncoder("1", "e1")
    with running(tmp_path) as (daemon, line):
        send_scan(line, "native", 1, with_positions=False)
        line.positioner.send_multipart(encoder.positions_start())
        line.positioner.send_multipart(encoder.positions(range(FRAMES), where))
        line.positioner.send_multipart(encoder.positions_end())
        send_scan(line, "native", 2)
        first, second = sealed(daemon, 2)
        assert first.counts["positioned"] == positioned
        assert_good(daemon, second, 2)
        assert_counted_and_said(daemon, counter, 1, says)


@pytest.mark.parametrize(
    ("message", "counter", "says"),
    [
        (b"\xc1", "malformed", "native dialect"),
        (msgpack.packb({"type": "positions", "epoch": "e1"}), "malformed", "native dialect"),
        (
            msgpack.packb(
                {
                    "type": "positions",
                    "epoch": "e1",
                    "frames": [0, 1],
                    "position_yx_m": [[0.0, 0.0]],
                }
            ),
            "malformed",
            "2 frame numbers",
        ),
        (
            msgpack.packb(
                {"type": "positions", "epoch": "e1", "frames": [-4], "position_yx_m": [[0.0, 0.0]]}
            ),
            "limit",
            "frame number -4",
        ),
    ],
    ids=["no msgpack", "no numbers", "odd lengths", "negative number"],
)
def test_a_bad_message_of_a_positioner(
    message: bytes, counter: str, says: str, tmp_path: Path
) -> None:
    with running(tmp_path) as (daemon, line):
        line.positioner.send_multipart([message])
        send_scan(line, "native", 1)
        assert_good(daemon, sealed(daemon, 1)[0], 1)
        assert_counted_and_said(daemon, UNDECODABLE.format(counter), 1, says)
