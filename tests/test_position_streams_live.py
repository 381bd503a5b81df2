"""What :mod:`test_position_streams` does, through daemons of their own and real sockets."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from beamline import Beamline, sealed_headers
from daemon_harness import DaemonHarness, wait_for
from mangled_scans import Story, check

from ptycho_stream.scans.catalogue import Catalogue

pytestmark = pytest.mark.slow

STORIES = (("native", 1), ("panda-1", 1), ("panda-10", 1), ("bluesky-scale", 1))
PACE = 0.2
"""Seconds of a story are so long here: ends wait for a second that is a real one."""


def test_stories_through_a_daemon_end_as_they_should(tmp_path: Path) -> None:
    with ThreadPoolExecutor() as pool:
        told = [pool.submit(tell, tmp_path / kind, Story(kind, seed, 2)) for kind, seed in STORIES]
    for one in told:
        one.result()


def tell(folder: Path, story: Story) -> None:
    folder.mkdir()
    with (
        DaemonHarness(folder, tables_of(story), stages=("ingest",)) as daemon,
        Beamline(daemon.detector_endpoint, daemon.positions_endpoint) as line,
    ):
        messages = [(when, line.detector, parts) for when, parts in story.frames]
        messages += [(when, line.positioner, parts) for when, parts in story.positions]
        messages.sort(key=lambda one: one[0])
        wait_for(lambda: all(e["peers"] for e in daemon.ingest().get("endpoints", [{"peers": 0}])))
        before_s = messages[0][0]
        for when_s, socket, parts in messages:
            time.sleep((when_s - before_s) * PACE)
            before_s = when_s
            socket.send_multipart(parts)
        catalogue = Catalogue(daemon.data)
        try:
            found = wait_for(lambda: sealed_headers(catalogue, len(story.scans)), 30)
        except AssertionError as error:
            raise AssertionError(f"{error}\n{daemon.log}") from None
        headers = {header.series: header for header in found}
        for scan in story.scans:
            check(catalogue, headers[str(scan.series)], scan, story.options.dialect)
        received = sum(scan.positions for scan in story.scans)
        daemon.metric("ptycho_stream_positions_received_total", received)
        frames = sum(len(scan.frames) for scan in story.scans)
        daemon.metric("ptycho_stream_frames_received_total", frames)
        assert daemon.status()["stages"]["ingest"]["restarts"] == 0


def tables_of(story: Story) -> dict[str, dict[str, Any]]:
    """The story's settings as the harness takes them, with its own endpoints."""
    told = dict(story.tables["positions"])
    del told["endpoint"]
    dialect = story.options.dialect
    own = {} if dialect == "native" else {f"positions.{dialect}": told.pop(dialect)}
    return {"positions": {**told, "wait_s": 2.5}, "detector": {"silence_s": 2.0}, **own}
