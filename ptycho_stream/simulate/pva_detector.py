"""A simulated areaDetector driver: a PV Access server whose channel is an NTNDArray.

Used by ``ptycho-stream replay --dialect pva`` and by tests; needs the extra ``[pva]``.  Channels
have no beginning: a client gets the newest array and then what follows, and one that is slow loses
arrays without a word, as at a real server.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from threading import Event
from types import TracebackType
from typing import Any, Final, Self

import numpy as np
from numpy.typing import NDArray

from ptycho_stream.errors import EndpointError, SettingsError
from ptycho_stream.files.npz import ScanFile
from ptycho_stream.settings import PVA_SCHEME
from ptycho_stream.simulate.detector import paced
from ptycho_stream.simulate.series import DetectorOptions, masked_pixels
from ptycho_stream.wire.compression import encode
from ptycho_stream.wire.pva import CODECS, SCALAR_TYPES
from ptycho_stream.wire.pva_library import pva_module

DEFAULT_SERVER: Final = "127.0.0.1:5075"
POSITION_ATTRIBUTES_YX: Final = ("SampleY", "SampleX")
"""Attributes with the positions, in metres."""
SUBSCRIBING_S: Final = 0.5
"""The server tells when a channel is opened, not when somebody subscribes to it just after."""


class PvaDetectorSimulator:
    """Publishes scan files, one acquisition after another; ``uniqueId`` begins with 1 in each.

    Args:
        endpoint: ``pva://CHANNEL``.
        options: of the detector; they need a rate, for nobody slows a channel down.
        server: address and port to listen at; port 0: any free one, see :attr:`server`.
        acquire_channel: of another channel, which is 1 while the detector acquires; None: none.
        timeout_s: how long a client may be absent.

    Raises:
        SettingsError: the library is not installed, or the options do not suit.
        EndpointError: it cannot listen there.
    """

    def __init__(
        self,
        endpoint: str,
        options: DetectorOptions,
        server: str = DEFAULT_SERVER,
        acquire_channel: str | None = None,
        timeout_s: float = 30.0,
    ) -> None:
        if options.dialect != "pva" or options.rate_hz is None:
            raise SettingsError(
                "a simulated PV Access detector needs a rate (--rate): nobody slows it down"
            )
        if not endpoint.startswith(PVA_SCHEME):
            raise SettingsError(f"{endpoint} names no channel: write {PVA_SCHEME}CHANNEL")
        self.options = options
        self.endpoint = endpoint
        self._timeout_s = timeout_s
        self._visited = Event()
        nt, raw = pva_module("nt"), pva_module("server.raw")
        self._array = nt.NTNDArray()
        self._images = raw.SharedPV(handler=_Visitors(self._visited), initial=self._value({}))
        channels = {endpoint.removeprefix(PVA_SCHEME): self._images}
        self._acquire: Any = None
        if acquire_channel is not None:
            self._acquire = raw.SharedPV(nt=nt.NTScalar("i"), initial=0)
            channels[acquire_channel] = self._acquire
        with ExitStack() as opened:
            self.server = _listen(opened, channels, server)
            self._opened = opened.pop_all()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._opened.close()

    def series_name(self, series: int) -> str | None:
        """None: only with ``pva.series_attribute`` would a daemon know the number."""
        return None

    def wait_for_receiver(self, timeout_s: float | None = None) -> None:
        """Return when somebody has opened the channel and has had time to subscribe.

        Raises:
            EndpointError: nobody came in time.
        """
        limit_s = self._timeout_s if timeout_s is None else timeout_s
        if not self._visited.wait(limit_s):
            raise EndpointError(
                f"nobody opened {self.endpoint} at {self.server} within {limit_s:g} s: start the "
                f"daemon, or correct its settings (endpoint, pva.servers = ['{self.server}'])"
            )
        time.sleep(SUBSCRIBING_S)

    def frames(
        self,
        scan: ScanFile,
        series: int = 1,
        stop_after: int | None = None,
        inline_positions: bool = False,
    ) -> Iterator[int]:
        """Publish an acquisition, yielding each frame's index in the file once it is sent.

        Args:
            scan: what to send.
            series: its number, an attribute of each array.
            stop_after: abort after so many frames; the acquire channel stays 1.
            inline_positions: each frame's position is among its array's attributes.
        """
        count = len(scan) if stop_after is None else min(stop_after, len(scan))
        self._acquiring(1)
        for index in paced(count, self.options.rate_hz):
            attributes: dict[str, float | int] = {"Series": series}
            if inline_positions:
                y_m, x_m = scan.positions_yx_m[index]
                attributes |= dict(
                    zip(POSITION_ATTRIBUTES_YX, (float(y_m), float(x_m)), strict=True)
                )
            fields = self._fields(masked_pixels(scan, index))
            fields["uniqueId"] = int(scan.frame_numbers[index]) + 1
            fields["attribute"] = [
                {"name": name, "value": value} for name, value in attributes.items()
            ]
            self._images.post(self._value(fields))
            yield index
        if count == len(scan):
            self._acquiring(0)

    def _acquiring(self, value: int) -> None:
        if self._acquire is not None:
            self._acquire.post(value)

    def _fields(self, pixels: NDArray[np.generic]) -> dict[str, Any]:
        """Of an image (y, x), as the driver or its codec plugin sends it."""
        encoding = self.options.encoding or "raw"
        dtype = pixels.dtype.newbyteorder("=")
        fields: dict[str, Any] = {
            "dimension": [{"size": n, "fullSize": n, "binning": 1} for n in pixels.shape[::-1]],
            "uncompressedSize": pixels.nbytes,
        }
        if encoding == "raw":
            member = self._array._code2u[dtype.char]  # noqa: SLF001 - the type's own names
            return fields | {"value": (member, pixels.ravel()), "compressedSize": pixels.nbytes}
        blob = np.frombuffer(encode(pixels, encoding), np.uint8)
        codec = next(name for name, known in CODECS.items() if known == encoding)
        number = next(n for n, name in SCALAR_TYPES.items() if n > 4 and np.dtype(name) == dtype)
        return fields | {
            "value": ("ubyteValue", blob),
            "codec": {"name": codec, "parameters": number},
            "compressedSize": len(blob),
        }

    def _value(self, fields: Mapping[str, Any]) -> Any:
        now_ns = time.time_ns()
        stamp = {"secondsPastEpoch": now_ns // 10**9, "nanoseconds": now_ns % 10**9}
        array = self._array
        return array.Value(array.type, {"dataTimeStamp": stamp, "timeStamp": stamp, **fields})


class _Visitors:
    """What the server calls when a channel is opened."""

    def __init__(self, visited: Event) -> None:
        self._visited = visited

    def onFirstConnect(self, pv: object) -> None:  # noqa: N802 - the library's name
        self._visited.set()

    def onLastDisconnect(self, pv: object) -> None:  # noqa: N802
        self._visited.clear()


def _listen(opened: ExitStack, channels: Mapping[str, Any], server: str) -> str:
    """Serve ``channels`` until ``opened`` is closed; the address and port."""
    host, _, port = server.rpartition(":")
    if not host or not port.isdecimal():
        raise SettingsError(f"{server} is no address of a server: write HOST:PORT")
    configuration = {
        "EPICS_PVAS_INTF_ADDR_LIST": host,
        "EPICS_PVAS_SERVER_PORT": port,
        "EPICS_PVAS_BROADCAST_PORT": "0",
        "EPICS_PVAS_AUTO_BEACON_ADDR_LIST": "NO",
        "EPICS_PVAS_BEACON_ADDR_LIST": "",
    }
    for pv in channels.values():
        opened.callback(pv.close, destroy=True)
    try:
        serving = pva_module("server").Server([channels], conf=configuration, useenv=False)
    except RuntimeError as error:
        raise EndpointError(f"cannot listen at {server} for PV Access: {error}") from error
    opened.callback(serving.stop)
    bound = serving.conf()["EPICS_PVAS_SERVER_PORT"]
    if port not in ("0", bound):
        raise EndpointError(
            f"port {port} of {host} is taken: stop the program that uses it, or listen elsewhere"
        )
    return f"{host}:{bound}"
