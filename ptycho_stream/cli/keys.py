"""``ptycho-stream keys …``: make keys, and say who may connect to a daemon.

``new`` and ``show`` work on key files, ``allow``, ``revoke`` and ``list`` on the allow-list of a
daemon, which reads it again by itself; ``token`` makes the word that its HTTP address asks for.
"""

from __future__ import annotations

import json
import secrets
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table
from rich.text import Text

from ptycho_stream.allow_list import (
    RIGHTS,
    AllowList,
    allow,
    checked_rights,
    read_allow_list,
    revoke,
)
from ptycho_stream.cli.options import AsJson, print_table
from ptycho_stream.errors import KeyFileError
from ptycho_stream.keys import load_public_key, new_key, write_private

app = typer.Typer(
    help="Make keys, and say who may connect to a daemon.\n\n"
    "Example: ptycho-stream keys allow alice alice.key --right subscribe --config daemon.toml",
    no_args_is_help=True,
    rich_markup_mode=None,
)

Name = Annotated[str, typer.Argument(metavar="NAME", help="Of whoever holds the key.")]
Config = Annotated[
    Path | None, typer.Option("--config", "-c", help="The daemon's TOML file, for its allow-list.")
]
ListFile = Annotated[
    Path | None, typer.Option("--list", metavar="FILE", help="The allow-list itself.")
]
TOKEN_BYTES = 32


@app.command()
def new(
    name: Name,
    folder: Annotated[Path, typer.Option(metavar="DIR", help="For the two files.")] = Path(),
    as_json: AsJson = False,
) -> None:
    """Make a pair of keys: NAME.key_secret, which stays with its owner, and NAME.key.

    Example: ptycho-stream keys new alice
    """
    private, public = new_key(folder, name)
    key = load_public_key(str(public))
    if as_json:
        typer.echo(json.dumps({"private": str(private), "public": str(public), "key": key}))
        return
    typer.echo(f"{private}: the private key; keep it to yourself (mode 0600)")
    typer.echo(f"{public}: the public key, for whoever runs the daemon")
    typer.echo(key)


@app.command()
def show(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="NAME.key or NAME.key_secret.")],
) -> None:
    """Print the public key in a key file, and nothing else.

    Example: ptycho-stream keys show /etc/ptycho-stream/daemon.key
    """
    typer.echo(load_public_key(str(file)))


@app.command("allow")
def allow_key(
    name: Name,
    key: Annotated[
        str, typer.Argument(metavar="KEY", help="Its public key in quotes, or a file that has it.")
    ],
    rights: Annotated[
        list[str],
        typer.Option(
            "--right",
            help="publish: send frames and positions; subscribe: receive images; control: ask and "
            "command. Repeatable.",
        ),
    ],
    config: Config = None,
    list_file: ListFile = None,
) -> None:
    """Let a key in, or give it other rights; connections need no restart of the daemon.

    Example: ptycho-stream keys allow alice alice.key --right subscribe --right control -c my.toml
    """
    path = _list_path(config, list_file)
    entry = allow(path, name, load_public_key(key), checked_rights(rights))
    typer.echo(f"{entry.name} may {entry.words.replace(',', ', ')} ({path})")


@app.command("revoke")
def revoke_key(name: Name, config: Config = None, list_file: ListFile = None) -> None:
    """Keep a key out, and have its open connections cut.

    Example: ptycho-stream keys revoke alice --config daemon.toml
    """
    path = _list_path(config, list_file)
    for entry in revoke(path, name):
        typer.echo(f"{entry.name} is revoked: {entry.public_key} ({path})")


@app.command("list")
def list_keys(config: Config = None, list_file: ListFile = None, as_json: AsJson = False) -> None:
    """Say who may do what.

    Example: ptycho-stream keys list --config daemon.toml
    """
    entries = read_allow_list(_list_path(config, list_file))
    if as_json:
        typer.echo(json.dumps(_plain(entries)))
        return
    table = Table(box=None, pad_edge=False)
    for column in ("name", *RIGHTS, "public key"):
        table.add_column(column, overflow="fold")
    for entry in entries.values():
        marks = ["yes" if right in entry.rights else "-" for right in RIGHTS]
        note = f"{entry.public_key} (revoked)" if entry.revoked else entry.public_key
        table.add_row(entry.name, *marks, Text(note))  # keys have brackets, which are no markup
    print_table(table)


@app.command()
def token(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="To be made: http.token_path.")],
) -> None:
    """Make the word that the daemon's HTTP address asks for, in a file that its owner may read.

    Example: ptycho-stream keys token /etc/ptycho-stream/http-token
    """
    write_private(file, f"{secrets.token_urlsafe(TOKEN_BYTES)}\n")
    typer.echo(
        f"{file}: the token; set http.token_path or viewer.token_path to it, and show it there"
    )


def _plain(entries: AllowList) -> list[dict[str, object]]:
    return [
        {
            "name": entry.name,
            "rights": [right for right in RIGHTS if right in entry.rights],
            "revoked": entry.revoked,
            "public_key": entry.public_key,
        }
        for entry in entries.values()
    ]


def _list_path(config: Path | None, list_file: Path | None) -> Path:
    if (config is None) == (list_file is None):
        raise typer.BadParameter("name the allow-list: either --config or --list")
    if list_file is not None:
        return list_file
    from ptycho_stream.settings import load_settings

    assert config is not None
    path = load_settings(config).security.allowed_keys_path
    if path is None:
        raise KeyFileError(
            f"{config} names no allow-list: set security.key_path and security.allowed_keys_path"
        )
    return path
