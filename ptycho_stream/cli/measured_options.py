"""What ``replay`` and ``reconstruct`` take alike: a scan, and what its file does not say.

The options are the fields of :class:`~ptycho_stream.files.measured_choice.MeasuredChoice`, which
errors of the readers call by their names.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from ptycho_stream.errors import ScanNotFound
from ptycho_stream.files.measured_choice import Axis, Domain, LengthUnit
from ptycho_stream.files.measured_choice import Negative as NegativeRule

ScanArgument = Annotated[
    str,
    typer.Argument(
        metavar="FILE",
        help="Scan file: ours (NPZ), PtychoPINN's NPZ, ptychodus' product or diffraction (HDF5, "
        "NPZ), CXI, any HDF5 (NeXus); a scan's folder in a store, or its id with --config.",
    ),
]


StoreConfig = Annotated[
    Path | None,
    typer.Option("--config", "-c", help="A daemon's TOML file, for the store that has the scan."),
]


def _option(help_text: str, *names: str, metavar: str | None = None) -> Any:
    """An option whose help begins with the name that errors of the readers have for it."""
    return typer.Option(*names, help=help_text, metavar=metavar)


Data = Annotated[
    str | None, _option("data: HDF5 path of the frames; * for several.", metavar="PATH")
]
Y = Annotated[str | None, _option("y: HDF5 path of positions along the rows.", metavar="PATH")]
X = Annotated[str | None, _option("x: likewise along the columns.", metavar="PATH")]
XY = Annotated[str | None, _option("xy: HDF5 path of both, columns x, y.", metavar="PATH")]
PositionsFile = Annotated[
    Path | None, _option("positions_file: HDF5, CSV or NPZ with the positions.", metavar="FILE")
]
Mask = Annotated[
    str | None, _option("mask: HDF5 path of the bad pixels, not 0 where bad.", metavar="PATH")
]
PositionUnit = Annotated[LengthUnit | None, _option("position_unit: px are object pixels.")]
EnergyEv = Annotated[float | None, _option("photon_energy_eV.", "--energy-ev")]
DistanceM = Annotated[
    float | None, _option("detector_distance_m, from the sample.", "--distance-m")
]
DetectorPixelM = Annotated[
    tuple[float, float] | None,
    _option("detector_pixel_yx_m.", "--detector-pixel-m", metavar="Y X"),
]
ObjectPixelM = Annotated[
    tuple[float, float] | None, _option("pixel_yx_m.", "--object-pixel-m", metavar="Y X")
]
FrameDomain = Annotated[Domain | None, _option("domain: what frames hold.", "--domain")]
Photons = Annotated[
    float | None, _option("photons: counts of a frame, to scale amplitudes by.", "--photons")
]
CountsPerUnit = Annotated[
    float | None, _option("counts_per_unit: of a value, squared if it is an amplitude.")
]
FramesAxis = Annotated[Axis, _option("frames_axis: last for (h, w, N).")]
Negative = Annotated[NegativeRule, _option("negative: what becomes of values below 0.")]
Product = Annotated[
    Path | None, _option("product: ptychodus' other file.", "--product", metavar="FILE")
]


def scan_path(file: str, config: Path | None) -> Path:
    """The file or folder that is meant; a scan's id is looked up in the store of a configuration.

    Raises:
        ScanNotFound: it is an id, and no store is named.
        SettingsError: the configuration is wrong.
    """
    from ptycho_stream.scans.folders import scan_directory
    from ptycho_stream.scans.ulid import is_scan_id

    path = Path(file)
    if path.exists() or not is_scan_id(file):
        return path
    if config is None:
        raise ScanNotFound(
            f"{file} is the id of a scan: give --config, whose store has it, or name its folder"
        )
    from ptycho_stream.settings import load_settings

    return scan_directory(load_settings(config).data.directory, file)
