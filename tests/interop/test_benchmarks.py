"""The benchmarks as programs, small: they run to their end and print sensible figures.

No speed is asserted here, because other programs may share the machine.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = [pytest.mark.interop, pytest.mark.timeout(180)]
FOLDER = Path(__file__).parents[2] / "benchmarks"


def printed(program: str, *options: object, limit_s: float = 170) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, str(FOLDER / program), *map(str, options)],
        capture_output=True,
        text=True,
        timeout=limit_s,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("files", ["warm", "cold"])
def test_ingest(files: str, tmp_path: Path) -> None:
    options = ["--pairs", 1, "--frames", 3000, "--folder", tmp_path]
    figures = printed("ingest.py", *options, *(["--cold"] if files == "cold" else []))
    assert ("cold" in figures["files"]) == (files == "cold")
    assert figures["frames"] == 3000
    assert 1000 < figures["message_bytes"] < 128 * 128 * 2
    assert figures["bare_frames_per_s"] > 0
    assert figures["ingest_frames_per_s"] > 0
    ratio = figures["ingest_frames_per_s"] / figures["bare_frames_per_s"]
    assert figures["ratio"] == pytest.approx(ratio)
    assert not list(tmp_path.iterdir()), "it deletes what it wrote"


def test_viewer() -> None:
    figures = printed("viewer.py", "--pairs", 1, "--seconds", 5, "--rate", 40, "--json")
    (pair,) = figures["pairs"]
    assert pair["without"]["frames_per_s"] > 0 and pair["with"]["frames_per_s"] > 0
    assert pair["with"]["messages_per_s"] > 0 and pair["with"]["kB_per_s"] < 300
    ratio = pair["with"]["frames_per_s"] / pair["without"]["frames_per_s"]
    assert figures["ratio_median"] == pytest.approx(ratio, abs=0.01)


@pytest.mark.timeout(600)
def test_a_stopped_subscriber_and_slow_ones_go_on_with_the_newest_image() -> None:
    figures = printed("subscribers.py", "--pairs", 1, "--frames", 200, "--slow", 20, limit_s=580)
    assert figures["subscribers_that_went_on"] == 21
    # What is kept for each that is slow (results.queue_bytes) bounds what the daemon grows by.
    assert figures["memory_growth_mb"] < 21 * 64
    (pair,) = figures["pairs"]
    for rate in ("ingest_frames_per_s", "reconstruct_frames_per_s"):
        assert pair["without"][rate] > 0 and pair["with"][rate] > 0
    # What the subscribers cost the thread that predicts; the bar of 0.95 is for 50 of them, alone.
    assert figures["reconstruct_cpu_ratio_median"] > 0.8
    # Ten times what is asked for on a machine that nobody shares.
    assert figures["newest_image_after_s"]["most"] < 20


@pytest.mark.timeout(600)
def test_nothing_grows_in_three_minutes() -> None:
    figures = printed("soak.py", "--minutes", 3, "--frames", 100, "--json", limit_s=580)
    assert figures["scans"] >= 2
    for key, held in figures["growth"].items():
        before, after = held["second_third"], held["last_third"]
        if key.endswith("_memory_mb"):
            assert after - before < 20 + 0.1 * before, (key, held)
        elif key == "files":
            assert after - before <= 60, held  # one scan's more or less
        elif key.endswith("_restarts"):
            assert after == 0, (key, held)
        else:
            assert after - before <= 8, (key, held)


@pytest.mark.timeout(300)
def test_what_comes_too_fast_is_stored_and_seen_everywhere() -> None:
    figures = printed("overload.py", "--seconds", 6, limit_s=280)
    frames = figures["frames"]
    assert figures["counts"]["frames"] == figures["in_the_final_image"] == frames
    assert figures["counts"].get("missing", 0) == 0
    assert figures["backlog_at_the_last_frame"] > frames / 4, "it was not too fast"
    assert figures["area_seen"]["two seconds later"] > 0.99


def test_curve(tmp_path: Path) -> None:
    figures = printed("curve.py", "--pairs", 1, "--frames", 2000, "--folder", tmp_path)
    ratio = figures["keys_frames_per_s"] / figures["plain_frames_per_s"]
    assert figures["ratio"] == pytest.approx(ratio) and ratio > 0
    assert not list(tmp_path.iterdir()), "it deletes what it wrote"


def test_live() -> None:
    figures = printed("live.py", "--pairs", 1, "--frames", 200, "--long", 0)
    (pair,) = figures["pairs"]
    ratio = pair["live_frames_per_s"] / pair["bare_frames_per_s"]
    assert figures["live_over_bare_median"] == pytest.approx(ratio, abs=0.01)
    assert figures["half_capacity_frames_per_s"] == pytest.approx(
        pair["live_frames_per_s"] / 2, abs=0.1
    )
    assert figures["updates"] > 10
    assert 0 < figures["latency_p50_ms"] <= figures["latency_p99_ms"] < 60_000
    assert "memory" not in figures


def test_a_suite_is_kept_and_compared(tmp_path: Path) -> None:
    """One short program of it, against itself."""
    kept = tmp_path / "figures.json"
    suite = [sys.executable, str(FOLDER / "suite.py")]
    subprocess.run([*suite, "--only", "crop", "--out", str(kept)], check=True, timeout=170)
    figures = json.loads(kept.read_text())
    assert figures["machine"]["versions"]["torch"] and figures["crop"]["ratio"] > 0
    compared = subprocess.run(
        [*suite, "--compare", str(kept), str(kept)], capture_output=True, text=True, check=True
    ).stdout
    assert "crop.ratio" in compared and "1.00" in compared and "machine" not in compared
