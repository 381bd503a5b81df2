"""Makes the messages of a Bluesky run: what the simulated positioner and the tests send.

The format is read by :mod:`ptycho_stream.wire.bluesky`; documents hold what a RunEngine puts there
and a position stream needs, no more.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import msgspec

Serializer = Literal["msgpack", "json"]
_SERIALIZERS = {"msgpack": msgspec.msgpack.encode, "json": msgspec.json.encode}


class BlueskyEncoder:
    """The documents of one run with one stream of events; each method returns a message's parts.

    Args:
        units: of each field, by name; None where the device tells none.
        uid: of the run; a new one if None.
        serializer: how documents are written.
        prefix: that goes before them; without a space.
    """

    def __init__(
        self,
        units: Mapping[str, str | None],
        uid: str | None = None,
        serializer: Serializer = "msgpack",
        prefix: str = "",
    ) -> None:
        self.uid = uid or str(uuid.uuid4())
        self._units = dict(units)
        self._descriptor = str(uuid.uuid4())
        self._serialize = _SERIALIZERS[serializer]
        self._prefix = prefix.encode()
        self._events = 0

    def start(self, **metadata: Any) -> list[bytes]:
        """The run's start, with what it says of itself."""
        return self._message("start", {**metadata, "uid": self.uid, "time": time.time()})

    def descriptor(self, stream: str = "primary") -> list[bytes]:
        """What the events will hold."""
        keys: dict[str, dict[str, Any]] = {}
        for name, units in self._units.items():
            keys[name] = {"source": f"SIM:{name}", "dtype": "number", "shape": []}
            if units is not None:
                keys[name]["units"] = units
        return self._message(
            "descriptor",
            {
                "uid": self._descriptor,
                "run_start": self.uid,
                "name": stream,
                "data_keys": keys,
                "time": time.time(),
            },
        )

    def event(self, seq_num: int, data: Mapping[str, float]) -> list[bytes]:
        """One event; numbers begin at 1."""
        self._events += 1
        now_s = time.time()
        return self._message(
            "event",
            {
                "uid": str(uuid.uuid4()),
                "descriptor": self._descriptor,
                "seq_num": seq_num,
                "time": now_s,
                "data": dict(data),
                "timestamps": dict.fromkeys(data, now_s),
            },
        )

    def event_page(
        self, seq_num: Sequence[int], data: Mapping[str, Sequence[float]]
    ) -> list[bytes]:
        """Several events."""
        self._events += len(seq_num)
        times = [time.time()] * len(seq_num)
        return self._message(
            "event_page",
            {
                "uid": [str(uuid.uuid4()) for _ in seq_num],
                "descriptor": self._descriptor,
                "seq_num": list(seq_num),
                "time": times,
                "data": {name: list(values) for name, values in data.items()},
                "timestamps": dict.fromkeys(data, times),
            },
        )

    def stop(self, exit_status: str = "success") -> list[bytes]:
        """The run's end."""
        return self._message(
            "stop",
            {
                "uid": str(uuid.uuid4()),
                "run_start": self.uid,
                "exit_status": exit_status,
                "num_events": {"primary": self._events},
                "time": time.time(),
            },
        )

    def _message(self, name: str, document: Mapping[str, Any]) -> list[bytes]:
        return [b" ".join([self._prefix, name.encode(), self._serialize(document)])]
