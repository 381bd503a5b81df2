"""``watch --fail-on``: when a verdict ends the watching, so that a script can stop the scan.

A verdict counts once enough frames are in the image and it has stood for long enough, and at the
latest with a scan's last image, after which nothing could change it.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

import typer

from ptycho_stream.verdicts import SUSPICIOUS, VERDICTS

if TYPE_CHECKING:
    from ptycho_stream.results import Image

STATUS_VERDICT = 3
"""Exit status of ``watch`` when a verdict of ``--fail-on`` was reached."""
ALL_SUSPICIOUS = "suspect"


class VerdictReached(Exception):
    """An image has a verdict that was waited for; the text says which, after how much, and why."""

    def __init__(self, image: Image) -> None:
        expected = image.counts.get("expected")
        of_all = f" of {expected}" if expected else ""
        reasons = "; ".join(image.reasons) or "no reasons given"
        super().__init__(
            f"scan {image.scan_id}: {image.verdict} after {image.frame_numbers.size}{of_all} "
            f"frames: {reasons}"
        )
        self.image = image


def wanted_verdicts(words: Sequence[str]) -> frozenset[str]:
    """The verdicts that ``words`` name; hyphens do for spaces, ``suspect`` for all that accuse.

    Raises:
        typer.BadParameter: a word is none.
    """
    wanted: set[str] = set()
    for word in words:
        name = word.strip().lower().replace("-", " ").replace("_", " ")
        if name == ALL_SUSPICIOUS:
            wanted.update(SUSPICIOUS)
        elif name in VERDICTS:
            wanted.add(name)
        else:
            known = ", ".join([*VERDICTS, ALL_SUSPICIOUS])
            raise typer.BadParameter(f"--fail-on {word}: there is no such verdict; known: {known}")
    return frozenset(wanted)


class VerdictJudge:
    """Looks at each image for a verdict of ``wanted``.

    Args:
        wanted: verdicts; none: no image is ever objected to.
        after_frames: an image of fewer frames is not judged.
        hold_s: so long must one scan's images have wanted verdicts without a break.
    """

    def __init__(self, wanted: frozenset[str], after_frames: int = 0, hold_s: float = 0.0) -> None:
        self._wanted = wanted
        self._after_frames = after_frames
        self._hold_s = hold_s
        self._scan_id = ""
        self._since_s: float | None = None

    def look(self, image: Image, *, last: bool) -> None:
        """Take note of an image; ``last``: nothing more will come of its scan.

        Raises:
            VerdictReached: it has such a verdict, for long enough.
        """
        if image.scan_id != self._scan_id:
            self._scan_id, self._since_s = image.scan_id, None
        enough = image.frame_numbers.size >= self._after_frames
        if image.verdict not in self._wanted or not (enough or last):
            self._since_s = None
            return
        now_s = time.monotonic()
        if self._since_s is None:
            self._since_s = now_s
        if last or now_s - self._since_s >= self._hold_s:
            raise VerdictReached(image)
