"""``ptycho-stream ctl snapshot``, ``snapshots``, ``reprocess`` and ``frame``: images and frames."""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from rich.table import Table

from ptycho_stream.atomic_file import atomic_file
from ptycho_stream.cli.options import (
    AsJson,
    Config,
    ControlEndpoint,
    Timeout,
    call_daemon,
    print_result,
    print_table,
    utc,
)
from ptycho_stream.wire.stored import frame_of

app = typer.Typer(rich_markup_mode=None)

ScanId = Annotated[
    str | None, typer.Argument(metavar="[ID]", help="The scan; without it the newest.")
]


@app.command()
def snapshot(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Letters, digits, '.', '_', '-'.")],
    scan: Annotated[
        str | None, typer.Option(metavar="ID", help="This scan; without it the newest one.")
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Replace the snapshot that has this name.")
    ] = False,
    config: Config = None,
    endpoint: ControlEndpoint = None,
    timeout: Timeout = None,
    as_json: AsJson = False,
) -> None:
    """Keep the image as it is now, under a name, in the scan's folder.

    Example: ptycho-stream ctl snapshot before-realignment
    """
    arguments = {"name": name, "scan_id": scan, "force": force}
    print_result(call_daemon("snapshot", arguments, config, endpoint, timeout), as_json)


@app.command()
def snapshots(
    scan_id: ScanId = None,
    config: Config = None,
    endpoint: ControlEndpoint = None,
    timeout: Timeout = None,
    as_json: AsJson = False,
) -> None:
    """List the snapshots of a scan, oldest first.

    Example: ptycho-stream ctl snapshots
    """
    found = call_daemon("snapshots", {"scan_id": scan_id}, config, endpoint, timeout)
    if as_json:
        typer.echo(json.dumps(found))
        return
    table = Table(box=None, pad_edge=False)
    for column in ("name", "taken (UTC)", "frames", "layer", "verdict", "file"):
        table.add_column(column, overflow="fold")
    for held in found:
        table.add_row(
            str(held["name"]),
            utc(held["taken_ns"]) if "taken_ns" in held else "",
            str(held.get("frames", "")),
            str(held.get("layer", "")),
            str(held.get("problem") or held.get("verdict", "")),
            str(held["path"]),
        )
    print_table(table)


@app.command()
def frame(
    scan_id: ScanId = None,
    number: Annotated[
        int | None, typer.Option(metavar="N", min=0, help="Of the frame; without it the newest.")
    ] = None,
    stored: Annotated[
        bool, typer.Option("--stored", help="As it is stored, not as the network sees it.")
    ] = False,
    out: Annotated[
        Path | None,
        typer.Option(metavar="FILE.npz", help="Write `counts` and `valid` into this file."),
    ] = None,
    config: Config = None,
    endpoint: ControlEndpoint = None,
    timeout: Timeout = None,
    as_json: AsJson = False,
) -> None:
    """Look at a stored frame of a scan.

    Example: ptycho-stream ctl frame --number 12 --out frame.npz
    """
    look = "stored" if stored else "view"
    arguments = {"scan_id": scan_id, "frame": number, "look": look}
    found = frame_of(call_daemon("frame", arguments, config, endpoint, timeout))
    words = {
        field.name: getattr(found, field.name)
        for field in fields(found)
        if not field.name.endswith("_yx")
    }
    words |= {"shape_yx": list(found.counts_yx.shape), "total": float(found.counts_yx.sum())}
    words["masked"] = int((~found.valid_yx).sum())
    if out is not None:
        with atomic_file(out) as file:
            np.savez(file, allow_pickle=False, counts=found.counts_yx, valid=found.valid_yx)
    print_result(words, as_json)


@app.command()
def reprocess(
    scan_id: ScanId = None,
    probe: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="On the daemon's machine; without it its settings'."),
    ] = None,
    model: Annotated[
        str | None, typer.Option(metavar="NAME", help="Without it the one in use.")
    ] = None,
    orientation: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Of the detector: identity, rotate90, rotate180, rotate270, flip_y, flip_x, "
            "transpose or antitranspose.",
        ),
    ] = None,
    center: Annotated[
        tuple[float, float] | None,
        typer.Option(metavar="Y X", help="Zero frequency, in pixels of the stored frames."),
    ] = None,
    dc: Annotated[
        str | None, typer.Option(metavar="WHERE", help="Zero frequency: center or corner.")
    ] = None,
    bad_pixels: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="Mask, on the daemon's machine; 'none': without."),
    ] = None,
    flat_field: Annotated[
        str | None, typer.Option(metavar="FILE", help="Response of each pixel; likewise.")
    ] = None,
    background: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="Counts a frame; likewise, or 'dark-frames'."),
    ] = None,
    bad_frames: Annotated[
        str | None, typer.Option(metavar="FILE", help="Frames to leave out; likewise.")
    ] = None,
    config: Config = None,
    endpoint: ControlEndpoint = None,
    timeout: Timeout = None,
    as_json: AsJson = False,
) -> None:
    """Make a scan's image anew from its stored frames; the present one is shown meanwhile.

    Example: ptycho-stream ctl reprocess --orientation flip_x --probe better.npz
    """
    arguments = {
        "scan_id": scan_id,
        "probe": None if probe is None else str(probe.absolute()),
        "model": model,
        "orientation": orientation,
        "center_yx_px": center,
        "dc": dc,
        "bad_pixels": _absolute(bad_pixels),
        "flat_field": _absolute(flat_field),
        "background": _absolute(background),
        "bad_frames": _absolute(bad_frames),
    }
    print_result(call_daemon("reprocess", arguments, config, endpoint, timeout), as_json)


def _absolute(source: str | None) -> str | None:
    """A file as the daemon finds it; words that stand for none stay as they are."""
    return source if source in (None, "none", "dark-frames") else str(Path(source).absolute())
