"""The options ``--key`` and ``--server-key`` of every command that talks to a daemon.

Commands do without them in their own signatures: :func:`keyed` adds them to one, :func:`give_keys`
to all of an app, and whoever makes a client asks :func:`client_keys`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from contextvars import ContextVar
from functools import wraps
from pathlib import Path
from typing import Annotated, Any, ParamSpec, TypeVar, cast

import typer

from ptycho_stream.errors import KeyFileError
from ptycho_stream.keys import (
    ClientKeys,
    PrivateKey,
    load_private_key,
    load_public_key,
    public_key_beside,
)

Key = Annotated[
    Path | None,
    typer.Option(
        "--key",
        metavar="FILE",
        envvar="PTYCHO_STREAM_KEY",
        help="Your private key, for a daemon that asks for keys.",
    ),
]
ServerKey = Annotated[
    str | None,
    typer.Option(
        "--server-key",
        metavar="KEY",
        envvar="PTYCHO_STREAM_SERVER_KEY",
        help="The daemon's public key, or a file that has it.",
    ),
]
_P = ParamSpec("_P")
_R = TypeVar("_R")
_given: ContextVar[tuple[Path | None, str | None]] = ContextVar("keys", default=(None, None))


def keyed(command: Callable[_P, _R]) -> Callable[_P, _R]:
    """Give a command the two options."""

    @wraps(command)
    def with_keys(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        words = cast("dict[str, Any]", kwargs)
        _given.set((words.pop("key", None), words.pop("server_key", None)))
        return command(*args, **kwargs)

    signature = inspect.signature(command, eval_str=True)
    added = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=kind)
        for name, kind in (("key", Key), ("server_key", ServerKey))
    ]
    parameters = [*signature.parameters.values(), *added]
    with_keys.__dict__["__signature__"] = signature.replace(parameters=parameters)
    with_keys.__annotations__ = {**command.__annotations__, "key": Key, "server_key": ServerKey}
    return with_keys


def give_keys(app: typer.Typer) -> None:
    """Give the options to all commands of an app; call once, when they are all there."""
    for registered in app.registered_commands:
        if registered.callback is not None:
            registered.callback = keyed(registered.callback)
    for group in app.registered_groups:
        if group.typer_instance is not None:
            give_keys(group.typer_instance)


def client_keys(config: Path | None) -> ClientKeys | None:
    """What this run shows to the daemon: the options, else the daemon's own key; None: nothing.

    Raises:
        KeyFileError: a key cannot be used, or one of the two is missing.
        SettingsError: the configuration file is wrong.
    """
    key, server_key = _given.get()
    daemon = None if config is None else _key_path(config)
    if key is not None:
        own = load_private_key(key)
    elif daemon is not None:
        own = _of_the_daemon(daemon)
    elif server_key is not None:
        raise KeyFileError("--server-key is given, and no --key: name your private key too")
    else:
        return None
    if server_key is not None:
        return ClientKeys(own, load_public_key(server_key))
    if daemon is None:
        raise KeyFileError(
            "--key is given, and no --server-key: name the daemon's public key, which "
            "`ptycho-stream keys show` prints on its machine, or the daemon's file with --config"
        )
    return ClientKeys(own, public_key_beside(daemon) if key is not None else own.public)


def _key_path(config: Path) -> Path | None:
    from ptycho_stream.settings import load_settings

    return load_settings(config).security.key_path


def _of_the_daemon(path: Path) -> PrivateKey:
    try:
        return load_private_key(path)
    except KeyFileError as error:
        raise KeyFileError(
            f"{error}; with --config the daemon's own key is shown unless --key names another"
        ) from error
