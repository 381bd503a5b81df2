"""What an epoch of training on groups came to: plain values that travel as JSON.

Apart from ``group_fit``, so that a host that has training done elsewhere need not load Lightning.
"""

from __future__ import annotations

import msgspec


class EpochFigures(msgspec.Struct, frozen=True):
    """What an epoch came to.

    Attributes:
        epoch: from 1.
        training: loss of its last step.
        validation: mean loss of the groups that judge.
        spread: of their patches, relative; 0 is a constant.
        collapsed: share of them that vary less than their frames demand.
        flux: the beam's photons over what the probe said.
    """

    epoch: int
    training: float
    validation: float
    spread: float
    collapsed: float
    flux: float
