"""The settings that the daemon goes by, as a file for its stages.

A user's file may be edited, or wrong, at any moment, and some of its changes wait for a restart of
the daemon; a stage that is started again must get what the others have.  The supervisor writes this
file into its private folder, stages load it with :func:`ptycho_stream.settings.load_settings`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ptycho_stream.errors import SettingsError
from ptycho_stream.settings import Settings

SETTINGS_NAME = "settings.toml"


def write_settings(settings: Settings, path: Path) -> None:
    """Replace ``path`` by ``settings`` as TOML; paths in them are absolute already.

    Raises:
        SettingsError: it cannot be written; the former file is as it was.
    """
    plain = settings.model_dump(mode="json", exclude_none=True)
    tables = {name: value for name, value in plain.items() if isinstance(value, dict)}
    lines = [_line(key, value) for key, value in plain.items() if key not in tables]
    for name, table in tables.items():
        lines += [f"[{name}]", *(_line(key, value) for key, value in table.items())]
    temporary = path.with_suffix(".new")
    try:
        temporary.write_text("\n".join(lines) + "\n", encoding="utf-8")
        temporary.replace(path)
    except OSError as error:
        raise SettingsError(
            f"cannot write {path}, which the stages read: {error.strerror}; make room in its folder"
        ) from error


def _line(key: str, value: Any) -> str:
    return f"{_string(key)} = {_value(value)}"


def _value(value: Any) -> str:
    if isinstance(value, str):
        return _string(value)
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, list):
        return f"[{', '.join(map(_value, value))}]"
    if isinstance(value, dict):
        return f"{{{', '.join(_line(key, held) for key, held in value.items())}}}"
    return repr(value)  # int, or float: inf and nan are spelt alike in TOML


def _string(text: str) -> str:
    # A JSON string is a TOML string but for surrogate pairs (not escaped here) and DEL.
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")
