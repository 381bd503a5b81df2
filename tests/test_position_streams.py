"""Frames and positions find each other whatever happens to their messages on the way.

Decoders, state machine, join and store together, on a clock of their own; the seeds are the test.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from ingest_bench import IngestBench
from mangled_scans import KINDS, Mangled, Story, pixels

from ptycho_stream.scans.catalogue import Catalogue
from ptycho_stream.scans.header import ScanHeader

SEEDS = 60
"""Of each kind of positioner."""


@pytest.mark.parametrize("kind", KINDS)
def test_every_frame_that_has_both_is_exact_and_every_loss_is_counted(kind, tmp_path, monkeypatch):
    for seed in range(SEEDS):
        story, folder = Story(kind, seed), tmp_path / str(seed)
        try:
            play(story, folder, monkeypatch)
        except AssertionError as error:
            raise AssertionError(f"{kind}, seed {seed}: {error}") from error
        shutil.rmtree(folder)


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


def check(catalogue: Catalogue, header: ScanHeader, scan: Mangled, dialect: str) -> None:
    both = scan.stored & scan.position_yx_m.keys()
    state = "complete" if scan.end else "interrupted"
    assert header.state == ("unmatched" if scan.end and not both else state), header.reason
    assert header.joined_late == (not scan.header)
    counts = header.counts
    assert counts["frames"] == len(scan.stored)
    assert counts["duplicate"] == len(scan.frames) - len(scan.stored)
    assert counts["out_of_order"] == scan.out_of_order
    assert counts["missing"] == scan.missing
    assert counts["positioned"] == len(both)
    assert counts["unpositioned"] == len(scan.stored) - len(both)
    if dialect == "panda":
        assert ("panda_arm_time" in header.metadata) == (scan.told and bool(both))
    else:
        sample = f"sample {scan.series}" if scan.told and both else None
        assert header.metadata.get("sample") == sample
    with catalogue.open(header.scan_id) as reader:
        numbers = reader.records()["number"].tolist()
        assert len(numbers) == len(scan.stored) and set(numbers) == scan.stored
        for slot, number in enumerate(numbers):
            np.testing.assert_array_equal(reader.frame(slot), pixels(scan.series, number))
        pairs = {int(pair["number"]): pair for pair in reader.pairs()}
    assert pairs.keys() == both
    for number, pair in pairs.items():
        assert (pair["y_m"], pair["x_m"]) == scan.position_yx_m[number], number
        assert numbers[pair["slot"]] == number
        assert pair["revision"] == pair["flags"] == 0
