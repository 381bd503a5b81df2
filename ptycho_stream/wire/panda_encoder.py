"""Makes PandA's messages: what the simulated positioner and the tests send.

The format is read by :mod:`ptycho_stream.wire.panda`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec
import numpy as np
from numpy.typing import ArrayLike

_encode = msgspec.json.Encoder().encode


class PandaEncoder:
    """The messages of one run, from arming to stop; each method returns one message's parts."""

    def __init__(self, arm_time: str) -> None:
        self.arm_time = arm_time
        self._emitted = 0

    def start(self, **more: Any) -> list[bytes]:
        """PandA is armed; ``more`` goes into the message as it is."""
        return [_encode({"msg_type": "start", "arm_time": self.arm_time, **more})]

    def data(self, first_sample: int, datasets: Mapping[str, ArrayLike]) -> list[bytes]:
        """Samples (n,) of each dataset by name, the first of which has this absolute number."""
        told: dict[str, Any] = {}
        for name, values in datasets.items():
            data = np.asarray(values, np.float64).tolist()
            told[name] = {
                "dtype": "float64",
                "size": len(data),
                "starting_sample_number": first_sample,
                "data": data,
            }
        number, self._emitted = self._emitted, self._emitted + 1
        return [_encode({"msg_type": "data", "frame_number": number, "datasets": told})]

    def stop(self) -> list[bytes]:
        """PandA is disarmed; says how many data messages there were."""
        return [_encode({"msg_type": "stop", "emitted_frames": self._emitted})]
