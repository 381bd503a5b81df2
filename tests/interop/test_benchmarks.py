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


def printed(program: str, *options: object) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, str(FOLDER / program), *map(str, options)],
        capture_output=True,
        text=True,
        timeout=170,
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
