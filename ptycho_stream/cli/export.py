"""``ptycho-stream export``: write the newest or a named scan's image into files on this machine.

It fetches the image from the resync socket as any subscriber would; the daemon writes nothing.
(``ctl export`` makes the daemon write from its store, also for scans of long ago.)
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ptycho_stream.cli.options import (
    AsJson,
    Config,
    ResultsEndpoint,
    ResyncEndpoint,
    result_endpoints,
)
from ptycho_stream.cli.watch import SILENCE_ONCE_S, fetch, line, summary

if TYPE_CHECKING:
    from ptycho_stream.results import Image

SUFFIXES = (".npz", ".png")


def export(
    files: Annotated[list[Path], typer.Argument(metavar="FILE...", help="Ending in .npz or .png.")],
    config: Config = None,
    results: ResultsEndpoint = None,
    resync: ResyncEndpoint = None,
    scan: Annotated[
        str | None, typer.Option(metavar="ID", help="This scan; without it the newest one.")
    ] = None,
    timeout: Annotated[
        float | None, typer.Option(metavar="S", min=0, help="Give up after so many seconds.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Write an image that the daemon holds, as NPZ (arrays) or PNG (phase and amplitude).

    Example: ptycho-stream export image.npz preview.png
    """
    from ptycho_stream.client import ResultStream

    for file in files:
        if file.suffix not in SUFFIXES:
            raise typer.BadParameter(f"{file}: the name must end in {' or '.join(SUFFIXES)}")
    endpoints = result_endpoints(config, results, resync)
    silence_s = SILENCE_ONCE_S if timeout is None else timeout
    with ResultStream(*endpoints, scan_id=scan, timeout_s=silence_s) as stream:
        image = fetch(stream, timeout)
    for file in files:
        _write(image, file)
    if as_json:
        typer.echo(json.dumps({**summary(image), "files": [str(file) for file in files]}))
    else:
        typer.echo(f"{line(image, 0.0)} -> {', '.join(str(file) for file in files)}")


def _write(image: Image, file: Path) -> None:
    if file.suffix == ".npz":
        image.save(file)
        return
    from ptycho_stream.files.images import save_png

    save_png(image, file)
