"""A real ``ptycho-streamd`` for tests: its own process, free ports, a data folder of its own.

``DaemonHarness`` writes a TOML file from the settings given, starts the daemon, waits until it is
ready, kills its stages when a test asks, and leaves nothing behind.
"""

from __future__ import annotations

import fcntl
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from ptycho_stream.client import Daemon
from ptycho_stream.keys import ClientKeys, load_private_key
from ptycho_stream.settings import Settings, load_settings

START = (
    "import sys; from pathlib import Path; "
    "from ptycho_stream.settings import load_settings; "
    "from ptycho_streamd.log_format import configure_logging; "
    "from ptycho_streamd.supervisor import Supervisor; "
    "configure_logging('info', 'ptycho-streamd'); "
    "path = Path(sys.argv[1]); "
    "sys.exit(Supervisor(path, load_settings(path), tuple(sys.argv[2:])).run())"
)
Tables = dict[str, dict[str, Any] | list[dict[str, Any]] | None]
READY_S = 60.0
FIRST_PORT, N_PORTS = 20_000, 12_000


def _untaken_ports() -> Iterator[int]:
    """Ports to try, each once; each stays locked for this process while it lives.

    One byte of a file that all test processes of this user lock stands for one port.
    """
    path = Path(tempfile.gettempdir()) / f"ptycho-stream-test-ports-{os.getuid()}"
    with path.open("a+") as claims:
        first = os.getpid() * 211 % N_PORTS
        for port in (FIRST_PORT + (first + n) % N_PORTS for n in range(N_PORTS)):
            with suppress(BlockingIOError, PermissionError):  # as lockf says "another has it"
                fcntl.lockf(claims, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, port)
                yield port


_ports = _untaken_ports()
_one_at_a_time = threading.Lock()  # a generator cannot be asked by two threads at once


def free_port() -> int:
    """A TCP port of the loopback that nobody uses now, and no other call in any test process gets.

    It lies below the range from which systems take ports for connections and for binds to any
    port, so that no other program is given it before its user binds it.
    """
    with _one_at_a_time:
        for port in _ports:
            with socket.socket() as probe, suppress(OSError):
                probe.bind(("127.0.0.1", port))
                return port
    raise AssertionError(f"no port from {FIRST_PORT} on is free")


def wait_for(condition: Any, timeout_s: float = 10.0, what: str = "it") -> Any:
    """Poll ``condition()`` until it is true; its value."""
    deadline_s = time.monotonic() + timeout_s
    while time.monotonic() < deadline_s:
        if value := condition():
            return value
        time.sleep(0.02)
    raise AssertionError(f"{what} did not happen within {timeout_s} s")


def _toml(value: Any) -> str:
    if isinstance(value, dict):
        return f"{{{', '.join(f'{json.dumps(key)} = {_toml(v)}' for key, v in value.items())}}}"
    return json.dumps(value)


class DaemonHarness:
    """One daemon.  Use as a context manager, which starts and stops it.

    Args:
        folder: for everything, usually ``tmp_path``.
        settings: tables that override the defaults below, by table and key; a table given as None
            is left out, a list is an array of tables.
        stages: which stages to run; without reconstruct no torch is loaded and it is up in 1 s.
        environment: extra variables of the daemon.
    """

    def __init__(
        self,
        folder: Path,
        settings: Tables | None = None,
        stages: tuple[str, ...] = ("ingest", "reconstruct"),
        environment: dict[str, str] | None = None,
    ) -> None:
        self.folder = folder
        self.stages = stages
        self.config = folder / "daemon.toml"
        self.log_path = folder / "daemon.log"
        self.detector_endpoint = f"tcp://127.0.0.1:{free_port()}"
        self.positions_endpoint = f"tcp://127.0.0.1:{free_port()}"
        self._environment = dict(environment or {})
        self._process: subprocess.Popen[bytes] | None = None
        self._tables = self._defaults()
        self.write_config(settings or {})

    @property
    def settings(self) -> Settings:
        """As the daemon reads them."""
        return load_settings(self.config)

    @property
    def data(self) -> Path:
        """The data directory."""
        return self.settings.data.directory

    @property
    def pid(self) -> int:
        """Of the supervisor."""
        assert self._process is not None
        return self._process.pid

    @property
    def log(self) -> str:
        """All that the daemon has logged."""
        return self.log_path.read_text() if self.log_path.exists() else ""

    def write_config(self, changes: Tables) -> None:
        """Write the TOML file anew with ``changes``, for the next start or a reload."""
        for table, values in changes.items():
            if values is None:
                self._tables.pop(table, None)
            elif isinstance(values, list):
                self._tables[table] = values
            else:
                self._tables.setdefault(table, {}).update(values)
        lines: list[str] = []
        for table, values in self._tables.items():
            array = isinstance(values, list)
            for one in values if array else [values]:
                lines.append(f"[[{table}]]" if array else f"[{table}]")
                lines += [f"{key} = {_toml(v)}" for key, v in one.items() if v is not None]
        self.config.write_text("\n".join(lines) + "\n")

    def start(self, *, ready: bool = True) -> None:
        """Start the daemon and wait until all stages run."""
        environment = {**os.environ, "OMP_NUM_THREADS": "1", **self._environment}
        root = Path(__file__).parents[1]
        path = [str(root), str(root / "daemon"), environment.get("PYTHONPATH", "")]
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, path))
        with self.log_path.open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-c", START, str(self.config), *self.stages],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment,
            )
        if ready:
            try:
                self.wait_ready()
            except BaseException:
                self._end()
                raise

    def _end(self) -> None:
        """Leave nothing behind of a daemon that did not start."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def wait_ready(self, timeout_s: float = READY_S) -> None:
        """Wait until every stage runs and was heard of."""
        deadline_s = time.monotonic() + timeout_s
        while time.monotonic() < deadline_s:
            assert self._process is not None
            if self._process.poll() is not None:
                raise AssertionError(f"the daemon ended:\n{self.log}")
            if self.is_well():
                return
            time.sleep(0.05)
        raise AssertionError(f"the daemon is not ready:\n{self.log}")

    def is_well(self) -> bool:
        """Whether it says that every stage runs and was heard of."""
        with suppress(OSError), urllib.request.urlopen(self.url("/healthz"), timeout=5) as answer:
            return answer.status == 200
        return False

    def stop(self, timeout_s: float = 10.0) -> int:
        """Stop the daemon by SIGTERM; its exit status."""
        if self._process is None:
            return 0
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)
        return self.wait(timeout_s)

    def wait(self, timeout_s: float = 10.0) -> int:
        """Wait for the daemon's end; its exit status."""
        assert self._process is not None
        try:
            return self._process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
            raise AssertionError(f"the daemon did not end:\n{self.log}") from None
        finally:
            self._process = None

    def kill(self, stage: str | None = None) -> None:
        """``kill -9`` one stage, or (None) everything at once."""
        if stage is not None:
            os.kill(self.stage_pid(stage), signal.SIGKILL)
            return
        pids = [self.pid, *(self.stage_pid(name) for name in self.stages)]
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
        assert self._process is not None
        self._process.wait()
        self._process = None

    def hangup(self) -> None:
        """SIGHUP: read the settings again."""
        os.kill(self.pid, signal.SIGHUP)

    def stage_pid(self, stage: str) -> int:
        """Of a stage that runs."""
        return wait_for(lambda: self.status()["stages"][stage]["pid"], what=f"pid of {stage}")

    def control(self) -> Daemon:
        """A control client, to be closed."""
        keys = None  # from what was written: a test may have damaged the file since
        if "security" in self._tables:
            own = load_private_key(self.folder / self._tables["security"]["key_path"])
            keys = ClientKeys(own, own.public)
        return Daemon(self._tables["control"]["endpoint"], keys=keys)

    def status(self) -> dict[str, Any]:
        """What the control command of that name says."""
        with self.control() as daemon:
            return daemon.status()

    def ingest(self) -> dict[str, Any]:
        """The status of ingest."""
        return self.status()["stages"]["ingest"]["status"]

    def url(self, path: str) -> str:
        """Of the daemon's HTTP address."""
        return f"http://127.0.0.1:{self._tables['http']['port']}{path}"

    def metrics(self) -> dict[str, float]:
        """All samples of ``/metrics`` by name with labels."""
        with urllib.request.urlopen(self.url("/metrics"), timeout=5) as answer:
            text = answer.read().decode()
        lines = [line for line in text.splitlines() if line and not line.startswith("#")]
        return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines)}

    def metric(self, name: str, value: float, timeout_s: float = 10.0) -> None:
        """Wait until a sample has a value."""
        try:
            wait_for(lambda: self.metrics().get(name, 0.0) == value, timeout_s, name)
        except AssertionError:
            found = self.metrics().get(name)
            raise AssertionError(f"{name} is {found}, not {value}\n{self.log}") from None

    def __enter__(self) -> DaemonHarness:
        self.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.stop()

    def _defaults(self) -> dict[str, Any]:
        probe = self.folder / "probe.npz"
        if not probe.exists():
            grid = np.arange(64) - 31.5
            gauss = np.exp(-(grid[:, None] ** 2 + grid[None] ** 2) / (2 * 10.0**2))
            np.savez(probe, probe=gauss[None].astype(np.complex64) * 100)
        return {
            "data": {"directory": "data", "min_free_bytes": 50_000_000, "frames_per_file": 128},
            "detector": {"dialect": "native", "endpoint": self.detector_endpoint},
            "positions": {
                "source": "native",
                "endpoint": self.positions_endpoint,
                "socket": "pull",
                "wait_s": 1.0,
            },
            "geometry": {
                "photon_energy_eV": 8800.0,
                "detector_distance_m": 2.0,
                "detector_pixel_yx_m": [75e-6, 75e-6],
            },
            "probe": {"path": "probe.npz"},
            "reconstruct": {"size_px": 64},
            # What the network makes, and nothing else, unless a test is about the rest.
            "refine": {"enabled": False},
            "trust": {"enabled": False},
            "results": {
                "endpoint": f"tcp://127.0.0.1:{free_port()}",
                "resync_endpoint": f"tcp://127.0.0.1:{free_port()}",
            },
            "control": {"endpoint": f"tcp://127.0.0.1:{free_port()}"},
            "http": {"port": free_port()},
            "viewer": {"port": free_port()},
        }
