"""The frames of a stored scan as training sees them: views of the mapped store, and where they lie.

Nothing is copied before a batch is made. Mask, orientation, photons and the probe's sub-pixel
shift are those of the reconstruct stage, so a network is trained on what it will be given.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ptycho_stream.errors import TrainingError
from ptycho_stream.geometry import patch_corners
from ptycho_stream.physics.probe import Probe
from ptycho_stream.reconstruct.corrections import Corrections
from ptycho_stream.reconstruct.frame_hash import frame_hash, in_share
from ptycho_stream.scans.reader import ScanReader
from ptycho_stream.scans.records import positions_of
from ptycho_stream.scans.viewed_scan import ViewedScan


@dataclass(frozen=True)
class ScanFrames:
    """The usable frames of a scan.

    Attributes:
        scan: as its frames are looked at; held open and under a lease by whoever made this.
        probe: scaled to the scan's photons.
        valid: bool (N, N), zero frequency at N // 2; False where the detector says nothing.
        slot: int64 (M,), where each frame is stored.
        number: int64 (M,), the detector's numbers.
        corner_yx_px: int64 (M, 2), canvas pixel of each patch's [0, 0].
        shift_yx_px: float32 (M, 2), by which the probe lies off the pixel grid.
    """

    scan: ViewedScan
    probe: Probe
    valid: NDArray[np.bool_]
    slot: NDArray[np.int64]
    number: NDArray[np.int64]
    corner_yx_px: NDArray[np.int64]
    shift_yx_px: NDArray[np.float32]

    @property
    def reader(self) -> ScanReader:
        """Of the scan."""
        return self.scan.reader

    def __len__(self) -> int:
        return len(self.slot)

    @cached_property
    def position_yx_px(self) -> NDArray[np.float64]:
        """Where the windows lie, float64 (M, 2), fractions of a pixel included."""
        return self.corner_yx_px + self.shift_yx_px.astype(np.float64)

    def counts(self, indices: NDArray[np.integer[Any]]) -> NDArray[Any]:
        """Counts (n, N, N) of frames, any real dtype, zero frequency at N // 2."""
        return self.scan.counts(self.slot[indices])

    def nearest(
        self, seed: int, count: int, among: NDArray[np.integer[Any]]
    ) -> NDArray[np.integer[Any]]:
        """The ``count`` frames of ``among`` that lie nearest to frame ``seed``, nearest first."""
        offset = self.position_yx_px[among] - self.position_yx_px[seed]
        order = np.argsort(np.square(offset).sum(1), kind="stable")
        return among[order[:count]]


def open_frames(
    reader: ScanReader, probe: Probe, photons: float, pairs: tuple[int, int]
) -> ScanFrames:
    """The frames of a scan that training may use.

    Left out are gated frames, those listed as bad, those with a flagged or superseded position and
    damaged ones.

    Args:
        reader: of the scan.
        probe: as its file has it.
        photons: of the unattenuated beam, a frame.
        pairs: half-open range of the log of pairs.

    Raises:
        TrainingError: the scan has no pixel size, or is of another size than the probe.
        StoreError: the scan cannot be read, or has no such pairs.
    """
    header = reader.header
    if header.pixel_yx_m is None:
        raise TrainingError(
            f"scan {header.scan_id} has no pixel size: its positions have no place on an image; "
            "take another scan, or set [geometry] before scanning"
        )
    if probe.size_px != header.size_px:
        raise TrainingError(
            f"scan {header.scan_id} was taken for patches of {header.size_px} pixels, the probe "
            f"has {probe.size_px}: name a probe of that size under [probe]"
        )
    scan = ViewedScan(reader)
    taken = _usable(scan, *pairs)
    position_yx_m = positions_of(taken)
    corner, shift = patch_corners(position_yx_m, header.pixel_yx_m, header.size_px)
    return ScanFrames(
        scan=scan,
        probe=probe.normalised(photons),
        valid=scan.valid,
        slot=taken["slot"].astype(np.int64),
        number=taken["number"].astype(np.int64),
        corner_yx_px=corner,
        shift_yx_px=shift,
    )


def _usable(scan: ViewedScan, first: int, last: int) -> NDArray[Any]:
    reader = scan.reader
    pairs = reader.pairs(first, last)
    corrections = Corrections(reader)
    corrections.look()
    damaged = reader.verify(pairs["slot"])
    usable = scan.usable(pairs) & ~np.isin(pairs["slot"], damaged)
    # A correction within the range counts, a later one would change what a resumed job sees.
    usable &= corrections.usable(np.arange(first, last), pairs, last)
    return pairs[usable]


def held_out(frame_numbers: NDArray[np.integer[Any]], share: float, seed: int) -> NDArray[np.bool_]:
    """Which frames are never trained on: a hash of the number, so a growing scan changes nothing.

    Args:
        frame_numbers: (M,).
        share: of the frames, 0 to 1.
        seed: another one holds out others.

    Returns:
        Bool (M,).
    """
    return in_share(frame_numbers, share, seed + 1)


def judging(frame_numbers: NDArray[np.integer[Any]], seed: int) -> NDArray[np.bool_]:
    """Which of the held-out frames (M,) judge the end of a job; the others choose its weights.

    By a bit of the hash that :func:`held_out` does not look at.
    """
    return (frame_hash(frame_numbers, seed + 1) & np.uint64(1)).astype(bool)
