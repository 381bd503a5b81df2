"""The measured siemens star, streamed at 100 frames/s with a guess of the probe, refined meanwhile.

Judged by the programs that come with the data; docs/refinement.md has figures at other times.
"""

from __future__ import annotations

import bz2
import io
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from daemon_harness import DaemonHarness
from make_siemens_star import REFERENCE, SOURCE, siemens_star

from ptycho_stream.files.npz import save_scan

pytest.importorskip("skimage", reason="pip install '.[interop]'")

pytestmark = [pytest.mark.interop, pytest.mark.timeout(240)]
PROGRAM = Path(sys.executable).with_name("ptycho-stream")


def test_a_guess_of_the_probe_becomes_a_refined_image(figures, data_folder, tmp_path):
    packed = bz2.decompress((data_folder / SOURCE).read_bytes())
    with np.load(io.BytesIO(packed)) as held:
        guess = np.squeeze(held["probe"]).astype(np.complex64)[None]
    np.savez(tmp_path / "probe.npz", probe=guess)
    save_scan(tmp_path / "scan.npz", siemens_star(data_folder))
    out = tmp_path / "object.npz"
    daemon = DaemonHarness(
        tmp_path,
        {
            "detector": {"dialect": "dectris-v1"},
            "geometry": None,  # the stream's header tells it
            "reconstruct": {"size_px": 128, "threads": 2},
            "positions": {"wait_s": 10.0},
            "refine": {"enabled": True},
            "trust": {"enabled": True},
        },
    )
    watch = [PROGRAM, "watch", "--config", daemon.config, "--until-complete", "--out", out]
    replay = [PROGRAM, "replay", tmp_path / "scan.npz", "--rate", "100"]
    replay += ["--bind", daemon.detector_endpoint, "--positions-bind", daemon.positions_endpoint]
    with daemon:
        watching = subprocess.Popen([*watch, "--timeout", "150"], stdout=subprocess.DEVNULL)
        try:
            subprocess.run(replay, timeout=90, check=True)
            assert watching.wait(150) == 0
        finally:
            watching.kill()
            watching.wait()
    with np.load(out) as held:
        assert sorted(held["frame_numbers"].tolist()) == list(range(516))
    score = figures("score_object.py", out, data_folder / REFERENCE)
    assert score["nrmse"] <= 0.075
    assert score["phase_ssim"] >= 0.80
    assert score["frc_half"] >= 0.53
    explained = figures("r_factor.py", out, data_folder / SOURCE)
    assert explained["excess"] <= 0.022
    assert explained["frames"] > 400
