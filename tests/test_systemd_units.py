"""The systemd files: sound, and as closed as the daemon's work allows, with and without a GPU."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[1] / "systemd"
UNIT = "ptycho-streamd.service"
MOST_EXPOSED = 2.0


def run(program: str, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    path = shutil.which(program)
    if path is None:
        pytest.skip(f"{program} is not installed: it is part of systemd")
    return subprocess.run(
        [path, *map(str, arguments)], capture_output=True, text=True, timeout=50, check=False
    )


@pytest.fixture(params=["cpu", "gpu"])
def unit(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """The unit as it is installed, once with the drop-in for GPUs."""
    shutil.copy(FOLDER / UNIT, tmp_path)
    if request.param == "gpu":
        (tmp_path / f"{UNIT}.d").mkdir()
        shutil.copy(FOLDER / "ptycho-streamd-gpu.conf", tmp_path / f"{UNIT}.d" / "gpu.conf")
    return tmp_path / UNIT


def test_systemd_finds_no_fault(unit: Path) -> None:
    done = run("systemd-analyze", "verify", unit)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_the_daemon_is_exposed_no_more_than_it_needs(unit: Path) -> None:
    done = run("systemd-analyze", "security", "--offline=yes", "--no-pager", unit)
    found = re.search(r"exposure level for \S+: (\d+\.\d)", done.stdout)
    assert found is not None, done.stdout + done.stderr
    assert float(found[1]) <= MOST_EXPOSED, done.stdout


def test_the_unit_as_it_lies_in_the_repository_is_sound_too() -> None:
    done = run("systemd-analyze", "verify", FOLDER / UNIT)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_users_and_groups_can_be_made() -> None:
    done = run("systemd-sysusers", "--dry-run", FOLDER / "ptycho-stream.sysusers.conf")
    assert (done.returncode, done.stderr.count("Failed")) == (0, 0), done.stderr
