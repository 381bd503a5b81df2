"""A report as one HTML file that needs nothing else: no script, no network, the picture inside.

All that comes from outside (metadata, names, reasons) is escaped.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from html import escape
from typing import Any

from ptycho_stream.reconstruct.history import HistoryEntry
from ptycho_stream.report.scan_report import ScanReport

_STYLE = """
body { font: 15px/1.5 sans-serif; margin: 2em auto; max-width: 1300px; padding: 0 1em; }
img { width: 100%; height: auto; }
table { border-collapse: collapse; margin: 0 0 1.5em; }
th, td { border-bottom: 1px solid #ccc; padding: .15em 1em .15em 0; text-align: left;
         vertical-align: top; overflow-wrap: anywhere; }
.verdict { font-size: 1.3em; font-weight: bold; }
.good { color: #17702c; } .undecided { color: #806000; } .suspect { color: #b01020; }
"""
# Even if something escaped the escaping, a browser would neither run nor fetch it.
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
_HEADER_WORDS = {
    "series": "series",
    "source": "source",
    "created_ns": "began",
    "ended_ns": "ended",
    "expected_frames": "frames expected",
    "frame_shape_yx": "frame, px",
    "dtype": "counts",
    "reason": "why it ended so",
}


def page(report: ScanReport, picture_png: bytes) -> str:
    """The report as HTML.

    Args:
        report: what to tell.
        picture_png: of it, from :func:`ptycho_stream.report.figure.draw`.
    """
    image = report.image
    title = escape(f"Scan {image.scan_id}")
    encoded = base64.b64encode(picture_png).decode("ascii")
    parts = [
        "<!DOCTYPE html>",
        '<html lang="en"><head><meta charset="utf-8">',
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">',
        f"<title>{title}</title><style>{_STYLE}</style></head><body>",
        f"<h1>{title}</h1>",
        _verdict(image.verdict, image.reasons),
        f'<img alt="Phase, amplitude, probe and curves" src="data:image/png;base64,{encoded}">',
        _section("Image", _image_rows(report)),
        _section("Trust", [(name, f"{value:.5g}") for name, value in image.trust.items()]),
        _section("Counts", _count_rows(report)),
        _section("Scan", _header_rows(report.header)),
        _section("Metadata", [(name, _said(value)) for name, value in image.metadata.items()]),
        _history(report),
        "</body></html>",
    ]
    return "\n".join(part for part in parts if part) + "\n"


def _verdict(verdict: str, reasons: Iterable[str]) -> str:
    kind = verdict if verdict in ("good", "undecided") else "suspect"
    told = escape(verdict or "not judged")
    items = "".join(f"<li>{escape(reason)}</li>" for reason in reasons)
    return f'<p class="verdict {kind if verdict else ""}">{told}</p>' + (
        f"<ul>{items}</ul>" if items else ""
    )


def _image_rows(report: ScanReport) -> list[tuple[str, str]]:
    image = report.image
    height, width = image.object_yx.shape
    y_nm, x_nm = (size * 1e9 for size in image.pixel_yx_m)
    return [
        ("state", image.state + (" (final)" if image.final else "")),
        ("frames", str(image.frame_numbers.size)),
        ("size", f"{height} x {width} px of {y_nm:.4g} x {x_nm:.4g} nm"),
        ("layer", image.layer),
        ("sweeps of refinement", f"{image.sweeps:.1f}"),
        ("model", image.content.model),
        ("generation", str(image.content.generation)),
    ]


def _count_rows(report: ScanReport) -> list[tuple[str, str]]:
    counts = {**dict(report.header.get("counts") or {}), **report.image.counts}
    return [(name, str(count)) for name, count in counts.items()]


def _header_rows(header: Mapping[str, Any]) -> list[tuple[str, str]]:
    rows: list[tuple[str, str]] = []
    for key, name in _HEADER_WORDS.items():
        value = header.get(key)
        if value not in (None, ""):
            rows.append((name, _utc(value) if key.endswith("_ns") else _said(value)))
    views: list[dict[str, Any]] = header.get("views") or []
    return rows + [(f"view {view.get('version', '')}", _said(view)) for view in views]


def _history(report: ScanReport) -> str:
    turns = report.turns()
    if not turns:
        return "<p>No history of this image was kept.</p>"
    names = ("time (UTC)", "frames", "layer", "sweeps", "R", "excess", "resolution, nm", "verdict")
    head = "".join(f"<th>{name}</th>" for name in names)
    body = "".join(f"<tr>{_turn(entry)}</tr>" for entry in turns)
    told = f"<p>{len(report.history)} looks; told are those at which something changed.</p>"
    return f"<h2>How it came about</h2>{told}<table><tr>{head}</tr>{body}</table>"


def _turn(entry: HistoryEntry) -> str:
    def figure(name: str) -> str:
        value = entry.figures.get(name)
        return "" if value is None else f"{value:.4g}"

    verdict = entry.verdict
    if entry.reasons:
        verdict += f": {'; '.join(entry.reasons)}"
    cells = (
        _utc(entry.time_ns),
        str(entry.frames),
        f"{entry.layer}, generation {entry.generation}, {entry.model}",
        f"{entry.sweeps:.1f}",
        *(figure(name) for name in ("r_factor", "excess", "resolution_nm")),
        verdict,
    )
    return "".join(f"<td>{escape(cell)}</td>" for cell in cells)


def _section(title: str, rows: Iterable[tuple[str, str]]) -> str:
    body = "".join(
        f"<tr><th>{escape(name)}</th><td>{escape(said)}</td></tr>" for name, said in rows
    )
    return f"<h2>{escape(title)}</h2><table>{body}</table>" if body else ""


def _said(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def _utc(time_ns: int) -> str:
    return f"{datetime.fromtimestamp(time_ns / 1e9, UTC):%Y-%m-%d %H:%M:%S}"
