"""Runs of a real RunEngine, published over 0MQ, give frames of our simulated detector positions."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import pytest
from beamline import sealed_headers
from daemon_harness import DaemonHarness, free_port, wait_for
from dialect_profiles import tables_of

from ptycho_stream.files.npz import ScanFile
from ptycho_stream.scans.catalogue import Catalogue
from ptycho_stream.scans.header import ScanHeader
from ptycho_stream.simulate.detector import DetectorSimulator
from ptycho_stream.simulate.series import DetectorOptions

pytest.importorskip("bluesky", reason="bluesky is not installed: pip install '.[interop]'")
pytest.importorskip("ophyd", reason="ophyd is not installed: pip install '.[interop]'")
pytestmark = [
    pytest.mark.interop,
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
]
SERIALIZERS: dict[str, Callable[[Any], bytes]] = {
    "msgpack": msgpack.packb,
    "json": lambda document: json.dumps(document).encode(),
}
ROWS, COLUMNS = 4, 5
UM = 1e-6


class TriggeredDetector:
    """A device whose frames are those of a scan file, one a trigger, sent by our simulator."""

    name, parent, hints = "eiger", None, {}

    def __init__(self, simulator: DetectorSimulator, scan: ScanFile) -> None:
        self.series = 0
        self.taken = 0
        self._simulator, self._scan = simulator, scan
        self._frames: Iterator[int] = iter(())

    def stage(self) -> list[Any]:
        self.series += 1
        self.taken = 0
        self._frames = self._simulator.frames(self._scan, self.series)
        return [self]

    def unstage(self) -> list[Any]:
        list(self._frames)  # the series' end, and frames that nobody has triggered
        return [self]

    def trigger(self) -> Any:
        from ophyd.sim import NullStatus

        next(self._frames)
        self.taken += 1
        return NullStatus()

    def read(self) -> dict[str, Any]:
        return {"eiger_counter": {"value": self.taken, "timestamp": time.time()}}

    def describe(self) -> dict[str, Any]:
        return {"eiger_counter": {"source": "SIM:eiger", "dtype": "integer", "shape": []}}

    def read_configuration(self) -> dict[str, Any]:
        return {}

    def describe_configuration(self) -> dict[str, Any]:
        return {}


def scan_file(frames: int) -> ScanFile:
    random = np.random.default_rng(5)
    counts = random.poisson(3.0, (frames, 64, 64)).astype(np.uint16)
    return ScanFile(counts, np.zeros((frames, 2)), np.arange(frames))


class Hutch:
    """A daemon, a detector of so many frames and a RunEngine with two motors in micrometres."""

    def __init__(self, daemon: DaemonHarness, frames: int = ROWS * COLUMNS) -> None:
        from bluesky import RunEngine
        from ophyd.sim import SynAxis

        self.daemon = daemon
        endpoint, options = daemon.settings.detector.endpoint, DetectorOptions("dectris-v1")
        self.simulator = DetectorSimulator(endpoint, options)
        self.simulator.wait_for_receiver()
        self.detector = TriggeredDetector(self.simulator, scan_file(frames))
        self.y, self.x = SynAxis(name="samy"), SynAxis(name="samx")
        self.engine = RunEngine({"beamline": "lab"}, context_managers=[])
        self.stops: list[str] = []
        self.engine.subscribe(lambda _, stop: self.stops.append(stop["exit_status"]), "stop")

    def publish(self, serializer: Callable[[Any], bytes]) -> Callable[[], None]:
        """Send documents from now on; call the result to send no more."""
        from bluesky.callbacks.zmq import Publisher

        address = self.daemon.positions_endpoint.removeprefix("tcp://")
        publisher = Publisher(address, serializer=serializer)
        token = self.engine.subscribe(publisher)
        wait_for(lambda: peers(self.daemon)["positions"] == 1, what="the publisher's connection")

        def close() -> None:
            self.engine.unsubscribe(token)
            publisher.close()
            wait_for(lambda: peers(self.daemon)["positions"] == 0, what="the publisher's end")

        return close

    def grid(self, pause_after: int | None = None, **metadata: Any) -> None:
        """A snake of ROWS by COLUMNS steps; one may be interrupted after its frame was taken."""
        from bluesky import plan_stubs as bps
        from bluesky.plans import grid_scan

        def step(detectors: Any, step: Any, pos_cache: Any) -> Iterator[Any]:
            yield from bps.move_per_step(step, pos_cache)
            yield from bps.trigger(self.detector, wait=True)
            if self.detector.taken == pause_after:
                yield from bps.pause()
            yield from bps.create()
            for device in (*detectors, self.y, self.x):
                yield from bps.read(device)
            yield from bps.save()

        axes = (self.y, -3, 3, ROWS, self.x, -2, 2, COLUMNS)
        self.engine(grid_scan([self.detector], *axes, snake_axes=True, per_step=step, md=metadata))


def peers(daemon: DaemonHarness) -> dict[str, int]:
    with daemon.control() as control:
        return {stream["name"]: stream["peers"] for stream in control.endpoints()}


def heard(daemon: DaemonHarness) -> int:
    """Messages of the positioner."""
    with daemon.control() as control:
        return next(s["messages"] for s in control.endpoints() if s["name"] == "positions")


def grid_yx_m() -> list[tuple[float, float]]:
    """Where the frames of a grid are, by the same arithmetic as the motors and the daemon."""
    x = np.linspace(-2, 2, COLUMNS)
    rows = enumerate(np.linspace(-3, 3, ROWS))
    return [(y * UM, along * UM) for row, y in rows for along in (x[::-1] if row % 2 else x)]


def tables(**bluesky: Any) -> dict[str, dict[str, Any] | None]:
    return {
        "detector": {"dialect": "dectris-v1"},
        "positions": {"source": "bluesky", "attach": "bind", "socket": "sub", "wait_s": 5.0},
        # ophyd's simulated motors tell no units
        "positions.bluesky": {"y": "samy", "x": "samx", "scale_yx_m": [UM, UM], **bluesky},
        "metadata": {"sample": "whatever", "proposal": "P1"},
    }


@pytest.fixture(scope="module")
def hutch(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hutch]:
    folder = tmp_path_factory.mktemp("hutch")
    with DaemonHarness(folder, tables(), stages=("ingest",)) as daemon:
        hutch = Hutch(daemon)
        with hutch.simulator:
            yield hutch


def sealed(hutch: Hutch, count: int) -> list[ScanHeader]:
    catalogue = Catalogue(hutch.daemon.data)
    try:
        return wait_for(lambda: sealed_headers(catalogue, count), 30, f"{count} scans")
    except AssertionError as error:
        raise AssertionError(f"{error}\n{hutch.daemon.log}") from None


def check(hutch: Hutch, header: ScanHeader) -> None:
    """Every frame is there, bit by bit, with the position of its own step."""
    assert (header.state, header.reason) == ("complete", "")
    frames = ROWS * COLUMNS
    expected = {"frames": frames, "positioned": frames, "positions": frames, "unpositioned": 0}
    expected |= {"missing": 0, "duplicate": 0, "out_of_order": 0}
    assert {name: header.counts[name] for name in expected} == expected
    with Catalogue(hutch.daemon.data).open(header.scan_id) as reader:
        scan = scan_file(frames)
        np.testing.assert_array_equal(reader.frames(slice(0, frames)), scan.counts)
        assert reader.records()["number"].tolist() == list(range(frames))
        pairs = {int(pair["number"]): (pair["y_m"], pair["x_m"]) for pair in reader.pairs()}
    assert pairs == dict(enumerate(grid_yx_m()))


@pytest.mark.parametrize("serializer", ["msgpack", "json"])
def test_a_grid_scan_gives_each_frame_the_position_of_its_step(hutch, serializer):
    before = len(Catalogue(hutch.daemon.data).scans())
    received = hutch.daemon.metrics().get("ptycho_stream_positions_received_total", 0)
    close = hutch.publish(SERIALIZERS[serializer])
    try:
        hutch.grid(sample="star", operator="me", purpose="interop")
        header = sealed(hutch, before + 1)[-1]
    finally:
        close()
    check(hutch, header)
    start = dict(header.metadata)
    assert start["sample"] == "star" and start["proposal"] == "P1"
    assert (start["operator"], start["purpose"], start["beamline"]) == ("me", "interop", "lab")
    assert start["plan_name"] == "grid_scan" and start["motors"] == ["samy", "samx"]
    assert (start["scan_shape"], start["num_points"]) == ([ROWS, COLUMNS], ROWS * COLUMNS)
    assert start["extents"] == [[-3, 3], [-2, 2]] and start["run_uid"] == start["position_epoch"]
    assert start["scan_number"] == hutch.engine.md["scan_id"]
    metric = hutch.daemon.metric
    metric("ptycho_stream_positions_received_total", received + ROWS * COLUMNS)
    metric("ptycho_stream_positions_orphaned_total", 0)
    metric('ptycho_stream_messages_undecodable_total{reason="malformed"}', 0)


def test_pickled_documents_are_refused_and_the_next_run_is_recorded(hutch):
    before = len(Catalogue(hutch.daemon.data).scans())
    close = hutch.publish(pickle.dumps)  # what bluesky does unless told otherwise
    try:
        hutch.grid()
        refused = sealed(hutch, before + 1)[-1]
    finally:
        close()
    assert refused.state == "unmatched"
    documents = ROWS * COLUMNS + 3  # start, descriptor, events, stop
    bad = 'ptycho_stream_messages_undecodable_total{reason="malformed"}'
    hutch.daemon.metric(bad, documents)
    assert "documents come as pickle, which is never loaded here" in hutch.daemon.log
    assert "serializer=msgpack.packb" in hutch.daemon.log
    close = hutch.publish(SERIALIZERS["msgpack"])
    try:
        hutch.grid()
        check(hutch, sealed(hutch, before + 2)[-1])
    finally:
        close()
    hutch.daemon.metric(bad, documents)
    assert hutch.daemon.status()["stages"]["ingest"]["restarts"] == 0


def test_a_step_that_is_repeated_after_a_pause_shifts_no_frame(tmp_path):
    """The engine goes back to its last checkpoint: a frame more is taken than there are events."""
    from bluesky.utils import RunEngineInterrupted

    frames = ROWS * COLUMNS + 1
    numbered = tables(frame="eiger_counter", first_frame=1)
    with DaemonHarness(tmp_path, numbered, stages=("ingest",)) as daemon:
        hutch = Hutch(daemon, frames)
        with hutch.simulator:
            close = hutch.publish(SERIALIZERS["msgpack"])
            with pytest.raises(RunEngineInterrupted):
                hutch.grid(pause_after=8)
            assert hutch.detector.taken == 8
            hutch.engine.resume()
            (header,) = sealed(hutch, 1)
            close()
        assert hutch.stops == ["success"]
        assert header.counts["frames"] == frames
        assert (header.counts["positioned"], header.counts["unpositioned"]) == (frames - 1, 1)
        with Catalogue(daemon.data).open(header.scan_id) as reader:
            pairs = {int(pair["number"]): (pair["y_m"], pair["x_m"]) for pair in reader.pairs()}
        grid = grid_yx_m()
        taken = [number for number in range(frames) if number != 7]  # the step of frame 7 was lost
        assert pairs == dict(zip(taken, grid, strict=True))


def test_documents_come_through_bluesky_s_own_proxy(tmp_path):
    """As configs/lab-eiger-bluesky.toml has it, and its first lines tell the session to do."""
    from bluesky.callbacks.zmq import Publisher

    ins, outs = free_port(), free_port()
    detector = f"tcp://127.0.0.1:{free_port()}"
    daemon = DaemonHarness(
        tmp_path,
        tables_of("lab-eiger-bluesky", [detector], f"tcp://127.0.0.1:{outs}"),
        stages=("ingest",),
    )
    program = Path(sys.executable).with_name("bluesky-0MQ-proxy")
    assert program.is_file(), "it comes with bluesky"
    with ExitStack() as stack:
        proxy = stack.enter_context(subprocess.Popen([str(program), str(ins), str(outs)]))
        stack.callback(proxy.kill)
        stack.enter_context(daemon)
        hutch = Hutch(daemon)
        stack.enter_context(hutch.simulator)
        publisher = Publisher(f"127.0.0.1:{ins}", serializer=msgpack.packb)
        stack.callback(publisher.close)

        def through() -> int:
            """Whether the proxy passes on what is published: documents that concern nobody."""
            publisher("datum", {})
            return heard(daemon)

        wait_for(through, 30, "a document through the proxy")
        hutch.engine.subscribe(publisher)
        hutch.grid(sample="star")
        (first,) = sealed(hutch, 1)
        check(hutch, first)
        assert first.metadata["sample"] == "star" and first.metadata["beamline"] == "lab"
        hutch.grid(plan_name="align")  # none of those that the file wants
        second = sealed(hutch, 2)[-1]
        assert second.state == "unmatched" and second.counts["frames"] == ROWS * COLUMNS
        daemon.metric("ptycho_stream_positions_received_total", ROWS * COLUMNS)
