"""Which settings change in a running daemon: SIGHUP and the ``reload`` command.

The supervisor reads the file again and keeps, by :func:`merge_reloaded`, what is bound to sockets,
files already laid out or memory already taken; its stages get what that comes to.
"""

from __future__ import annotations

from dataclasses import dataclass

from ptycho_stream.settings import Section, Settings

FIXED: dict[str, frozenset[str] | None] = {
    "data": frozenset({"directory", "frames_per_file", "verify_reads"}),
    "detector": frozenset(
        {"dialect", "endpoint", "attach", "socket", "max_shape_yx_px", "queue_bytes"}
    ),
    "positions": frozenset({"source", "endpoint", "attach", "socket", "panda", "bluesky"}),
    "reconstruct": frozenset({"size_px", "device", "threads", "helpers", "tile_px"}),
    "results": None,
    "control": None,
    "http": None,
    "viewer": None,
    "security": frozenset({"key_path", "allowed_keys_path", "server_keys"}),
}
"""Keys that need a restart, by table; None: the whole table."""


@dataclass(frozen=True, slots=True)
class Reloaded:
    """What a reload comes to: ``settings`` to go on with, and the dotted keys that changed."""

    settings: Settings
    applied: tuple[str, ...]
    needs_restart: tuple[str, ...]


def merge_reloaded(current: Settings, read: Settings) -> Reloaded:
    """The settings to go on with after ``read`` was found in the file."""
    applied: list[str] = []
    needs_restart: list[str] = []
    changes: dict[str, object] = {}
    for table in Settings.model_fields:
        old, new = getattr(current, table), getattr(read, table)
        if old == new:
            continue
        if table == "more_detectors":  # a process each
            needs_restart.append(table)
            continue
        if not isinstance(new, Section):
            applied.append(table)
            changes[table] = new
            continue
        fixed = FIXED.get(table, frozenset())
        kept: dict[str, object] = {}
        for key in type(new).model_fields:
            if getattr(old, key) == getattr(new, key):
                continue
            if fixed is None or key in fixed:
                needs_restart.append(f"{table}.{key}")
                kept[key] = getattr(old, key)
            else:
                applied.append(f"{table}.{key}")
        changes[table] = new.model_copy(update=kept)
    return Reloaded(current.model_copy(update=changes), tuple(applied), tuple(needs_restart))
