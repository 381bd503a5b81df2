"""A coarse picture of the object's phase in a terminal: two pixels a character cell.

Used by ``ptycho-stream watch`` and ``demo``.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from rich.color import Color
from rich.console import Console, ConsoleOptions, RenderResult
from rich.style import Style
from rich.text import Text

from ptycho_stream.pictures import coloured, phase, shrunk
from ptycho_stream.results import Image

UPPER_HALF = "\u2580"


@dataclass(frozen=True)
class PhasePicture:
    """Draws itself as large as the terminal allows, leaving ``spare_rows`` for other things."""

    object_yx: NDArray[np.complex64]
    spare_rows: int

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        rows = max(4, console.size.height - self.spare_rows)
        yield phase_picture(self.object_yx, rows, options.max_width)


def picture_of(image: Image, spare_rows: int = 3) -> PhasePicture:
    """The phase of an image, for a rich console or live display."""
    return PhasePicture(image.object_yx, spare_rows)


def phase_picture(object_yx: NDArray[np.complex64], rows: int, columns: int) -> Text:
    """Phase as grey levels in at most ``rows`` x ``columns`` cells, dark blue where unseen."""
    if not object_yx.size:
        return Text("nothing seen yet")
    rgb = coloured(phase(shrunk(object_yx, rows * 2, columns)))
    if rgb.shape[0] % 2:
        rgb = np.concatenate([rgb, np.zeros_like(rgb[:1])])
    text = Text(no_wrap=True)
    for upper, lower in zip(rgb[::2], rgb[1::2], strict=True):
        for above, below in zip(upper.tolist(), lower.tolist(), strict=True):
            style = Style(color=Color.from_rgb(*above), bgcolor=Color.from_rgb(*below))
            text.append(UPPER_HALF, style)
        text.append("\n")
    text.rstrip()
    return text
