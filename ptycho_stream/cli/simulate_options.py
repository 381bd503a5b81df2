"""The options of ``ptycho-stream simulate`` and the checks that need more than one number.

Kinds are checked against the simulators' own tables; nothing here imports torch, which --help
should not wait for.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Annotated, Literal

import typer

from ptycho_stream.simulate.optics import OPTICS
from ptycho_stream.simulate.samples import SAMPLE_KINDS
from ptycho_stream.simulate.scan_paths import PATH_KINDS

MEASURED = "measured"
SAMPLES = (*SAMPLE_KINDS, "random")
PROBES = (*OPTICS, "random", MEASURED)


def _above_zero(value: float | None) -> float | None:
    if value is not None and not 0 < value < math.inf:
        raise typer.BadParameter(f"{value:g} is not a number above 0")
    return value


def _finite(value: float | None) -> float | None:
    if value is not None and not math.isfinite(value):
        raise typer.BadParameter(f"{value:g} is not a finite number")
    return value


def _one_of(names: Iterable[str]) -> Callable[[str | None], str | None]:
    known = tuple(names)

    def check(value: str | None) -> str | None:
        if value is not None and value not in known:
            raise typer.BadParameter(f"{value!r} is none of {', '.join(known)}")
        return value

    return check


def _zone_plate(value: str | None) -> str | None:
    if value is not None:
        zone_plate_m(value)
    return value


def zone_plate_m(text: str) -> tuple[float, float, float, float]:
    """What --zone-plate says, in metres.

    Args:
        text: diameter, outermost zone width, diameter of the stop and distance from focus,
            micrometres.

    Raises:
        typer.BadParameter: the text is not four numbers, or the first two are not above 0.
    """
    try:
        diameter, zone, stop, defocus = (float(word) * 1e-6 for word in text.split(","))
    except ValueError as error:
        raise typer.BadParameter(
            f"{text!r} is not four numbers (diameter, outermost zone width, diameter of the stop, "
            "distance from focus, in micrometres): for example 160,0.06,60,400"
        ) from error
    if not all(map(math.isfinite, (diameter, zone, stop, defocus))) or min(diameter, zone) <= 0:
        raise typer.BadParameter(f"{text!r}: diameter and outermost zone width are above 0")
    return diameter, zone, stop, defocus


def _names(names: Iterable[str]) -> str:
    return ", ".join(names)


Frames = Annotated[int, typer.Option(min=1, help="Number of frames.")]
Size = Annotated[int | None, typer.Option(min=8, help="Of a frame, pixels. [128, or --probe-in's]")]
Seed = Annotated[int, typer.Option(min=0, help="Of all that is drawn.")]
Format = Annotated[
    Literal["native", "ptychopinn"],
    typer.Option("--format", help="Our scan file, or PtychoPINN's data file."),
]
ScanPath = Annotated[
    str,
    typer.Option(
        "--path", callback=_one_of(PATH_KINDS), help=f"Where the probe goes: {_names(PATH_KINDS)}."
    ),
]
Step = Annotated[
    float | None,
    typer.Option(callback=_above_zero, help="Distance of neighbours, object pixels. [size / 12]"),
]
Jitter = Annotated[
    float | None,
    typer.Option(
        min=0, max=10, help="Displacement of positions, in steps. [0.25; raster and spiral 0]"
    ),
]
Energy = Annotated[float, typer.Option(callback=_above_zero, help="Photon energy.")]
Distance = Annotated[float, typer.Option(callback=_above_zero, help="From sample to detector.")]
Sample = Annotated[
    str, typer.Option(callback=_one_of(SAMPLES), help=f"What is scanned: {_names(SAMPLES)}.")
]
Phase = Annotated[
    float | None, typer.Option(callback=_finite, help="Range of the sample's phase. [1]")
]
Absorption = Annotated[
    float | None, typer.Option(min=0, max=10, help="Largest -ln |transmission|. [0.2]")
]
Relation = Annotated[
    Literal["matching", "unrelated", "mixed"] | None,
    typer.Option("--relation", help="Of absorption and phase. [matching]"),
]
ProbeName = Annotated[
    str | None,
    typer.Option(
        "--probe",
        callback=_one_of(PROBES),
        help=f"What illuminates it: {_names(PROBES)}; drawn by the seed, but for measured ones and "
        "the default, a defocused zone plate.",
    ),
]
ProbeIn = Annotated[
    str | None,
    typer.Option(
        metavar="FILE", help="A measured probe with its modes (NPZ or ptychodus product)."
    ),
]
Modes = Annotated[
    int | None, typer.Option(min=1, max=20, help="Incoherent modes of a drawn probe. [1]")
]
ZonePlateOption = Annotated[
    str | None,
    typer.Option(
        "--zone-plate",
        metavar="D,DR,STOP,Z",
        callback=_zone_plate,
        help="A zone plate by its optics, micrometres: diameter, outermost zone width, diameter of "
        "the central stop, distance from focus.",
    ),
]
Photons = Annotated[
    float,
    typer.Option(callback=_above_zero, help="Of the unattenuated beam, a frame (1e2 to 1e7)."),
]
Gaps = Annotated[int, typer.Option(min=0, help="Width of module gaps, pixels.")]
Hot = Annotated[float, typer.Option(min=0, max=0.5, help="Share of hot pixels.")]
Dead = Annotated[float, typer.Option(min=0, max=0.5, help="Share of dead pixels.")]
BeamStop = Annotated[float, typer.Option(min=0, help="Radius of the beam stop, pixels.")]
Background = Annotated[float, typer.Option(min=0, help="Mean counts a pixel, not the sample's.")]
Saturation = Annotated[int | None, typer.Option(min=1, help="Largest count of a pixel.")]
