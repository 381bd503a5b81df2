"""Which files of this machine a request may name: those below a few folders, keys excepted.

Used by the supervisor before it hands a request on: who may control the daemon can have it read the
masks and probes of the beamline, and nothing else that its user could read.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ptycho_stream.errors import ControlError
from ptycho_stream.settings import Settings


@dataclass(frozen=True, slots=True)
class ReadableFiles:
    """What requests may name.

    Attributes:
        folders: below which a file must lie.
        secrets: files below them that no request may name.
    """

    folders: tuple[Path, ...]
    secrets: tuple[Path, ...] = ()

    @classmethod
    def of(cls, settings: Settings, config: Path) -> ReadableFiles:
        """What ``settings``, read from the file ``config``, allow."""
        security = settings.security
        secrets = (security.key_path, settings.http.token_path, settings.viewer.token_path)
        return cls(
            (settings.data.directory, config.parent, *security.readable_folders),
            tuple(path for path in secrets if path is not None),
        )

    def checked(self, argument: str, name: str) -> str:
        """The file that an argument names, with no link in its path any more.

        Args:
            argument: of the request, for the error.
            name: an absolute path.

        Raises:
            ControlError: it lies elsewhere, perhaps by way of a link or of ``..``, or is a secret.
        """
        try:
            path = Path(name).resolve()
        except (OSError, RuntimeError) as error:  # a loop of links, a name that is too long
            raise ControlError(
                "bad_arguments", f"{argument}: {name} is no path: {error}"
            ) from error
        if not any(path.is_relative_to(folder.resolve()) for folder in self.folders):
            known = ", ".join(str(folder) for folder in self.folders)
            raise ControlError(
                "bad_arguments",
                f"{argument}: {name} lies outside the folders whose files requests may name "
                f"({known}): copy it there, or add its folder to security.readable_folders",
            )
        if any(path == secret.resolve() for secret in self.secrets):
            raise ControlError(
                "bad_arguments",
                f"{argument}: {name} is a key or token of the daemon, which no request may name",
            )
        return str(path)
