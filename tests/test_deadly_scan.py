"""A scan at which the reconstruct stage dies each time does not keep others from their images."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from daemon_harness import DaemonHarness, wait_for
from live_scan import FRAMES, line, simulated

from ptycho_stream.errors import StoreError
from ptycho_stream.scans import Catalogue
from ptycho_streamd.tries import MAX_TRIES, begin_try, end_tries

STAND_IN = Path(__file__).parent / "stand_in_crash"


def test_tries_are_counted_until_one_gets_further(tmp_path: Path) -> None:
    for _ in range(MAX_TRIES):
        begin_try(tmp_path)
    with pytest.raises(StoreError, match="died 5 times in a row"):
        begin_try(tmp_path)
    end_tries(tmp_path)
    begin_try(tmp_path)
    (tmp_path / "reconstruct.tries").write_text("no number")
    begin_try(tmp_path)


def test_tries_that_cannot_be_read_keep_no_scan_from_its_image(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "reconstruct.tries").mkdir()
    begin_try(tmp_path)
    assert "reconstruct.tries" in caplog.text


@pytest.mark.long
@pytest.mark.timeout(180)
def test_a_deadly_scan_is_left_alone_after_a_few_tries(tmp_path: Path) -> None:
    scan = simulated(seed=3)
    np.savez(tmp_path / "probe.npz", probe=scan.probe)
    path = os.pathsep.join([str(STAND_IN), os.environ.get("PYTHONPATH", "")])
    settings = {"detector": {"dialect": "dectris-v1"}, "supervisor": {"max_backoff_s": 0.5}}
    with DaemonHarness(tmp_path, settings, environment={"PYTHONPATH": path}) as daemon:
        with line(daemon) as beamline:
            beamline.play(scan, series=666)
            wait_for(lambda: "died 5 times in a row" in daemon.log, 120, "the end of the tries")
            deadly = Catalogue(daemon.data).latest()
            assert deadly is not None and deadly.counts["frames"] == FRAMES
            beamline.play(scan, series=7)
            final = beamline.results.wait_complete(after=deadly.scan_id, timeout_s=60)
        assert sorted(final.frame_numbers.tolist()) == list(range(FRAMES))
        stages = daemon.status()["stages"]
        assert stages["ingest"]["restarts"] == 0
        # Once more if the scan was opened before its first pair had come.
        assert MAX_TRIES <= stages["reconstruct"]["restarts"] <= MAX_TRIES + 1
