"""The sockets of ingest: how much may wait in them."""

from __future__ import annotations

import pytest
import zmq
from daemon_harness import free_port

from ptycho_stream.settings import Settings
from ptycho_stream.wire.limits import WireLimits
from ptycho_streamd.security import Gate
from ptycho_streamd.sources import open_sources


@pytest.mark.parametrize(
    ("socket", "shape_yx", "messages"),
    [
        ("sub", (8192, 8192), 64),
        ("sub", (1000, 1000), 250),
        ("sub", (64, 64), 20_000),
        ("pull", (64, 64), 64),
    ],
)
def test_frames_that_wait_are_bounded_in_bytes_and_positions_in_number(
    socket, shape_yx, messages
) -> None:
    settings = Settings.model_validate(
        {
            "probe": {"path": "probe.npz"},
            "detector": {
                "endpoint": f"tcp://127.0.0.1:{free_port()}",
                "dialect": "native",
                "socket": socket,
                "queue_bytes": 1_000_000_000,
            },
            "positions": {"endpoint": f"tcp://127.0.0.1:{free_port()}", "socket": "sub"},
        }
    )
    gate = Gate()
    sources = open_sources(gate, settings, WireLimits(max_shape_yx_px=shape_yx))
    held = {source.name: source.socket.getsockopt(zmq.RCVHWM) for source in sources}
    for source in sources:
        source.close()
    gate.close()
    assert held == {"detector": messages, "positions": 20_000}
