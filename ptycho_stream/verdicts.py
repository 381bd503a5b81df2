"""The words for how a scan is going: the vocabulary that images, their judges and watchers share.

Plain names, so that programs which only look at a verdict load no torch.
"""

from __future__ import annotations

from typing import Literal, get_args

VerdictName = Literal[
    "good",
    "probe suspect",
    "orientation suspect",
    "positions suspect",
    "frames bad",
    "undersampled",
    "undecided",
]
VERDICTS: tuple[VerdictName, ...] = get_args(VerdictName)

HARMLESS: tuple[VerdictName, ...] = ("good", "undecided")
"""Verdicts that accuse nobody."""
SUSPICIOUS: tuple[VerdictName, ...] = tuple(name for name in VERDICTS if name not in HARMLESS)
"""Verdicts that say something is wrong."""
