"""One daemon a data directory: a lock that the supervisor takes and its children inherit.

Because the children hold it too, a daemon that is started after a ``kill -9`` of its predecessor
waits until the last of the old stages is gone; otherwise both would take frames from one detector.
"""

from __future__ import annotations

import fcntl
import os
import time
from pathlib import Path

from ptycho_stream.errors import SettingsError, StoreError

PATIENCE_S = 10.0
LOCK_NAME = "daemon.lock"


class DataLock:
    """Held from construction to :meth:`close`; ``fd`` goes to ``subprocess``' ``pass_fds``.

    Raises:
        SettingsError: the directory cannot be made or written.
        StoreError: another daemon has it.
    """

    def __init__(self, directory: Path, patience_s: float = PATIENCE_S) -> None:
        path = directory / LOCK_NAME
        try:
            directory.mkdir(parents=True, exist_ok=True)
            self.fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except OSError as error:
            raise SettingsError(
                f"cannot write in {directory}: {error.strerror}; change data.directory or its "
                "permissions"
            ) from error
        give_up_s = time.monotonic() + patience_s
        while not self._take():
            if time.monotonic() > give_up_s:
                holder = os.pread(self.fd, 32, 0).decode("ascii", "replace") or "unknown"
                os.close(self.fd)
                raise StoreError(
                    f"another ptycho-streamd (pid {holder}) uses {directory}: stop it or change "
                    "data.directory"
                )
            time.sleep(0.05)
        os.ftruncate(self.fd, 0)
        os.pwrite(self.fd, str(os.getpid()).encode(), 0)

    def close(self) -> None:
        """Give it up (as far as this process is concerned)."""
        os.close(self.fd)

    def _take(self) -> bool:
        try:
            fcntl.flock(self.fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True
