"""What the codecs accept from outside: the largest shape, message, nesting and batch.

Every decoder of :mod:`ptycho_stream.wire` checks against these before it allocates memory; ingest
makes one from its settings, and tests make small ones.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

from ptycho_stream.errors import LimitExceeded, MalformedMessage

Scalar = str | int | float | bool | None
MAX_NAME_LENGTH = 256
MAX_DOCUMENT_CHARACTERS = 65_536
MAX_TEXT_CHARACTERS = 4096


def checked_name(text: str) -> str:
    """A series or epoch name that is safe to log and to show.

    Raises:
        MalformedMessage: it is empty, too long, or holds a line break or another control character.
    """
    if not 0 < len(text) <= MAX_NAME_LENGTH or not text.isprintable():
        raise MalformedMessage(
            f"the series or epoch name {text[:40]!r} of {len(text)} characters is not 1 to "
            f"{MAX_NAME_LENGTH} printable ones"
        )
    return text


@dataclass(frozen=True, slots=True)
class WireLimits:
    """Upper bounds of what a message may ask for.

    Attributes:
        max_shape_yx_px: of a frame, and of a pixel mask.
        max_message_bytes: of any single part.
        max_header_bytes: of a part that is parsed (JSON or msgpack), but for position batches,
            whose number is limited.
        max_decoded_bytes: of one frame after decompression.
        max_depth: of nested metadata.
        max_metadata_items: scalars in a header's metadata, all levels together.
        max_positions: in one batch.
        max_frame_number: numbers above it are taken for damage, not for a very long scan.
    """

    max_shape_yx_px: tuple[int, int] = (8192, 8192)
    max_message_bytes: int = 512 * 2**20
    max_header_bytes: int = 2**20
    max_decoded_bytes: int = 512 * 2**20
    max_depth: int = 8
    max_metadata_items: int = 10_000
    max_positions: int = 1_000_000
    max_frame_number: int = 2**40

    def check_shape(self, shape_yx: tuple[int, int], itemsize: int) -> None:
        """Refuse a frame that is empty or larger than accepted.

        Raises:
            LimitExceeded: an axis is below 1 or above the limit, or the frame holds too many bytes.
        """
        if min(shape_yx) < 1 or any(
            n > limit for n, limit in zip(shape_yx, self.max_shape_yx_px, strict=True)
        ):
            raise LimitExceeded(
                f"a frame of shape (y, x) = {shape_yx} is outside (1, 1) to "
                f"{self.max_shape_yx_px}: correct the sender or detector.max_shape_yx_px"
            )
        if shape_yx[0] * shape_yx[1] * itemsize > self.max_decoded_bytes:
            raise LimitExceeded(
                f"a frame of shape (y, x) = {shape_yx} with {itemsize} bytes a pixel exceeds "
                f"{self.max_decoded_bytes} bytes"
            )

    def check_number(self, number: int) -> None:
        """Refuse a frame number that no scan reaches.

        Raises:
            LimitExceeded: it is negative or above the limit.
        """
        if not 0 <= number <= self.max_frame_number:
            raise LimitExceeded(f"frame number {number} is outside 0 to {self.max_frame_number}")

    def bounded_metadata(self, raw: Mapping[Any, Any]) -> dict[str, Any]:
        """Copy of free metadata that is safe to store as JSON.

        Values of other types than str, int, float, bool, None, list and dict become their text, and
        so do NaN and infinities.

        Raises:
            LimitExceeded: nested deeper, or holding more items, than accepted.
        """
        left = self.max_metadata_items
        top: dict[str, Any] = {}
        # (source, depth, target); a list, because recursion is what hostile nesting breaks
        stack: list[tuple[Any, int, Any]] = [(raw, 1, top)]
        while stack:
            source, depth, target = stack.pop()
            if depth > self.max_depth:
                raise LimitExceeded(f"metadata are nested deeper than {self.max_depth} levels")
            is_map = isinstance(source, Mapping)
            pairs = (
                cast("Mapping[Any, Any]", source).items()
                if is_map
                else enumerate(cast("list[Any]", source))
            )
            for key, value in pairs:
                left -= 1
                if left < 0:
                    raise LimitExceeded(f"metadata hold over {self.max_metadata_items} items")
                kept: Any
                if isinstance(value, Mapping):
                    kept = {}
                    stack.append((cast("Any", value), depth + 1, kept))
                elif isinstance(value, list):
                    kept = []
                    stack.append((cast("Any", value), depth + 1, kept))
                elif isinstance(value, int) and abs(value) >= 2**64:
                    raise LimitExceeded("metadata hold an integer of more than 64 bits")
                elif isinstance(value, float) and not math.isfinite(value):
                    kept = str(value)
                else:
                    kept = value if isinstance(value, Scalar) else str(value)
                if is_map:
                    target[str(key)] = kept
                else:
                    target.append(kept)
        return top


def bounded_document(document: Mapping[str, Any]) -> dict[str, Any]:
    """As much of a foreign document as a scan's header may hold: whole keys, the first ones first.

    Documents of other programs say more than anybody asks for; what does not fit is left out and
    named under ``left_out``, and costs nothing else.
    """
    limits = WireLimits(max_metadata_items=1000)
    left, held, left_out = MAX_DOCUMENT_CHARACTERS, dict[str, Any](), list[str]()
    for key, value in document.items():
        try:
            (kept,) = limits.bounded_metadata({key: value}).items()
        except LimitExceeded:
            left_out.append(key)
            continue
        size, longest = len(repr(kept)), _longest_text(kept[1])
        if size > left or longest > MAX_TEXT_CHARACTERS or len(key) > MAX_NAME_LENGTH:
            left_out.append(key)
            continue
        left -= size
        held[kept[0]] = kept[1]
    if left_out:
        told = [key[:MAX_NAME_LENGTH] for key in left_out[:20]]
        held["left_out"] = told if len(left_out) <= 20 else [*told, f"{len(left_out) - 20} more"]
    return held


def _longest_text(value: Any) -> int:
    if isinstance(value, str):
        return len(value)
    if isinstance(value, Mapping):
        return max((_longest_text(held) for held in cast("Any", value).values()), default=0)
    if isinstance(value, list):
        return max((_longest_text(held) for held in cast("list[Any]", value)), default=0)
    return 0
