"""Frames and positions find each other whatever happens to their messages on the way.

Decoders, state machine, join and store together, on a clock of their own; the seeds are the test.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from ingest_bench import IngestBench
from mangled_scans import KINDS, Story, check

from ptycho_stream.scans.header import ScanHeader

FEW, MANY = range(20), range(20, 200)
"""Seeds of each kind of positioner."""
LONG = (pytest.mark.long, pytest.mark.timeout(600))


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """In memory where that can be had: hundreds of scans are synced to it."""
    memory = Path("/dev/shm")
    if not os.access(memory, os.W_OK):
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(dir=memory) as name:
        yield Path(name)


@pytest.mark.parametrize("seeds", [FEW, pytest.param(MANY, marks=LONG)], ids=["few", "many"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_frame_that_has_both_is_exact_and_every_loss_is_counted(
    kind: str, seeds: range, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for seed in seeds:
        try:
            play(Story(kind, seed), folder / str(seed), monkeypatch)
        except AssertionError as error:
            raise AssertionError(f"{kind}, seed {seed}: {error}") from error
        shutil.rmtree(folder / str(seed))


def play(story: Story, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with IngestBench(monkeypatch, folder, story.tables, story.frames, story.positions) as bench:
        headers = {header.series: header for header in bench.run(idle_s=30)}
        compare(story, bench, headers)


def compare(story: Story, bench: IngestBench, headers: dict[str, ScanHeader]) -> None:
    assert len(headers) == len(story.scans) == len(bench.catalogue.scans())
    for scan in story.scans:
        check(bench.catalogue, headers[str(scan.series)], scan, story.options.dialect)

    frames = [number for scan in story.scans for number in scan.frames]
    doubled = len(frames) - sum(len(scan.stored) for scan in story.scans)
    assert bench.metric("ptycho_stream_frames_received_total") == len(frames)
    assert bench.metric("ptycho_stream_frames_duplicate_total") == doubled
    disorder = sum(scan.out_of_order for scan in story.scans)
    assert bench.metric("ptycho_stream_frames_out_of_order_total") == disorder
    received = sum(scan.positions for scan in story.scans)
    assert bench.metric("ptycho_stream_positions_received_total") == received
    stored = sum(header.counts["positions"] for header in headers.values())
    assert stored + bench.metric("ptycho_stream_positions_orphaned_total") == received
    torn = sum(scan.torn for scan in story.scans)
    undecodable = "ptycho_stream_messages_undecodable_total"
    assert bench.metric(undecodable, reason="torn") == torn
    assert not any(bench.metric(undecodable, reason=why) for why in ("malformed", "limit"))
