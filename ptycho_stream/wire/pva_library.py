"""PV Access' library (p4p, extra ``[pva]``), which is looked for only where it is used.

Used by the daemon's source of frames, the detector simulator and ``ptycho-stream doctor``.
"""

from __future__ import annotations

import importlib
from typing import Any

from ptycho_stream.errors import SettingsError


def pva_module(name: str) -> Any:
    """A module of the library, such as ``client.thread``.

    Raises:
        SettingsError: the library is not installed, or cannot be loaded.
    """
    try:
        return importlib.import_module(f"p4p.{name}")
    except ImportError as error:
        raise SettingsError(
            f"dialect 'pva' needs a library ({error}): pip install 'ptycho-stream[pva]'"
        ) from error


def client_configuration(servers: tuple[str, ...]) -> dict[str, str] | None:
    """Ask these servers only, over TCP; None: whatever the environment says."""
    if not servers:
        return None
    return {
        "EPICS_PVA_NAME_SERVERS": " ".join(servers),
        "EPICS_PVA_ADDR_LIST": "",
        "EPICS_PVA_AUTO_ADDR_LIST": "NO",
    }
