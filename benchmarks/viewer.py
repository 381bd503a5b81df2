"""What a page of the viewer costs the daemon, and how much it is sent.

One run of the real daemon without a viewer and one with a page that shows a 1,000 x 1,000 pixel
canvas at 5 updates/s, alternating.  More frames of 128 x 128 pixels come than the network can take,
so that its frame rate is all it can do; refinement and trust are on, and every sweep changes every
tile.  The stage's main thread has core 0, everything else the others (``--free``: as it comes).

    python benchmarks/viewer.py --pairs 3
    python benchmarks/viewer.py --pairs 1 --browser
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import threading
import time
import urllib.request
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from live import Beamline, free_ports, pin, repeated
from websockets.sync.client import connect

from ptycho_stream.files.npz import ScanFile
from ptycho_stream.simulate.experiment import simulate_experiment
from ptycho_stream.simulate.scan_file import scan_file_of

CANVAS_PX = 1000
SIZE_PX = 128
DIFFERENT = 400
WARM_UP_S = 12.0
COUNTER = "ptycho_stream_frames_reconstructed_total"


@dataclass
class Page:
    """A page that is open: what it was sent, and how to wait while it goes on."""

    sleep: Callable[[float], None] = time.sleep
    messages: int = 0
    tiles: int = 0
    bytes: int = 0


def spread_out(scan: ScanFile) -> ScanFile:
    """The frames of a scan, at places that cover a square of ``CANVAS_PX``."""
    assert scan.pixel_yx_m is not None
    places = scan.positions_yx_m
    low, high = places.min(0), places.max(0)
    wanted = (CANVAS_PX - SIZE_PX) * np.asarray(scan.pixel_yx_m)
    return replace(scan, positions_yx_m=(places - low) / (high - low) * wanted)


def reconstructed(beamline: Beamline) -> float:
    """Frames that the network has done so far."""
    port = beamline.endpoints[5].rpartition(":")[2]
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
        for line in answer.read().decode().splitlines():
            if line.startswith(f"{COUNTER} "):
                return float(line.split()[1])
    return 0.0


@contextmanager
def page_open(url: str) -> Generator[Page]:
    """A page without a browser: it takes all that comes and says at once that it has shown it."""
    received, over = Page(), threading.Event()
    host = url.removeprefix("http://").rstrip("/")
    look = {"type": "look", "pane": "a", "stream": 1, "quantity": "phase"}
    with connect(
        f"ws://{host}/ws", origin=f"http://{host}", max_size=None, compression=None
    ) as link:
        link.send(json.dumps(look))
        link.send(json.dumps({"type": "watch", "frame": True, "probe": True, "path": True}))

        def hear() -> None:
            while not over.is_set():
                try:
                    message = link.recv(0.5)
                except TimeoutError:
                    continue
                received.bytes += len(message)
                if isinstance(message, bytes):
                    length = int.from_bytes(message[:4], "little")
                    head = json.loads(message[4 : 4 + length])
                    received.messages += 1
                    received.tiles += head.get("count", 0)
                    link.send(json.dumps({"type": "ack", "seq": head["seq"]}))

        thread = threading.Thread(target=hear)
        thread.start()
        try:
            yield received
        finally:
            over.set()
            thread.join()


@contextmanager
def browser_open(url: str) -> Generator[Page]:
    """A page in headless Chromium with a canvas of ``CANVAS_PX`` squared."""
    from playwright.sync_api import sync_playwright

    flags = ["--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run"]
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path="/usr/bin/chromium", args=flags)
        page = browser.new_page(viewport={"width": CANVAS_PX + 560, "height": CANVAS_PX + 220})
        received = Page(lambda seconds: page.wait_for_timeout(1e3 * seconds))
        link = page.context.new_cdp_session(page)
        link.send("Network.enable")

        def count(event: dict[str, Any]) -> None:
            response = event["response"]
            size = len(response["payloadData"])
            received.bytes += size if response["opcode"] == 1 else size * 3 // 4
            received.messages += response["opcode"] == 2

        link.on("Network.webSocketFrameReceived", count)
        page.goto(url)
        yield received
        browser.close()


def measure(
    folder: Path, scan: ScanFile, options: argparse.Namespace, with_page: bool
) -> dict[str, float]:
    """Frames/s of the network over some seconds, without a viewer or with a page open."""
    beamline = Beamline(folder, threads=1)
    port = free_ports(1)[0]
    wanted = f"enabled = {str(with_page).lower()}\nport = {port}\n"
    text = beamline.config.read_text().replace("enabled = false\n", wanted)
    beamline.config.write_text(text)
    with beamline.running():
        if not options.free:
            pin(beamline)
        player = threading.Thread(target=beamline.play, args=(scan, options.rate), daemon=True)
        player.start()
        if not with_page:
            return figures_over(beamline, options.seconds, Page())
        opened = browser_open if options.browser else page_open
        with opened(beamline.control.status()["viewer"]) as page:
            return figures_over(beamline, options.seconds, page)


def figures_over(beamline: Beamline, seconds: float, page: Page) -> dict[str, float]:
    page.sleep(WARM_UP_S)
    page.messages = page.tiles = page.bytes = 0
    first, began_s = reconstructed(beamline), time.monotonic()
    page.sleep(seconds)
    took_s = time.monotonic() - began_s
    return {
        "frames_per_s": round((reconstructed(beamline) - first) / took_s, 2),
        "messages_per_s": round(page.messages / took_s, 2),
        "tiles_per_s": round(page.tiles / took_s, 1),
        "kB_per_s": round(page.bytes / took_s / 1e3, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=3, help="without and with, alternating")
    parser.add_argument("--seconds", type=float, default=30.0, help="of each measurement")
    parser.add_argument(
        "--rate", type=float, default=120.0, help="frames/s sent; above the network's"
    )
    parser.add_argument("--browser", action="store_true", help="the page is shown by Chromium")
    parser.add_argument("--free", action="store_true", help="pin nothing to cores")
    parser.add_argument("--json", action="store_true", help="print the figures on one line")
    options = parser.parse_args()
    experiment = simulate_experiment(seed=1, frames=DIFFERENT, size_px=SIZE_PX)
    frames = int(options.rate * (options.seconds + WARM_UP_S + 10))
    scan = repeated(spread_out(scan_file_of(experiment)), frames)
    pairs: list[dict[str, Any]] = []
    for _ in range(options.pairs):
        pair: dict[str, Any] = {}
        for name, with_page in (("without", False), ("with", True)):
            with tempfile.TemporaryDirectory(prefix="viewer-") as place:
                np.savez(Path(place) / "probe.npz", probe=experiment.probe.modes)
                pair[name] = measure(Path(place), scan, options, with_page)
        pair["ratio"] = round(pair["with"]["frames_per_s"] / pair["without"]["frames_per_s"], 3)
        pairs.append(pair)
    figures = {
        "cores": os.cpu_count(),
        "load": os.getloadavg(),
        "browser": options.browser,
        "pinned": not options.free,
        "ratio_median": round(statistics.median(pair["ratio"] for pair in pairs), 3),
        "pairs": pairs,
    }
    print(json.dumps(figures, indent=None if options.json else 2))


if __name__ == "__main__":
    main()
