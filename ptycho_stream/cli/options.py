"""Options that several commands share: where the daemon is, how long to wait, how to print.

An endpoint comes from its own option, else from the daemon's configuration file, else from the
defaults of the settings.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

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
        from ptycho_stream.settings import load_settings

        settings = load_settings(config).results
        return results or settings.endpoint, resync or settings.resync_endpoint
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
    from ptycho_stream.settings import load_settings

    return load_settings(config).control.endpoint


def print_table(table: Table) -> None:
    """Print a table, in a pipe as wide as it needs to be: nobody chose a width there."""
    console = Console()
    if not console.is_terminal:
        console = Console(width=1000)
    console.print(table)
