"""Paths of CXI 1.6 that ptycho-stream, ptychodus and cdtools agree on.

Used where such files are read and written. What CXI has no place for lies under
``/entry_1/ptychodus``, where ptychodus looks for it: pixel and centre of the object, numbers of the
positions, photons.
"""

from __future__ import annotations

from typing import Final

VERSION: Final = "cxi_version"
NEWEST_VERSION: Final = 160
ENERGY: Final = "/entry_1/instrument_1/source_1/energy"
DETECTOR: Final = "/entry_1/instrument_1/detector_1"
DATA: Final = "/entry_1/data_1/data"
TRANSLATION: Final = "/entry_1/sample_1/geometry_1/translation"
TRANSLATION_LINK: Final = "/entry_1/data_1/translation"
PROBE: Final = "/entry_1/image_1"
OBJECT: Final = "/entry_1/image_2"
EXTRAS: Final = "/entry_1/ptychodus"
OURS: Final = "/entry_1/ptycho_stream"
JOULES_PER_EV: Final = 1.602176634e-19
INVALID: Final = 0x1
"""Bit of a mask: the pixel measures nothing."""
HAS_SIGNAL: Final = 0x1000
"""Bit of a mask that says nothing against a pixel."""
