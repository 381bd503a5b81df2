"""A scan whose image may still grow, as the reconstruct stage holds it: what is due, and when.

Owns the scan's lease and reader; the stage's loop decides what to do, this knows the state.
"""

from __future__ import annotations

import time
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Self

import numpy as np
from numpy.typing import NDArray

from ptycho_stream.errors import StoreError
from ptycho_stream.reconstruct.allowance import Allowance
from ptycho_stream.reconstruct.recipe import Recipe
from ptycho_stream.reconstruct.saved_image import write_state
from ptycho_stream.reconstruct.scan_image import ScanImage
from ptycho_stream.reconstruct.scan_trust import ScanTrust
from ptycho_stream.results import ImageState
from ptycho_stream.scans.leases import Lease
from ptycho_stream.scans.reader import ScanReader
from ptycho_stream.settings import Settings

HEADER_POLL_S = 0.02
RETRY_S = 5.0
"""After a fault in a scan, when it is tried again."""


class OpenScan:
    """A scan, its image, and what is due for it.

    Attributes:
        changed: subscribers have not seen the newest state.
        unsaved: the state on disk is older than the image.
        unpublished: ``paired_monotonic_ns`` of pairs that are in the image and were not sent.
        faults: how often in a row its image could not be extended.
        finished: the final image was published; what is left is to save it.
        collapsed: the network's output had collapsed when last looked at.

    Args:
        image: of the scan.
        lease: that keeps it in the store.
        trust: in the image; None: it is not looked at.
        refine_s: for how long it is refined after all frames are in the image.
        trust_s: for how long it is looked at after that.
    """

    def __init__(
        self,
        image: ScanImage,
        lease: Lease,
        *,
        trust: ScanTrust | None,
        refine_s: float,
        trust_s: float,
    ) -> None:
        self.image = image
        self.trust = trust
        self._refine_time, self._trust_time = Allowance(refine_s), Allowance(trust_s)
        self.changed = True
        self.unsaved = False
        self.unpublished: list[NDArray[np.int64]] = []
        self.faults = 0
        self.finished = False
        self.collapsed = False
        self._lease = lease
        self._header_read_at_s = 0.0
        self._retry_at_s = 0.0
        self._saved_at_s = self._partial_at_s = time.monotonic()
        self._partial_frames = 0
        self._saving: Future[None] | None = None
        self._writer = ThreadPoolExecutor(1, "save-image")

    @classmethod
    def of(cls, reader: ScanReader, lease: Lease, recipe: Recipe, settings: Settings) -> Self:
        """The image of ``reader``'s scan, made with ``recipe``, refined and judged by settings."""
        refinement, trust = settings.refine, settings.trust
        image = ScanImage(
            reader,
            recipe,
            settings.reconstruct.tile_px,
            refinement if refinement.enabled else None,
        )
        judge = None
        if trust.enabled:
            judge = ScanTrust(
                image,
                trust,
                recipe.device,
                positions_move=refinement.positions,
                mask_pixels=settings.view.hot_pixels == "auto",
            )
        return cls(
            image,
            lease,
            trust=judge,
            refine_s=refinement.seconds,
            trust_s=trust.seconds,
        )

    @property
    def reader(self) -> ScanReader:
        """The scan in the store."""
        return self.image.reader

    @property
    def over(self) -> bool:
        """Whether nothing will be added to the image any more."""
        if not self.predicted or self.refining or self.judging:
            return False
        return self.trust is None or not self.trust.awaits_view

    @property
    def predicted(self) -> bool:
        """Whether the scan has ended and the network has no more to do."""
        return self.reader.header.sealed and not self.image.has_work

    @property
    def refining(self) -> bool:
        """Whether the image is to be refined, and there is time left for it."""
        in_time = self._refine_time.left(running=self.predicted)
        return in_time and self.image.wants_refinement

    @property
    def may_renew(self) -> bool:
        """Whether a better probe may be sought: not while the pattern is still to be looked at."""
        return self.trust is None or not self.trust.looks_first

    @property
    def waits(self) -> bool:
        """Whether the network waits for a probe that is fitted for this scan."""
        return self.image.network_waits and self.refining and not self.parked

    @property
    def judging(self) -> bool:
        """Whether trust in the image is to be looked at, and there is time left for it."""
        if self.trust is None:
            return False
        hurried = self.predicted and not self.refining
        return self._trust_time.left(running=hurried) and self.trust.due(hurried=hurried)

    def state(self, *, final: bool) -> ImageState:
        """What subscribers are to see now."""
        state = self.image.image(final)
        return state if self.trust is None else self.trust.told(state)

    def refresh(self) -> None:
        """Look, now and then, whether the scan's header has changed.

        Raises:
            ScanNotFound: the scan was deleted.
        """
        now_s = time.monotonic()
        if now_s - self._header_read_at_s >= HEADER_POLL_S:
            self._header_read_at_s = now_s
            if self.reader.refresh():
                self.changed = True
                self.retry()

    def ready(self, batch_frames: int, deadline_ns: float) -> bool:
        """Whether a batch that subscribers wait for is full, late, or the last one."""
        pending = self.image.pending
        if self.parked or not pending or not self.image.can_step:
            return False
        if pending >= batch_frames or self.reader.header.sealed:
            return True
        oldest = self.image.oldest_pending_monotonic_ns()
        # Times of before a reboot lie in the future, or far back: such pairs are late in any case.
        return oldest is None or not 0 <= time.monotonic_ns() - oldest < deadline_ns

    @property
    def to_rebuild(self) -> bool:
        """Whether there is work that no subscriber waits for: another generation."""
        return not self.parked and not self.image.pending and self.image.can_step

    @property
    def parked(self) -> bool:
        """Whether a fault keeps this scan waiting for another try."""
        return time.monotonic() < self._retry_at_s

    def park(self) -> None:
        """Its image could not be extended: try again later."""
        self.faults += 1
        self._retry_at_s = time.monotonic() + RETRY_S

    def retry(self) -> None:
        """What was wrong may have changed: try at once."""
        self._retry_at_s = 0.0

    def extended(self, shown: NDArray[np.int64]) -> None:
        """A batch is in the image; ``shown`` are its pairs' times that subscribers wait for."""
        self.faults = 0
        self.unpublished.append(shown)
        self.changed = self.unsaved = True

    def save_due(self, interval_s: float) -> bool:
        """Whether the state should be saved, at most every ``interval_s``."""
        return self.unsaved and time.monotonic() - self._saved_at_s >= interval_s

    def partial_due(self, interval_s: float) -> bool:
        """Whether a partial product should be written of what has come since the last one."""
        late = time.monotonic() - self._partial_at_s >= interval_s
        return late and len(self.image.frames) > self._partial_frames

    def partial_begun(self) -> None:
        """A partial product of the image as it is now is being written."""
        self._partial_at_s, self._partial_frames = time.monotonic(), len(self.image.frames)

    def begin_save(self) -> None:
        """Save the image's state in another thread: a sync waits for the disk, batches need not."""
        if self._saving is not None:
            return
        self._saved_at_s = time.monotonic()
        self.unsaved = False
        arrays = self.image.snapshot()
        self._saving = self._writer.submit(write_state, self.reader.directory, arrays)

    def end_save(self, *, wait: bool = False) -> float | None:
        """The seconds that a save took which has ended; None if none has.

        Raises:
            StoreError: the disk refused; tried again after the interval.
        """
        saving = self._saving
        if saving is None or not (wait or saving.done()):
            return None
        self._saving = None
        try:
            saving.result()
        except StoreError:
            self.unsaved = True
            raise
        finally:
            del saving  # else the error and what was to be saved refer to each other
        return time.monotonic() - self._saved_at_s

    def close(self) -> None:
        """Let go of the scan."""
        if self.trust is not None:
            self.trust.close()
        self._writer.shutdown()
        self.reader.close()
        self._lease.release()
