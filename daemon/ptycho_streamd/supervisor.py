"""``ptycho-streamd``: the daemon's first process, which starts, watches and speaks for the others.

It owns the control socket, the HTTP address and the link to systemd, and touches no frame; it
imports no torch, so that it is up at once and stays small.
"""

from __future__ import annotations

import argparse
import logging
import os
import resource
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import zmq
from prometheus_client import CollectorRegistry

from ptycho_stream import __version__
from ptycho_stream.allow_list import AllowList, write_allow_list
from ptycho_stream.errors import ControlError, MalformedMessage, PtychoStreamError, SettingsError
from ptycho_stream.scans.catalogue import Catalogue
from ptycho_stream.settings import Settings, load_settings
from ptycho_streamd.bus import Answer, Beat, Bus, Fatal, Refusal, Reload
from ptycho_streamd.child import Child
from ptycho_streamd.control import ControlServer
from ptycho_streamd.data_lock import DataLock
from ptycho_streamd.http_server import HttpServer
from ptycho_streamd.job_metrics import JobMetrics
from ptycho_streamd.jobs import Jobs
from ptycho_streamd.log_format import configure_logging
from ptycho_streamd.log_limit import LimitedLog
from ptycho_streamd.metrics import MergedMetrics, snapshot
from ptycho_streamd.misfit_trigger import MisfitTrigger
from ptycho_streamd.notify import Notifier
from ptycho_streamd.process import StageProcess
from ptycho_streamd.readable_files import ReadableFiles
from ptycho_streamd.reload import merge_reloaded
from ptycho_streamd.requests import Requests, desk_commands, store_commands
from ptycho_streamd.security import Gate
from ptycho_streamd.settings_file import SETTINGS_NAME, write_settings
from ptycho_streamd.stage import stage_of_detector
from ptycho_streamd.store_desk import StoreDesk
from ptycho_streamd.supervisor_metrics import SupervisorMetrics
from ptycho_streamd.view_trigger import ViewTrigger

STAGE_ENVIRONMENT = {
    # bitshuffle opens a parallel region for every block: 12 ms a frame instead of 0.4.
    "ingest": {"OMP_NUM_THREADS": "1"},
    # Threads that spin while they wait starve those that work when cores are shared: a batch took
    # 5 s instead of 0.08 beside another busy process on two cores.
    "reconstruct": {"OMP_WAIT_POLICY": "PASSIVE"},
    "viewer": {"OMP_NUM_THREADS": "1"},
    "helper": {"OMP_WAIT_POLICY": "PASSIVE"},
}
"""What each stage gets beside the daemon's own environment."""
ALLOW_LIST_NAME = "allowed-keys"
DESCRIPTORS = 65_536
TURN_MS = 100
STATUS_SETTINGS = 78
"""Exit status for settings that are wrong (EX_CONFIG of sysexits.h): to start again is no use."""

log = logging.getLogger(__name__)


def wanted_stages(settings: Settings) -> tuple[str, ...]:
    """The processes of a daemon with these settings, by module name."""
    stages = ("ingest", "reconstruct")
    return (*stages, "viewer") if settings.viewer.enabled else stages


class Supervisor:
    """The daemon.  Construction takes the locks and ports; :meth:`run` returns the exit status.

    Args:
        config: the TOML file, read again at SIGHUP.
        settings: what it held at the start.
        stages: the processes to start, by module name.

    Raises:
        PtychoStreamError: the data directory or a port is taken; nothing is left behind.
    """

    def __init__(self, config: Path, settings: Settings, stages: tuple[str, ...]) -> None:
        self._config = config.resolve()
        self._settings = settings
        self._started_ns = time.time_ns()
        self._stop_signal = 0
        self._hangup = False
        self._ready = False
        self._registry = CollectorRegistry()
        self._merged = MergedMetrics()
        self._registry.register(self._merged)
        self._metrics = SupervisorMetrics(self._registry)
        self._notifier = Notifier()
        self._gate_metrics = CollectorRegistry()
        self._gate = Gate(settings.security, self._gate_metrics)
        try:
            self._lock = DataLock(settings.data.directory)
        except PtychoStreamError:
            self._gate.close()
            raise
        self._bus = Bus(self._gate.context)
        self._desk = StoreDesk(desk_commands(Catalogue(settings.data.directory)))
        self._stage_config = self._bus.folder / SETTINGS_NAME
        self._stage_allowed: AllowList = {}
        self._trouble = LimitedLog(log)
        self._reload_late: set[str] = set()
        self._control: ControlServer | None = None
        self._http: HttpServer | None = None
        self._children: dict[str, Child] = {}
        try:
            self._write_for_stages(settings)
            self._control = ControlServer(self._gate, settings.control.endpoint)
            self._http = HttpServer(settings.http, self._registry, self.health, self.viewer_url)
        except PtychoStreamError:
            self._close()
            raise
        self._children = {child.name: child for child in self._made_children(stages)}
        self._metrics.expect(self._children)
        self._jobs = Jobs(
            lambda: self._settings,
            StageProcess("train", self._stage_config, self._bus, self._lock.fd),
            JobMetrics(self._registry),
            lambda: self._tell_to_reload(self._children.get("reconstruct")),
        )
        self._trigger = MisfitTrigger(self._jobs)
        catalogue = Catalogue(settings.data.directory)
        self._requests = Requests(
            self._control,
            self._bus,
            self._children,
            {
                "status": self._status,
                "reload": self._reload_command,
                "endpoints": self._endpoints,
                **self._jobs.commands(),
                **store_commands(catalogue),
            },
            catalogue,
            self._desk,
            lambda: ReadableFiles.of(self._settings, self._config),
        )
        self._views = ViewTrigger(self._requests)

    def _made_children(self, stages: tuple[str, ...]) -> Iterator[Child]:
        """A child for each stage, an ingest for each stored detector, and the helpers."""
        for name in stages:
            yield self._made_child(name, name)
        if "ingest" in stages:
            for detector in self._settings.more_detectors:
                name = stage_of_detector("ingest", detector.name)
                yield self._made_child(name, "ingest", "--detector", detector.name)
        if "reconstruct" in stages:
            for number in range(1, self._settings.reconstruct.helpers + 1):
                yield self._made_child(f"helper-{number}", "helper", "--number", str(number))

    def _made_child(self, name: str, module: str, *arguments: str) -> Child:
        return Child(
            name,
            self._stage_config,
            self._bus,
            environment=STAGE_ENVIRONMENT.get(module, {}),
            inherited_fd=self._lock.fd,
            module=module,
            arguments=arguments,
        )

    def run(self) -> int:
        """Run until SIGTERM or SIGINT, or until a stage cannot start; returns the exit status."""
        signal.signal(signal.SIGTERM, self._on_stop)
        signal.signal(signal.SIGINT, self._on_stop)
        signal.signal(signal.SIGHUP, self._on_hangup)
        _allow_descriptors()
        poller = zmq.Poller()
        assert self._control is not None
        poller.register(self._bus.socket, zmq.POLLIN)
        poller.register(self._control.socket, zmq.POLLIN)
        poller.register(self._desk.wakes, zmq.POLLIN)
        try:
            for child in self._children.values():
                child.begin()
            while not self._stop_signal:
                poller.poll(TURN_MS)
                self._turn()
                if fault := self._startup_fault():
                    log.error("the daemon cannot start: %s", fault)
                    return 1
            log.info("stopping at signal %d", self._stop_signal)
            return 0
        finally:
            self._stop_children()
            self._close()

    def health(self) -> tuple[bool, dict[str, Any]]:
        """Whether every stage lives and does its work, and the figures behind it."""
        limit_s = self._settings.supervisor.heartbeat_timeout_s
        stages: dict[str, dict[str, Any]] = {}
        problems: list[str] = []
        for name, child in self._children.items():
            age_s = child.last_beat_age_s
            alive = age_s is not None and age_s < limit_s
            if not alive:
                problems.append(
                    f"stage {name} is not heard of: {child.last_words or 'see the log'}"
                )
            if refusing := child.status.get("refusing"):
                problems.append(f"{name} refuses new scans: {refusing}")
            stages[name] = {
                "alive": alive,
                "pid": child.pid,
                "restarts": child.restarts,
                "last_beat_age_s": age_s,
                "error": child.last_words,
                "status": child.status,
            }
        return not problems, {"well": not problems, "problems": problems, "stages": stages}

    def viewer_url(self) -> str:
        """Where the page for browsers is; empty while there is none."""
        viewer = self._children.get("viewer")
        return str(viewer.status.get("url", "")) if viewer else ""

    def _turn(self) -> None:
        self._listen()
        self._watch_gate()
        for name, child in self._children.items():
            if child.check(self._settings.supervisor):
                self._merged.stage_ended(name)
                self._requests.stage_ended(name)
                self._metrics.restarts.labels(name).inc()
            self._metrics.up.labels(name).set(child.beating)
        self._jobs.turn()
        self._requests.serve()
        if self._hangup:
            self._hangup = False
            try:
                self._reload()
            except SettingsError as error:
                log.error("the settings stay as they were: %s", error)
        if not self._ready and all(child.beating for child in self._children.values()):
            self._ready = True
            self._notifier.ready()
            log.info("ready: control at %s", self._settings.control.endpoint)
        self._notifier.status(self._summary())
        self._notifier.watchdog()

    def _listen(self) -> None:
        try:
            messages = self._bus.receive()
        except MalformedMessage as error:
            log.error("%s", error)
            return
        for message in messages:
            if message.stage == "train":
                self._jobs.heard(message)
                continue
            child = self._children.get(message.stage)
            if child is None:
                log.warning("a message of an unknown stage %s", message.stage)
                continue
            match message:
                case Beat():
                    # The last words of a stage that was reaped meanwhile still hold its counters.
                    if child.heard(message):
                        self._catch_up(child)
                        if child.name == "reconstruct":
                            self._trigger.look(child.status, self._settings.training)
                            self._views.look(child.status)
                        self._merged.update(child.name, message.pid, message.metrics)
                case Answer() | Refusal():
                    self._requests.answered(message)
                case Fatal():
                    child.failed(message)

    def _catch_up(self, child: Child) -> None:
        """Repeat a reload that came while this stage was starting and had read its settings."""
        if child.name in self._reload_late:
            self._reload_late.discard(child.name)
            child.send(Reload())

    def _startup_fault(self) -> str:
        if self._ready:
            return ""
        faults = [child.last_words for child in self._children.values() if child.last_words]
        return faults[0] if faults else ""

    def _stop_children(self) -> None:
        self._notifier.stopping()
        deadline_s = time.monotonic() + self._settings.supervisor.stop_timeout_s
        self._jobs.ask_to_stop()
        for child in self._children.values():
            child.ask_to_stop()
        for child in self._children.values():
            child.wait_until(deadline_s)
        self._jobs.wait_until(deadline_s)

    def _close(self) -> None:
        self._desk.close()
        if self._http:
            self._http.close()
        if self._control:
            self._control.close()
        self._bus.close()
        self._gate.close()
        self._notifier.close()
        self._lock.close()

    def _status(self, _arguments: dict[str, Any]) -> dict[str, Any]:
        well, health = self.health()
        return {
            "version": __version__,
            "pid": os.getpid(),
            "started_ns": self._started_ns,
            "uptime_s": (time.time_ns() - self._started_ns) / 1e9,
            "state": "starting" if not self._ready else "ready" if well else "degraded",
            "data_directory": str(self._settings.data.directory),
            "http": f"http://{self._settings.http.host}:{self._http.port if self._http else 0}",
            "viewer": self.viewer_url(),
            "results": self._settings.results.endpoint,
            "resync": self._settings.results.resync_endpoint,
            "stages": health["stages"],
            "training": self._jobs.status(),
        }

    def _endpoints(self, _arguments: dict[str, Any]) -> list[dict[str, Any]]:
        """What the ingests have said last, a quarter of a second ago at most, of their sockets."""
        ingests = [child for name, child in self._children.items() if name.startswith("ingest")]
        if not all(child.beating for child in ingests):
            raise ControlError(
                "unavailable", "stage ingest is not running just now: try again in a second"
            )
        return [told for child in ingests for told in child.status["endpoints"]]

    def _reload_command(self, _arguments: dict[str, Any]) -> dict[str, Any]:
        try:
            return self._reload()
        except SettingsError as error:
            raise ControlError("bad_settings", str(error)) from error

    def _reload(self) -> dict[str, Any]:
        if self._ready:
            self._notifier.reloading()
        try:
            outcome = merge_reloaded(self._settings, load_settings(self._config))
            self._gate.read_again()
            self._write_for_stages(outcome.settings)
        finally:
            if self._ready:
                self._notifier.ready()
        self._settings = outcome.settings
        logging.getLogger().setLevel(self._settings.log_level.upper())
        for child in self._children.values():
            self._tell_to_reload(child)
        log.info("settings read again; changed: %s", ", ".join(outcome.applied) or "nothing")
        for key in outcome.needs_restart:
            log.warning("%s has changed in the file: it needs a restart of the daemon", key)
        return {"applied": list(outcome.applied), "needs_restart": list(outcome.needs_restart)}

    def _write_for_stages(self, settings: Settings) -> None:
        """Settings and allow-list as the daemon goes by them: a stage that is started again must
        not trip over a file that is being edited.
        """
        security = settings.security
        if security.allowed_keys_path is not None:
            copy = self._bus.folder / ALLOW_LIST_NAME
            allowed = self._gate.allowed
            write_allow_list(allowed, copy)
            self._stage_allowed = allowed
            security = security.model_copy(update={"allowed_keys_path": copy})
        write_settings(settings.model_copy(update={"security": security}), self._stage_config)

    def _watch_gate(self) -> None:
        """Hand a changed allow-list on to the stages, which look at their copy by themselves."""
        self._gate.check()
        if self._gate.allowed is not self._stage_allowed and self._gate.keyed:
            try:
                self._write_for_stages(self._settings)
            except SettingsError as error:  # no room: once more in the next turn
                self._trouble.warning("stages", f"the stages keep the old allow-list: {error}")
        self._merged.update("supervisor", os.getpid(), snapshot(self._gate_metrics))

    def _tell_to_reload(self, child: Child | None) -> None:
        if child is None:
            return
        if child.beating:
            child.send(Reload())
        else:
            self._reload_late.add(child.name)

    def _summary(self) -> str:
        if not self._ready:
            waiting = [name for name, child in self._children.items() if not child.beating]
            return f"starting: waiting for {', '.join(waiting)}"
        down = [name for name, child in self._children.items() if not child.beating]
        if down:
            return f"{', '.join(down)} is being restarted"
        return str(self._children["ingest"].status.get("summary", "ready"))

    def _on_stop(self, number: int, _frame: object) -> None:
        self._stop_signal = number

    def _on_hangup(self, _number: int, _frame: object) -> None:
        self._hangup = True


def _allow_descriptors() -> None:
    """Take what descriptors the system lets us have, for this process and its stages: connections
    to a socket, which are limited, must never leave none for a scan's files.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = DESCRIPTORS if hard == resource.RLIM_INFINITY else min(DESCRIPTORS, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def main(arguments: list[str] | None = None) -> int:
    """The program ``ptycho-streamd``; returns its exit status (0, 1, 78; argparse exits with 2)."""
    parser = argparse.ArgumentParser(
        prog="ptycho-streamd",
        description="Shows a ptychographic scan while it runs. Stops at SIGTERM or Ctrl-C, reads "
        "its settings again at SIGHUP.",
        epilog="example: ptycho-streamd --config /etc/ptycho-stream/beamline.toml",
    )
    parser.add_argument("--config", type=Path, required=True, metavar="FILE", help="settings, TOML")
    parser.add_argument(
        "--check", action="store_true", help="check the settings, start nothing: status 0 or 1"
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    options = parser.parse_args(arguments)
    configure_logging("info", "ptycho-streamd")
    try:
        settings = load_settings(options.config)
        if options.check:
            sys.stdout.write(f"{options.config}: no problem found\n")
            return 0
        logging.getLogger().setLevel(settings.log_level.upper())
        return Supervisor(options.config, settings, wanted_stages(settings)).run()
    except PtychoStreamError as error:
        log.error("%s", error)
        return STATUS_SETTINGS if isinstance(error, SettingsError) and not options.check else 1


if __name__ == "__main__":
    sys.exit(main())
