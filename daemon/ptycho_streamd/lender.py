"""The reconstruct stage's link to its helpers: lends them pairs, takes back what they make.

Helpers (:mod:`ptycho_streamd.helper`) ask for work at a socket in the daemon's private folder and
get pairs that the stage itself does not come to. A helper that dies costs the time to do its loans
again; a loan that was taken back is never taken a second time.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import zmq

from ptycho_stream.errors import MalformedMessage, PtychoStreamError
from ptycho_stream.reconstruct.lending import Loan, Made
from ptycho_stream.reconstruct.open_scan import OpenScan

HELLO, MADE, CANNOT = b"hello", b"made", b"cannot"
"""What helpers say: I am free; this came of a loan; nothing comes of it, for this reason."""

LOANS = 2
"""To a helper at a time: it works on one while the stage takes back the other."""
LOAN_S = 0.25
"""What a helper needs for a loan, about: results come so often."""
MAX_FRAMES = 4096
"""In a loan: bounds the time and memory that a fast helper's results cost."""
LOST_S = 10.0
"""After so long a loan is done by someone else."""
REST_S = 1.0
"""A helper that could not do a loan gets no other one for so long."""
MESSAGES_A_TURN = 16

log = logging.getLogger(__name__)


def endpoint_in(folder: Path) -> str:
    """Where stage and helpers meet, in the folder of the daemon's bus."""
    return f"ipc://{folder}/lend"


@dataclass(slots=True)
class _Helper:
    """One that said hello.

    Attributes:
        frame_s: the seconds that it takes for a frame.
        has_probe_of: purpose of its newest loan.
        loans: by number, with the time of each.
    """

    frame_s: float
    has_probe_of: tuple[str, int, str] | None = None
    rests_until_s: float = 0.0
    loans: dict[bytes, tuple[Loan, float]] = field(default_factory=dict[bytes, tuple[Loan, float]])


class Lender:
    """Lends pairs of open scans.

    Args:
        folder: private to the daemon.

    Attributes:
        socket: to be polled.
    """

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], folder: Path) -> None:
        self.socket = context.socket(zmq.ROUTER)
        self.socket.setsockopt(zmq.LINGER, 0)
        # A helper that was started again takes the place of the one that died.
        self.socket.setsockopt(zmq.ROUTER_HANDOVER, 1)
        self.socket.bind(endpoint_in(folder))
        self._helpers: dict[bytes, _Helper] = {}
        # A helper may send what it made for a stage that died: no number comes a second time.
        self._lent = time.monotonic_ns()

    def close(self) -> None:
        """Close the socket; what is lent is lost."""
        self.socket.close()

    @property
    def helpers(self) -> int:
        """How many there are."""
        return len(self._helpers)

    def lend(self, scans: Mapping[str, OpenScan], enough: int) -> None:
        """Give each helper that is free something to do, of the newest scan first.

        Of scans that have no more than ``enough`` pairs pending nothing is lent.
        """
        now_s = time.monotonic()
        for name, helper in self._helpers.items():
            while len(helper.loans) < LOANS and now_s >= helper.rests_until_s:
                frames = max(1, min(MAX_FRAMES, int(LOAN_S / max(helper.frame_s, 1e-6))))
                loan = _loan(scans, frames, enough)
                if loan is None:
                    return
                self._lent += 1
                number = str(self._lent).encode()
                helper.loans[number] = (loan, now_s)
                known = helper.has_probe_of == loan.purpose
                told = loan.to_who_has_the_probe() if known else loan
                helper.has_probe_of = loan.purpose
                self.socket.send_multipart([name, number, told.encode()])

    def returned(self) -> Iterator[tuple[Loan, Made | None]]:
        """Loans that have come back, and what was made of them; None: nothing."""
        for _ in range(MESSAGES_A_TURN):
            try:
                name, kind, *parts = self.socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                break
            yield from self._heard(name, kind, parts)
        now_s = time.monotonic()
        for name, helper in list(self._helpers.items()):
            if any(now_s - lent_s > LOST_S for _, lent_s in helper.loans.values()):
                log.error("%s does not answer: others do its work", name.decode())
                yield from self._forget(name)

    def _heard(
        self, name: bytes, kind: bytes, parts: list[bytes]
    ) -> Iterator[tuple[Loan, Made | None]]:
        if kind == HELLO:
            yield from self._forget(name)
            self._helpers[name] = _Helper(float(parts[0]))
            return
        helper = self._helpers.get(name)
        held = None if helper is None else helper.loans.pop(parts[0], None)
        if helper is None or held is None:
            return  # given to someone else meanwhile
        loan, _ = held
        if kind == CANNOT:
            log.warning("%s: %s", name.decode(), parts[1].decode())
            helper.rests_until_s = time.monotonic() + REST_S
            helper.has_probe_of = None
            yield loan, None
            return
        helper.frame_s = float(parts[1])
        try:
            made = Made.decode(parts[2])
        except MalformedMessage as error:
            log.error("%s: %s", name.decode(), error)
            made = None
        yield loan, made

    def _forget(self, name: bytes) -> Iterator[tuple[Loan, Made | None]]:
        helper = self._helpers.pop(name, None)
        for loan, _ in helper.loans.values() if helper else ():
            yield loan, None


def _loan(scans: Mapping[str, OpenScan], frames: int, enough: int) -> Loan | None:
    for scan_id in sorted(scans, reverse=True):
        scan = scans[scan_id]
        if scan.parked or scan.image.pending <= enough:
            continue
        try:
            loan = scan.image.lend(frames)
        except PtychoStreamError as error:
            log.debug("scan %s: nothing is lent: %s", scan_id, error)  # its next step says so
            continue
        if loan is not None:
            return loan
    return None
