"""``ptycho-stream COMMAND``: all that a person types.

Each command is a module of this package; only the one that is called is imported, so that none
waits for another's dependencies.  Faults that a user can mend end as one line on stderr and exit
status 1, wrong usage as status 2.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

import typer
from rich.console import Console

from ptycho_stream.errors import PtychoStreamError

# Name -> (module, attribute: a function, or an app with commands of its own).
COMMANDS = {
    "demo": ("ptycho_stream.cli.demo", "demo"),
    "simulate": ("ptycho_stream.cli.simulate", "simulate"),
    "replay": ("ptycho_stream.cli.replay", "replay"),
    "reconstruct": ("ptycho_stream.cli.reconstruct", "reconstruct"),
    "watch": ("ptycho_stream.cli.watch", "watch"),
    "ctl": ("ptycho_stream.cli.ctl", "app"),
    "train": ("ptycho_stream.cli.train", "train"),
    "export": ("ptycho_stream.cli.export", "export"),
    "scans": ("ptycho_stream.cli.scans", "app"),
    "export-detectors": ("ptycho_stream.cli.export_detectors", "export_detectors"),
    "models": ("ptycho_stream.cli.models", "app"),
    "config": ("ptycho_stream.cli.config", "app"),
    "keys": ("ptycho_stream.cli.keys", "app"),
    "doctor": ("ptycho_stream.cli.doctor", "doctor"),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit status."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    try:
        build_app(given)(args=given, prog_name="ptycho-stream")
    except PtychoStreamError as error:
        console = Console(stderr=True, soft_wrap=True, highlight=False)
        console.print("error:", style="bold red", end=" ")
        console.print(str(error), style="red", markup=False)
        return 1
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    return 0


def build_app(arguments: Sequence[str]) -> typer.Typer:
    """The program with the command that ``arguments`` name, or with all of them."""
    app = typer.Typer(
        help="Live ptychography: a scan becomes an image while it is running.\n\n"
        "Example: ptycho-stream watch --once --out image.npz",
        no_args_is_help=True,
        pretty_exceptions_enable=False,
        rich_markup_mode=None,
    )
    app.callback()(_nothing_before_commands)
    named = next((word for word in arguments if not word.startswith("-")), None)
    for name in [named] if named in COMMANDS else COMMANDS:
        module, attribute = COMMANDS[name]
        command = getattr(importlib.import_module(module), attribute)
        if isinstance(command, typer.Typer):
            app.add_typer(command, name=name)
        else:
            app.command(name)(command)
    return app


def _nothing_before_commands() -> None:
    """Without a callback typer would drop the name of an only command."""
