"""``ptycho-stream replay``: stream a recorded scan as a detector and a positioner would.

For trying a daemon's configuration without a beam, with measured or simulated frames.
"""

from __future__ import annotations

import json
import time
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskProgressColumn, TextColumn

from ptycho_stream.cli import measured_options as given
from ptycho_stream.cli import position_options as positioner_given
from ptycho_stream.cli.options import AsJson
from ptycho_stream.files.measured import load_measured
from ptycho_stream.files.measured_choice import MeasuredChoice
from ptycho_stream.files.npz import ScanFile
from ptycho_stream.simulate.detector import (
    DetectorSimulator,
    PositionSimulator,
    PositionTiming,
    SimulatedDetector,
    play,
)
from ptycho_stream.simulate.outlet import SocketKind
from ptycho_stream.simulate.position_series import PositionOptions
from ptycho_stream.simulate.pva_detector import DEFAULT_SERVER, PvaDetectorSimulator
from ptycho_stream.simulate.series import DetectorOptions, Dialect
from ptycho_stream.wire.dectris_v1_parts import HeaderDetail


@dataclass(frozen=True)
class _Plan:
    """What to stream, how often, and when positions come."""

    scan: ScanFile
    timing: PositionTiming
    first_series: int
    repeat: int
    stop_after: int | None
    batch: int

    @property
    def frames(self) -> int:
        count = len(self.scan) if self.stop_after is None else min(self.stop_after, len(self.scan))
        return count * self.repeat


@given.explained
def replay(
    file: given.ScanArgument,
    choice: MeasuredChoice,
    dialect: Annotated[Dialect, typer.Option(help="What the detector speaks.")] = "dectris-v1",
    bind: Annotated[
        str,
        typer.Option(
            help="Where the detector binds (dectris-v2: port 31001), its first module if it has "
            "several; pva://CHANNEL."
        ),
    ] = "tcp://127.0.0.1:9999",
    detector_socket: Annotated[
        SocketKind | None,
        typer.Option("--socket", help="Of the detector. [what those of the dialect have]"),
    ] = None,
    modules: Annotated[
        tuple[int, int], typer.Option(help="slsdet: rows and columns; each module has a port.")
    ] = (1, 1),
    pva_server: Annotated[
        str | None, typer.Option(help=f"pva: where the server listens. [{DEFAULT_SERVER}]")
    ] = None,
    acquire_channel: Annotated[
        str | None, typer.Option(help="pva: a channel that is 1 during a series.")
    ] = None,
    positions_bind: Annotated[
        str, typer.Option(help="Where the positioner binds.")
    ] = "tcp://127.0.0.1:9998",
    positions: Annotated[
        PositionTiming, typer.Option(help="When positions come; `inline`: native and pva.")
    ] = "during",
    positions_dialect: positioner_given.Dialect = None,
    positions_from: positioner_given.From = None,
    positions_socket: positioner_given.Socket = None,
    samples_per_frame: positioner_given.SamplesPerFrame = None,
    samples_per_message: positioner_given.SamplesPerMessage = None,
    jitter_m: positioner_given.JitterM = None,
    serializer: positioner_given.SerializerName = None,
    pages: positioner_given.Pages = False,
    no_positions: Annotated[bool, typer.Option("--no-positions", help="Send frames only.")] = False,
    positions_batch: Annotated[int, typer.Option(min=1, help="Positions a message.")] = 10,
    rate: Annotated[
        float | None, typer.Option(help="Frames a second. [as fast as they are taken]")
    ] = None,
    series: Annotated[int, typer.Option(help="Number of the (first) series.")] = 1,
    repeat: Annotated[int, typer.Option(min=1, help="Series to send, one after another.")] = 1,
    stop_after: Annotated[
        int | None, typer.Option(min=0, help="Abort each series after so many frames.")
    ] = None,
    encoding: Annotated[
        str | None, typer.Option(help="Of the pixels: 'bs16-lz4<', 'lz4<', '<'; others: bslz4 ...")
    ] = None,
    header_detail: Annotated[HeaderDetail, typer.Option(help="Of DECTRIS headers.")] = "basic",
    one_part_each: Annotated[
        bool,
        typer.Option(
            "--one-part-each", help="Send every part as a message of its own, as some proxies do."
        ),
    ] = False,
    timeout: Annotated[float, typer.Option(help="Seconds to wait for a receiver.")] = 30.0,
    config: given.StoreConfig = None,
    as_json: AsJson = False,
) -> None:
    """Stream a recorded scan, of any format, as if it were being measured.

    Waits until somebody receives, then sends frames and positions.

    Example: ptycho-stream replay scan.npz --rate 100 --series 1
    --bind tcp://127.0.0.1:9999 --positions-bind tcp://127.0.0.1:9998

    Example: ptycho-stream replay scan.cxi --dialect native

    Example: ptycho-stream replay master.h5 --y /entry/samy --x /entry/samx --position-unit um
    --rate 50

    Example: ptycho-stream replay scan.npz --one-part-each --positions-from configs/nsls2-hxn.toml
    """
    scan = load_measured(given.scan_path(file, config), choice)
    motion = positioner_given.position_options(
        positions_dialect,
        positions_from,
        samples_per_frame,
        samples_per_message,
        jitter_m,
        serializer,
        pages,
    )
    alone = no_positions or positions == "inline"
    if alone and (motion != PositionOptions() or positions_socket is not None):
        raise typer.BadParameter(
            "there is no positioner: leave out --positions-dialect, --positions-from, "
            "--positions-socket and what goes with them"
        )
    options = DetectorOptions(dialect, encoding, header_detail, rate, one_part_each, modules)
    plan = _Plan(scan, positions, series, repeat, stop_after, positions_batch)
    with ExitStack() as stack:
        if dialect == "pva":
            if detector_socket is not None:
                raise typer.BadParameter("--socket is of ZeroMQ: leave it out for pva")
            server = pva_server or DEFAULT_SERVER
            detector = stack.enter_context(
                PvaDetectorSimulator(bind, options, server, acquire_channel, timeout)
            )
        else:
            if pva_server is not None or acquire_channel is not None:
                raise typer.BadParameter("--pva-server and --acquire-channel are of pva only")
            detector = stack.enter_context(
                DetectorSimulator(bind, options, timeout_s=timeout, kind=detector_socket)
            )
        positioner = None
        if not alone:
            kind = positioner_given.socket_kind(positions_socket, motion.dialect)
            positioner = stack.enter_context(
                PositionSimulator(positions_bind, kind, timeout_s=timeout, options=motion)
            )
        console = Console(stderr=True)
        with console.status(f"waiting for a receiver at {detector.endpoint}"):
            detector.wait_for_receiver()
            if positioner is not None:
                positioner.wait_for_receiver()
        started_s = time.monotonic()
        sent = _stream(plan, detector, positioner, console)
        elapsed_s = time.monotonic() - started_s
    if as_json:
        report = {"sent": sent, "series": repeat, "elapsed_s": round(elapsed_s, 3)}
        typer.echo(json.dumps(report))
    else:
        rate_text = f"{sent / elapsed_s:.0f} frames/s" if elapsed_s > 0 else ""
        typer.echo(f"sent {sent} frames in {repeat} series, {elapsed_s:.1f} s {rate_text}")


def _stream(
    plan: _Plan,
    detector: SimulatedDetector,
    positioner: PositionSimulator | None,
    console: Console,
) -> int:
    total = 0
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TaskProgressColumn(show_speed=True),
    )
    # In a pipe there is no bar, only the summary at the end.
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task("", total=plan.frames)
        for number in range(plan.first_series, plan.first_series + plan.repeat):
            before = total

            def sent(count: int, before: int = before) -> None:
                progress.update(task, completed=before + count)

            progress.update(task, description=f"series {number}")
            total += play(
                plan.scan,
                detector,
                positioner,
                plan.timing,
                number,
                plan.stop_after,
                plan.batch,
                on_frame=sent,
            )
    return total
