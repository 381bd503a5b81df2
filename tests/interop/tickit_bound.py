"""Runs tickit (in its own environment) with detectors that bind their sockets and do no more.

As it comes, tickit 0.4.3 binds a PUSH socket and also connects it to its own address.  That
connection comes to nothing, but for as long as it is tried, which is decided by chance, every other
message is dealt to it and never seen again.
"""

from __future__ import annotations

from typing import Any

import aiozmq
from tickit.cli import main

create_zmq_stream = aiozmq.create_zmq_stream


async def bound_stream(kind: int, *, bind: str, connect: str) -> Any:
    return await create_zmq_stream(kind, bind=bind)


aiozmq.create_zmq_stream = bound_stream
main()
