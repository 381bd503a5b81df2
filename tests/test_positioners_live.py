"""The shipped configurations with a PandA or Bluesky, each with ``replay`` as the beamline.

``replay`` and the daemon are told of the positioner by the same file, and must understand it alike.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from beamline import wait_sealed
from daemon_harness import DaemonHarness, free_port, wait_for
from dialect_profiles import CONFIGS, tables_of

from ptycho_stream.cli.endpoint_checkup import check_endpoints
from ptycho_stream.files.npz import ScanFile, save_scan
from ptycho_stream.scans.catalogue import Catalogue
from ptycho_stream.scans.header import ScanHeader
from ptycho_stream.settings import Settings

pytestmark = pytest.mark.slow

FRAMES = 30
REPLAY = "import sys; from ptycho_stream.cli import main; sys.exit(main())"
SHOULD_BE = {
    "nsls2-hxn": (("--one-part-each", "--jitter-m", "3e-9"), "panda_arm_time", (288, 288)),
    "lab-eiger-bluesky": (("--serializer", "json", "--pages"), "run_uid", (128, 128)),
}
"""Of each configuration: how its beamline is played, what its runs say, and the stored frame."""


@pytest.mark.parametrize("name", SHOULD_BE)
def test_a_beamline_that_is_played_is_recorded(name: str, tmp_path: Path) -> None:
    options, told, shape_yx = SHOULD_BE[name]
    scan = scan_of(shape_yx)
    save_scan(tmp_path / "scan.npz", scan)
    detector, positions = (f"tcp://127.0.0.1:{free_port()}" for _ in range(2))
    tables = tables_of(name, [detector], positions)
    daemon = DaemonHarness(tmp_path, tables, stages=("ingest",))
    assert states(daemon.settings) == {"detector": "refused", "positions": "refused"}
    command = (tmp_path / "scan.npz", "--positions-from", CONFIGS / f"{name}.toml", *options)
    sockets = ("--bind", detector, "--positions-bind", positions)
    with replaying(*command, *sockets, "--repeat", 2) as process:
        as_it_should_be = {"detector": "OK", "positions": "OK"}
        wait_for(lambda: states(daemon.settings) == as_it_should_be, 30, "the doctor's consent")
        with daemon:
            headers = wait_sealed(daemon, 2)
            out, err = process.communicate(timeout=30)
            assert process.returncode == 0 and json.loads(out)["sent"] == 2 * FRAMES, err
            for header in headers:
                check(daemon, header, scan)
                assert told in header.metadata
            assert len({header.metadata[told] for header in headers}) == 2
            daemon.metric("ptycho_stream_positions_orphaned_total", 0)


@contextmanager
def replaying(*arguments: object) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-c", REPLAY, "replay", *map(str, arguments), "--json"]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def scan_of(shape_yx: tuple[int, int]) -> ScanFile:
    random = np.random.default_rng(7)
    return ScanFile(
        counts=random.poisson(2, (FRAMES, *shape_yx)).astype(np.uint16),
        positions_yx_m=random.uniform(-2e-6, 2e-6, (FRAMES, 2)),
        frame_numbers=np.arange(FRAMES),
    )


def states(settings: Settings) -> dict[str, str]:
    """What the doctor says of the streams."""
    found = check_endpoints(settings, timeout_s=1.0)
    return {f.subject: f.state for f in found if f.subject in ("detector", "positions")}


def check(daemon: DaemonHarness, header: ScanHeader, scan: ScanFile) -> None:
    """Every frame is there bit by bit, at its own position."""
    assert header.state == "complete", header.reason
    counts = {key: n for key, n in header.counts.items() if n}
    assert counts == {"frames": FRAMES, "positions": FRAMES, "positioned": FRAMES}
    with Catalogue(daemon.data).open(header.scan_id) as reader:
        numbers = reader.records()["number"].tolist()
        np.testing.assert_array_equal(reader.frames(slice(0, FRAMES)), scan.counts)
        pairs = reader.pairs()
    assert numbers == list(range(FRAMES)) == sorted(pairs["number"].tolist())
    found = np.stack([pairs["y_m"], pairs["x_m"]], axis=1)
    # Rounding: through counts, and by the mean of samples.
    np.testing.assert_allclose(found, scan.positions_yx_m[pairs["number"]], rtol=0, atol=1e-18)
