"""``ptycho-stream scans …``: the scan store on disk, also where no daemon runs.

Looks at scans, checks them for damage, brings damaged ones back to what is whole of them, deletes
them.  What a running daemon knows of them is in ``ptycho-stream ctl scans``.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from ptycho_stream.cli.options import AsJson, Config, print_result, print_scans
from ptycho_stream.errors import ScanNotFound, StoreError

if TYPE_CHECKING:
    from ptycho_stream.scans.catalogue import Catalogue
    from ptycho_stream.scans.inspection import Fault

app = typer.Typer(
    help="Look after the scans on disk.\n\nExample: ptycho-stream scans verify --data data",
    no_args_is_help=True,
    rich_markup_mode=None,
)

Data = Annotated[
    Path | None,
    typer.Option("--data", metavar="DIR", help="The data directory; else the configuration's."),
]
ScanId = Annotated[str, typer.Argument(metavar="ID", help="The scan.")]


def _catalogue(config: Path | None, data: Path | None) -> Catalogue:
    from ptycho_stream.scans.catalogue import Catalogue
    from ptycho_stream.settings import DataSettings, load_settings

    if data is None:
        settings = DataSettings() if config is None else load_settings(config).data
        data = settings.directory
    if not data.is_dir():
        raise StoreError(f"there is no data directory {data}: name it with --data or --config")
    return Catalogue(data)


@app.command("list")
def list_scans(config: Config = None, data: Data = None, as_json: AsJson = False) -> None:
    """List the scans, newest first.

    Example: ptycho-stream scans list --data data
    """
    found = [json.loads(header.to_json()) for header in _catalogue(config, data).scans()]
    if as_json:
        typer.echo(json.dumps(found))
    else:
        print_scans(found)


@app.command()
def show(
    scan_id: ScanId, config: Config = None, data: Data = None, as_json: AsJson = False
) -> None:
    """Say all that is known of a scan.

    Example: ptycho-stream scans show 01JBQ3N8Z5T0V6W7X8Y9ZABCDE
    """
    with _catalogue(config, data).open(scan_id) as reader:
        told = json.loads(reader.header.to_json()) | {
            "committed": reader.committed,
            "durable": reader.durable,
            "pairs": reader.pair_count,
            "positions": reader.position_count,
        }
    print_result(told, as_json)


@app.command()
def verify(
    scan_ids: Annotated[
        list[str] | None, typer.Argument(metavar="[ID...]", help="Scans; without any, all.")
    ] = None,
    config: Config = None,
    data: Data = None,
    as_json: AsJson = False,
) -> None:
    """Check scans for damage: checksums, records, pairs, files of views, saved images.

    Nothing is changed. Ends with status 1 if anything is wrong, and says what to do about it.

    Example: ptycho-stream scans verify --data data
    """
    catalogue = _catalogue(config, data)
    found: dict[str, list[Fault]] = {}
    with _progress(catalogue, scan_ids or catalogue.ids(), quiet=as_json) as (names, advance):
        for scan_id in names:
            try:
                found[scan_id] = _faults(catalogue.directory(scan_id), advance)
            except ScanNotFound:
                if scan_ids:
                    raise
    if as_json:
        typer.echo(
            json.dumps({name: [asdict(f) for f in faults] for name, faults in found.items()})
        )
    else:
        for scan_id, faults in found.items():
            typer.echo(f"{scan_id}: {'whole' if not faults else f'{len(faults)} fault(s)'}")
            for fault in faults:
                typer.echo(f"  {fault.part}: {fault.what}\n    {fault.advice}")
    if any(found.values()):
        raise typer.Exit(1)


def _faults(directory: Path, advance: Callable[[int], None]) -> list[Fault]:
    from ptycho_stream.reconstruct.saved_image import STATE_FILE, state_problem
    from ptycho_stream.scans.inspection import Fault, inspect_scan

    faults = inspect_scan(directory, advance)
    if problem := state_problem(directory):
        advice = f"`ptycho-stream ctl reprocess {directory.name}` makes the image again"
        faults.append(Fault(STATE_FILE, problem, advice))
    return faults


@contextmanager
def _progress(
    catalogue: Catalogue, scan_ids: list[str], *, quiet: bool
) -> Generator[tuple[list[str], Callable[[int], None]]]:
    """A bar of frames on the terminal, for as long as the block lasts."""
    frames = {header.scan_id: int(header.counts.get("frames", 0)) for header in catalogue.scans()}
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    console = Console(stderr=True, quiet=quiet)
    with Progress(*columns, TimeRemainingColumn(), console=console, transient=True) as bar:
        task = bar.add_task("frames", total=sum(frames.get(name, 0) for name in scan_ids))
        yield scan_ids, lambda count: bar.advance(task, count)


@app.command()
def recover(
    scan_id: ScanId, config: Config = None, data: Data = None, as_json: AsJson = False
) -> None:
    """Bring a damaged scan to what is whole of it; an open one is sealed as interrupted.

    The daemon does this at its start with scans that it finds open. What is damaged beyond repair
    is dropped from the scan for good: copy its folder first if you want to keep it.

    Example: ptycho-stream scans recover 01JBQ3N8Z5T0V6W7X8Y9ZABCDE
    """
    report: dict[str, Any] = asdict(_catalogue(config, data).recover(scan_id))
    print_result(report, as_json)


@app.command()
def delete(
    scan_id: ScanId,
    config: Config = None,
    data: Data = None,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
    as_json: AsJson = False,
) -> None:
    """Delete a scan that is sealed and that nobody works on, and the scans beside it.

    Example: ptycho-stream scans delete 01JBQ3N8Z5T0V6W7X8Y9ZABCDE --yes
    """
    catalogue = _catalogue(config, data)
    if not yes:
        going = " and ".join([str(catalogue.directory(scan_id)), *catalogue.beside(scan_id)])
        typer.confirm(f"delete {going} for good?", abort=True)
    deleted, freed_bytes = catalogue.delete(scan_id)
    print_result({"deleted": deleted, "freed_bytes": freed_bytes}, as_json)
