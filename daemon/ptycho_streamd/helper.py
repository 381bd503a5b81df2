"""A stage beside ``reconstruct`` that predicts a part of its pairs: another core, or another GPU.

It reads frames from the scan store as that stage does, and sends back sums of patches. The
supervisor starts as many as ``reconstruct.helpers`` says; any may die at any time.
"""

from __future__ import annotations

import logging
import sys
import time
from pathlib import Path

import torch
import zmq
from prometheus_client import CollectorRegistry, Counter

from ptycho_stream.errors import ModelError, ProbeError, PtychoStreamError, SettingsError
from ptycho_stream.reconstruct.lending import LentScan, Loan
from ptycho_stream.reconstruct.recipe import load_recipe
from ptycho_stream.settings import Settings, load_settings
from ptycho_streamd.image_store import ImageStore
from ptycho_streamd.lender import CANNOT, HELLO, MADE, endpoint_in
from ptycho_streamd.stage import Stage, run_stage

IDLE_S = 1.0
"""Without work, after which a helper lets go of its scan and says that it is free."""
RETRY_S = 2.0

log = logging.getLogger(__name__)


class HelperStage:
    """The loop of a helper: a loan, then the next.

    Args:
        config: the daemon's settings, in the folder of its bus.
    """

    def __init__(self, stage: Stage, config: Path, settings: Settings) -> None:
        torch.set_num_threads(settings.reconstruct.threads)
        self._stage = stage
        self._config = config
        self._number = int(stage.name.rpartition("-")[2])
        self._images = ImageStore(settings)
        self._scan: LentScan | None = None
        self._frame_s = 0.0
        self._tried_at_s = float("-inf")
        self._heard_at_s = time.monotonic()
        self._problem = ""
        self._registry = CollectorRegistry()
        self._frames = Counter(
            "ptycho_stream_helper_frames",
            "Frames that helpers have predicted",
            ["helper"],
            registry=self._registry,
        ).labels(str(self._number))
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._socket = self._context.socket(zmq.DEALER)
        self._socket.setsockopt(zmq.IDENTITY, stage.name.encode())
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.connect(endpoint_in(config.parent))
        self._poller = zmq.Poller()
        for socket in (stage.socket, self._socket):
            self._poller.register(socket, zmq.POLLIN)

    def run(self) -> None:
        """Until the supervisor says stop."""
        try:
            while not self._stage.stopping:
                self.turn()
        finally:
            self._let_go()
            self._socket.close()
            self._context.term()

    def turn(self) -> None:
        """One loan, or what is due while there is none."""
        for request in self._stage.requests():
            self._stage.fail(request, "unknown_command", "helpers know no commands")
        if self._stage.reload_requested:
            self._reload()
        if self._images.recipe is None:
            self._load()
        self._beat()
        try:
            number, data = self._socket.recv_multipart(zmq.NOBLOCK)
        except zmq.Again:
            if self._images.recipe is not None and self._idle_s >= IDLE_S:
                self._heard_at_s = time.monotonic()
                self._let_go()
                self._socket.send_multipart([HELLO, str(self._frame_s).encode()])
            self._poller.poll(int(IDLE_S * 250))
            return
        self._work(number, Loan.decode(data))
        self._heard_at_s = time.monotonic()

    @property
    def _idle_s(self) -> float:
        return time.monotonic() - self._heard_at_s

    def _work(self, number: bytes, loan: Loan) -> None:
        started_s = time.monotonic()
        try:
            made = self._scan_of(loan).make(loan, self._beat)
        except PtychoStreamError as error:
            self._let_go()
            self._socket.send_multipart([CANNOT, number, str(error).encode()])
            return
        self._frame_s = (time.monotonic() - started_s) / len(loan.indices)
        self._frames.inc(len(made.generation.ledger.added))
        parts = [MADE, number, str(self._frame_s).encode(), made.encode()]
        self._socket.send_multipart(parts, copy=False)

    def _scan_of(self, loan: Loan) -> LentScan:
        """The scan that a loan is of, opened if it is not the one of the loan before."""
        if self._scan is not None:
            self._scan.reader.refresh()
            if self._scan.is_for(loan):
                return self._scan
            self._let_go()
        try:
            self._scan = self._opened(loan)
        except ModelError:
            # The stage may have taken another model into use since this helper loaded its own.
            self._images.recipe = load_recipe(self._own_settings())
            self._scan = self._opened(loan)
        return self._scan

    def _opened(self, loan: Loan) -> LentScan:
        reader = self._images.catalogue.open(loan.scan_id)
        try:
            return LentScan(reader, self._images.recipe_for(reader.header), loan)
        except Exception:
            reader.close()
            raise

    def _let_go(self) -> None:
        """Close the scan; what was deleted meanwhile is gone then."""
        if self._scan is not None:
            self._scan.reader.close()
            self._scan = None

    def _load(self) -> None:
        """Load network and probe; while they cannot be loaded, try now and then."""
        now_s = time.monotonic()
        if now_s - self._tried_at_s < RETRY_S:
            return
        self._tried_at_s = now_s
        try:
            recipe = load_recipe(self._own_settings())
            self._beat(now=True)
            self._frame_s = recipe.warm_up()
        except (ProbeError, ModelError) as error:
            if str(error) != self._problem:
                log.error("network and probe are not loaded: %s", error)
            self._problem = self._images.problem = str(error)
            return
        self._problem, self._images.recipe = "", recipe
        self._heard_at_s = float("-inf")
        log.info("helps with model %s on %s", recipe.model, recipe.device)

    def _own_settings(self) -> Settings:
        """The settings, with the device of this helper."""
        settings = self._images.settings
        device = device_of(settings.reconstruct.device, self._number, torch.cuda.device_count())
        changed = {"device": device}
        return settings.model_copy(
            update={"reconstruct": settings.reconstruct.model_copy(update=changed)}
        )

    def _reload(self) -> None:
        self._stage.reloaded()
        try:
            self._images.settings = load_settings(self._config)
        except SettingsError as error:
            log.error("the settings stay as they were: %s", error)
            return
        logging.getLogger().setLevel(self._images.settings.log_level.upper())
        self._images.recipe, self._tried_at_s = None, float("-inf")

    def _beat(self, *, now: bool = False) -> None:
        recipe = self._images.recipe
        status = {
            "model": recipe.model if recipe else None,
            "device": str(recipe.device) if recipe else None,
            "problem": self._problem,
        }
        self._stage.beat(status, self._registry, now=now)


def device_of(device: str, number: int, gpus: int) -> str:
    """The device of helper ``number`` (from 1), where the reconstruct stage is told ``device``.

    Where the stage takes any GPU, or the first, helpers take the others in turn.
    """
    if gpus > 1 and device in ("auto", "cuda"):
        return f"cuda:{number % gpus}"
    return device


def body(stage: Stage, config: Path, settings: Settings) -> None:
    """The stage's life, for :func:`ptycho_streamd.stage.run_stage`."""
    HelperStage(stage, config, settings).run()


if __name__ == "__main__":
    sys.exit(run_stage("helper", body))
