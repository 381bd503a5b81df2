"""What ``replay`` and ``reconstruct`` take alike: a scan, and what its file does not say.

The options are the fields of :class:`~ptycho_stream.files.measured_choice.MeasuredChoice`, which
errors of the readers call by their names.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any

import typer

from ptycho_stream.errors import ScanNotFound
from ptycho_stream.files.measured_choice import (
    Axis,
    Domain,
    LengthUnit,
    MeasuredChoice,
    Negative,
)

_KEYWORD = inspect.Parameter.POSITIONAL_OR_KEYWORD

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


def _option(help_text: str, metavar: str | None = None) -> Any:
    """An option whose help begins with the name that errors of the readers have for it."""
    return typer.Option(help=help_text, metavar=metavar)


_OPTIONS: Mapping[str, tuple[Any, str]] = {
    "data": (
        Annotated[
            str | None, _option("data: HDF5 path of the frames; * for several.", metavar="PATH")
        ],
        "data",
    ),
    "y": (
        Annotated[str | None, _option("y: HDF5 path of positions along the rows.", metavar="PATH")],
        "y",
    ),
    "x": (Annotated[str | None, _option("x: likewise along the columns.", metavar="PATH")], "x"),
    "xy": (
        Annotated[str | None, _option("xy: HDF5 path of both, columns x, y.", metavar="PATH")],
        "xy",
    ),
    "positions_file": (
        Annotated[
            Path | None,
            _option("positions_file: HDF5, CSV or NPZ with the positions.", metavar="FILE"),
        ],
        "positions_file",
    ),
    "mask": (
        Annotated[
            str | None,
            _option("mask: HDF5 path of the bad pixels, not 0 where bad.", metavar="PATH"),
        ],
        "mask",
    ),
    "position_unit": (
        Annotated[LengthUnit | None, _option("position_unit: px are object pixels.")],
        "position_unit",
    ),
    "energy_ev": (Annotated[float | None, _option("photon_energy_eV.")], "photon_energy_eV"),
    "distance_m": (
        Annotated[float | None, _option("detector_distance_m, from the sample.")],
        "detector_distance_m",
    ),
    "detector_pixel_m": (
        Annotated[tuple[float, float] | None, _option("detector_pixel_yx_m.", metavar="Y X")],
        "detector_pixel_yx_m",
    ),
    "object_pixel_m": (
        Annotated[tuple[float, float] | None, _option("pixel_yx_m.", metavar="Y X")],
        "pixel_yx_m",
    ),
    "domain": (Annotated[Domain | None, _option("domain: what frames hold.")], "domain"),
    "photons": (
        Annotated[float | None, _option("photons: counts of a frame, to scale amplitudes by.")],
        "photons",
    ),
    "counts_per_unit": (
        Annotated[
            float | None, _option("counts_per_unit: of a value, squared if it is an amplitude.")
        ],
        "counts_per_unit",
    ),
    "frames_axis": (Annotated[Axis, _option("frames_axis: last for (h, w, N).")], "frames_axis"),
    "negative": (
        Annotated[Negative, _option("negative: what becomes of values below 0.")],
        "negative",
    ),
    "product": (
        Annotated[Path | None, _option("product: ptychodus' other file.", metavar="FILE")],
        "product",
    ),
}
"""Options by the name of their parameter: what typer makes of it, and the field that it answers."""


def explained(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command these options, whose answers it gets as its argument ``choice``."""
    defaults = {field.name: field.default for field in fields(MeasuredChoice)}
    signature = inspect.signature(command, eval_str=True)
    own = [value for name, value in signature.parameters.items() if name != "choice"]
    added = [
        inspect.Parameter(name, _KEYWORD, default=defaults[field], annotation=annotation)
        for name, (annotation, field) in _OPTIONS.items()
    ]

    @functools.wraps(command)
    def asked(**arguments: Any) -> None:
        answers = {field: arguments.pop(name) for name, (_, field) in _OPTIONS.items()}
        command(**arguments, choice=MeasuredChoice(**answers))

    parameters = [*own, *added]
    asked.__annotations__ = {p.name: p.annotation for p in parameters}
    asked.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    del asked.__wrapped__  # type: ignore[attr-defined]  # whose annotations would be read instead
    return asked


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
