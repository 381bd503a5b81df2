"""The report of a scan: one HTML file and one PNG, from a daemon or from a scan's folder."""

from __future__ import annotations

import base64
import io
import json
import re
import threading
import time
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image as Picture
from result_samples import asymmetric_scan, image_of
from results_source import SCANS, TILE_PX, Source, free_ports, grown
from scan_samples import make_scan
from test_cli_results import at, run

from ptycho_stream.errors import FileFormatError, MissingPackage
from ptycho_stream.files.image_npz import load_image
from ptycho_stream.files.measured import load_measured
from ptycho_stream.files.stored_scan import store_scan
from ptycho_stream.reconstruct.history import HistoryEntry, append_history
from ptycho_stream.report.figure import DPI, SIZE_INCHES, draw
from ptycho_stream.report.page import page
from ptycho_stream.report.scan_report import ScanReport
from ptycho_stream.results import Image
from ptycho_stream.scans.catalogue import Catalogue
from ptycho_stream.scans.folders import scan_directory
from ptycho_streamd.control import ControlServer
from ptycho_streamd.requests import store_commands
from ptycho_streamd.security import Gate
from ptycho_streamd.snapshots import take_snapshot

PICTURE_PX = tuple(round(side * DPI) for side in SIZE_INCHES)
EVIL = "<script>alert('$x_')</script>"


def entries(count: int = 8) -> list[HistoryEntry]:
    """A scan that is undecided, then suspected, then good in another generation, refined."""
    made: list[HistoryEntry] = []
    for n in range(count):
        verdict = "undecided" if n < 2 else "probe suspect" if n < 5 else "good"
        figures = {"r_factor": 0.3 / (n + 1), "r_poisson": 0.02, "excess": 0.28 / (n + 1)}
        if n > 3:
            figures |= {"resolution_nm": 40.0 / n, "coverage_um2": n / 2, "overlap": 2.0}
            figures |= {"r_free": 0.31 / (n + 1), "excess_free": 0.29 / (n + 1)}
        layer = "refined" if n > 2 else "predicted"
        time_ns = 1_760_000_000_000_000_000 + n * 10**9
        made.append(
            HistoryEntry(
                *(time_ns, 1 + (n > 4), 10 * n, layer, n / 2, "unrolled-v2"),
                figures=figures,
                verdict=verdict,
                reasons=(f"reason {n} & more",),
            )
        )
    return made


def judged(scan_id: str = SCANS[0], **changes: Any) -> Any:
    return grown(
        6,
        scan_id,
        **{
            "layer": "refined",
            "sweeps": 3.5,
            "trust": {"r_factor": 0.0375, "excess": 0.035},
            "verdict": "good",
            "reasons": ("it fits <well>",),
            **changes,
        },
    )


class Page(HTMLParser):
    """What a browser would make of it: text, and everything it would load or run."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.words: list[str] = []
        self.tags: list[str] = []
        self.sources: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.sources += [value or "" for name, value in attrs if name in ("src", "href")]

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(self.words)


def check_picture(data: bytes) -> None:
    with Picture.open(io.BytesIO(data)) as picture:
        assert picture.format == "PNG"
        assert picture.size == PICTURE_PX
        pixels = np.asarray(picture.convert("L"))
    assert pixels.std() > 10


def test_the_page_needs_nothing_else_and_tells_everything():
    image = Image(judged(metadata={"sample": EVIL, "notes": {"a": [1, 2]}}))
    header = {"series": "7", "created_ns": 1_760_000_000_000_000_000, "counts": {"missing": 3}}
    header["views"] = [{"version": 1, "orientation": "flip_x"}]
    report = ScanReport(image, entries(), header)
    read = Page(page(report, draw(report)))
    (source,) = read.sources
    kind, encoded = source.split(",", 1)
    assert kind == "data:image/png;base64"
    check_picture(base64.b64decode(encoded))
    assert "script" not in read.tags and EVIL in read.text
    for word in (
        *(SCANS[0], "good", "it fits <well>", "refined", "3.5", "0.0375", "unrolled-v2"),
        *("missing", "flip_x", "2025-10-09 08:53:20", "reason 5 & more", "probe suspect"),
        '{"a": [1, 2]}',
    ):
        assert word in read.text, word
    assert "8 looks" in read.text and read.text.count("reason 1 &") == 0


@pytest.mark.parametrize("history", [[], entries(1), entries(8)], ids=len)
@pytest.mark.parametrize("steps", [0, 6])
def test_it_is_drawn_of_whatever_there_is(history, steps):
    content = judged() if steps else grown(0, probe=np.zeros((0, 0, 0), np.complex64))
    check_picture(draw(ScanReport(Image(content), history)))


def test_text_of_others_is_no_formula_and_may_lack_in_the_font():
    image = Image(judged(verdict="$\\frac{$", state="走る"))
    check_picture(draw(ScanReport(image, entries())))


def test_a_large_image_is_thinned_out():
    content = judged(tile_px=1500)
    check_picture(draw(ScanReport(Image(content), ())))


def test_without_matplotlib_the_extra_is_named(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(MissingPackage, match=r"ptycho-stream\[report\]"):
        draw(ScanReport(Image(judged())))


@pytest.mark.parametrize("corner", [(0, 0), (-300, 255), (17, -1000)])
def test_an_image_comes_back_from_its_file_as_it_was(tmp_path, corner):
    from dataclasses import replace

    from ptycho_stream.files.image_npz import cut

    rng = np.random.default_rng(1)
    object_yx = rng.normal(size=(400, 300)) + 1j * rng.normal(size=(400, 300))
    weight = np.ones((400, 300), np.float32)
    object_yx[:, :5], weight[5:9] = np.nan, 0.5
    tiles = cut(object_yx.astype(np.complex64), weight, corner)
    before = Image(replace(judged(), tiles=tiles, tile_px=256, final=True))
    before.save(tmp_path / "a.npz")
    after = load_image(tmp_path / "a.npz")
    np.testing.assert_array_equal(after.object_yx, before.object_yx)
    np.testing.assert_array_equal(after.weight_yx, before.weight_yx)
    assert after.origin_yx_m == pytest.approx(before.origin_yx_m)
    assert (after.verdict, after.reasons, after.sweeps) == ("good", ("it fits <well>",), 3.5)
    assert after.metadata == {"sample": "siemens star", "proposal": "7"}
    assert (after.final, after.trust) == (True, before.trust)


@pytest.mark.parametrize("content", [b"", b"PK\3\4", b"\x93NUMPY"])
def test_what_is_no_image_is_refused_by_name(tmp_path, content):
    path = tmp_path / "a.npz"
    with pytest.raises(FileFormatError, match="there is no"):
        load_image(path)
    path.write_bytes(content)
    with pytest.raises(FileFormatError, match="not an image"):
        load_image(path)
    np.savez(path, probe=np.ones(3))
    with pytest.raises(FileFormatError, match="not an image"):
        load_image(path)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[tuple[str, str, Path]]:
    """A store with a scan that has a history, and the control socket of its daemon."""
    scan_id = make_scan(tmp_path / "data", frames=3, metadata={"sample": "star"})
    catalogue = Catalogue(tmp_path / "data")
    directory = catalogue.directory(scan_id)
    for entry in entries():
        append_history(directory, entry)
    endpoint = f"tcp://127.0.0.1:{free_ports(1)[0]}"
    gate = Gate()
    server = ControlServer(gate, endpoint)
    commands, over = store_commands(catalogue), threading.Event()

    def serve() -> None:
        while not over.is_set():
            if server.socket.poll(20):
                for request in server.poll():
                    server.reply(request, commands[request.command](request.arguments))

    thread = threading.Thread(target=serve)
    thread.start()
    yield scan_id, endpoint, directory
    over.set()
    thread.join()
    server.close()
    gate.close()


def test_export_writes_the_report_of_a_scan_that_the_daemon_holds(store, tmp_path):
    scan_id, endpoint, _ = store
    files = [tmp_path / "report.html", tmp_path / "report.png", tmp_path / "image.npz"]
    with Source() as source:
        source.publish(judged(scan_id))
        done = run("export", "--report", *files, "--json", "--endpoint", endpoint, *at(source))
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["files"] == [str(file) for file in files]
    text = files[0].read_text()
    assert scan_id in text and "8 looks" in text and "reason 5 &amp; more" in text
    check_picture(files[1].read_bytes())
    assert load_image(files[2]).scan_id == scan_id
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        *("data", "image.npz", "report.html", "report.png")
    ]


def test_the_report_of_a_snapshot_needs_no_daemon(store, tmp_path, monkeypatch):
    scan_id, _, directory = store
    monkeypatch.chdir(tmp_path)
    snapshot = take_snapshot(judged(scan_id), directory, "kept")
    done = run("export", "--report", "--image", snapshot, "--folder", directory)
    assert done.returncode == 0, done.stderr
    text = (tmp_path / f"{scan_id}-report.html").read_text()
    assert re.search("<li>it fits &lt;well&gt;</li>", text) and "8 looks" in text
    check_picture((tmp_path / f"{scan_id}-report.png").read_bytes())


def test_a_snapshot_is_exported_as_a_picture(store, tmp_path):
    scan_id, _, directory = store
    snapshot = take_snapshot(judged(scan_id), directory, "kept")
    out = tmp_path / "kept.png"
    assert run("export", "--image", snapshot, out).returncode == 0
    with Picture.open(out) as picture:
        assert picture.size == (2 * 4 * TILE_PX + 8, TILE_PX)


def test_a_snapshot_is_exported_with_the_frames_of_its_folder(tmp_path):
    scan = asymmetric_scan()
    folder = scan_directory(tmp_path, store_scan(tmp_path, scan))
    image_of(scan, folder.name).save(tmp_path / "kept.npz")
    outputs = [tmp_path / "product.h5", tmp_path / "scan.cxi"]
    done = run("export", *outputs, "--image", tmp_path / "kept.npz", "--folder", folder)
    assert done.returncode == 0, done.stderr
    for output in outputs:
        assert load_measured(output).frame_numbers.tolist() == scan.frame_numbers.tolist()


def test_a_folder_of_another_scan_is_refused(store, tmp_path):
    _, _, directory = store
    snapshot = take_snapshot(judged(), directory, "kept")
    done = run("export", "--report", "--image", snapshot, "--folder", directory)
    assert done.returncode == 1 and "is the folder of scan" in done.stderr


def test_a_report_without_its_daemon_says_so(store):
    scan_id, _, directory = store
    snapshot = take_snapshot(judged(scan_id), directory, "kept")
    nobody = f"tcp://127.0.0.1:{free_ports(1)[0]}"
    began_s = time.monotonic()
    done = run("export", "--report", "--image", snapshot, "--endpoint", nobody, "--timeout", "0.3")
    assert done.returncode == 1 and "is ptycho-streamd running" in done.stderr
    assert time.monotonic() - began_s < 15


@pytest.mark.parametrize(
    "words",
    [
        (),
        ("a.html",),
        ("--report", "a.pdf"),
        ("--report", "--folder", "."),
        ("a.h5", "--image", "b.npz"),
        ("a.png", "--image", "b.npz", "--scan", SCANS[0]),
    ],
)
def test_words_that_do_not_go_together_are_wrong_usage(words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run("export", *words).returncode == 2
