"""``ptycho-stream config check FILE``: whether the daemon would take this configuration file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from ptycho_stream.cli.options import AsJson
from ptycho_stream.errors import ProbeError, SettingsError

app = typer.Typer(
    help="Work on configuration files.\n\nExample: ptycho-stream config check daemon.toml",
    no_args_is_help=True,
    rich_markup_mode=None,
)


@app.callback()
def _only_subcommands() -> None:
    """Keep ``check`` a word of its own even while it is the only command."""


@app.command()
def check(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="The daemon's TOML file.")],
    as_json: AsJson = False,
) -> None:
    """Explain every problem of a configuration file by its key.

    With --json the settings in force are printed, defaults included, or the problem.

    Example: ptycho-stream config check configs/demo.toml
    """
    from ptycho_stream.cli.checkup import check_optics
    from ptycho_stream.cli.positions_checkup import check_generated
    from ptycho_stream.settings import load_settings

    try:
        settings = load_settings(file)
        try:
            check_optics(settings)
        except ProbeError as error:
            raise SettingsError(f"{file} has 1 problem(s):\n  probe.optics: {error}") from error
        path = settings.positions.generated
        found = None if path is None else check_generated(path, settings)
        if found is not None and not found.ok:
            text = f"{file} has 1 problem(s):\n  positions.generated: {found.detail}"
            raise SettingsError(text)
    except SettingsError as error:
        if not as_json:
            raise
        typer.echo(json.dumps({"ok": False, "problem": str(error)}))
        raise typer.Exit(1) from None
    if as_json:
        typer.echo(json.dumps({"ok": True, "settings": settings.model_dump(mode="json")}))
    else:
        typer.echo(f"{file} is sound")
