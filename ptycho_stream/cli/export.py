"""``ptycho-stream export``: write the newest or a named scan's image into files on this machine.

It fetches the image from the resync socket as any subscriber would, or reads it from a file; the
daemon writes nothing.  (``ctl export`` makes the daemon write from its store, also for scans of
long ago.)  ``--report`` adds how the image came about, which the daemon tells over its control
socket, or a scan's folder.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ptycho_stream.cli.image_words import line, summary
from ptycho_stream.cli.key_options import client_keys, keyed
from ptycho_stream.cli.options import (
    AsJson,
    Config,
    ControlEndpoint,
    ResultsEndpoint,
    ResyncEndpoint,
    control_endpoint,
    result_endpoints,
)
from ptycho_stream.cli.watch import SILENCE_ONCE_S, fetch
from ptycho_stream.errors import ScanNotFound

if TYPE_CHECKING:
    from ptycho_stream.keys import ClientKeys
    from ptycho_stream.report.scan_report import ScanReport
    from ptycho_stream.results import Image

SUFFIXES = (".npz", ".png")
REPORT_SUFFIXES = (*SUFFIXES, ".html")


@keyed
def export(
    files: Annotated[
        list[Path] | None,
        typer.Argument(
            metavar="[FILE...]",
            help="Ending in .npz or .png; with --report in .html or .png, or none: "
            "ID-report.html and ID-report.png.",
        ),
    ] = None,
    config: Config = None,
    results: ResultsEndpoint = None,
    resync: ResyncEndpoint = None,
    endpoint: ControlEndpoint = None,
    scan: Annotated[
        str | None, typer.Option(metavar="ID", help="This scan; without it the newest one.")
    ] = None,
    image_file: Annotated[
        Path | None,
        typer.Option("--image", metavar="FILE.npz", help="This export or snapshot instead."),
    ] = None,
    report: Annotated[
        bool, typer.Option("--report", help="Write the scan's report: image, curves, verdict.")
    ] = False,
    folder: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR", help="With --report and --image: the scan's folder; asks no daemon."
        ),
    ] = None,
    timeout: Annotated[
        float | None, typer.Option(metavar="S", min=0, help="Give up after so many seconds.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Write an image as NPZ (arrays) or PNG (phase and amplitude), or a scan's report.

    Example: ptycho-stream export image.npz preview.png
    """
    _check(files or [], scan, image_file, report, folder)
    if image_file is not None:
        from ptycho_stream.files.image_npz import load_image

        image = load_image(image_file)
    else:
        endpoints = result_endpoints(config, results, resync)
        image = _newest(endpoints, client_keys(config), scan, timeout)
    written = files or [Path(f"{image.scan_id}-report{suffix}") for suffix in (".html", ".png")]
    if report:
        known = _known(image, folder, config, endpoint, timeout)
        _write_report(known, [file for file in written if file.suffix != ".npz"])
    for file in written:
        if file.suffix == ".npz" or not report:
            _write(image, file)
    if as_json:
        typer.echo(json.dumps({**summary(image), "files": [str(file) for file in written]}))
    else:
        typer.echo(f"{line(image, 0.0)} -> {', '.join(str(file) for file in written)}")


def _check(
    files: list[Path], scan: str | None, image_file: Path | None, report: bool, folder: Path | None
) -> None:
    """Refuse what makes no sense together, as wrong usage."""
    suffixes = REPORT_SUFFIXES if report else SUFFIXES
    for file in files:
        if file.suffix not in suffixes:
            hint = " (.html needs --report)" if file.suffix == ".html" else ""
            raise typer.BadParameter(f"{file}: the name must end in {' or '.join(suffixes)}{hint}")
    if not files and not report:
        raise typer.BadParameter("name the files to write, ending in .npz or .png")
    if image_file is not None and scan is not None:
        raise typer.BadParameter("--image is of one scan already: leave --scan out")
    if folder is not None and not (report and image_file is not None):
        raise typer.BadParameter("--folder needs --report and --image")


def _newest(
    endpoints: tuple[str, str],
    keys: ClientKeys | None,
    scan: str | None,
    timeout_s: float | None,
) -> Image:
    from ptycho_stream.client import ResultStream

    silence_s = SILENCE_ONCE_S if timeout_s is None else timeout_s
    try:
        with ResultStream(*endpoints, scan_id=scan, timeout_s=silence_s, keys=keys) as stream:
            return fetch(stream, timeout_s)
    except ScanNotFound as error:
        raise ScanNotFound(
            f"{error}; `ptycho-stream ctl export {scan}` writes it as NPZ from the store, which "
            "--image reads"
        ) from error


def _write(image: Image, file: Path) -> None:
    if file.suffix == ".npz":
        image.save(file)
        return
    from ptycho_stream.files.images import save_png

    save_png(image, file)


def _known(
    image: Image,
    folder: Path | None,
    config: Path | None,
    endpoint: str | None,
    timeout_s: float | None,
) -> ScanReport:
    """All that a report tells, from the scan's folder or from the daemon."""
    from ptycho_stream.reconstruct.history import HistoryEntry, read_history
    from ptycho_stream.report.scan_report import ScanReport

    header: dict[str, Any]
    if folder is not None:
        from ptycho_stream.scans.header import read_header

        held = read_header(folder)
        if held.scan_id != image.scan_id:
            raise ScanNotFound(
                f"{folder} is the folder of scan {held.scan_id} and the image is of "
                f"{image.scan_id}: name the folder of that"
            )
        header = json.loads(held.to_json())
        return ScanReport(image, read_history(folder), header)
    from ptycho_stream.client import Daemon

    asked, keys = control_endpoint(config, endpoint), client_keys(config)
    with Daemon(asked, timeout_s=timeout_s or 10.0, keys=keys) as daemon:
        header = daemon.scan(image.scan_id)
        entries: list[dict[str, Any]] = daemon.history(image.scan_id)["entries"]
    for entry in entries:
        entry["reasons"] = tuple(entry["reasons"])
    return ScanReport(image, [HistoryEntry(**entry) for entry in entries], header)


def _write_report(report: ScanReport, files: list[Path]) -> None:
    from ptycho_stream.atomic_file import atomic_file
    from ptycho_stream.report.figure import draw
    from ptycho_stream.report.page import page

    picture = draw(report)
    # What cannot be UTF-8 (half a surrogate pair in metadata) is no reason to go without.
    text = page(report, picture).encode("utf-8", "backslashreplace")
    for file in files:
        with atomic_file(file) as held:
            held.write(text if file.suffix == ".html" else picture)
