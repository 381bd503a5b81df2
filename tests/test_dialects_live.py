"""The shipped configurations of the JSON-and-blob dialects, each started against its simulator.

One daemon a dialect, without reconstruction: first a scan as it should be, then what goes wrong at
beamlines: lost messages and modules, senders that start again, several of them, late subscribers.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from beamline import wait_sealed
from daemon_harness import DaemonHarness, wait_for
from dialect_profiles import Tables, tables_of

from ptycho_stream.cli.endpoint_checkup import check_endpoints
from ptycho_stream.files.npz import ScanFile
from ptycho_stream.scans.catalogue import Catalogue
from ptycho_stream.scans.header import ScanHeader
from ptycho_stream.settings import Settings
from ptycho_stream.simulate.detector import DetectorSimulator, PositionSimulator, play
from ptycho_stream.simulate.outlet import Outlet
from ptycho_stream.simulate.series import DetectorOptions
from ptycho_stream.wire.bluesky_encoder import BlueskyEncoder
from ptycho_stream.wire.json_blob_encoder import (
    OdinEncoder,
    PsiEncoder,
    SlsdetEncoder,
    StinsEncoder,
)
from ptycho_stream.wire.panda_encoder import PandaEncoder

FRAMES, SHAPE = 40, (32, 48)
BAD = np.iinfo(np.uint16).max


@pytest.fixture(scope="module")
def scan() -> ScanFile:
    rng = np.random.default_rng(5)
    return ScanFile(
        counts=rng.poisson(4, (FRAMES, *SHAPE)).astype(np.uint16),
        positions_yx_m=np.rint(rng.normal(0, 1e3, (FRAMES, 2))) * 1e-9,
        frame_numbers=np.arange(FRAMES),
    )


@contextmanager
def recording(folder: Path, tables: Tables) -> Iterator[DaemonHarness]:
    """A daemon of these settings, of which doctor says that it can and does connect."""
    daemon = DaemonHarness(folder, tables, stages=("ingest",))
    assert states(daemon.settings) == {"detector": {"OK"}, "control": {"no daemon"}}
    with daemon:
        endpoints = len(daemon.settings.detector.endpoints)
        wait_for(lambda: connected(daemon) == endpoints, what=f"{endpoints} connections")
        assert states(daemon.settings) == {"detector": {"silent"}, "control": {"OK"}}
        yield daemon


def connected(daemon: DaemonHarness) -> int:
    return sum(e["peers"] for e in daemon.ingest()["endpoints"] if e["name"] == "detector")


def states(settings: Settings) -> dict[str, set[str]]:
    found: dict[str, set[str]] = {}
    for finding in check_endpoints(settings, timeout_s=1.0):
        if finding.subject in ("detector", "control"):
            found.setdefault(finding.subject, set()).add(finding.state)
    return found


def check(daemon: DaemonHarness, header: ScanHeader, scan: ScanFile, **counts: int) -> None:
    """All frames are there bit by bit at their positions; ``counts`` as given, others 0."""
    numbers = stored(daemon, header, scan)
    assert numbers == list(range(FRAMES))
    assert header.state == "complete", header.reason
    expected = {"frames": FRAMES, "positioned": FRAMES, **counts}
    expected.setdefault("positions", FRAMES)
    assert {key: n for key, n in header.counts.items() if n} == expected


def stored(daemon: DaemonHarness, header: ScanHeader, scan: ScanFile) -> list[int]:
    """Numbers of a scan's frames, each of which holds what was sent, with its own position."""
    with Catalogue(daemon.data).open(header.scan_id) as reader:
        records, pairs = reader.records(), reader.pairs()
        for slot, number in enumerate(records["number"].tolist()):
            np.testing.assert_array_equal(reader.frame(slot), scan.counts[number])
        for pair in pairs:
            assert records["number"][pair["slot"]] == pair["number"]
            wanted = scan.positions_yx_m[int(pair["number"])]
            np.testing.assert_allclose((pair["y_m"], pair["x_m"]), wanted, rtol=0, atol=1e-15)
    return records["number"].tolist()


def lost(daemon: DaemonHarness, reason: str) -> float:
    name = f'ptycho_stream_messages_undecodable_total{{reason="{reason}"}}'
    return daemon.metrics().get(name, 0.0)


# ---- STINS, with positions of a PandA ------------------------------------------------------------


def test_stins(tmp_path: Path, scan: ScanFile) -> None:
    with (
        DetectorSimulator(options=DetectorOptions("stins")) as detector,
        Outlet("tcp://127.0.0.1:*", "pub") as panda,
    ):
        tables = tables_of("maxiv-stins", detector.endpoints, panda.endpoint)
        with recording(tmp_path, tables) as daemon:
            panda.wait_for_receiver()
            detector.send_series(scan)
            send_panda(panda, scan, "2026-03-01T10:00:00.000000Z")
            (header,) = wait_sealed(daemon, 1)
            check(daemon, header, scan)
            assert header.expected_frames == FRAMES
            assert header.metadata["filename"] == "/data/scan_000001.h5"
            (outlet,) = detector._outlets
            stins_faults(outlet, scan)
            first, second = wait_sealed(daemon, 3)[1:]
            assert stored(daemon, first, scan) == [0, 1, 3, 4, 6]
            assert first.counts["lost"] == first.counts["missing"] == 2
            assert first.state == "interrupted"
            assert stored(daemon, second, scan) == [0, 1, 2, 3, 4]
            daemon.metric("ptycho_stream_frames_received_total", FRAMES + 10)
            assert lost(daemon, "lost") == 2


def send_panda(outlet: Outlet, scan: ScanFile, armed: str) -> None:
    """Positions as counts of a nanometre, y mirrored, in blocks of 7 samples."""
    encoder = PandaEncoder(armed)
    outlet.send(encoder.start())
    for first in range(0, FRAMES, 7):
        y, x = np.rint(scan.positions_yx_m[first : first + 7] * 1e9).T
        outlet.send(encoder.data(first, {"/INENC2.VAL.Mean": -y, "/INENC1.VAL.Mean": x}))
    outlet.send(encoder.stop())


def stins_faults(outlet: Outlet, scan: ScanFile) -> None:
    """A second receiver has taken two messages, then the sender is started again."""
    encoder = StinsEncoder(first_message=FRAMES + 2)
    outlet.send(encoder.start())
    for number in range(7):
        message = encoder.frame(number, scan.counts[number])
        if number not in (2, 5):
            outlet.send(message)
    encoder = StinsEncoder()
    outlet.send(encoder.start())
    for number in range(5):
        outlet.send(encoder.frame(number, scan.counts[number]))
    outlet.send(encoder.end())


# ---- PSI, with native positions ------------------------------------------------------------------


def test_psi(tmp_path: Path, scan: ScanFile) -> None:
    with (
        DetectorSimulator(options=DetectorOptions("psi")) as detector,
        PositionSimulator() as positions,
    ):
        tables = tables_of("psi-jungfrau", detector.endpoints, positions.endpoint)
        tables["detector"] |= {"silence_s": 0.5}
        encoder, (outlet,) = PsiEncoder(), detector._outlets
        for number in range(3):  # nobody has subscribed yet: a PUB drops them
            outlet.send(encoder.frame(number, scan.counts[number]))
        with recording(tmp_path, tables) as daemon:
            for number in range(3, 6):
                outlet.send(encoder.frame(number, scan.counts[number]))
            (late,) = wait_sealed(daemon, 1)
            assert late.joined_late and late.state == "unmatched"
            assert stored(daemon, late, scan) == [3, 4, 5]
            assert late.counts["missing"] == 3
            play(scan, detector, positions, "before")
            header = wait_sealed(daemon, 2)[-1]  # there is no end: by silence
            check(daemon, header, scan)
            assert not header.joined_late
            for number in [0, 1, 3, 3, 2, 4, 0, 1, 2, 3]:  # the sender begins again
                outlet.send(encoder.frame(number, scan.counts[number]))
            first, second = wait_sealed(daemon, 4)[2:]
            assert stored(daemon, first, scan) == [0, 1, 3, 2, 4]
            assert first.counts["duplicate"] == first.counts["out_of_order"] == 1
            assert stored(daemon, second, scan) == [0, 1, 2, 3]
            outlet.send([b'{"htype":"bsr_m-1.1"}', b""])
            outlet.send(encoder.frame(0, scan.counts[0])[:1])
            wait_for(lambda: lost(daemon, "malformed") == lost(daemon, "torn") == 1)


# ---- slsReceiver, with positions of a Bluesky run ------------------------------------------------


def test_slsdet(tmp_path: Path, scan: ScanFile) -> None:
    with (
        DetectorSimulator(options=DetectorOptions("slsdet", modules_yx=(2, 2))) as detector,
        Outlet("tcp://127.0.0.1:*", "pub") as bluesky,
    ):
        tables = tables_of("slsdet-eiger", detector.endpoints, bluesky.endpoint)
        tables["detector.slsdet"] |= {"gap_yx_px": [0, 0], "wait_ms": 300.0}
        with recording(tmp_path, tables) as daemon:
            bluesky.wait_for_receiver()
            send_bluesky(bluesky, scan)
            detector.send_series(scan, series=4)
            (header,) = wait_sealed(daemon, 1)
            check(daemon, header, scan)
            assert header.series == "run_4" and header.metadata["fileIndex"] == 4
            slsdet_faults([outlet.send for outlet in detector._outlets], scan)
            first, second = wait_sealed(daemon, 3)[1:]
            with Catalogue(daemon.data).open(first.scan_id) as reader:
                frames = {int(r["number"]): reader.frame(k) for k, r in enumerate(reader.records())}
            assert sorted(frames) == list(range(6))
            for number in (0, 1, 3, 5):
                np.testing.assert_array_equal(frames[number], scan.counts[number])
            cut = scan.counts[2].copy()
            cut[:16, 24:] = BAD
            np.testing.assert_array_equal(frames[2], cut)
            np.testing.assert_array_equal(frames[4], scan.counts[4])
            assert first.counts["incomplete"] == first.counts["gated"] == 2
            assert first.counts["missing"] == 0
            assert stored(daemon, second, scan) == [0, 1, 2]
            assert lost(daemon, "incomplete") == 2


def send_bluesky(outlet: Outlet, scan: ScanFile) -> None:
    encoder = BlueskyEncoder({"samy": "nm", "samx": "nm"})
    outlet.send(encoder.start())
    outlet.send(encoder.descriptor())
    for number, (y, x) in enumerate(np.rint(scan.positions_yx_m * 1e9).tolist(), 1):
        outlet.send(encoder.event(number, {"samy": y, "samx": x}))
    outlet.send(encoder.stop())


def slsdet_faults(send: list[Callable[[list[bytes]], None]], scan: ScanFile) -> None:
    """Frame 2 lacks a module, frame 4 packets of one; an end is lost, and the next run begins."""
    for run, frames, ends in ((5, 6, 3), (6, 3, 4)):
        for k, (row, column) in enumerate(((0, 0), (0, 1), (1, 0), (1, 1))):
            encoder = SlsdetEncoder("/data/run", run, (2, 2), (row, column), flipped=row == 1)
            for number in range(frames):
                module = scan.counts[number][
                    16 * row : 16 * row + 16, 24 * column : 24 * column + 24
                ]
                if (run, number, k) != (5, 2, 1):
                    complete = (run, number, k) != (5, 4, 3)
                    send[k](encoder.frame(number, module, complete))
            if k < ends:
                send[k](encoder.end())


# ---- Odin, with positions from a file ------------------------------------------------------------


def test_odin(tmp_path: Path, scan: ScanFile) -> None:
    with (
        DetectorSimulator(options=DetectorOptions("odin")) as detector,
        Outlet("tcp://127.0.0.1:*", "pub") as other,
    ):
        endpoints = [detector.endpoint, other.endpoint]
        tables = tables_of("dls-odin", endpoints)
        tables["detector"] |= {"silence_s": 0.5}
        tables["detector.odin"] |= {"shape_order": "xy"}
        tables["positions"] |= {"path": "planned.csv"}
        rows = (f"{n},{y},{x}" for n, (y, x) in enumerate(scan.positions_yx_m.tolist()))
        (tmp_path / "planned.csv").write_text("\n".join(["frame,y_m,x_m", *rows]))
        with recording(tmp_path, tables) as daemon:
            detector.send_series(scan, series=7)
            (header,) = wait_sealed(daemon, 1)
            check(daemon, header, scan)
            assert header.series == "scan-7"
            odin_faults([outlet.send for outlet in (*detector._outlets, other)], scan)
            first, second = wait_sealed(daemon, 3)[1:]
            assert sorted(stored(daemon, first, scan)) == [0, 1, 2, 3, 5, 6, 7]
            assert (first.state, first.counts["missing"]) == ("complete", 1)
            assert sorted(stored(daemon, second, scan)) == [0, 1, 2]
            daemon.metric("ptycho_stream_frames_received_total", FRAMES + 10)


def odin_faults(send: list[Callable[[list[bytes]], None]], scan: ScanFile) -> None:
    """Two frame processors share the frames; one loses a frame and publishes another dataset."""
    for name, numbers in (("scan-8", range(8)), ("scan-9", range(3))):
        encoder = OdinEncoder(name, "lz4")
        for number in numbers:
            if number != 4:
                send[number % 2](encoder.frame(number, scan.counts[number]))
        send[0](OdinEncoder(name, dataset="threshold_1").frame(0, scan.counts[0]))
        time.sleep(0.2)  # the sockets are read in turns, runs come seconds apart
