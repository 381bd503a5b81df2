"""``ptycho-stream doctor``: look at everything a configuration names and say what is wrong.

It never takes a frame: a running daemon is asked what it knows of its sockets, and where there is
none, endpoints are only knocked at (:mod:`ptycho_stream.cli.knock`).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from ptycho_stream.cli.checkup import Finding, check_files, check_machine
from ptycho_stream.cli.endpoint_checkup import check_endpoints
from ptycho_stream.cli.key_checkup import check_keys
from ptycho_stream.cli.key_options import client_keys, keyed
from ptycho_stream.cli.options import AsJson
from ptycho_stream.cli.positions_checkup import check_known_positions
from ptycho_stream.errors import KeyFileError
from ptycho_stream.keys import ClientKeys
from ptycho_stream.settings import load_settings

_STYLES = {True: "green", False: "red"}


@keyed
def doctor(
    config: Annotated[Path, typer.Option("--config", "-c", help="The daemon's TOML file.")],
    timeout: Annotated[float, typer.Option(help="Seconds an endpoint may take to answer.")] = 2.0,
    as_json: AsJson = False,
) -> None:
    """Check endpoints, files, disk and device of a configuration, without taking a frame.

    Says of every endpoint whether it is OK, silent, refused, or asks for another key; and of keys
    and their permissions, the probe, the model, the data directory and the GPU, and of positions
    from a file or a generated path, whether they can be used. The exit status is 1 if something is
    wrong.

    Example: ptycho-stream doctor --config beamline.toml
    """
    settings = load_settings(config)
    findings = [
        *check_endpoints(settings, timeout, _keys(config)),
        *check_keys(settings),
        *check_known_positions(settings),
        *check_files(settings),
        *check_machine(settings),
    ]
    if as_json:
        typer.echo(json.dumps([finding.as_dict() for finding in findings], indent=2))
    else:
        _print(findings)
    if not all(finding.ok for finding in findings):
        raise typer.Exit(1)


def _keys(config: Path) -> ClientKeys | None:
    """To ask the daemon with; None where there are none that can be used, which is a finding."""
    try:
        return client_keys(config)
    except KeyFileError as error:
        typer.echo(f"the daemon is not asked: {error}", err=True)
        return None


def _print(findings: list[Finding]) -> None:
    console = Console()
    if not console.is_terminal:
        for finding in findings:
            typer.echo(f"{finding.subject}\t{finding.state}\t{finding.target}\t{finding.detail}")
        return
    table = Table("checked", "state", "where", "what was found", box=None, pad_edge=False)
    for finding in findings:
        state = f"[{_STYLES[finding.ok]}]{finding.state}[/]"
        table.add_row(finding.subject, state, finding.target, finding.detail)
    console.print(table)
