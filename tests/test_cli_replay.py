"""``simulate`` writes a scan, ``replay`` streams it: as programs, read over real sockets."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import zmq
from daemon_harness import free_port
from make_siemens_star import siemens_star

from ptycho_stream.files.npz import load_scan, save_scan
from ptycho_stream.messages import Frame, Positions, ScanEnd, ScanStart
from ptycho_stream.settings import DetectorSettings
from ptycho_stream.wire import NativeDecoder, WireLimits, frame_decoders
from ptycho_stream.wire.compression import decode

PROGRAM = [
    sys.executable,
    "-c",
    "import sys; from ptycho_stream.cli import main; sys.exit(main())",
]


def started(*arguments: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [*PROGRAM, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def ended(process: subprocess.Popen[str], timeout_s: float = 60) -> tuple[int, str, str]:
    try:
        out, err = process.communicate(timeout=timeout_s)
    finally:
        process.kill()
    return process.returncode, out, err


@pytest.fixture(scope="module")
def scan_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("scan")
    options = ("--frames", 30, "--size", 32, "--seed", 3, "--probe-out", folder / "probe.npz")
    status, out, err = ended(
        started("simulate", "--out", folder / "scan.npz", *options, "--json"), 90
    )
    assert status == 0, err
    assert json.loads(out)["frames"] == 30
    with np.load(folder / "probe.npz") as held:
        assert held["probe"].shape[1:] == (32, 32)
    return folder / "scan.npz"


@pytest.mark.parametrize("dialect", ["dectris-v1", "dectris-v2", "native"])
def test_a_simulated_scan_is_streamed_as_two_series(scan_path: Path, dialect: str) -> None:
    frames_at = f"tcp://127.0.0.1:{free_port()}"
    positions_at = f"tcp://127.0.0.1:{free_port()}"
    process = started(
        *("replay", scan_path, "--dialect", dialect, "--bind", frames_at, "--series", 4),
        *("--positions-bind", positions_at, "--repeat", 2, "--rate", 500, "--json"),
    )
    got, where = [], []
    (decoder,) = frame_decoders(DetectorSettings(dialect=dialect), WireLimits())
    position_decoder = NativeDecoder(WireLimits())
    with zmq.Context() as context, context.socket(zmq.PULL) as frames:
        positions = context.socket(zmq.PULL)
        frames.linger = positions.linger = 0
        frames.connect(frames_at)
        positions.connect(positions_at)
        while sum(isinstance(message, ScanEnd) for message in got) < 2:
            assert frames.poll(30_000), "the stream stopped"
            got += decoder.receive(frames.recv_multipart())
        while positions.poll(500):
            where += position_decoder.receive(positions.recv_multipart())
        positions.close()
    status, out, err = ended(process)
    assert status == 0, err
    assert json.loads(out)["sent"] == 60
    scan = load_scan(scan_path)
    assert [m.series for m in got if isinstance(m, ScanStart)] == ["4", "5"]
    pixels = [decode(m.image) for m in got if isinstance(m, Frame)]
    np.testing.assert_array_equal(pixels, np.concatenate([scan.counts, scan.counts]))
    coordinates = [m.position_yx_m for m in where if isinstance(m, Positions)]
    np.testing.assert_array_equal(
        np.concatenate(coordinates), np.concatenate([scan.positions_yx_m] * 2)
    )


def test_replay_gives_up_where_nobody_receives(scan_path: Path) -> None:
    endpoint = f"tcp://127.0.0.1:{free_port()}"
    status, _, err = ended(
        started("replay", scan_path, "--bind", endpoint, "--no-positions", "--timeout", 0.3)
    )
    assert status == 1
    assert endpoint in " ".join(err.split()) and "nobody connected" in err


def test_wrong_files_and_options_end_with_a_status(scan_path: Path, tmp_path: Path) -> None:
    assert ended(started("replay", tmp_path / "none.npz"))[0] == 1
    assert ended(started("replay", scan_path, "--dialect", "morse"))[0] == 2
    assert ended(started("replay", scan_path, "--encoding", "zip"))[0] == 1


def test_the_measured_scan_becomes_a_scan_file(data_folder: Path, tmp_path: Path) -> None:
    save_scan(tmp_path / "siemens-star.npz", siemens_star(data_folder))
    scan = load_scan(tmp_path / "siemens-star.npz")
    assert len(scan) == 516
    assert scan.frame_shape_yx == (128, 128)
    assert int(scan.counts.max()) == 963
    peak_yx = np.unravel_index(scan.counts.sum(axis=0, dtype=np.int64).argmax(), (128, 128))
    assert np.hypot(*(np.array(peak_yx) - 64)) < 24, "zero frequency is in the middle"
    assert scan.probe is not None and scan.probe.shape == (1, 128, 128)
