"""``ptycho-stream demo``: a whole beamline on this machine, from detector to image.

Starts ``ptycho-streamd`` as a program of its own, streams a simulated scan into it over real
sockets, shows the image grow, and writes what came out and how fast.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
import webbrowser
from collections.abc import Generator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from rich.console import Console

from ptycho_stream.cli.watch import View, open_view
from ptycho_stream.client import ResultStream
from ptycho_stream.errors import (
    ControlError,
    EndpointError,
    FileFormatError,
    PtychoStreamError,
)
from ptycho_stream.files.images import save_png
from ptycho_stream.files.npz import ScanFile
from ptycho_stream.remote import Daemon
from ptycho_stream.results import Image
from ptycho_stream.settings import Settings, load_settings
from ptycho_stream.simulate.detector import DetectorSimulator, PositionSimulator, play
from ptycho_stream.simulate.series import DetectorOptions

START_LIMIT_S = 60.0
SILENCE_LIMIT_S = 60.0
GOOD_NRMSE = 0.2
"""Above this the demo's image counts as bad: one flat value scores about twice as much."""


@dataclass
class _Stream:
    """What has come of the stream so far; one thread plays detector and stage, one follows."""

    sent: int = 0
    started_s: float = 0.0
    first_image_s: float = 0.0
    last_image_s: float = 0.0
    failure: list[PtychoStreamError] = field(default_factory=list[PtychoStreamError])


def demo(
    out: Annotated[Path, typer.Option(help="Folder for image, preview and report.")] = Path(
        "out/demo"
    ),
    frames: Annotated[int, typer.Option(min=50, help="Frames of the simulated scan.")] = 1000,
    rate: Annotated[float, typer.Option(min=1, help="Frames a second.")] = 40.0,
    seed: Annotated[int, typer.Option(help="Of sample, scan path and noise.")] = 1,
    viewer: Annotated[
        bool, typer.Option("--viewer", help="Open the page in a browser, and stay until Ctrl-C.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report only.")] = False,
) -> None:
    """Simulate a beamline and watch a scan become an image.

    Exit status 1 if a frame was lost or the image is bad.

    Example:  ptycho-stream demo --frames 400 --rate 30 --viewer
    """
    console = Console(stderr=as_json)
    config = out / "demo.toml"
    try:
        out.mkdir(parents=True, exist_ok=True)
        config.write_text(_template(), encoding="utf-8")
    except OSError as error:
        raise FileFormatError(
            f"cannot write to {out}: {error.strerror}; choose another folder with --out"
        ) from error
    with console.status("simulating a scan"):
        scan = _simulate(out, seed, frames)
    settings = load_settings(config)
    console.print(f"starting ptycho-streamd with {config}, its log is {out / 'daemon.log'}")
    with _daemon(config, settings, out / "daemon.log"):
        _show_page(settings, console, viewer)
        report, image = _run(settings, scan, rate, quiet=as_json)
        image.save(out / "object.npz")
        save_png(image, out / "preview.png")
        text = json.dumps(report, indent=2)
        (out / "report.json").write_text(text + "\n", encoding="utf-8")
        if as_json:
            typer.echo(text)
        else:
            console.print_json(text)
            console.print(f"wrote object.npz, preview.png and report.json to {out}")
        if viewer:
            console.print("the page stays until Ctrl-C")
            with suppress(KeyboardInterrupt):
                threading.Event().wait()
    problem = _problem(report)
    if problem:
        console.print(f"[red]{problem}")
        raise typer.Exit(1)


def _show_page(settings: Settings, console: Console, viewer: bool) -> None:
    """Say where the page is, and open it if that is wished."""
    with Daemon(settings.control.endpoint) as daemon:
        url = daemon.status()["viewer"]
    console.print(f"watch it in a browser at {url}")
    # Without a display the module would start a browser for terminals, in this one.
    can_open = any(os.environ.get(name) for name in ("DISPLAY", "WAYLAND_DISPLAY", "BROWSER"))
    if viewer and not (can_open and webbrowser.open(url)):
        console.print("[yellow]no browser could be opened from here: open the page yourself")


def _simulate(out: Path, seed: int, frames: int) -> ScanFile:
    from ptycho_stream.simulate.experiment import simulate_experiment  # torch takes a second
    from ptycho_stream.simulate.scan_file import scan_file_of

    experiment = simulate_experiment(seed=seed, frames=frames)
    np.savez(out / "probe.npz", probe=experiment.probe.modes)
    return scan_file_of(experiment)


def _template() -> str:
    return files("ptycho_stream.cli").joinpath("demo.toml").read_text(encoding="utf-8")


@contextmanager
def _daemon(config: Path, settings: Settings, log: Path) -> Generator[None]:
    """The daemon as a program, from ready to stopped."""
    with log.open("wb") as file:
        process = subprocess.Popen(
            [sys.executable, "-m", "ptycho_streamd.supervisor", "--config", str(config)],
            stdout=file,
            stderr=subprocess.STDOUT,
        )
        try:
            _wait_ready(process, settings, log)
            yield
        finally:
            process.terminate()
            try:
                process.wait(timeout=20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _wait_ready(process: subprocess.Popen[bytes], settings: Settings, log: Path) -> None:
    until_s = time.monotonic() + START_LIMIT_S
    with Daemon(settings.control.endpoint, timeout_s=1.0) as daemon:
        while time.monotonic() < until_s:
            if process.poll() is not None:
                tail = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-3:]
                raise EndpointError(
                    f"ptycho-streamd ended with status {process.returncode}; {log} ends with:\n"
                    + "\n".join(tail)
                )
            try:
                if daemon.status()["state"] == "ready":
                    return
            except (EndpointError, ControlError):
                pass  # not there yet: asked again until the limit
            time.sleep(0.1)
    raise EndpointError(f"ptycho-streamd was not ready in {START_LIMIT_S:.0f} s: see {log}")


def _run(
    settings: Settings, scan: ScanFile, rate: float, *, quiet: bool
) -> tuple[dict[str, Any], Image]:
    """Stream the scan, follow the image, and put together the report."""
    stream = _Stream()
    with (
        ResultStream(settings.results.endpoint, settings.results.resync_endpoint) as results,
        Daemon(settings.control.endpoint) as daemon,
        nullcontext() if quiet else open_view(as_json=False) as view,
    ):
        before = results.latest()
        player = threading.Thread(target=_play, args=(settings, scan, rate, stream), daemon=True)
        player.start()
        after = before.scan_id if before else ""
        image = _follow(results, daemon, after, stream, view)
        player.join()
        stage = daemon.status()["stages"]["reconstruct"]["status"]
        stored = daemon.scan(image.scan_id)
    return {
        "scan_id": image.scan_id,
        "sent": stream.sent,
        "received": stored["committed"],
        "reconstructed": len(image.frame_numbers),
        "frames_per_s": round(
            len(image.frame_numbers) / (stream.last_image_s - stream.started_s), 1
        ),
        "latency_p50_ms": round(stage["latency_p50_ms"], 1),
        "latency_p99_ms": round(stage["latency_p99_ms"], 1),
        "first_image_s": round(stream.first_image_s - stream.started_s, 3),
        "nrmse": round(_nrmse(image, scan), 4),
    }, image


def _follow(
    results: ResultStream, daemon: Daemon, after: str, stream: _Stream, view: View | None
) -> Image:
    """Show each image of the scan after ``after`` until the final one, which is returned.

    Raises:
        PtychoStreamError: the detector or the positioner failed.
        EndpointError: there was no new image for a long time.
    """

    def show(image: Image) -> None:
        if image.scan_id > after:
            stream.last_image_s = time.monotonic()
            stream.first_image_s = stream.first_image_s or stream.last_image_s
            if view is not None:
                view.show(image)

    began_s = time.monotonic()
    while True:
        try:
            return results.wait_complete(timeout_s=1.0, after=after, on_image=show)
        except EndpointError:
            if stream.failure:
                raise stream.failure[0] from None
            if time.monotonic() - max(began_s, stream.last_image_s) < SILENCE_LIMIT_S:
                continue
            problem = daemon.status()["stages"]["reconstruct"]["status"].get("problem", "")
            raise EndpointError(
                f"no new image for {SILENCE_LIMIT_S:.0f} s: {problem or 'see daemon.log'}"
            ) from None


def _play(settings: Settings, scan: ScanFile, rate: float, stream: _Stream) -> None:
    def sent(count: int) -> None:
        stream.started_s = stream.started_s or time.monotonic()
        stream.sent = count

    assert settings.positions.endpoint is not None
    try:
        with (
            DetectorSimulator(
                settings.detector.endpoint, DetectorOptions(rate_hz=rate)
            ) as detector,
            PositionSimulator(settings.positions.endpoint) as positions,
        ):
            detector.wait_for_receiver()
            positions.wait_for_receiver()
            play(scan, detector, positions, on_frame=sent)
    except PtychoStreamError as error:
        stream.failure.append(error)


def _nrmse(image: Image, scan: ScanFile) -> float:
    from ptycho_stream.simulate.score import nrmse_to_truth

    assert scan.object is not None and scan.object_origin_yx_m is not None
    return nrmse_to_truth(image, scan.object, scan.object_origin_yx_m)


def _problem(report: dict[str, Any]) -> str:
    if not report["sent"] == report["received"] == report["reconstructed"]:
        return "frames were lost: sent, received and reconstructed differ; see daemon.log"
    if not report["nrmse"] <= GOOD_NRMSE:
        return f"the image is bad: nrmse {report['nrmse']} is above {GOOD_NRMSE}; see preview.png"
    return ""
