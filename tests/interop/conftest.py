"""Fixtures of the tests with third-party programs."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest


@pytest.fixture
def figures(data_folder: Path) -> Callable[..., dict[str, float]]:
    """What one of the programs that come with the data says of its arguments."""

    def judged(tool: str, *arguments: object) -> dict[str, float]:
        answer = subprocess.run(
            [sys.executable, data_folder.parent / "tools" / tool, *map(str, arguments)],
            capture_output=True,
            text=True,
            timeout=90,
        )
        assert answer.returncode == 0, answer.stderr
        print(tool, answer.stdout)
        return {name: float(v) for name, v in (row.split() for row in answer.stdout.splitlines())}

    return judged
