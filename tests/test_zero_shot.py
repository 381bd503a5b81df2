"""The shipped model on measured frames that no training ever saw."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

_SCRIPT = Path(__file__).parents[1] / "benchmarks" / "zero_shot.py"


@pytest.mark.interop
@pytest.mark.timeout(240)
def test_the_shipped_model_reconstructs_the_siemens_star(tmp_path):
    folder = os.environ.get("PTYCHO_STREAM_DATA")
    if folder is None:
        pytest.skip("PTYCHO_STREAM_DATA is not set: no measured frames to reconstruct")
    tool = Path(folder).parent / "tools" / "score_object.py"
    command = [sys.executable, str(_SCRIPT), "--data", folder, "--score-tool", str(tool)]
    done = subprocess.run(
        [*command, "--out", str(tmp_path), "--limit", "0.15"],
        capture_output=True,
        text=True,
        timeout=220,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
