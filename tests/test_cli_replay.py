"""``simulate`` writes a scan, ``replay`` streams it, ``reconstruct`` makes an image of it.

All as programs; what is streamed is read over real sockets.
"""

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

from ptycho_stream.files.measured import load_measured
from ptycho_stream.files.npz import load_scan, save_scan
from ptycho_stream.files.ptychopinn_npz import save_ptychopinn
from ptycho_stream.files.stored_scan import store_scan
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


def streamed(*arguments: object) -> tuple[np.ndarray, np.ndarray]:
    """Frames and inline positions of one series that ``replay`` sends."""
    at = f"tcp://127.0.0.1:{free_port()}"
    options = ("--dialect", "native", "--positions", "inline", "--bind", at, "--rate", 1000)
    process = started("replay", *arguments, *options)
    (decoder,) = frame_decoders(DetectorSettings(dialect="native"), WireLimits())
    got = []
    with zmq.Context() as context, context.socket(zmq.PULL) as frames:
        frames.linger = 0
        frames.connect(at)
        while not any(isinstance(message, ScanEnd) for message in got):
            assert frames.poll(30_000), ended(process, 5)[2]
            got += decoder.receive(frames.recv_multipart())
    status, _, err = ended(process)
    assert status == 0, err
    sent = [message for message in got if isinstance(message, Frame)]
    return np.stack([decode(m.image) for m in sent]), np.array([m.position_yx_m for m in sent])


def test_any_recorded_scan_is_streamed(scan_path: Path, tmp_path: Path) -> None:
    """A PtychoPINN file that must be explained, and a scan of a store by its id."""
    scan = load_scan(scan_path)
    save_ptychopinn(tmp_path / "train.npz", scan)
    with np.load(tmp_path / "train.npz") as held:
        arrays = {key: held[key] for key in held.files if key != "_metadata"}
    np.savez(tmp_path / "bare.npz", **arrays)
    brightest = float(scan.counts.max())
    pixel = [str(value) for value in scan.pixel_yx_m]
    explained = ("--domain", "amplitude", "--counts-per-unit", brightest)
    frames, positions = streamed(tmp_path / "bare.npz", *explained, "--object-pixel-m", *pixel)
    np.testing.assert_array_equal(frames, scan.counts)
    moved = positions - scan.positions_yx_m
    np.testing.assert_allclose(moved, np.broadcast_to(moved[0], moved.shape), atol=1e-14)
    scan_id = store_scan(tmp_path / "data", scan)
    config = tmp_path / "my.toml"
    config.write_text('[data]\ndirectory = "data"\n[probe]\npath = "probe.npz"\n')
    frames, positions = streamed(scan_id, "--config", config)
    np.testing.assert_array_equal(frames, scan.counts)
    np.testing.assert_array_equal(positions, scan.positions_yx_m)
    status, _, err = ended(started("replay", scan_id))
    assert status == 1 and "give --config, whose store has it" in " ".join(err.split())
    status, _, err = ended(started("replay", tmp_path / "bare.npz"))
    assert status == 1 and "say domain = 'amplitude' or 'counts'" in " ".join(err.split())


@pytest.mark.slow
def test_a_scan_is_reconstructed_and_its_image_written(scan_path: Path, tmp_path: Path) -> None:
    outputs = [tmp_path / "object.cxi", tmp_path / "object.png"]
    words = [word for output in outputs for word in ("--out", output)]
    quick = ("--seconds", 0.5, "--sweeps", 5)
    status, out, err = ended(started("reconstruct", scan_path, *words, *quick, "--json"), 90)
    assert status == 0, err
    told = json.loads(out)
    assert told["frames"] == 30 and told["layer"] == "refined" and told["verdict"]
    assert told["files"] == [str(output) for output in outputs]
    assert len(load_measured(outputs[0])) == 30
    status, _, err = ended(started("reconstruct", scan_path, "--out", tmp_path / "a.txt"))
    assert status == 2 and "must end in" in err
    status, _, err = ended(started("reconstruct", scan_path, "--probe", "none.npz"))
    assert status == 1 and "no probe file at none.npz" in " ".join(err.split())


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
    idle = ("--no-positions", "--positions-dialect", "panda")
    status, _, err = ended(started("replay", scan_path, *idle))
    assert status == 2 and "there is no positioner" in " ".join(err.split())


def test_the_measured_scan_becomes_a_scan_file(data_folder: Path, tmp_path: Path) -> None:
    save_scan(tmp_path / "siemens-star.npz", siemens_star(data_folder))
    scan = load_scan(tmp_path / "siemens-star.npz")
    assert len(scan) == 516
    assert scan.frame_shape_yx == (128, 128)
    assert int(scan.counts.max()) == 963
    peak_yx = np.unravel_index(scan.counts.sum(axis=0, dtype=np.int64).argmax(), (128, 128))
    assert np.hypot(*(np.array(peak_yx) - 64)) < 24, "zero frequency is in the middle"
    assert scan.probe is not None and scan.probe.shape == (1, 128, 128)
