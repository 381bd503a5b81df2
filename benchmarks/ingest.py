"""How fast ingest takes frames, beside a bare receive-and-decode loop in the same run.

Frames of 128 x 128 uint16, ``bs16-lz4<``, come over TCP from a sender on another core.  Bare:
receive, decode, forget, with ingest's own decoder.  Ingest: the stage's process as the daemon runs
it, with positions joined, commits and a sync every 100 ms.  They alternate; the median of the
pairs' ratios is the figure.  Without ``--cold`` a first scan makes the files that the next use.
``--peer`` adds LiberTEM's receiver (libertem-dectris, from PyPI), which receives into shared memory
and decodes, and neither stores nor joins.

    python benchmarks/ingest.py --pairs 5 --frames 30000
    python benchmarks/ingest.py --pairs 3 --frames 30000 --cold
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import zmq

from ptycho_stream.keys import ClientKeys
from ptycho_stream.messages import Frame
from ptycho_stream.scans.catalogue import Catalogue
from ptycho_stream.scans.folders import scan_directory
from ptycho_stream.scans.spare import SpareFiles
from ptycho_stream.wire import DectrisV1Decoder, DectrisV1Encoder, NativeEncoder
from ptycho_stream.wire.compression import decode
from ptycho_streamd.bus import BUS_VARIABLE, SUPERVISOR_VARIABLE, Bus, Stop

SHAPE = (128, 128)
DIFFERENT = 256
ARMED_S = 1.5
LIMIT_S = 120.0


def simulated_frames() -> list[np.ndarray]:
    """Poisson frames of a focused probe: about 4e5 photons, most of them near the centre."""
    y, x = np.indices(SHAPE) - 63.5
    mean = np.exp(-np.hypot(y, x) / 9.0) + 2e-5
    mean *= 4e5 / mean.sum()
    rng = np.random.default_rng(1)
    return [rng.poisson(mean).astype(np.uint16) for _ in range(DIFFERENT)]


def send(
    frames_endpoint: str,
    positions_endpoint: str,
    core: int,
    commands: Connection,
    keys: ClientKeys | None,
) -> None:
    """The sender's process: for each number of frames that it is told, one series.

    It binds, as a detector does; with ``keys`` it shows them and connects.
    """
    os.sched_setaffinity(0, {core})
    encoded = [DectrisV1Encoder(1).frame(0, pixels) for pixels in simulated_frames()]
    context = zmq.Context()
    detector, positioner = context.socket(zmq.PUSH), context.socket(zmq.PUSH)
    for out, endpoint in ((detector, frames_endpoint), (positioner, positions_endpoint)):
        if keys is None:
            out.bind(endpoint)
        else:
            keys.show(out)
            out.connect(endpoint)
    commands.send(sum(map(len, encoded[0])))
    series = 0
    while frames := commands.recv():
        count, wait_s, with_positions = frames
        series += 1
        head = {"nimages": count, "ntrigger": 1, "trigger_mode": "ints", "bit_depth_image": 16}
        head |= {"x_pixels_in_detector": SHAPE[1], "y_pixels_in_detector": SHAPE[0]}
        # What LiberTEM asks for besides.
        head |= {"count_time": 1e-4, "frame_time": 1e-4, "compression": "bslz4", "wavelength": 1.0}
        head |= {"beam_center_x": 64.0, "beam_center_y": 64.0, "description": "benchmark"}
        head |= {"detector_distance": 1.0, "x_pixel_size": 75e-6, "y_pixel_size": 75e-6}
        encoder = DectrisV1Encoder(series)
        detector.send_multipart(encoder.start("basic", head))
        if with_positions:
            native = NativeEncoder(str(series), f"epoch-{series}")
            positioner.send_multipart(native.positions_start())
            for at in range(0, count, 1000):
                numbers = np.arange(at, min(at + 1000, count))
                where = np.stack([numbers // 200, numbers % 200], axis=1) * 1e-7
                positioner.send_multipart(native.positions(numbers, where))
            positioner.send_multipart(native.positions_end())
        time.sleep(wait_s)
        for number in range(count):
            _, array, blob, times = encoded[number % DIFFERENT]
            first = b'{"htype":"dimage-1.0","series":%d,"frame":%d,"hash":"0"}' % (series, number)
            detector.send_multipart([first, array, blob, times], copy=False)
        detector.send_multipart(encoder.end())
        commands.send(series)
    context.destroy(linger=0)


def receive_bare(endpoint: str, frames: int) -> float:
    """Receive and decode one series; frames/s from the first to the last."""
    decoder = DectrisV1Decoder()
    out = np.zeros((64, *SHAPE), np.uint16)
    buffers = list(out)
    context = zmq.Context()
    socket_ = context.socket(zmq.PULL)
    socket_.setsockopt(zmq.RCVHWM, 64)
    socket_.connect(endpoint)
    taken, first_ns = 0, 0
    while taken < frames:
        for message in decoder.receive(socket_.recv_multipart()):
            if isinstance(message, Frame):
                first_ns = first_ns or time.monotonic_ns()
                decode(message.image, buffers[taken % 64])
                taken += 1
    rate = (frames - 1) * 1e9 / (time.monotonic_ns() - first_ns)
    context.destroy(linger=0)
    return rate


def receive_by_libertem(endpoint: str, frames: int) -> float:
    """The same with LiberTEM's receiver, in batches that it decodes as one."""
    import libertem_dectris

    batch = 64
    out = np.empty((batch, *SHAPE), np.uint16)
    with tempfile.TemporaryDirectory() as folder:
        connection = libertem_dectris.DectrisConnection(
            endpoint,
            8,
            f"{folder}/shm.sock",
            num_slots=4000,
            bytes_per_frame=out[0].nbytes,
            huge=False,
        )
        connection.start_passive()
        connection.wait_for_arm(timeout=LIMIT_S)
        client = libertem_dectris.CamClient(connection.get_socket_path())
        taken, counted, first_ns = 0, 0, 0
        while taken < frames:
            stack = connection.get_next_stack(batch)
            length = len(stack)
            client.decode_range_into_buffer(stack, out[:length], 0, length)
            client.done(stack)
            taken += length
            counted += length if first_ns else 0
            first_ns = first_ns or time.monotonic_ns()
        rate = counted * 1e9 / (time.monotonic_ns() - first_ns)
        client.close()
        connection.close()
    return rate


RECEIVERS = {"bare": receive_bare, "libertem": receive_by_libertem}


class Bench:
    """Sender, receivers and the folder of one run; ``keys`` adds to the settings and is shown."""

    def __init__(
        self,
        options: argparse.Namespace,
        keys: Callable[[Path], tuple[ClientKeys, str]] | None = None,
    ) -> None:
        self.options = options
        self.cores = sorted(os.sched_getaffinity(0))
        folder = options.folder
        self.folder = Path(tempfile.mkdtemp(prefix="ptycho-stream-bench-", dir=folder))
        self.root = self.folder / "data"
        self.frames_endpoint, self.positions_endpoint = _endpoint(), _endpoint()
        self.commands, theirs = multiprocessing.Pipe()
        shown, security = (None, "") if keys is None else keys(self.folder)
        arguments = (self.frames_endpoint, self.positions_endpoint, self.cores[-1], theirs, shown)
        spawn = multiprocessing.get_context("spawn")
        self.sender = spawn.Process(target=send, args=arguments, daemon=True)
        self.sender.start()
        self.message_bytes: int = self.commands.recv()
        self.config = self.folder / "bench.toml"
        attach = "connect" if shown is None else "bind"
        self.config.write_text(
            'log_level = "error"\n'
            f'[data]\ndirectory = "data"\nretention_bytes = {10**12}\nmin_free_bytes = 0\n'
            f'[probe]\npath = "probe.npz"\n{security}'
            f'[detector]\nendpoint = "{self.frames_endpoint}"\nattach = "{attach}"\n'
            f'[positions]\nsource = "native"\nsocket = "pull"\n'
            f'endpoint = "{self.positions_endpoint}"\nattach = "{attach}"\n'
        )

    def close(self) -> None:
        """End the sender and delete the folder."""
        self.commands.send(None)
        self.sender.join()
        shutil.rmtree(self.folder)

    def receive(self, receiver: str) -> float:
        """Frames/s of one of ``RECEIVERS``, in a process of its own on the first core."""
        frames = self.options.frames
        command = [sys.executable, __file__, "--receive", receiver, self.frames_endpoint]
        process = self._on_first_core([*command, "--frames", str(frames)], {})
        self.commands.send((frames, 0.5, False))
        out, _ = process.communicate(timeout=LIMIT_S)
        self.commands.recv()
        return float(out)

    def ingest(self) -> dict[str, float]:
        """Figures of the ingest stage, in a process of its own on the first core."""
        frames = self.options.frames
        context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        bus = Bus(context)
        command = [sys.executable, "-m", "ptycho_streamd.ingest", "--config", str(self.config)]
        environment = {BUS_VARIABLE: bus.endpoint, SUPERVISOR_VARIABLE: str(os.getpid())}
        process = self._on_first_core(command, environment)
        try:
            bus.socket.poll(10_000)
            self.commands.send((frames, 0.0 if self.options.cold else ARMED_S, True))
            self.commands.recv()
            scan_id = self._sealed(bus)
            bus.send("ingest", process.pid, Stop())
            process.wait(10)
        finally:
            process.kill()
            process.wait()
            bus.close()
            context.term()
        figures = self._figures(scan_id)
        self._retire(scan_id)
        return figures

    def _sealed(self, bus: Bus) -> str:
        catalogue = Catalogue(self.root)
        until_s = time.monotonic() + LIMIT_S
        while time.monotonic() < until_s:
            bus.receive()
            newest = catalogue.latest() if catalogue.changed() else None
            if newest is not None and newest.sealed:
                if newest.state != "complete" or newest.counts["frames"] != self.options.frames:
                    raise SystemExit(f"the scan is {newest.state}: {newest.reason} {newest.counts}")
                return newest.scan_id
            time.sleep(0.05)
        raise SystemExit("the scan was not sealed in time")

    def _figures(self, scan_id: str) -> dict[str, float]:
        with Catalogue(self.root).open(scan_id) as reader:
            received = reader.records()["received_monotonic_ns"]
            pairs = reader.pair_count
        if pairs != self.options.frames:
            raise SystemExit(f"{pairs} pairs of {self.options.frames} frames")
        return {"frames_per_s": (len(received) - 1) * 1e9 / float(received[-1] - received[0])}

    def _retire(self, scan_id: str) -> None:
        """Keep the scan's files for the next one as the daemon's retention does; or delete them."""
        directory = scan_directory(self.root, scan_id)
        if not self.options.cold:
            spare = SpareFiles(self.root)
            for path in directory.glob("frames-*.bin"):
                spare.put(path)
        shutil.rmtree(directory)
        if self.options.cold:
            shutil.rmtree(self.root)

    def _on_first_core(
        self, command: list[str], environment: dict[str, str]
    ) -> subprocess.Popen[str]:
        os.sched_setaffinity(0, {self.cores[0]})
        try:
            return subprocess.Popen(
                command,
                env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
                stdout=subprocess.PIPE,
                text=True,
            )
        finally:
            os.sched_setaffinity(0, set(self.cores))


def _endpoint() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"tcp://127.0.0.1:{probe.getsockname()[1]}"


def main() -> int:
    """The program; returns its exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--frames", type=int, default=30_000)
    parser.add_argument("--cold", action="store_true", help="new files, not touched ahead of time")
    parser.add_argument("--folder", type=Path, help="where the scans are written (deleted)")
    parser.add_argument("--peer", action="store_true", help="LiberTEM's receiver too")
    parser.add_argument("--receive", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.receive:
        receiver, endpoint = options.receive
        print(RECEIVERS[receiver](endpoint, options.frames))
        return 0
    bench = Bench(options)
    bare: list[float] = []
    ingest: list[float] = []
    peer: list[float] = []
    print(f"{'pair':>4} {'bare/s':>9} {'ingest/s':>9} {'ratio':>6}", file=sys.stderr)
    try:
        if not options.cold:
            bench.ingest()  # makes the files that the next ones use again
        for pair in range(options.pairs):
            bare.append(bench.receive("bare"))
            ingest.append(bench.ingest()["frames_per_s"])
            if options.peer:
                peer.append(bench.receive("libertem"))
            ratio = ingest[-1] / bare[-1]
            print(f"{pair:4} {bare[-1]:9.0f} {ingest[-1]:9.0f} {ratio:6.2f}", file=sys.stderr)
    finally:
        bench.close()
    result = {
        "files": "cold" if options.cold else "reused and touched ahead",
        "frames": options.frames,
        "message_bytes": bench.message_bytes,
        "bare_frames_per_s": statistics.median(bare),
        "ingest_frames_per_s": statistics.median(ingest),
        "ratio": statistics.median(i / b for i, b in zip(ingest, bare, strict=True)),
    }
    if peer:
        result["libertem_frames_per_s"] = statistics.median(peer)
        result["ratio_to_libertem"] = statistics.median(
            ours / theirs for ours, theirs in zip(ingest, peer, strict=True)
        )
    print(json.dumps(result, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
