"""Which files of this machine a request may name: those below a few folders.

Used by the supervisor before it hands a request on: who may control the daemon can have it read the
masks and probes of the beamline, and nothing else that its user could read.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ptycho_stream.errors import ControlError


def checked_path(argument: str, name: str, folders: Sequence[Path]) -> str:
    """The file that an argument names, with no link in its path any more.

    Args:
        argument: of the request, for the error.
        name: an absolute path.
        folders: below which it must lie.

    Raises:
        ControlError: it lies elsewhere, perhaps by way of a link or of ``..``.
    """
    try:
        path = Path(name).resolve()
    except (OSError, RuntimeError) as error:  # a loop of links, a name that is too long
        raise ControlError("bad_arguments", f"{argument}: {name} is no path: {error}") from error
    if not any(path.is_relative_to(folder.resolve()) for folder in folders):
        known = ", ".join(str(folder) for folder in folders)
        raise ControlError(
            "bad_arguments",
            f"{argument}: {name} lies outside the folders whose files requests may name ({known}): "
            "copy it there, or add its folder to security.readable_folders",
        )
    return str(path)
