"""A daemon's results without the daemon: images that grow, published from a thread or a process.

Tests of subscribers use :class:`Source` directly; ``python results_source.py PORT RESYNC_PORT
SCAN_ID`` publishes one growing image a scan until it is killed, for tests that stop or kill it.
"""

from __future__ import annotations

import sys
import threading
import time
from dataclasses import replace

import numpy as np
from daemon_harness import free_port

from ptycho_stream.results import ImageState, Tile
from ptycho_stream.settings import ResultSettings
from ptycho_streamd.publish import Publisher
from ptycho_streamd.security import Gate

TILE_PX = 32
PIXEL_M = (5e-9, 5e-9)
SCANS = [f"01JB{n:022d}" for n in range(20)]


def free_ports(count):
    return [free_port() for _ in range(count)]


def free_settings(**changes):
    ports = free_ports(2)
    return ResultSettings(
        endpoint=f"tcp://127.0.0.1:{ports[0]}",
        resync_endpoint=f"tcp://127.0.0.1:{ports[1]}",
        **changes,
    )


def tile(version, value, tile_px=TILE_PX):
    shape = (tile_px, tile_px)
    return Tile(
        version, np.full(shape, value * np.exp(0.5j), np.complex64), np.ones(shape, np.float32)
    )


def grown(step, scan_id=SCANS[0], tile_px=TILE_PX, tiles=4, **changes):
    """The image after ``step`` frames: each adds to one tile of a row that begins at (-1, -2)."""
    held = {}
    for number in range(step):
        key = (-1, number % tiles - 2)
        version = held[key].version + 1 if key in held else 1
        held[key] = tile(version, number + 1, tile_px)
    numbers = np.arange(step, dtype=np.int64)
    content = ImageState(
        scan_id=scan_id,
        state="running",
        generation=1,
        pixel_yx_m=PIXEL_M,
        tile_px=tile_px,
        tiles=held,
        frame_numbers=numbers,
        position_yx_m=np.stack([numbers * 1e-8, numbers * 2e-8], 1),
        probe=np.ones((2, 8, 8), np.complex64),
        model="test",
        counts={"committed": step, "reconstructed": step},
        metadata={"sample": "siemens star", "proposal": np.int64(7)},
    )
    return replace(content, **changes)


def same_picture(image, content):
    """Whether an image shows exactly what was published."""
    from ptycho_stream.results import stitch

    object_yx, weight_yx, _ = stitch(content.tiles, content.tile_px)
    return (
        image.scan_id == content.scan_id
        and image.state == content.state
        and np.array_equal(image.object_yx, object_yx, equal_nan=True)
        and np.array_equal(image.weight_yx, weight_yx)
        and np.array_equal(image.frame_numbers, content.frame_numbers)
        and np.array_equal(image.positions_yx_m, content.position_yx_m)
        and np.array_equal(image.probe, content.probe)
    )


class Source:
    """A publisher in a thread of its own, which serves all the time, as the daemon's loop does."""

    def __init__(self, settings=None, epoch="epoch", security=None):
        self.settings = settings or free_settings()
        self.endpoints = (self.settings.endpoint, self.settings.resync_endpoint)
        self._gate = Gate(security)
        self.publisher = Publisher(self._gate, self.settings, epoch)
        self._lock = threading.Lock()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def _serve(self):
        while not self._over.wait(0.005):
            with self._lock:
                self.publisher.serve()

    def publish(self, image):
        with self._lock:
            return self.publisher.publish(image)

    def lose(self, image):
        """Publish while every subscriber's connection drops the message."""
        with self._lock:
            send, self.publisher._send = self.publisher._send, lambda topic, parts: 0
            try:
                return self.publisher.publish(image)
            finally:
                self.publisher._send = send

    def wait_subscribers(self, count=1):
        end = time.monotonic() + 5
        while self.publisher.subscribers < count and time.monotonic() < end:
            time.sleep(0.005)
        assert self.publisher.subscribers == count

    def close(self):
        self._over.set()
        self._thread.join()
        self.publisher.close()
        self._gate.close()

    def __enter__(self):
        return self

    def __exit__(self, *exc_info):
        self.close()


def main(port, resync_port, scan_id, interval_s=0.02, tile_px=TILE_PX):
    """Publish an image that grows by a frame each interval, until killed."""
    settings = ResultSettings(
        endpoint=f"tcp://127.0.0.1:{port}", resync_endpoint=f"tcp://127.0.0.1:{resync_port}"
    )
    with Source(settings) as source:
        print("ready", flush=True)
        step = 0
        while True:
            step += 1
            source.publish(grown(step, scan_id, tile_px))
            time.sleep(interval_s)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
