"""Frames with positions, and groups of them, as PtychoPINN's programs ask for them.

``RawData`` holds arrays or a PtychoPINN file, ``RawDataTorch`` looks into the scan store; both draw
the same groups. A frame is held once at most, however many groups it is in. Used for training and
inference in this package, and by people's programs.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, Self, TypedDict

import numpy as np
from numpy.typing import NDArray

from ptycho_stream.errors import PtychoPinnError
from ptycho_stream.files.measured_choice import Domain
from ptycho_stream.physics.probe import Probe
from ptycho_stream.ptychopinn.frame_cache import FrameCache
from ptycho_stream.ptychopinn.grouping import draw_groups, group_coordinates
from ptycho_stream.ptychopinn.npz_contract import FrameArrays, checked, load_npz
from ptycho_stream.ptychopinn.reassembly import extract, windows_inside
from ptycho_stream.reconstruct.patches import PHOTON_FRAMES, measured_photons
from ptycho_stream.scans.reader import ScanReader
from ptycho_stream.scans.viewed_scan import ViewedScan
from ptycho_stream.training.scan_frames import ScanFrames, open_frames


class GroupedData(TypedDict):
    """What :meth:`FrameSet.generate_grouped_data` gives: B groups of C frames of N x N.

    ``diffraction`` float32 (B, N, N, C), amplitude; ``X_full`` the same, scaled so that the mean
    over frames of the sum of squares is (N / 2)^2; ``Y`` complex64 (B, N, N, C), known patches,
    None where nobody knows; ``coords_*`` float64, see
    :class:`~ptycho_stream.ptychopinn.grouping.GroupCoordinates`; ``nn_indices`` int32 (B, C);
    ``objectGuess`` complex64 (H, W) or None.
    """

    diffraction: NDArray[np.float32]
    X_full: NDArray[np.float32]
    Y: NDArray[np.complex64] | None
    coords_offsets: NDArray[np.float64]
    coords_relative: NDArray[np.float64]
    coords_start_offsets: NDArray[np.float64]
    coords_start_relative: NDArray[np.float64]
    coords_nn: NDArray[np.float64]
    coords_start_nn: NDArray[np.float64]
    nn_indices: NDArray[np.int32]
    objectGuess: NDArray[np.complex64] | None


class FrameSet(ABC):
    """M frames with positions, wherever they are held.

    Attributes:
        size_px: N.
        measurement_domain: what the frames are held as; they are handed out as amplitudes.
        xcoords: float64 (M,), object pixels; so are ycoords, xcoords_start and ycoords_start.
        scan_index: int64 (M,).
        probeGuess: complex64 (modes, N, N).
        objectGuess: complex64 (H, W), or None.
        valid: bool (N, N), False where a pixel is bad.
        nphotons: of a frame on average, where a file of amplitudes tells; None: see the frames.
    """

    size_px: int
    measurement_domain: Domain
    xcoords: NDArray[np.float64]
    ycoords: NDArray[np.float64]
    xcoords_start: NDArray[np.float64]
    ycoords_start: NDArray[np.float64]
    scan_index: NDArray[np.int64]
    probeGuess: NDArray[np.complex64]
    objectGuess: NDArray[np.complex64] | None
    valid: NDArray[np.bool_]
    nphotons: float | None
    _rows: NDArray[np.int64]
    """Where the frames are in what holds them."""

    @abstractmethod
    def _amplitude(self, rows: NDArray[np.int64]) -> NDArray[np.float32]:
        """Amplitudes (n, N, N) of what is held, at ``rows``."""

    @abstractmethod
    def _known(self, rows: NDArray[np.int64]) -> NDArray[np.complex64] | None:
        """Patches (n, N, N) that are held, at ``rows``; None: none are."""

    def __len__(self) -> int:
        return len(self.xcoords)

    @property
    def coords_xy(self) -> NDArray[np.float64]:
        """Positions (M, 2)."""
        return np.stack([self.xcoords, self.ycoords], 1)

    def amplitude(self, indices: NDArray[np.integer[Any]]) -> NDArray[np.float32]:
        """Amplitudes (n, N, N) of frames, zero frequency at N // 2, 0 where a pixel is bad."""
        return self._amplitude(self._rows[indices])

    def known_patches(self, indices: NDArray[np.integer[Any]]) -> NDArray[np.complex64] | None:
        """What the sample really looks like under frames, complex64 (n, N, N).

        The patches that came with the frames, else windows of ``objectGuess``, but only if those of
        all frames lie inside it: else the positions are not in its pixels. None: nobody knows.
        """
        held = self._known(self._rows[indices])
        if held is not None or self.objectGuess is None:
            return held
        if not windows_inside(self.objectGuess.shape, self.coords_xy, self.size_px):
            return None
        return extract(self.objectGuess, self.coords_xy[indices], self.size_px)

    def subsample(self, count: int, seed: int | None = None) -> Self:
        """So many frames, drawn at random, in their order; nothing is copied but positions.

        Raises:
            PtychoPinnError: there are fewer.
        """
        if not 1 <= count <= len(self):
            raise PtychoPinnError(f"n_subsample is {count}, there are {len(self)} frames")
        taken = np.sort(np.random.default_rng(seed).choice(len(self), count, replace=False))
        part = copy.copy(self)
        for name in ("_rows", "xcoords", "ycoords", "xcoords_start", "ycoords_start", "scan_index"):
            setattr(part, name, getattr(self, name)[taken])
        return part

    def draw_groups(
        self,
        K: int,
        nsamples: int,
        *,
        gridsize: int = 1,
        seed: int | None = None,
        sequential_sampling: bool = False,
    ) -> NDArray[np.int32]:
        """Groups as indices (B, C) alone; see :func:`~ptycho_stream.ptychopinn.grouping`.

        Raises:
            PtychoPinnError: there are too few frames or neighbours.
        """
        return draw_groups(
            self.coords_xy,
            gridsize=gridsize,
            K=K,
            nsamples=nsamples,
            seed=seed,
            sequential_sampling=sequential_sampling,
        )

    def generate_grouped_data(
        self,
        N: int,
        K: int = 4,
        nsamples: int = 1,
        *,
        gridsize: int = 1,
        seed: int | None = None,
        sequential_sampling: bool = False,
    ) -> GroupedData:
        """Groups of frames, gathered.

        Args:
            N: side of a frame, which the frames must have.
            K: groups are drawn from so many nearest neighbours.
            nsamples: B.
            gridsize: C is its square.
            seed: of the draws; None: another one each time.
            sequential_sampling: groups about the first frames instead of random ones.

        Raises:
            PtychoPinnError: the frames are of another size, dark, or too few for the groups.
        """
        if self.size_px != N:
            raise PtychoPinnError(f"N is {N}, the frames have {self.size_px} pixels: crop them")
        groups = self.draw_groups(
            K,
            nsamples,
            gridsize=gridsize,
            seed=seed,
            sequential_sampling=sequential_sampling,
        )
        flat = groups.reshape(-1)
        diffraction = _channels_last(self.amplitude(flat), groups.shape)
        known = self.known_patches(flat)
        coords = group_coordinates(self.coords_xy, groups)
        start = group_coordinates(np.stack([self.xcoords_start, self.ycoords_start], 1), groups)
        return GroupedData(
            diffraction=diffraction,
            X_full=normalised(diffraction),
            Y=None if known is None else _channels_last(known, groups.shape),
            coords_offsets=coords.offsets,
            coords_relative=coords.relative,
            coords_start_offsets=start.offsets,
            coords_start_relative=start.relative,
            coords_nn=coords.nn,
            coords_start_nn=start.nn,
            nn_indices=groups,
            objectGuess=self.objectGuess,
        )


def normalised(diffraction: NDArray[np.float32]) -> NDArray[np.float32]:
    """Amplitudes (B, N, N, C) scaled so that their mean sum of squares is (N / 2)^2.

    Raises:
        PtychoPinnError: they are all 0.
    """
    size = diffraction.shape[1]
    mean = float(np.square(diffraction, dtype=np.float64).sum((1, 2)).mean())
    if not mean > 0:
        raise PtychoPinnError("the frames of all groups are dark: there is nothing to normalise by")
    return diffraction * np.float32(size / 2 / np.sqrt(mean))


def _channels_last(frames: NDArray[Any], shape: tuple[int, ...]) -> NDArray[Any]:
    """Frames (B * C, N, N) of groups (B, C) as (B, N, N, C)."""
    return np.moveaxis(frames.reshape(*shape, *frames.shape[1:]), 1, -1).copy()


class RawData(FrameSet):
    """Frames in memory, as they were given: counts stay counts."""

    def __init__(self, arrays: FrameArrays) -> None:
        self._arrays = arrays
        self._rows = np.arange(len(arrays.diff3d))
        self.size_px = arrays.diff3d.shape[-1]
        self.measurement_domain = arrays.measurement_domain
        self.xcoords, self.ycoords = arrays.xcoords, arrays.ycoords
        self.xcoords_start, self.ycoords_start = arrays.xcoords_start, arrays.ycoords_start
        self.scan_index = arrays.scan_index
        self.probeGuess, self.objectGuess = arrays.probeGuess, arrays.objectGuess
        bad = arrays.bad_pixels
        self.valid = np.ones((self.size_px, self.size_px), bool) if bad is None else ~bad
        self.nphotons = arrays.nphotons

    @classmethod
    def from_coords_without_pc(
        cls,
        xcoords: NDArray[Any],
        ycoords: NDArray[Any],
        diff3d: NDArray[Any],
        probeGuess: NDArray[Any],
        scan_index: NDArray[Any],
        objectGuess: NDArray[Any] | None = None,
        *,
        measurement_domain: Domain = "amplitude",
    ) -> Self:
        """Frames whose nominal positions are the true ones ("without position correction").

        Args:
            xcoords: (M,), object pixels.
            ycoords: (M,).
            diff3d: (M, N, N), zero frequency at N // 2.
            probeGuess: complex (N, N) or (modes, N, N).
            scan_index: integers (M,).
            objectGuess: complex (H, W), if anything is known.
            measurement_domain: what ``diff3d`` is; counts of a detector are ``counts``.

        Raises:
            PtychoPinnError: shapes or dtypes do not fit, or the numbers cannot be of that domain.
        """
        given = {
            "diff3d": diff3d,
            "xcoords": xcoords,
            "ycoords": ycoords,
            "probeGuess": probeGuess,
            "scan_index": scan_index,
            "objectGuess": objectGuess,
        }
        arrays = {name: np.asarray(value) for name, value in given.items() if value is not None}
        return cls(checked(arrays, measurement_domain, "diff3d"))

    @classmethod
    def from_file(cls, path: Path | str, measurement_domain: Domain | None = None) -> Self:
        """Read a PtychoPINN file; see :func:`~ptycho_stream.ptychopinn.npz_contract.load_npz`.

        Raises:
            FileFormatError: it cannot be read.
            PtychoPinnError: it breaks the contract, or nobody tells its domain.
        """
        return cls(load_npz(Path(path), measurement_domain))

    def _amplitude(self, rows: NDArray[np.int64]) -> NDArray[np.float32]:
        frames = self._arrays.diff3d[rows].astype(np.float32)
        frames[:, ~self.valid] = 0
        return np.sqrt(frames, out=frames) if self.measurement_domain == "counts" else frames

    def _known(self, rows: NDArray[np.int64]) -> NDArray[np.complex64] | None:
        return None if self._arrays.Y is None else self._arrays.Y[rows]


class RawDataTorch(FrameSet):
    """Frames of a stored scan: mapped files, read when they are asked for.

    Groups are indices into the store. Each frame is kept in memory as an amplitude once it was
    read, until ``cache_bytes`` are used.

    Args:
        frames: of an open scan, which whoever made this keeps open and under a lease.
        cache_bytes: 0: every use reads the mapped file.
    """

    def __init__(self, frames: ScanFrames, cache_bytes: int = 0) -> None:
        size = frames.probe.size_px
        self.frames = frames
        self.size_px = size
        self.measurement_domain = "counts"
        self._rows = np.arange(len(frames))
        # Of the first pixel's edge; the canvas' pixels count from their centres.
        y, x = (frames.position_yx_px + size / 2).T
        self.xcoords = self.xcoords_start = x
        self.ycoords = self.ycoords_start = y
        self.scan_index = frames.number
        self.probeGuess, self.objectGuess = frames.probe.modes, None
        self.valid, self.nphotons = frames.valid, None
        self._cache = FrameCache(len(frames), size, cache_bytes)

    @classmethod
    def from_scan(
        cls,
        reader: ScanReader,
        probe: Probe,
        *,
        photons: float | None = None,
        cache_bytes: int = 0,
    ) -> Self:
        """All frames of a scan that may be in an image.

        Args:
            reader: of the scan.
            probe: of its window's size, in any unit.
            photons: of the unattenuated beam, a frame; None: as the scan's first frames tell.
            cache_bytes: for frames that are kept in memory.

        Raises:
            TrainingError: the scan has no pixel size, or is of another size than the probe.
            StoreError: it cannot be read.
        """
        if photons is None:
            photons = measured_photons(ViewedScan(reader), PHOTON_FRAMES)
        frames = open_frames(reader, probe, photons, (0, reader.pair_count))
        return cls(frames, cache_bytes)

    @property
    def cached_bytes(self) -> int:
        """Memory that kept frames use."""
        return self._cache.held_bytes

    def _amplitude(self, rows: NDArray[np.int64]) -> NDArray[np.float32]:
        return self._cache.get(rows, self._read)

    def _read(self, rows: NDArray[np.int64]) -> NDArray[np.float32]:
        counts = np.where(self.valid, self.frames.counts(rows), 0).astype(np.float32)
        return np.sqrt(counts, out=counts)

    def _known(self, rows: NDArray[np.int64]) -> NDArray[np.complex64] | None:
        return None
