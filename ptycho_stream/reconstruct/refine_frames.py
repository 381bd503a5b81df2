"""Roots of the counts that refinement fits, read once and kept within a budget of memory.

Frames come from wherever the caller keeps them (an array, the memory-mapped scan store); only
:class:`~ptycho_stream.reconstruct.refine.Refiner` uses this.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ptycho_stream.errors import GeometryError

ReadFrames = Callable[[NDArray[np.int64]], NDArray[Any]]
"""Counts (n, N, N) of frames by their keys, any real dtype, zero frequency at [N // 2, N // 2]."""

COUNT_OFFSET = 0.2
"""Added to counts and expected photons under the root.

3/8 makes the variance of the root constant (Anscombe 1948, Biometrika 35, 246); less keeps more of
what dark pixels tell. On the measured siemens star 0.2 has the excess of 3/8 and lies nearer to the
reference.
"""

_HALF_EXACT = 512.0
"""float16 holds roots below this to a quarter of their Poisson noise; larger ones are float32."""

INVALID = -1.0
"""Stands for a root that was not measured: masked, saturated, negative or not finite."""


class RootCache:
    """Roots of counts by index, in the order in which the frames were added.

    Args:
        read: gives counts by key.
        size_px: N.
        valid: bool (N, N), ordered as the counts; None: every pixel is.
        saturation: counts from this on are not measured.
        max_bytes: to keep.
        device: where to keep them.
    """

    def __init__(
        self,
        read: ReadFrames,
        size_px: int,
        valid: NDArray[np.bool_] | None,
        saturation: float | None,
        max_bytes: int,
        device: torch.device,
    ) -> None:
        if valid is not None and valid.shape != (size_px, size_px):
            raise GeometryError(f"the mask is {valid.shape}, frames are ({size_px}, {size_px})")
        if valid is not None and not valid.any():
            raise GeometryError(
                "the mask leaves no pixel to compare with: correct the mask or the view"
            )
        self._read, self._size_px, self._valid = read, size_px, valid
        self._saturation = saturation
        self._left_bytes = max_bytes
        self._device = device
        self._keys: NDArray[np.int64] = np.zeros(0, np.int64)
        self._held: dict[int, Tensor] = {}
        self.complete = valid is None
        """Whether every pixel of every frame so far was measured."""

    def add(self, keys: NDArray[np.int64]) -> None:
        """Take note of frames; they are read when they are first asked for."""
        self._keys = np.concatenate([self._keys, keys])

    @property
    def keys(self) -> NDArray[np.int64]:
        """Keys (n,) of all frames."""
        return self._keys

    def get(self, indices: NDArray[np.int64]) -> Tensor:
        """sqrt(counts + COUNT_OFFSET), float32 (B, N, N), zero frequency at [0, 0].

        What was not measured is ``INVALID``.

        Raises:
            GeometryError: the source gave frames of another shape.
        """
        missing = np.array([i for i in indices.tolist() if i not in self._held], np.int64)
        fresh: dict[int, Tensor] = {}
        if len(missing):
            roots = self._roots(self._keys[missing])
            fresh = {i: _rounded(root) for i, root in zip(missing.tolist(), roots, strict=True)}
            self._keep(fresh)
        rows = [self._held[i] if i in self._held else fresh[i] for i in indices.tolist()]
        if all(row.dtype == torch.float16 for row in rows):
            return torch.stack(rows).float()
        return torch.stack([row.float() for row in rows])

    def _keep(self, fresh: dict[int, Tensor]) -> None:
        for index, root in fresh.items():
            size = root.numel() * root.element_size()
            if size > self._left_bytes:
                return
            self._held[index] = root
            self._left_bytes -= size

    def _roots(self, keys: NDArray[np.int64]) -> Tensor:
        counts = np.asarray(self._read(keys))
        wanted = (len(keys), self._size_px, self._size_px)
        if counts.shape != wanted:
            raise GeometryError(f"frames were read as {counts.shape}; the probe needs {wanted}")
        limit = self._saturation
        values = counts.astype(np.float32)
        good = np.isfinite(values) & (values >= 0)
        if limit is not None:
            good &= values < limit
        if self._valid is not None:
            good &= self._valid
        if not good.all():
            self.complete = False
        with np.errstate(invalid="ignore"):
            roots = np.sqrt(values + np.float32(COUNT_OFFSET))
        roots = np.where(good, roots, np.float32(INVALID))
        return torch.as_tensor(np.fft.ifftshift(roots, axes=(-2, -1))).to(self._device)


def _rounded(root: Tensor) -> Tensor:
    """A root (N, N) of its own as it is kept, so that what does not fit is fitted alike."""
    return root.half() if float(root.max()) < _HALF_EXACT else root.clone()
