"""The script for Slurm: it checks the settings, runs the daemon, and passes its end on.

Slurm is not here: a stand-in for ``srun`` runs what it is told.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import urllib.request
from contextlib import suppress
from pathlib import Path

import pytest
from daemon_harness import DaemonHarness, wait_for

SCRIPT = Path(__file__).parents[1] / "configs" / "slurm.sh"


def started(config: Path, folder: Path) -> subprocess.Popen[str]:
    """The script, with a stand-in for srun on the path."""
    srun = folder / "srun"
    srun.write_text('#!/bin/bash\n[[ $1 == --cpu-bind=none ]] || exit 64\nexec "${@:2}"\n')
    srun.chmod(0o755)
    programs = os.pathsep.join([str(folder), str(Path(sys.executable).parent), os.environ["PATH"]])
    return subprocess.Popen(
        ["bash", str(SCRIPT), str(config)],
        env={**os.environ, "PATH": programs},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.mark.slow
def test_the_daemon_runs_as_a_job_and_ends_in_order(tmp_path: Path) -> None:
    harness = DaemonHarness(tmp_path)

    def ready() -> bool:
        with suppress(OSError), urllib.request.urlopen(harness.url("/healthz"), timeout=5) as page:
            return page.status == 200
        return False

    with started(harness.config, tmp_path) as job:
        try:
            wait_for(ready, 60, "the daemon")
            job.send_signal(signal.SIGTERM)
            assert job.wait(20) == 0, job.communicate()[0]
        finally:
            job.kill()


def test_wrong_settings_end_the_job_before_it_begins(tmp_path: Path) -> None:
    (tmp_path / "daemon.toml").write_text("[data]\ndirectry = 'x'\n")
    with started(tmp_path / "daemon.toml", tmp_path) as job:
        said, _ = job.communicate(timeout=60)
    assert job.returncode not in (0, 64)
    assert "directry" in said
