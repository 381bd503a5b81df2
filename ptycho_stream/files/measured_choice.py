"""What a person says of a measured file that the file does not say itself.

Made by ``ptycho-stream replay`` and ``reconstruct`` from their options and by people's programs;
read by the readers behind :func:`ptycho_stream.files.measured.load_measured`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ptycho_stream.errors import FileFormatError

Domain = Literal["counts", "amplitude"]
LengthUnit = Literal["m", "mm", "um", "nm", "px"]
"""``px`` are object pixels."""
Axis = Literal["first", "last"]
Negative = Literal["refuse", "zero"]


@dataclass(frozen=True)
class MeasuredChoice:
    """Answers to what a file leaves open; None: as the file has it.

    A value given here goes before the file's. Only paths and units that the format leaves open are
    looked at: a ptychodus product has no use for ``x``.

    Attributes:
        data: HDF5 path of the frames, (N, h, w) or, of a raster, (rows, columns, h, w). A ``*`` in
            its last part stands for anything: all such datasets, one after another.
        y: HDF5 path of positions along the rows: (N,), (rows, columns), or (rows,) of a raster.
        x: likewise along the columns.
        xy: HDF5 path of an (N, 2) or (N, 3) array instead; columns x, y as in CXI.
        positions_file: where these paths are, if not in the file of the frames; or a CSV or NPZ as
            ``positions.path`` of the settings takes it.
        mask: HDF5 path of the bad pixels (h, w), not 0 where bad.
        position_unit: of y, x or xy; None: as their ``units`` attribute says.
        photon_energy_eV: of the beam.
        detector_distance_m: from the sample.
        detector_pixel_yx_m: size of a pixel.
        pixel_yx_m: size of an object pixel, for the window of the file's probe, else of its frames.
        domain: what the numbers in frames are.
        photons: counts of a frame on average, to scale amplitudes in units of their own.
        counts_per_unit: counts = value (squared if it is an amplitude) times this, rounded.
        frames_axis: where the frames are counted: ``last`` for (h, w, N).
        negative: what becomes of values below 0: ``refuse`` the file, or make them ``zero``.
        product: ptychodus product that belongs to a diffraction file, or the other way round; None:
            the one beside it (``product.h5`` and ``diffraction.h5``).
    """

    data: str | None = None
    y: str | None = None
    x: str | None = None
    xy: str | None = None
    positions_file: Path | None = None
    mask: str | None = None
    position_unit: LengthUnit | None = None
    photon_energy_eV: float | None = None
    detector_distance_m: float | None = None
    detector_pixel_yx_m: tuple[float, float] | None = None
    pixel_yx_m: tuple[float, float] | None = None
    domain: Domain | None = None
    photons: float | None = None
    counts_per_unit: float | None = None
    frames_axis: Axis = "first"
    negative: Negative = "refuse"
    product: Path | None = None

    def __post_init__(self) -> None:
        """Refuse what makes no sense together.

        Raises:
            FileFormatError: a number is not above 0, or two answers contradict each other.
        """
        numbers = {
            "photon_energy_eV": (self.photon_energy_eV,),
            "detector_distance_m": (self.detector_distance_m,),
            "detector_pixel_yx_m": self.detector_pixel_yx_m or (None,),
            "pixel_yx_m": self.pixel_yx_m or (None,),
            "photons": (self.photons,),
            "counts_per_unit": (self.counts_per_unit,),
        }
        for name, values in numbers.items():
            if any(v is not None and not 0 < v < math.inf for v in values):
                raise FileFormatError(f"{name} is {getattr(self, name)}: give a number above 0")
        if self.photons is not None and self.counts_per_unit is not None:
            raise FileFormatError("photons and counts_per_unit say the same: give one of them")
        if (self.y is None) != (self.x is None):
            raise FileFormatError("y and x belong together: name the paths of both")
        if self.xy is not None and self.y is not None:
            raise FileFormatError("give either xy or y and x, not both")

    @property
    def moves_pixel(self) -> bool:
        """Whether the object pixel follows from geometry given here, not from the file."""
        geometry = (self.photon_energy_eV, self.detector_distance_m, self.detector_pixel_yx_m)
        return self.pixel_yx_m is None and any(value is not None for value in geometry)
