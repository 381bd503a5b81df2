"""A simulated detector and a simulated positioner: they stream a scan file as real ones would.

The demo, ``ptycho-stream replay`` and the tests drive the daemon with these.  The detector binds
PUSH like a DECTRIS detector, or PUB; frames come paced or as fast as they are taken, whole or with
every part as a message of its own, and a series can be left unfinished.
:mod:`ptycho_stream.simulate.pva_detector` has the one that is no ZeroMQ.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from types import TracebackType
from typing import Any, Final, Literal, Protocol, Self

import numpy as np
from numpy.typing import NDArray

from ptycho_stream.errors import SettingsError
from ptycho_stream.files.npz import ScanFile
from ptycho_stream.simulate.dectris_v2_series import DectrisV2Series
from ptycho_stream.simulate.outlet import Outlet, SocketKind
from ptycho_stream.simulate.position_series import PositionOptions, PositionSeries, position_series
from ptycho_stream.simulate.series import DectrisSeries, DetectorOptions, NativeSeries, Series
from ptycho_stream.simulate.series_json_blob import RUN_NAME, acquisition_id, json_blob_series

PositionTiming = Literal["before", "during", "after", "inline"]
PUBLISHERS: Final = ("psi", "slsdet", "odin")
"""Dialects whose detectors usually bind PUB; the others bind PUSH."""


class SimulatedDetector(Protocol):
    """What plays a scan's frames, over ZeroMQ or not."""

    @property
    def endpoint(self) -> str:
        """Where it is."""
        ...

    def series_name(self, series: int) -> str | None:
        """What a positioner would call this series; None: the detector names none."""
        ...

    def wait_for_receiver(self, timeout_s: float | None = None) -> None:
        """Return when somebody is there to receive."""
        ...

    def frames(
        self,
        scan: ScanFile,
        series: int = 1,
        stop_after: int | None = None,
        inline_positions: bool = False,
    ) -> Iterator[int]:
        """Stream a series, yielding each frame's index in the file once it is sent."""
        ...


class DetectorSimulator:
    """Streams scan files, one series after another, from one socket, or one for each module.

    Args:
        endpoint: to bind or connect; ``tcp://127.0.0.1:*`` binds any free port.  Where there are
            several modules it is that of the first one, and the others take the ports after it.
        options: of the detector.
        attach: ``bind`` as detectors do, or ``connect``.
        timeout_s: how long a receiver may be absent, or take nothing.
        kind: of its sockets; None: what detectors of the dialect usually have.

    Example::

        with DetectorSimulator("tcp://127.0.0.1:9999") as detector:
            detector.send_series(load_scan(Path("scan.npz")), series=1)
    """

    def __init__(
        self,
        endpoint: str = "tcp://127.0.0.1:*",
        options: DetectorOptions | None = None,
        attach: Literal["bind", "connect"] = "bind",
        timeout_s: float = 30.0,
        kind: SocketKind | None = None,
    ) -> None:
        self.options = options or DetectorOptions()
        kind = kind or ("pub" if self.options.dialect in PUBLISHERS else "push")
        rows, columns = self.options.modules_yx
        with ExitStack() as opened:
            self._outlets = [
                opened.enter_context(Outlet(place, kind, attach, timeout_s=timeout_s))
                for place in consecutive_endpoints(endpoint, rows * columns)
            ]
            self._opened = opened.pop_all()
        self.endpoints = tuple(outlet.endpoint for outlet in self._outlets)
        self.endpoint = self.endpoints[0]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._opened.__exit__(kind, error, trace)

    def series_name(self, series: int) -> str | None:
        """What a positioner would call this series; None: the detector names none."""
        match self.options.dialect:
            case "odin":
                return acquisition_id(series)
            case "slsdet":
                return f"{RUN_NAME}_{series}"
            case "stins" | "psi" | "pva":
                return None
            case _:
                return str(series)

    def wait_for_receiver(self, timeout_s: float | None = None) -> None:
        """Return when somebody is connected or subscribed, to each socket.

        Raises:
            EndpointError: nobody came in time.
        """
        for outlet in self._outlets:
            outlet.wait_for_receiver(timeout_s)

    def send_series(
        self,
        scan: ScanFile,
        series: int = 1,
        stop_after: int | None = None,
        inline_positions: bool = False,
    ) -> int:
        """Stream a whole series and return the number of frames sent; see :meth:`frames`."""
        return sum(1 for _ in self.frames(scan, series, stop_after, inline_positions))

    def frames(
        self,
        scan: ScanFile,
        series: int = 1,
        stop_after: int | None = None,
        inline_positions: bool = False,
    ) -> Iterator[int]:
        """Stream a series, yielding each frame's index in the file once it is sent.

        Args:
            scan: what to send.
            series: its number; real detectors begin again at 1 when they are switched on.
            stop_after: abort after so many frames: no series end is sent.
            inline_positions: put each frame's position into its message (native dialect only).

        Raises:
            EndpointError: nobody receives.
            SettingsError: the dialect cannot say it, such as inline positions in most.
        """
        streams = series_streams(scan, series, self.options, inline_positions)
        count = len(scan) if stop_after is None else min(stop_after, len(scan))
        self._send([stream.start() for stream in streams])
        for index in paced(count, self.options.rate_hz):
            self._send([stream.frame(index) for stream in streams])
            yield index
        if count == len(scan):
            self._send([stream.end() for stream in streams])

    def _send(self, messages: Sequence[list[bytes]]) -> None:
        """One message from each socket."""
        for outlet, parts in zip(self._outlets, messages, strict=True):
            if self.options.one_part_each:
                for part in parts:
                    outlet.send([part])
            elif parts:
                outlet.send(parts)


def series_streams(
    scan: ScanFile, series: int, options: DetectorOptions, inline_positions: bool = False
) -> list[Series]:
    """What each socket of a detector has to send of a series.

    Raises:
        SettingsError: the dialect cannot say it.
    """
    match options.dialect:
        case "native":
            return [NativeSeries(scan, series, options, inline_positions)]
        case "dectris-v1":
            return [DectrisSeries(scan, series, options, inline_positions)]
        case "dectris-v2":
            return [DectrisV2Series(scan, series, options, inline_positions)]
        case "stins" | "psi" | "slsdet" | "odin":
            return json_blob_series(scan, series, options, inline_positions)
        case "pva":
            raise SettingsError("PV Access has no ZeroMQ messages: use PvaDetectorSimulator")


def consecutive_endpoints(first: str, count: int) -> list[str]:
    """So many endpoints, on the ports from that of ``first`` on, or on any where it has none.

    Raises:
        SettingsError: several, and ``first`` is no tcp endpoint, or ports run out.
    """
    if count == 1 or first.endswith(":*"):
        return [first] * count
    host, _, port = first.rpartition(":")
    if not first.startswith("tcp://") or not port.isdecimal() or int(port) + count > 65_536:
        raise SettingsError(f"{first} has no {count} ports, one a module: write tcp://HOST:PORT")
    return [f"{host}:{int(port) + n}" for n in range(count)]


def paced(count: int, rate_hz: float | None) -> Iterator[int]:
    """0 to ``count`` - 1, each when its time has come; None: at once."""
    started_s = time.monotonic()
    for index in range(count):
        if rate_hz is not None:
            time.sleep(max(started_s + index / rate_hz - time.monotonic(), 0))
        yield index


class PositionSimulator:
    """Streams the positions of scan files, one epoch a scan, in the dialect of its options.

    PUSH by default: a PUB loses what it sends before its subscribers are there, which
    :meth:`wait_for_receiver` helps against.
    """

    def __init__(
        self,
        endpoint: str = "tcp://127.0.0.1:*",
        kind: SocketKind = "push",
        attach: Literal["bind", "connect"] = "bind",
        timeout_s: float = 30.0,
        options: PositionOptions | None = None,
    ) -> None:
        self._outlet = Outlet(endpoint, kind, attach, timeout_s=timeout_s)
        self.endpoint = self._outlet.endpoint
        self._options = options or PositionOptions()
        self._epoch: PositionSeries | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._outlet.close(linger=error is None)

    def wait_for_receiver(self, timeout_s: float | None = None) -> None:
        """Return when somebody is connected or subscribed.

        Raises:
            EndpointError: nobody came in time.
        """
        self._outlet.wait_for_receiver(timeout_s)

    def start(
        self,
        series: int | str | None,
        epoch: str | None = None,
        metadata: Mapping[str, Any] | None = None,
    ) -> None:
        """Begin an epoch, of a new unique name if None is given.

        It belongs to ``series``, the detector's name of it, or (None) to that of its time.
        """
        name = None if series is None else str(series)
        self._epoch = position_series(self._options, name, epoch, metadata or {})
        self._send(self._epoch.start())

    def send(self, numbers: NDArray[np.int64], position_yx_m: NDArray[np.float64]) -> None:
        """Send a batch of the epoch that was begun."""
        self._send(self._started().positions(numbers, position_yx_m))

    def end(self) -> None:
        """End the epoch."""
        self._send(self._started().end())

    def send_scan(self, scan: ScanFile, series: int | str | None = 1, batch: int = 50) -> None:
        """Stream all positions of ``scan`` as one epoch, ``batch`` a message."""
        self.start(series, metadata=scan.metadata)
        for first in range(0, len(scan), batch):
            part = slice(first, first + batch)
            self.send(scan.frame_numbers[part], scan.positions_yx_m[part])
        self.end()

    def _send(self, messages: Iterable[Sequence[bytes]]) -> None:
        for parts in messages:
            self._outlet.send(parts)

    def _started(self) -> PositionSeries:
        if self._epoch is None:
            raise SettingsError("no epoch of positions was begun: call start() first")
        return self._epoch


def play(
    scan: ScanFile,
    detector: SimulatedDetector,
    positions: PositionSimulator | None,
    timing: PositionTiming = "during",
    series: int = 1,
    stop_after: int | None = None,
    batch: int = 10,
    on_frame: Callable[[int], None] | None = None,
) -> int:
    """Stream one scan, frames and positions, and return the number of frames sent.

    Args:
        scan: what to send.
        detector: sends the frames.
        positions: sends the positions; not used where they are ``inline``.
        timing: when positions come, relative to the frames.
        series: number of the series.
        stop_after: abort after so many frames; neither the series nor a ``during`` epoch is ended.
        batch: positions a message.
        on_frame: called with the number of frames sent so far.

    Raises:
        EndpointError: nobody receives.
    """
    inline = timing == "inline"
    source = None if inline else positions
    name = detector.series_name(series)
    if source is not None and timing == "before":
        source.send_scan(scan, name, batch)
    if source is not None and timing == "during":
        source.start(name, metadata=scan.metadata)
    sent = 0
    for index in detector.frames(scan, series, stop_after, inline_positions=inline):
        sent = index + 1
        if source is not None and timing == "during" and sent % batch == 0:
            part = slice(sent - batch, sent)
            source.send(scan.frame_numbers[part], scan.positions_yx_m[part])
        if on_frame is not None:
            on_frame(sent)
    if source is not None and timing == "during":
        rest = slice(sent - sent % batch, sent)
        if sent % batch:
            source.send(scan.frame_numbers[rest], scan.positions_yx_m[rest])
        if sent == len(scan):
            source.end()
    if source is not None and timing == "after":
        source.send_scan(scan, name, batch)
    return sent
