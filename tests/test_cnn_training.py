"""The plain encoder-decoder learns a scan's object without any truth, and does not collapse.

A short form of ``benchmarks/cnn_unsupervised.py``, with looser bounds.
"""

import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.long
BENCHMARK = Path(__file__).parents[1] / "benchmarks" / "cnn_unsupervised.py"


def figures(*options: object) -> tuple[float, float]:
    """Correlation of the phase with the sample's, and spread of the object over the true one's."""
    done = subprocess.run(
        [sys.executable, str(BENCHMARK), "--threads", "1", "--limit", "-1", *map(str, options)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = re.search(r"Pearson phase (\S+), .* spread (\S+);", done.stdout)
    assert found, done.stdout
    return float(found[1]), float(found[2])


@pytest.mark.timeout(900)
def test_frames_alone_teach_the_phase_of_a_scan():
    """Half a minute on a free core; the benchmark's limit of 0.9 takes a few minutes."""
    phase, spread = figures("--size", 64, "--frames", 200, "--steps", 250)
    assert phase > 0.6
    assert 0.2 < spread < 2


@pytest.mark.timeout(900)
def test_larger_frames_do_not_collapse_to_a_constant():
    options = ("--steps", 250, "--batch-frames", 8)
    phase, spread = figures("--size", 128, "--frames", 100, *options)
    assert spread > 0.1 and phase > 0.15
