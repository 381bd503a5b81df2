"""The tutorial, typed as it stands: each command works, and what it says comes true."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image as Picture

from ptycho_stream.files.image_npz import load_image

TUTORIAL = Path(__file__).parents[2] / "docs" / "tutorial.md"
BLOCK = re.compile(r"(?:^(?: {4}.*)?\n)+", re.MULTILINE)
pytestmark = [pytest.mark.interop, pytest.mark.timeout(420)]


def shell_script():
    """All indented blocks of the document, in their order."""
    blocks = (block for block in BLOCK.findall(TUTORIAL.read_text()) if block.strip())
    return "\n".join(re.sub("^ {4}", "", block, flags=re.MULTILINE) for block in blocks)


def test_the_tutorial_works_as_written(tmp_path):
    script = shell_script()
    assert script.count("ptycho-stream ") > 10 and "cat > look.py" in script
    programs = Path(sys.executable).parent
    done = subprocess.run(
        ["bash", "-e", "-o", "pipefail", "-c", f"trap 'kill $(jobs -p) || :' EXIT\n{script}\nwait"],
        cwd=tmp_path,
        env=os.environ
        | {"PATH": f"{programs}{os.pathsep}{os.environ['PATH']}", "MPLBACKEND": "agg"},
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    folder = tmp_path / "tutorial"
    images = [load_image(folder / f"{name}.npz") for name in ("image", "wrong", "right")]
    first, wrong, right = images
    assert [image.frame_numbers.size for image in images] == [200, 200, 200]
    assert first.verdict == "good" and first.layer == "refined"
    assert wrong.scan_id == right.scan_id != first.scan_id
    assert wrong.trust["r_factor"] > 2 * first.trust["r_factor"] and wrong.verdict != "good"
    assert right.trust["r_factor"] < 1.2 * first.trust["r_factor"]
    assert right.content.generation > wrong.content.generation
    with Picture.open(folder / "image.png") as picture:
        assert min(picture.size) > 300
    assert 'orientation = "identity"' in (folder / "beamline.toml").read_text()
