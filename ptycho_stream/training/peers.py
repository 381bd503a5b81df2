"""The other processes of a job with several devices: how they start, meet and end.

The job's own process is rank 0 and starts the others as ``python -m ptycho_stream.training.peers``;
Lightning would start the host's whole program again. Peers end with the process that started them.
"""

from __future__ import annotations

import socket
import subprocess
import sys
import time
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from lightning.fabric.plugins.environments.cluster_environment import ClusterEnvironment
from torch import distributed

from ptycho_stream.errors import TrainingError
from ptycho_stream.settings import Settings
from ptycho_stream.training.apart import end_with_parent

SETTINGS_FILE = "settings.json"
_ADDRESS = "127.0.0.1"
_END_S = 30.0
"""Peers that have not ended so long after rank 0 are killed."""
_NOTICE_S = 0.5
"""A peer's connections may be gone so long before the peer is."""


@dataclass(frozen=True)
class Rank:
    """One of the processes of a job, and where they meet."""

    number: int = 0
    ranks: int = 1
    port: int = 0

    def environment(self) -> ClusterEnvironment | None:
        """For Lightning; None where there is one process only."""
        return None if self.ranks == 1 else _Environment(self)


class _Environment(ClusterEnvironment):
    """Tells Lightning that the processes are there already, and who is who."""

    def __init__(self, rank: Rank) -> None:
        super().__init__()
        self._rank = rank

    @property
    def creates_processes_externally(self) -> bool:
        return True

    @property
    def main_address(self) -> str:
        return _ADDRESS

    @property
    def main_port(self) -> int:
        return self._rank.port

    @staticmethod
    def detect() -> bool:
        return False

    def world_size(self) -> int:
        return self._rank.ranks

    def set_world_size(self, size: int) -> None:
        """Fixed by the job."""

    def global_rank(self) -> int:
        return self._rank.number

    def set_global_rank(self, rank: int) -> None:
        """Fixed by the job."""

    def local_rank(self) -> int:
        return self._rank.number

    def node_rank(self) -> int:
        return 0


@contextmanager
def peers(folder: Path, settings: Settings, ranks: int) -> Generator[Rank]:
    """Run the other ranks of a job while the block runs; gives the rank of this process.

    Args:
        folder: the job's, with its plan.
        settings: the job's.
        ranks: of the job, this one included.

    Raises:
        TrainingError: a peer failed.
    """
    if ranks == 1:
        yield Rank()
        return
    (folder / SETTINGS_FILE).write_text(settings.model_dump_json())
    port = _free_port()
    started = [_start(folder, Rank(number, ranks, port)) for number in range(1, ranks)]
    try:
        try:
            yield Rank(0, ranks, port)
        except RuntimeError as error:
            # What torch raises when it waits in vain for a process, or loses one.
            time.sleep(_NOTICE_S)
            if ended := [peer.returncode for peer in started if peer.poll()]:
                raise _ended(ended[0]) from error
            raise
        for peer in started:
            if peer.wait(_END_S) != 0:
                raise _ended(peer.returncode)
    except subprocess.TimeoutExpired as error:
        raise TrainingError("a peer process of the job did not end with it") from error
    finally:
        for peer in started:
            peer.kill()
            peer.wait()
            if peer.stdin is not None:
                peer.stdin.close()
        leave_group()


def _ended(status: int) -> TrainingError:
    return TrainingError(f"a peer process of the job ended with {status}; its output says why")


def leave_group() -> None:
    """Part from the other processes; Lightning would leave this process tied to dead ones."""
    if distributed.is_initialized():
        distributed.destroy_process_group()


def _start(folder: Path, rank: Rank) -> subprocess.Popen[bytes]:
    numbers = (str(number) for number in (rank.number, rank.ranks, rank.port))
    # A pipe that nobody writes to: it closes when this process ends, however it ends.
    return subprocess.Popen(
        [sys.executable, "-m", "ptycho_stream.training.peers", str(folder), *numbers],
        stdin=subprocess.PIPE,
    )


def _free_port() -> int:
    with socket.socket() as held:
        held.bind((_ADDRESS, 0))
        return held.getsockname()[1]


def main() -> None:
    """Be a peer."""
    from ptycho_stream.training.fitting import fit_as_peer

    end_with_parent()
    folder, number, ranks, port = Path(sys.argv[1]), *map(int, sys.argv[2:])
    settings = Settings.model_validate_json((folder / SETTINGS_FILE).read_text())
    fit_as_peer(folder, settings, Rank(number, ranks, port))


if __name__ == "__main__":
    main()
