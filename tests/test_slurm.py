"""The script for Slurm: it checks the settings and becomes the daemon. Slurm itself is not here."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from daemon_harness import DaemonHarness, wait_for

SCRIPT = Path(__file__).parents[1] / "configs" / "slurm.sh"


def started(config: Path, output: Path) -> subprocess.Popen[bytes]:
    """The script, as Slurm would start it."""
    programs = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    with output.open("wb") as out:
        return subprocess.Popen(
            ["bash", str(SCRIPT), str(config)],
            env={**os.environ, "PATH": programs},
            stdout=out,
            stderr=subprocess.STDOUT,
        )


@pytest.mark.slow
def test_the_daemon_runs_as_a_job_and_ends_in_order(tmp_path: Path) -> None:
    harness = DaemonHarness(tmp_path)
    with started(harness.config, tmp_path / "job.out") as job:
        try:
            wait_for(harness.is_well, 60, "the daemon")
            job.send_signal(signal.SIGTERM)
            assert job.wait(20) == 0, (tmp_path / "job.out").read_text()
        finally:
            job.kill()


def test_wrong_settings_end_the_job_before_it_begins(tmp_path: Path) -> None:
    (tmp_path / "daemon.toml").write_text("[data]\ndirectry = 'x'\n")
    with started(tmp_path / "daemon.toml", tmp_path / "job.out") as job:
        status = job.wait(60)
    assert status == 1, "that of `config check`; the daemon's would be 78"
    assert "directry" in (tmp_path / "job.out").read_text()
