"""Options that several commands share: where the daemon is, how long to wait, how to print.

An endpoint comes from its own option, else from the daemon's configuration file, else from the
defaults of the settings.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, cast

import typer
from rich.console import Console
from rich.table import Table

from ptycho_stream.cli.key_options import client_keys
from ptycho_stream.errors import EndpointError

Config = Annotated[
    Path | None,
    typer.Option("--config", "-c", help="The daemon's TOML file, for its endpoints."),
]
ResultsEndpoint = Annotated[
    str | None, typer.Option("--results", metavar="ENDPOINT", help="results.endpoint")
]
ResyncEndpoint = Annotated[
    str | None, typer.Option("--resync", metavar="ENDPOINT", help="results.resync_endpoint")
]
ControlEndpoint = Annotated[
    str | None, typer.Option("--endpoint", metavar="ENDPOINT", help="control.endpoint")
]
Timeout = Annotated[
    float | None, typer.Option(metavar="S", min=0, help="How long the answer may take.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")]


def result_endpoints(
    config: Path | None, results: str | None, resync: str | None
) -> tuple[str, str]:
    """Endpoints of updates and of resync.

    Raises:
        SettingsError: the configuration file is wrong.
        EndpointError: only one of the two is given, without a file.
    """
    from ptycho_stream.client import RESULTS_ENDPOINT, RESYNC_ENDPOINT

    if config is not None:
        from ptycho_stream.settings import load_settings, reachable

        settings = load_settings(config).results
        return (
            results or reachable(settings.endpoint),
            resync or reachable(settings.resync_endpoint),
        )
    if (results is None) != (resync is None):
        raise EndpointError(
            "only one of --results and --resync is given: they belong to one daemon, give both, "
            "or --config"
        )
    return results or RESULTS_ENDPOINT, resync or RESYNC_ENDPOINT


def control_endpoint(config: Path | None, endpoint: str | None) -> str:
    """Endpoint of the control socket.

    Raises:
        SettingsError: the configuration file is wrong.
    """
    from ptycho_stream.remote import CONTROL_ENDPOINT

    if endpoint is not None:
        return endpoint
    if config is None:
        return CONTROL_ENDPOINT
    from ptycho_stream.settings import load_settings, reachable

    return reachable(load_settings(config).control.endpoint)


def print_table(table: Table) -> None:
    """Print a table, in a pipe as wide as it needs to be: nobody chose a width there."""
    console = Console()
    if not console.is_terminal:
        console = Console(width=1000)
    console.print(table)


def print_scans(headers: Sequence[Mapping[str, Any]]) -> None:
    """Print a line for each scan, from what its header says."""
    table = Table(box=None, pad_edge=False)
    columns = ("scan", "detector", "state", "series", "began (UTC)", "expected", "counts", "reason")
    for column in columns:
        table.add_column(column, overflow="fold")
    for header in headers:
        counts: Mapping[str, int] = header.get("counts") or {}
        table.add_row(
            str(header["scan_id"]),
            _detector_of(header),
            str(header["state"]),
            str(header.get("series", "")),
            utc(header["created_ns"]) if "created_ns" in header else "",
            str(header.get("expected_frames") or "-"),
            ", ".join(f"{name} {count}" for name, count in counts.items() if count),
            str(header.get("reason", "")),
        )
    print_table(table)


def _detector_of(header: Mapping[str, Any]) -> str:
    """A stored detector, and beside which scan its frames are; empty: the reconstructed one."""
    name, beside = header.get("detector") or "", header.get("beside")
    return f"{name} beside {beside}" if name and beside else name


def call_daemon(
    command: str,
    arguments: Mapping[str, Any],
    config: Path | None,
    endpoint: str | None,
    timeout_s: float | None,
) -> Any:
    """Ask the daemon.

    Raises:
        ControlError: it refused or failed.
        EndpointError: it does not answer, or does not let us in.
        KeyFileError: a key that is to be shown cannot be used.
    """
    from ptycho_stream.client import Daemon

    with Daemon(control_endpoint(config, endpoint), keys=client_keys(config)) as daemon:
        return daemon.call(command, arguments, timeout_s)


def print_result(result: Any, as_json: bool) -> None:
    """Print an answer as JSON, or as a line for each value in it."""
    if as_json:
        typer.echo(json.dumps(result))
        return
    for key, value in _flat(result):
        typer.echo(f"{key}: {value}" if key else str(value))


def _flat(value: object, name: str = "") -> list[tuple[str, object]]:
    """Nested values as lines of dotted names."""
    items: Sequence[tuple[object, object]]
    if isinstance(value, Mapping) and value:
        items = list(cast("Mapping[object, object]", value).items())
    elif isinstance(value, list) and value:
        items = list(enumerate(cast("list[object]", value)))
    else:
        return [(name, _word(name, value))]
    lines: list[tuple[str, object]] = []
    for key, held in items:
        lines += _flat(held, f"{name}.{key}" if name else str(key))
    return lines


def _word(name: str, value: object) -> str:
    if value is None:
        return "-"
    if name.endswith("_ns") and isinstance(value, int) and "monotonic" not in name:
        return utc(value)
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def utc(time_ns: int) -> str:
    """A time in nanoseconds for people."""
    return f"{datetime.fromtimestamp(time_ns / 1e9, UTC):%Y-%m-%d %H:%M:%S}"
