"""The first commands and the first program of ``docs/files.md`` do what the page says."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from ptycho_stream.files.measured import load_measured

pytestmark = [pytest.mark.interop, pytest.mark.timeout(180)]

PAGE = (Path(__file__).parents[2] / "docs" / "files.md").read_text()
START = "import sys; from ptycho_stream.cli import main; sys.exit(main())"


def run(folder: Path, *words: str) -> str:
    ended = subprocess.run(
        [sys.executable, *words], cwd=folder, capture_output=True, text=True, timeout=120
    )
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


def test_the_page_begins_with_what_works(tmp_path):
    commands = re.findall(r"^    ptycho-stream (.*)$", PAGE, re.MULTILINE)[:3]
    for command in commands:
        run(tmp_path, "-c", START, *shlex.split(command))
    made = {path.name for path in tmp_path.iterdir()}
    assert made == {*("scan.npz", "scan.cxi", "object.png", "product.h5", "diffraction.h5")}
    assert len(load_measured(tmp_path / "product.h5")) == 60
    program = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)[0]
    told = run(tmp_path, "-c", program)
    assert told.startswith("(60, 64, 64)") and "(1, 64, 64)" not in told.splitlines()[0]
    assert (tmp_path / "object.h5").exists() and (tmp_path / "object.diffraction.h5").exists()
