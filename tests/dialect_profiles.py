"""The shipped configurations for a test's daemon: with its own ports, folders and probe.

What is left of a file is what it is about: dialect, sockets, how series end, where positions are.
"""

from __future__ import annotations

import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

CONFIGS = Path(__file__).parents[1] / "configs"
OF_THE_TEST = ("data", "probe", "model", "export", "reconstruct")
"""Tables whose paths and sizes are of the beamline."""

Tables = dict[str, dict[str, Any] | None]


def tables_of(name: str, endpoints: Sequence[str], positions: str | None = None) -> Tables:
    """The tables of ``configs/NAME.toml`` for ``DaemonHarness``, with these endpoints in them."""
    raw = tomllib.loads((CONFIGS / f"{name}.toml").read_text())
    raw["detector"]["endpoint"] = endpoints[0]
    if endpoints[1:]:
        raw["detector"]["more_endpoints"] = list(endpoints[1:])
    # The harness' own table is overridden key by key: what the file has not must go.
    harness = {"endpoint": None, "socket": None}
    raw["positions"] = {**harness, **raw["positions"], "wait_s": 1.0}
    if positions is not None:
        raw["positions"]["endpoint"] = positions
    tables: Tables = {}
    for table in raw.keys() - set(OF_THE_TEST):
        _flatten(table, raw[table], tables)
    return tables


def _flatten(name: str, values: dict[str, Any], into: Tables) -> None:
    into[name] = {key: value for key, value in values.items() if not isinstance(value, dict)}
    for key, value in values.items():
        if isinstance(value, dict):
            _flatten(f"{name}.{key}", value, into)
