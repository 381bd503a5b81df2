"""The sockets of ingest: how much may wait in them."""

from __future__ import annotations

import pytest
import zmq
from daemon_harness import free_port

from ptycho_stream.settings import DetectorSettings
from ptycho_stream.wire.limits import WireLimits
from ptycho_streamd.sources import Source


@pytest.mark.parametrize(
    ("socket", "shape_yx", "messages"),
    [
        ("sub", (8192, 8192), 64),
        ("sub", (1000, 1000), 250),
        ("sub", (64, 64), 20_000),
        ("pull", (64, 64), 64),
    ],
)
def test_what_waits_is_bounded_in_bytes(socket, shape_yx, messages) -> None:
    endpoint = f"tcp://127.0.0.1:{free_port()}"
    options = DetectorSettings(endpoint=endpoint, dialect="native", socket=socket)
    limits = WireLimits(max_shape_yx_px=shape_yx)
    context = zmq.Context()
    source = Source(context, "detector", endpoint, options, "native", limits, 1_000_000_000)
    assert source.socket.getsockopt(zmq.RCVHWM) == messages
    source.close()
    context.term()
