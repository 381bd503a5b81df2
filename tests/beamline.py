"""A beamline in miniature for tests of ingest: sockets that send what a test tells them to.

Frames of scan ``key`` are made by :func:`pixels`, so that what the store holds can be compared bit
by bit with what was sent, without keeping it.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence

import numpy as np
import zmq
from daemon_harness import DaemonHarness, wait_for
from numpy.typing import NDArray

from ptycho_stream.scans.catalogue import Catalogue
from ptycho_stream.scans.header import ScanHeader
from ptycho_stream.wire import DectrisV1Encoder, NativeEncoder

SHAPE = (64, 64)


def pixels(key: int, number: int, shape: tuple[int, int] = SHAPE) -> NDArray[np.uint16]:
    """Frame ``number`` of scan ``key``: noise that no other frame has."""
    return np.random.default_rng([key, number]).poisson(3.0, shape).astype(np.uint16)


def position(number: int) -> tuple[float, float]:
    """Of frame ``number``, metres: a raster of 20 columns."""
    return (number // 20) * 1e-6, (number % 20) * 1e-6


def positions(numbers: Iterable[int]) -> NDArray[np.float64]:
    """Of several frames (n, 2)."""
    return np.array([position(n) for n in numbers], np.float64).reshape(-1, 2)


class Beamline:
    """Binds a detector's PUSH and a positioner's PUSH; use as a context manager."""

    def __init__(self, detector_endpoint: str, positions_endpoint: str) -> None:
        self._context = zmq.Context()
        self.detector = self._bound(detector_endpoint)
        self.positioner = self._bound(positions_endpoint)

    def __enter__(self) -> Beamline:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def close(self) -> None:
        """Close without waiting for receivers."""
        self.detector.close(linger=0)
        self.positioner.close(linger=0)
        self._context.term()

    def _bound(self, endpoint: str) -> zmq.Socket[bytes]:
        socket = self._context.socket(zmq.PUSH)
        socket.setsockopt(zmq.SNDHWM, 10_000)
        socket.bind(endpoint)
        return socket

    def send(self, parts: Sequence[bytes]) -> None:
        """A message of the detector."""
        self.detector.send_multipart(parts)

    def send_positions(
        self,
        numbers: Sequence[int],
        series: str = "1",
        epoch: str = "e1",
        *,
        name_series: bool = True,
        end: bool = True,
    ) -> None:
        """A whole epoch of positions, in batches of 50."""
        encoder = NativeEncoder(series, epoch)
        self.positioner.send_multipart(encoder.positions_start(name_series=name_series))
        for at in range(0, len(numbers), 50):
            batch = numbers[at : at + 50]
            parts = encoder.positions(batch, positions(batch), name_series=name_series)
            self.positioner.send_multipart(parts)
        if end:
            self.positioner.send_multipart(encoder.positions_end())

    def native(self, series: str, key: int, numbers: Iterable[int], **start: object) -> None:
        """A whole scan in our dialect, without positions."""
        encoder = NativeEncoder(series, encoding="bslz4")
        numbers = list(numbers)
        self.send(encoder.scan_start(len(numbers), SHAPE, "<u2"))
        for number in numbers:
            self.send(encoder.frame(number, pixels(key, number)))
        self.send(encoder.scan_end())

    def dectris(
        self,
        series: int,
        key: int,
        numbers: Iterable[int],
        *,
        start: bool = True,
        end: bool = True,
        rate_hz: float = 0.0,
        encoding: str = "bs16-lz4<",
        expected: int | None = None,
    ) -> None:
        """A scan, or a piece of one, in the DECTRIS dialect."""
        encoder = DectrisV1Encoder(series, encoding)
        numbers = list(numbers)
        if start:
            config = {
                "nimages": expected or len(numbers),
                "ntrigger": 1,
                "trigger_mode": "ints",
                "x_pixels_in_detector": SHAPE[1],
                "y_pixels_in_detector": SHAPE[0],
                "bit_depth_image": 16,
            }
            self.send(encoder.start("basic", config))
        for number in numbers:
            self.send(encoder.frame(number, pixels(key, number)))
            if rate_hz:
                time.sleep(1 / rate_hz)
        if end:
            self.send(encoder.end())


def headers(catalogue: Catalogue) -> list[ScanHeader]:
    """All scans, oldest first."""
    return catalogue.scans()[::-1]


def sealed_headers(catalogue: Catalogue, count: int) -> list[ScanHeader] | None:
    """All scans if there are ``count`` and they are sealed, oldest first."""
    found = headers(catalogue)
    return found if len(found) == count and all(h.sealed for h in found) else None


def wait_sealed(daemon: DaemonHarness, count: int, timeout_s: float = 20.0) -> list[ScanHeader]:
    """The headers of so many scans once they are sealed, the newest last."""
    catalogue = Catalogue(daemon.data)
    try:
        return wait_for(lambda: sealed_headers(catalogue, count), timeout_s, f"{count} scans")
    except AssertionError as error:
        raise AssertionError(f"{error}\n{daemon.ingest()}\n{daemon.log}") from None


def check_scan(catalogue: Catalogue, scan_id: str, key: int, numbers: Iterable[int]) -> None:
    """Assert that a scan holds these frames bit by bit, each once, with their own positions."""
    with catalogue.open(scan_id) as reader:
        records = reader.records()
        assert sorted(records["number"].tolist()) == sorted(numbers)
        for slot, number in enumerate(records["number"].tolist()):
            np.testing.assert_array_equal(reader.frame(slot), pixels(key, number))
        for pair in reader.pairs():
            assert records["number"][pair["slot"]] == pair["number"]
            assert (pair["y_m"], pair["x_m"]) == position(int(pair["number"]))
