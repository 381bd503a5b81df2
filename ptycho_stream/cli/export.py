"""``ptycho-stream export``: write the newest or a named scan's image into files on this machine.

It fetches the image from the resync socket as any subscriber would, or reads it from a file; the
daemon writes nothing.  (``ctl export`` makes the daemon write from its store, also for scans of
long ago.)  Formats with room for frames take them from the scan's folder.  ``--report`` adds how
the image came about, which the daemon tells over its control socket, or a scan's folder.
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
from ptycho_stream.files.products import ENDINGS, format_of, write_result
from ptycho_stream.messages import DetectorGeometry
from ptycho_stream.scans.header import read_header
from ptycho_stream.scans.reader import ScanReader

if TYPE_CHECKING:
    from ptycho_stream.keys import ClientKeys
    from ptycho_stream.report.scan_report import ScanReport
    from ptycho_stream.results import Image

REPORT_SUFFIXES = (".npz", ".png", ".html")


@keyed
def export(
    files: Annotated[
        list[Path] | None,
        typer.Argument(
            metavar="[FILE...]",
            help=f"Ending in {', '.join(ENDINGS)}; with --report in .html or .png, or none: "
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
            metavar="DIR",
            help="The scan's folder, for its frames (.h5, .cxi, .ptychopinn.npz); with --image "
            "the daemon is not asked.",
        ),
    ] = None,
    timeout: Annotated[
        float | None, typer.Option(metavar="S", min=0, help="Give up after so many seconds.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Write an image into files of other programs' formats (docs/files.md), or a scan's report.

    Example: ptycho-stream export image.npz preview.png product.h5

    Example: ptycho-stream export scan.cxi --folder data/scans/01JBQ3N8Z5T0V6W7X8Y9ZABCDE
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
    to_write = [file for file in written if file.suffix == ".npz" or not report]
    if folder is not None and not report:
        with ScanReader(_folder_of(image, folder)) as reader:
            for file in to_write:
                _write(image, file, frames=reader)
    else:
        asks = any(format_of(file) in _WITH_GEOMETRY for file in to_write) and image_file is None
        geometry = _geometry(image, config, endpoint, timeout) if asks else None
        for file in to_write:
            _write(image, file, geometry=geometry)
    if as_json:
        typer.echo(json.dumps({**summary(image), "files": [str(file) for file in written]}))
    else:
        typer.echo(f"{line(image, 0.0)} -> {', '.join(str(file) for file in written)}")


def _check(
    files: list[Path], scan: str | None, image_file: Path | None, report: bool, folder: Path | None
) -> None:
    """Refuse what makes no sense together, as wrong usage."""
    endings = REPORT_SUFFIXES if report else ENDINGS
    for file in files:
        if not file.name.lower().endswith(endings):
            hint = " (.html needs --report)" if file.suffix == ".html" else ""
            raise typer.BadParameter(f"{file}: the name must end in {' or '.join(endings)}{hint}")
        if format_of(file) == "ptychodus" and image_file is not None and folder is None:
            raise typer.BadParameter(
                f"{file}: energy and distance are not in {image_file}: name the scan's --folder"
            )
    if not files and not report:
        raise typer.BadParameter(f"name the files to write, ending in {', '.join(ENDINGS)}")
    if image_file is not None and scan is not None:
        raise typer.BadParameter("--image is of one scan already: leave --scan out")
    if folder is not None and report and image_file is None:
        raise typer.BadParameter("--folder with --report needs --image")


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


_WITH_GEOMETRY = ("ptychodus", "cxi")
"""Formats that say energy, distance and detector pixel, which an image does not have."""


def _write(
    image: Image,
    file: Path,
    frames: ScanReader | None = None,
    geometry: DetectorGeometry | None = None,
) -> None:
    kind = format_of(file)
    assert kind is not None  # by _check
    write_result(image, file, kind, frames, geometry=geometry)


def _folder_of(image: Image, folder: Path) -> Path:
    """The folder, if it is that of the image's scan."""
    held = read_header(folder)
    if held.scan_id != image.scan_id:
        raise ScanNotFound(
            f"{folder} is the folder of scan {held.scan_id} and the image is of {image.scan_id}: "
            "name the folder of that"
        )
    return folder


def _geometry(
    image: Image, config: Path | None, endpoint: str | None, timeout_s: float | None
) -> DetectorGeometry:
    """Energy, distance and detector pixel of a scan, as the daemon has them."""
    from ptycho_stream.client import Daemon

    with Daemon(control_endpoint(config, endpoint), timeout_s=timeout_s or 10.0) as daemon:
        told: dict[str, Any] = daemon.scan(image.scan_id)["geometry"]
    values: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value for name, value in told.items()
    }
    return DetectorGeometry(**values)


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
        header = json.loads(read_header(_folder_of(image, folder)).to_json())
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
