"""The program that writes an image's files, and the thread that drives it."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import pytest
from daemon_harness import wait_for
from result_samples import FRAMES, asymmetric_scan, image_of

from ptycho_stream.errors import ControlError
from ptycho_stream.files.measured import load_measured
from ptycho_stream.files.stored_scan import store_scan
from ptycho_stream.reconstruct.history import HistoryEntry, append_history
from ptycho_stream.results import Image
from ptycho_stream.scans.catalogue import Catalogue
from ptycho_stream.scans.folders import scan_directory
from ptycho_stream.scans.leases import Lease
from ptycho_stream.settings import ExportSettings
from ptycho_streamd import exports as exports_module
from ptycho_streamd.export_files import ExportOutcome, ExportTask, carry_out
from ptycho_streamd.exports import MAX_WAITING, Export, Exports


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Of a scan in a store."""
    return scan_directory(tmp_path / "data", store_scan(tmp_path / "data", asymmetric_scan()))


@pytest.fixture
def image(folder: Path) -> Image:
    return image_of(asymmetric_scan(), folder.name)


@pytest.fixture
def handed_over(image: Image, tmp_path: Path) -> str:
    image.save(tmp_path / "image.npz")
    return str(tmp_path / "image.npz")


@pytest.fixture
def exports() -> Iterator[Exports]:
    made = Exports()
    yield made
    made.close()


@pytest.fixture
def lease(folder: Path) -> Iterator[Lease]:
    with Catalogue(folder.parents[1]).lease(folder.name, "export") as held:
        yield held


@pytest.fixture
def export(image: Image, folder: Path, lease: Lease) -> Export:
    return Export(image.content, folder, lease)


def outcome_of(exports: Exports) -> ExportOutcome:
    """Of the one export that was begun."""
    [(_, outcome)] = wait_for(exports.done, 30, "the export")
    return outcome


def test_every_format_is_written_by_the_program(folder, export, exports, tmp_path):
    for sweeps, r in ((1.2, 0.5), (1.9, 0.4), (4.0, 0.2)):
        append_history(folder, HistoryEntry(0, 1, 18, "refined", sweeps, "m", {"r_factor": r}))
    settings = ExportSettings(directory=tmp_path / "out")
    kinds = ("npz", "png", "tiff", "ptychodus", "cxi", "ptychopinn")
    exports.begin(export, settings, kinds)
    outcome = outcome_of(exports)
    assert outcome.problems == () and exports.waiting == 0
    there = {str(p.relative_to(tmp_path / "out")) for p in (tmp_path / "out").rglob("*.*")}
    name = folder.name
    assert there == {
        *(f"{name}{ending}" for ending in (".npz", ".png", ".tiff", ".cxi", ".ptychopinn.npz")),
        f"{name}/product.h5",
        f"{name}/diffraction.h5",
    }
    assert {str(Path(path).relative_to(tmp_path / "out")) for path in outcome.paths} == there
    assert len(load_measured(tmp_path / "out" / name / "product.h5")) == FRAMES
    with h5py.File(tmp_path / "out" / name / "product.h5") as file:
        assert file["loss_epochs"][:].tolist() == [1, 4]
        assert file["loss_values"][:].tolist() == [0.4, 0.2]
    assert not list(folder.glob("export*"))


def test_partial_products_are_counted_and_the_oldest_go(folder, handed_over, tmp_path):
    task = ExportTask(handed_over, str(folder), str(tmp_path / "out"), keep_partial=3)
    written = [Path(carry_out(task).paths[0]).name for _ in range(5)]
    assert written == [f"product.{n:06d}.h5" for n in (1, 2, 3, 4, 5)]
    left = sorted(path.name for path in (tmp_path / "out" / folder.name).iterdir())
    assert left == written[2:]
    with h5py.File(tmp_path / "out" / folder.name / left[0]) as file:
        np.testing.assert_array_equal(
            file["probe_position_indexes"], asymmetric_scan().frame_numbers
        )


def test_what_fails_is_said_and_costs_no_other_format(folder, handed_over, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / folder.name).write_text("a file where ptychodus' folder should be")
    task = ExportTask(
        handed_over, str(folder), str(tmp_path / "out"), ("npz", "ptychodus", "png"), 1
    )
    outcome = carry_out(task)
    assert [Path(path).suffix for path in outcome.paths] == [".npz", ".png"]
    assert len(outcome.problems) == 1 and "cannot make the export folder" in outcome.problems[0]


def run_program(text: str) -> tuple[int, dict[str, list[str]]]:
    ended = subprocess.run(
        [sys.executable, "-m", "ptycho_streamd.export_files"],
        input=text,
        capture_output=True,
        text=True,
        timeout=30,
    )
    return ended.returncode, json.loads(ended.stdout)


def test_the_program_ends_with_a_status(folder, handed_over, tmp_path):
    task = ExportTask(handed_over, str(folder), str(tmp_path / "out"), ("png",))
    assert run_program(task.to_json()) == (0, {"paths": [*carry_out(task).paths], "problems": []})
    missing = ExportTask("none.npz", str(folder), str(tmp_path / "out"), ("png",))
    status, told = run_program(missing.to_json())
    assert status == 1 and "no image file" in told["problems"][0]


SLOW = """
import sys, time, signal
sys.stdin.read()
signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
print("x", file=sys.stderr, flush=True)
time.sleep(60)
"""


def test_nothing_waits_for_an_export_and_too_many_are_refused(
    folder, export, tmp_path, monkeypatch
):
    monkeypatch.setattr(exports_module, "PROGRAM", (sys.executable, "-c", SLOW))
    exports, settings = Exports(), ExportSettings(directory=tmp_path / "out")
    began_s = time.monotonic()
    for _ in range(MAX_WAITING):
        exports.begin(export, settings, ("png",))
    assert exports.done() == [] and exports.waiting == MAX_WAITING
    with pytest.raises(ControlError, match="exports wait already"):
        exports.begin(export, settings, ("png",))
    exports.close()
    assert time.monotonic() - began_s < 30, "close() ends the program instead of waiting for it"
    assert not list(folder.glob("export*"))


def test_a_program_that_dies_is_a_failed_export(export, exports, tmp_path, monkeypatch):
    code = "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"
    monkeypatch.setattr(exports_module, "PROGRAM", (sys.executable, "-c", code))
    exports.begin(export, ExportSettings(directory=tmp_path), ("png",))
    assert outcome_of(exports) == ExportOutcome(
        (), (f"the writer of files ended with status {-signal.SIGKILL}",)
    )


def test_a_disk_that_refuses_the_image_is_a_failed_export(folder, export, exports, tmp_path):
    gone = folder.with_name("gone")
    exports.begin(replace(export, folder=gone), ExportSettings(directory=tmp_path), ("png",))
    [problem] = outcome_of(exports).problems
    assert "cannot write" in problem
