"""Puts a detector's frames together from its modules, which come in messages of their own.

Used by the slsReceiver decoder.  Frames wait for their modules for a bounded time in bounded memory
and are then given out with the pixels that are missing marked as bad.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from ptycho_stream.errors import MalformedMessage, TornMessage
from ptycho_stream.messages import EncodedImage

MAX_GIVEN: Final = 1024
"""So many frames that were given out incomplete are remembered, for their late modules."""

Place = tuple[int, int]
Key = tuple[str, int]


@dataclass(frozen=True, slots=True)
class Layout:
    """How modules make a frame: rows and columns of modules, each of one shape and pixel type."""

    modules_yx: tuple[int, int]
    module_shape_yx: tuple[int, int]
    dtype: str
    gap_yx_px: tuple[int, int] = (0, 0)

    @property
    def count(self) -> int:
        """Modules of a frame."""
        return self.modules_yx[0] * self.modules_yx[1]

    @property
    def shape_yx(self) -> tuple[int, int]:
        """Of a whole frame."""
        rows, columns = self.modules_yx
        (height, width), (gap_y, gap_x) = self.module_shape_yx, self.gap_yx_px
        return rows * height + (rows - 1) * gap_y, columns * width + (columns - 1) * gap_x

    def area(self, place: Place) -> tuple[slice, slice]:
        """Where the module in this row and column lies."""
        (height, width), (gap_y, gap_x) = self.module_shape_yx, self.gap_yx_px
        top, left = place[0] * (height + gap_y), place[1] * (width + gap_x)
        return slice(top, top + height), slice(left, left + width)


@dataclass(frozen=True, slots=True)
class Module:
    """One module of a frame.

    ``whole`` is False where its sender says that packets of it are missing; ``flipped``: its rows
    come from the bottom up.
    """

    place: Place
    layout: Layout
    image: EncodedImage
    whole: bool = True
    flipped: bool = False


@dataclass(frozen=True, slots=True)
class PutTogether:
    """A frame of which all that came is in ``image``; ``lacks`` says what did not, if anything."""

    series: str
    number: int
    image: EncodedImage
    lacks: str = ""


@dataclass(slots=True)
class _Waiting:
    layout: Layout
    first_ns: int
    modules: dict[Place, Module] = field(default_factory=dict[Place, Module])
    bytes: int = 0


class ModuleFrames:
    """Frames that wait for modules.

    Args:
        wait_ns: from a frame's first module on.
        wait_bytes: that all modules that wait may take.
    """

    def __init__(self, wait_ns: int, wait_bytes: int) -> None:
        self._wait_ns = wait_ns
        self._wait_bytes = wait_bytes
        self._waiting: dict[Key, _Waiting] = {}
        self._bytes = 0
        self._given: dict[Key, set[Place]] = {}

    def add(self, series: str, number: int, module: Module, now_ns: int) -> list[PutTogether]:
        """Frames that ``module`` completes, or that have to make room for it.

        Its layout is within what is accepted of frames.

        Raises:
            MalformedMessage: it does not fit the frame's other modules, or came twice.
            TornMessage: its frame has been given out without it.
        """
        key = series, number
        layout = module.layout
        late = self._given.get(key)
        if late is not None and module.place in late:
            raise TornMessage(
                f"module {module.place} of frame {number} came after its frame was given out: "
                "raise detector.slsdet.wait_ms, or find out what holds its receiver up"
            )
        waiting = self._waiting.get(key)
        if waiting is None:
            if layout.count == 1 and not module.flipped:
                return [PutTogether(series, number, module.image, _lacks_packets([module]))]
            waiting = self._waiting[key] = _Waiting(layout, now_ns)
        if layout != waiting.layout:
            raise MalformedMessage(
                f"module {module.place} of frame {number} is {layout} and others are "
                f"{waiting.layout}: all modules must be alike"
            )
        if module.place in waiting.modules:
            raise MalformedMessage(f"module {module.place} of frame {number} came twice")
        waiting.modules[module.place] = module
        size = len(module.image.blob)
        waiting.bytes += size
        self._bytes += size
        if len(waiting.modules) == layout.count:
            return [self._give(key)]
        return list(self._make_room())

    def overdue(self, now_ns: int) -> list[PutTogether]:
        """Frames that have waited too long, oldest first."""
        keys = [
            key
            for key, waiting in self._waiting.items()
            if now_ns - waiting.first_ns >= self._wait_ns
        ]
        return [self._give(key) for key in keys]

    def flush(self) -> list[PutTogether]:
        """All frames that wait: no more modules will come."""
        out = [self._give(key) for key in list(self._waiting)]
        self._given.clear()
        return out

    def _make_room(self) -> Iterator[PutTogether]:
        while self._bytes > self._wait_bytes:
            yield self._give(next(iter(self._waiting)))

    def _give(self, key: Key) -> PutTogether:
        waiting = self._waiting.pop(key)
        self._bytes -= waiting.bytes
        layout, modules = waiting.layout, waiting.modules
        pixels = _assembled(layout, modules)
        image = EncodedImage(pixels.data.cast("B"), "raw", layout.dtype, layout.shape_yx)
        absent = {
            (row, column)
            for row in range(layout.modules_yx[0])
            for column in range(layout.modules_yx[1])
        } - set(modules)
        if not absent:
            return PutTogether(*key, image, _lacks_packets(list(modules.values())))
        self._given[key] = absent
        if len(self._given) > MAX_GIVEN:
            del self._given[next(iter(self._given))]
        return PutTogether(*key, image, f"module(s) {sorted(absent)}")


def _assembled(layout: Layout, modules: dict[Place, Module]) -> NDArray[Any]:
    dtype = np.dtype(layout.dtype)
    bad = np.iinfo(dtype).max
    pixels: NDArray[Any] = np.full(layout.shape_yx, bad, dtype)
    for place, module in modules.items():
        own = np.frombuffer(module.image.blob, dtype).reshape(layout.module_shape_yx)
        pixels[layout.area(place)] = own[::-1] if module.flipped else own
    return pixels


def _lacks_packets(modules: list[Module]) -> str:
    torn = sorted(module.place for module in modules if not module.whole)
    return f"packets of module(s) {torn}" if torn else ""
