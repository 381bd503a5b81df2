"""The picture of a report: phase, amplitude and probe, and the figures of trust over time.

Drawn with matplotlib (the extra ``report``) without its global state, so that it works in any
program.
"""

from __future__ import annotations

import io
import warnings
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from ptycho_stream.errors import MissingPackage
from ptycho_stream.pictures import draw_object, extent_um, say
from ptycho_stream.report.scan_report import ScanReport
from ptycho_stream.verdicts import VERDICTS

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SIZE_INCHES = (13.0, 12.0)
DPI = 100
MAX_SIDE_PX = 1200
"""A longer image is thinned out: the picture has no more pixels for it."""
_UNDECIDED_FIRST = ("undecided", *(name for name in reversed(VERDICTS) if name != "undecided"))


def draw(report: ScanReport) -> bytes:
    """The picture as PNG.

    Raises:
        MissingPackage: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise MissingPackage("a report", "report", error) from error
    figure = Figure(figsize=SIZE_INCHES, dpi=DPI, layout="constrained")
    axes = figure.subplots(3, 3)
    image = report.image
    of = f"scan {image.scan_id}, {image.state}, {image.frame_numbers.size} frames, {image.layer}"
    figure.suptitle(f"{of}: {image.verdict}" if image.verdict else of, parse_math=False)
    _pictures(report, list(axes[0]))
    _curves(report, list(axes[1:].flat))
    held = io.BytesIO()
    with warnings.catch_warnings():
        # A letter that the font lacks is drawn as a box, which is enough.
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        figure.savefig(held, format="png", metadata={"Software": None})
    return held.getvalue()


def _pictures(report: ScanReport, axes: list[Axes]) -> None:
    image = report.image
    extent = extent_um(image.object_yx.shape, image.origin_yx_m, image.pixel_yx_m)
    draw_object(axes[:2], _thinned(image.object_yx), extent)
    axes[2].set_title("probe, first mode")
    if image.probe.size:
        axes[2].imshow(np.abs(image.probe[0]), cmap="inferno")
    else:
        say(axes[2], "not known")


def _thinned(object_yx: NDArray[np.complex64]) -> NDArray[np.complex64]:
    step = max(1, -(-max(object_yx.shape) // MAX_SIDE_PX))
    return object_yx[::step, ::step]


def _curves(report: ScanReport, axes: list[Axes]) -> None:
    _lines(
        axes[0],
        report,
        "misfit R",
        {
            "R": report.figure_curve("r_factor"),
            "R of Poisson noise alone": report.figure_curve("r_poisson"),
            "R of frames held out": report.figure_curve("r_free"),
        },
    )
    _lines(
        axes[1],
        report,
        "excess of R over noise",
        {
            "excess": report.figure_curve("excess"),
            "of frames held out": report.figure_curve("excess_free"),
        },
    )
    _lines(
        axes[2],
        report,
        "resolution / nm",
        {"half-canvas FRC at 1/7": report.figure_curve("resolution_nm")},
    )
    frames = report.curve(lambda entry: float(entry.frames))
    sweeps = report.curve(lambda entry: entry.sweeps)
    _lines(axes[3], report, "frames, sweeps", {"frames in the image": frames})
    _beside(axes[3], report, "sweeps", sweeps)
    _lines(axes[4], report, "covered area / µm²", {"covered": report.figure_curve("coverage_um2")})
    _beside(axes[4], report, "overlap", report.figure_curve("overlap"))
    _verdicts(axes[5], report)


def _lines(
    ax: Axes, report: ScanReport, title: str, curves: dict[str, NDArray[np.float64]]
) -> None:
    """Curves over the time; a dotted line where another generation of the image begins."""
    ax.set_title(title)
    if not any(np.isfinite(values).any() for values in curves.values()):
        say(ax, "not measured")
        return
    for name, values in curves.items():
        if np.isfinite(values).any():
            ax.plot(report.time_s, values, ".-", markersize=3, linewidth=1, label=name)
    ax.set_ylim(bottom=0)
    _mark_generations(ax, report)
    ax.set_xlabel("time / s")
    ax.legend(fontsize="small", loc="best")


def _beside(ax: Axes, report: ScanReport, name: str, values: NDArray[np.float64]) -> None:
    """Another curve in the same field, on an axis of its own at the right."""
    if not np.isfinite(values).any():
        return
    right = ax.twinx()
    right.plot(report.time_s, values, "--", linewidth=1, color="tab:red")
    right.set_ylabel(name, color="tab:red")
    right.set_ylim(bottom=0)


def _verdicts(ax: Axes, report: ScanReport) -> None:
    ax.set_title("verdict")
    rows = {name: row for row, name in enumerate(_UNDECIDED_FIRST)}
    values = report.curve(lambda entry: rows.get(entry.verdict))
    if not np.isfinite(values).any():
        say(ax, "not judged")
        return
    ax.plot(report.time_s, values, ".-", markersize=3, linewidth=1, drawstyle="steps-post")
    ax.set_yticks(range(len(rows)), list(rows), fontsize="small")
    ax.set_ylim(-0.5, len(rows) - 0.5)
    _mark_generations(ax, report)
    ax.set_xlabel("time / s")


def _mark_generations(ax: Axes, report: ScanReport) -> None:
    generations = [entry.generation for entry in report.history]
    for at, (now, before) in enumerate(zip(generations[1:], generations, strict=False), 1):
        if now != before:
            ax.axvline(report.time_s[at], linestyle=":", linewidth=1, color="grey")
