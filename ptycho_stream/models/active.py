"""Which model is in use, and which were before it: one small file in the registry's folder.

The registry reads and changes it through :class:`ActiveModels`; the name ``default`` in the
settings means its newest entry.  The reconstruct stage, a training job and the CLI may change it.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

from ptycho_stream.atomic_file import atomic_file
from ptycho_stream.errors import FileFormatError, ModelError
from ptycho_stream.settings import ModelSettings

DEFAULT_MODEL = "unrolled-v2"
"""The shipped model, in use until another is."""

ACTIVE_FILE = "active.json"
MAX_HISTORY = 100
"""Older entries are forgotten; their models stay."""


def active_model(root: Path | None) -> str:
    """Name of the model in use with the registry folder ``root``.

    Raises:
        ModelError: the file that tells it is damaged.
    """
    return _newest([] if root is None else ActiveModels(root).history())


def model_in_use(settings: ModelSettings) -> str:
    """Name of the model that images are made with under ``settings``, which may pin one.

    Raises:
        ModelError: the file that tells it is damaged.
    """
    return settings.name if settings.name != "default" else active_model(settings.registry)


def former_model(root: Path | None) -> str:
    """Name of the model that was in use before.

    Raises:
        ModelError: none was, or the file that tells it is damaged.
    """
    history = [] if root is None else ActiveModels(root).history()
    if not history:
        raise ModelError(
            f"there is no model to go back to: {DEFAULT_MODEL} is in use from the start"
        )
    return _newest(history[:-1])


def _newest(history: list[str]) -> str:
    return history[-1] if history else DEFAULT_MODEL


def check_unpinned(settings: ModelSettings) -> None:
    """Refuse to change the model in use where the settings name one.

    Raises:
        ModelError: they do.
    """
    if settings.name != "default":
        raise ModelError(
            f"model.name = {settings.name!r} in the settings pins the model in use: set it to "
            "'default' and reload to have another one used"
        )


class ActiveModels:
    """The history of models in use under a registry's folder ``root``, which need not exist."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._path = root / ACTIVE_FILE

    def history(self) -> list[str]:
        """Names of the models that were taken into use, the one in use last.

        Raises:
            ModelError: the file is damaged.
        """
        try:
            held: Any = json.loads(self._path.read_text("utf-8"))
            if not isinstance(held["history"], list):
                raise TypeError("history is no list")
            names = cast("list[object]", held["history"])
            if not all(isinstance(name, str) for name in names):
                raise TypeError("history holds other things than names")
        except FileNotFoundError:
            return []
        except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
            raise ModelError(
                f"{self._path} does not say which model is in use ({error}): remove it to go back "
                "to the default model, or write " + '{"history": ["NAME"]}'
            ) from error
        return cast("list[str]", names)

    def push(self, name: str) -> None:
        """``name`` is in use from now on; nothing changes if it is already.

        Raises:
            ModelError: the file is damaged or cannot be written.
        """
        with self._locked():
            history = self.history()
            if history[-1:] != [name]:
                self._write([*history, name])

    def pop(self, name: str) -> None:
        """``name`` is in use no more; nothing changes if another has come into use meanwhile.

        Raises:
            ModelError: the file is damaged or cannot be written.
        """
        with self._locked():
            history = self.history()
            if history[-1:] == [name]:
                self._write(history[:-1])

    def _write(self, history: list[str]) -> None:
        text = json.dumps({"history": history[-MAX_HISTORY:]}, indent=2) + "\n"
        try:
            with atomic_file(self._path) as file:
                file.write(text.encode())
        except FileFormatError as error:
            raise ModelError(f"the model in use stays as it was: {error}") from error

    @contextmanager
    def _locked(self) -> Generator[None]:
        """Keep other processes from changing the history meanwhile."""
        try:
            self._root.mkdir(parents=True, exist_ok=True)
            handle = os.open(self._root, os.O_RDONLY)
        except OSError as error:
            raise ModelError(
                f"cannot use the registry {self._root}: {error.strerror}; set model.registry to a "
                "folder that can be written"
            ) from error
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
            yield
        finally:
            os.close(handle)
